"""Stage 2: ranking. InfoNCE over the labelled lists plus KL to the fused teacher over all lists.

Teacher logit of a passage: 20·cos(bi-encoder) + 0.9·z(BM25), z over the query's BM25 top. A negative the bi-encoder
puts above the positive is taken for a false one and left out of InfoNCE (the KL still sees it).
"""

from __future__ import annotations

import argparse
import itertools
from pathlib import Path

import data
import loop
import numpy as np
import student
import torch
from data import IdPair
from safetensors.torch import save_file
from torch import Tensor

from turborank.architectures import jinabert

CONFIG = student.student_config()
COSINE_WEIGHT, BM25_WEIGHT = 20.0, 0.9
CUTS, CUT_SHARES = (96, 160, 256), (0.35, 0.35, 0.30)  # document tokens of a step
LONG_EVERY = 16  # every 16th step hides each passage among others of its kind: 500 to 1,200 tokens
# Draws per list of each source, relative: short, templated or unlabelled lists less, real questions more.
SHARES = {"squad_nqg": 1.0, "nq_oracle": 2.5, "xquad": 1.5, "pubmedqa": 4.0, "medquad": 1.0}
SHARES |= {"sentence": 1.0, "keywords": 0.8}


class Lists:
    """The lists of lists.py, and batches of them drawn by step number."""

    def __init__(self, path: Path, seed: int) -> None:
        kept = np.load(path)
        self.seed = seed
        self.members, self.labelled, self.source = kept["members"], kept["labelled"], kept["source"]
        self.cosine, self.bm25_z = kept["cosine"], kept["bm25_z"]
        self.queries = _split(kept["query_ids"], kept["query_bounds"])
        self.passages = _split(kept["passage_ids"], kept["passage_bounds"])
        weight = np.array([SHARES[s] for s in self.source]) * ~kept["held_out"]
        self.weight = weight / weight.sum()
        self.held_out = np.flatnonzero(kept["held_out"])

    def batch(self, step: int, budget: int) -> tuple[list[int], list[IdPair]]:
        """(list numbers, their pairs list by list) of about ``budget`` tokens."""
        rng = np.random.default_rng((self.seed, step))
        cut = int(rng.choice(CUTS, p=CUT_SHARES))
        spread = int(rng.integers(2, 5)) if step % LONG_EVERY == LONG_EVERY - 1 else 0
        chosen: list[int] = []
        pairs: list[IdPair] = []
        used = 0
        while used < budget:
            at = int(rng.choice(len(self.weight), p=self.weight))
            mine = self.pairs(at, cut, spread, rng)
            chosen.append(at)
            pairs += mine
            used += sum(len(q) + len(d) + 3 for q, d in mine)
        return chosen, pairs

    def pairs(self, at: int, cut: int, spread: int = 0, rng: np.random.Generator | None = None) -> list[IdPair]:
        documents = [self.passages[m][:cut] for m in self.members[at]]
        if spread and rng is not None:
            strangers = rng.integers(len(self.passages), size=(len(documents), spread))
            documents = [self._hide(d, row, rng) for d, row in zip(documents, strangers, strict=True)]
        return [(self.queries[at], document) for document in documents]

    def _hide(self, document: list[int], strangers: np.ndarray, rng: np.random.Generator) -> list[int]:
        parts = [self.passages[s] for s in strangers]
        parts.insert(int(rng.integers(len(parts) + 1)), document)
        return [token for part in parts for token in part]

    def targets(self, chosen: list[int]) -> tuple[Tensor, Tensor, Tensor]:
        """Teacher logits (B, 8), which lists are labelled (B,), which passages InfoNCE leaves out (B, 8)."""
        teacher = torch.from_numpy(COSINE_WEIGHT * self.cosine[chosen] + BM25_WEIGHT * self.bm25_z[chosen])
        doubtful = torch.from_numpy(self.cosine[chosen] > self.cosine[chosen][:, :1])
        return teacher, torch.from_numpy(self.labelled[chosen]), doubtful


