"""Stage 1: teach the ALiBi student, reading a pair, to give every token the state the bi-encoder gives it alone.

The student reads `[CLS] q [SEP] d [SEP]`, the bi-encoder reads q and d apart; the target of each of the student's
tokens, after each layer, is the bi-encoder's state of the same token. So the joint-encoding cosine starts stage 2 as
the bi-encoder's cosine, and positions, segments and the pair template are all learnt in one stage.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import data
import loop
import numpy as np
import student
import torch
import torch.nn.functional as F
from data import IdPair
from tokenizers import Tokenizer
from torch import Tensor

from turborank.architectures import jinabert

WINDOW = 254  # tokens of a long document the bi-encoder reads at once
CONFIG = student.student_config()


class Texts:
    """Token ids of everything stage 1 reads, and batches drawn from it by step number."""

    def __init__(self, folder: Path, tokenizer: Tokenizer, seed: int) -> None:
        pairs, passages = data.corpus(folder, seed)
        self.seed = seed
        self.queries = data.token_ids(tokenizer, [p.query for p in pairs], 64)
        self.documents = data.token_ids(tokenizer, [p.passage for p in pairs], 400)
        self.passages = data.token_ids(tokenizer, [text for _, text in passages], 400)
        self.long = data.token_ids(tokenizer, [p.passage for p in data.long_documents(folder)], 30_000)

    def batch(self, step: int, budget: int) -> list[IdPair]:
        """(query, document) ids of about ``budget`` tokens; every 12th batch is one or two long documents."""
        rng = np.random.default_rng((self.seed, step))
        if step % 12 == 11:
            size = int(rng.choice([1024, 2048, 4096]))
            return [(self.queries[rng.integers(len(self.queries))], self._stretch(rng, size))]
        drawn: list[IdPair] = []
        used = 0
        while used < budget:
            query, document = self._pair(rng)
            drawn.append((query, document))
            used += len(query) + len(document) + 3
        return drawn

    def _stretch(self, rng: np.random.Generator, size: int) -> list[int]:
        text = self.long[rng.integers(len(self.long))]
        first = int(rng.integers(max(1, len(text) - size)))
        return text[first : first + size]

    def _pair(self, rng: np.random.Generator) -> IdPair:
        """A labelled pair, a pair of strangers, or a stretch of one passage as the query of another."""
        kind = rng.random()
        if kind < 0.4:
            at = rng.integers(len(self.queries))
            return self.queries[at], self.documents[at]
        document = self.passages[rng.integers(len(self.passages))]
        if kind < 0.7:
            return self.queries[rng.integers(len(self.queries))], document
        source = document if rng.random() < 0.5 else self.passages[rng.integers(len(self.passages))]
        first = int(rng.integers(max(1, len(source) - 10)))
        return source[first : first + int(rng.integers(5, 40))], document


def _segments(pairs: list[IdPair]) -> tuple[list[Sequence[int]], Tensor]:
    """The texts the teacher reads, and for each of the student's tokens its row among the teacher's tokens."""
    texts: list[Sequence[int]] = []
    rows: list[int] = []
    at = 0
    for query, document in pairs:
        rows += range(at, at + len(query) + 2)
        at += len(query) + 2
        texts.append(query)
        windows = [document[i : i + WINDOW] for i in range(0, max(1, len(document)), WINDOW)]
        for number, window in enumerate(windows):
            rows += range(at + 1, at + 1 + len(window))
            rows += [at + 1 + len(window)] if number == len(windows) - 1 else []  # the last window's [SEP]
            at += len(window) + 2
        texts += windows
    return texts, torch.tensor(rows)


def loss_of(weights: dict[str, Tensor], teacher: dict[str, Tensor], pairs: list[IdPair]) -> loop.Loss:
    """Mean over layers of MSE / variance of the layer, and 1 - cosine of the pooled segments."""
    batch = data.pack(pairs)
    texts, rows = _segments(pairs)
    wanted = student.teacher_layers(teacher, data.pack_segments(texts))
    trace: list[Tensor] = []
    jinabert.forward(weights, CONFIG, batch, student.fast_ops, trace)
    layers = []
    for have, want in zip(trace[1:], wanted[1:], strict=True):
        target = want[rows].float()
        layers.append(F.mse_loss(have.float(), target) / target.var())
    have_q, have_d = student.fast_ops.segment_means(trace[-1], batch.type_ids, batch.cu_seqlens)
    want_q, want_d = student.fast_ops.segment_means(wanted[-1][rows], batch.type_ids, batch.cu_seqlens)
    pooled = 1 - torch.cat([F.cosine_similarity(have_q, want_q), F.cosine_similarity(have_d, want_d)]).mean()
    hidden = torch.stack(layers).mean()
    parts = {"hidden": hidden.item(), "last": layers[-1].item(), "pooled": pooled.item()}
    return loop.Loss(hidden + 2 * pooled, parts, batch.tokens)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--budget", type=int, default=4096, help="tokens a step")
    parser.add_argument("--learning-rate", type=float, default=5e-4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=loop.THREADS)
    parser.add_argument("--stop", type=int, help="leave at this step, to be resumed")
    parser.add_argument("--resume", action="store_true")
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    torch.set_num_threads(args.threads)
    tokenizer = Tokenizer.from_file(str(student.minilm_folder() / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.no_truncation()
    texts = Texts(args.data, tokenizer, args.seed)
    print({"pairs": len(texts.queries), "passages": len(texts.passages)}, flush=True)
    first = args.out / "initial"
    if not (args.resume and first.exists()):
        probes = [data.pack_segments([p[:200]]) for p in texts.passages[:: len(texts.passages) // 16]]
        student.save(first, student.initial(probes))
    weights = student.load(first)
    teacher = {name: w.bfloat16() for name, w in student.minilm().items()}
    trained = loop.run(
        weights,
        lambda w, step: loss_of(w, teacher, texts.batch(step, args.budget)),
        loop.Schedule(args.steps, args.learning_rate, stop=args.stop),
        args.out,
        resume=args.resume,
        threads=args.threads,
    )
    student.save(args.out, trained)


if __name__ == "__main__":
    main()