def _split(ids: np.ndarray, bounds: np.ndarray) -> list[list[int]]:
    return [ids[a:b].tolist() for a, b in itertools.pairwise(bounds)]


def info_nce(logits: Tensor, doubtful: Tensor, labelled: Tensor) -> Tensor:
    """-log softmax of place 0 among the trusted passages, mean over labelled lists (arXiv 1807.03748)."""
    losses = -torch.log_softmax(logits.masked_fill(doubtful, -torch.inf), dim=-1)[:, 0]
    return (losses * labelled).sum() / labelled.sum().clamp_min(1)


def kl(logits: Tensor, teacher: Tensor) -> Tensor:
    """KL(teacher ‖ student) of the list softmaxes, mean over lists."""
    want = torch.log_softmax(teacher, dim=-1)
    return (want.exp() * (want - torch.log_softmax(logits, dim=-1))).sum(-1).mean()


def loss_of(weights: dict[str, Tensor], lists: Lists, step: int, budget: int, kl_weight: float) -> loop.Loss:
    chosen, pairs = lists.batch(step, budget)
    batch = data.pack(pairs)
    logits = jinabert.forward(weights, CONFIG, batch, student.fast_ops).float().unflatten(0, (len(chosen), -1))
    teacher, labelled, doubtful = lists.targets(chosen)
    nce, divergence = info_nce(logits, doubtful, labelled), kl(logits, teacher)
    parts = {"nce": nce.item(), "kl": divergence.item(), "scale": weights["head.scale"].item()}
    return loop.Loss(nce + kl_weight * divergence, parts, batch.tokens)


@torch.no_grad()
def held_out(weights: dict[str, Tensor], lists: Lists, count: int = 96) -> dict[str, float]:
    """Top-1 accuracy, InfoNCE and KL on lists never trained on (160 tokens)."""
    compute = {name: w.bfloat16() for name, w in weights.items()}
    right, nce, divergence = [], [], []
    for at in lists.held_out[:count]:
        batch = data.pack(lists.pairs(at, 160))
        logits = jinabert.forward(compute, CONFIG, batch, student.fast_ops).float()[None]
        teacher, labelled, doubtful = lists.targets([at])
        right.append(float(logits.argmax() == 0))
        nce.append(info_nce(logits, doubtful, labelled).item())
        divergence.append(kl(logits, teacher).item())
    return {"held_top1": float(np.mean(right)), "held_nce": float(np.mean(nce)), "held_kl": float(np.mean(divergence))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lists", type=Path, required=True, help="the .npz of lists.py")
    parser.add_argument("--start", type=Path, required=True, help="the folder recover.py wrote")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--budget", type=int, default=6144, help="tokens a step")
    parser.add_argument("--learning-rate", type=float, default=1.2e-4)
    parser.add_argument("--kl-weight", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=loop.THREADS)
    parser.add_argument("--stop", type=int, help="leave at this step, to be resumed")
    parser.add_argument("--resume", action="store_true")
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    torch.set_num_threads(args.threads)
    lists = Lists(args.lists, args.seed)
    started = student.load(args.start)

    def on_checkpoint(weights: dict[str, Tensor], step: int) -> dict[str, float]:
        kept = {name: w.bfloat16() if name != loop.FROZEN else w[:1] for name, w in weights.items()}
        save_file({name: w.contiguous() for name, w in kept.items()}, args.out / f"step-{step:05}.safetensors")
        return held_out(weights, lists)

    trained = loop.run(
        started,
        lambda weights, step: loss_of(weights, lists, step, args.budget, args.kl_weight),
        loop.Schedule(args.steps, args.learning_rate, checkpoint_every=50, stop=args.stop),
        args.out,
        resume=args.resume,
        threads=args.threads,
        on_checkpoint=on_checkpoint,
    )
    student.save(args.out, trained)


if __name__ == "__main__":
    main()
