"""Training: the teacher's hidden states, and lists scored by three teachers, together.

    torchrun --nproc_per_node 2 runs/embedded/train.py WORK --data DATA --first V1 --out WORK/run

Of each batch of lists (one query, eight documents): the mean over layers of MSE / variance between the student's
states and L-12's (FitNets, arXiv 1412.6550; the last layer's first token only), whose weight falls from 3 to .3, and
KL (T = 3), MarginMSE and squared error against

    L-12's logit + a · (bge's cosine - .7) + b · the first embedded model's logit

with a and b by the question's source (WEIGHTS): L-12 is the best of the three on web questions, the first model on
scientific ones. The teachers read each batch beside the student, so nothing is stored.

Half of the lists, at the end three quarters, are scientific ones. Their states in the last layers are free: what L-12
concludes there is not what is to be learnt.

Documents longer than L-12 reads are made by hiding a passage among others: L-12 reads them in windows, each with the
question, and its best window's logit counts. Word and position embeddings are not trained. Runs stop and go on by
themselves: the same command continues from the newest checkpoint.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from common import HELD_OUT, CrossEncoder, IdPair, TorchCrossEncoder, lines, load, pack, save
from dev import DevSets
from student import TARGETS, make
from torch import Tensor

from turborank import checkpoint, engines
from turborank.distill.losses import Targets, mix
from turborank.distill.students import Student
from turborank.distill.trainer import Loss, Run, Schedule, StudentModel, tensors

QUERY_TOKENS, DOCUMENT_TOKENS = 64, 300
# Weights of bge's cosine and of the first model's logit; read on DL 2021 (web) and SciFact's train split.
WEIGHTS = {"web": (22.0, 0.5), "science": (60.0, 2.0)}
SCIENCE = ("acl", "pubmedqa", "medquad", "openstax", "covid", "made", "stackexchange", "reuters")  # of sources' names
COSINE_CENTRE = 0.7  # of bge's cosines
LISTS_LOSS = "kl@3:0.11,margin_mse:0.006"
LEVEL, LOGIT_SCALE = 0.2, 25.0  # of the squared error, so that scores stay comparable from question to question
K = 8  # documents of a list

Teacher = CrossEncoder | TorchCrossEncoder


class Corpus:
    """Token ids of all questions and passages, and BM25's candidates."""

    def __init__(self, work: Path, teacher: Path) -> None:
        path = work / "tokens.npz"
        if not path.is_file():
            tokenizer = checkpoint.load(teacher).tokenizer
            tokenizer.no_padding()
            tokenizer.no_truncation()

            def ids(texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
                flat: list[np.ndarray] = []
                for start in range(0, len(texts), 5000):
                    encoded = tokenizer.encode_batch_fast(texts[start : start + 5000], add_special_tokens=False)
                    flat += [np.asarray(e.ids, np.uint16) for e in encoded]
                return np.concatenate(flat), np.cumsum([0, *map(len, flat)])

            q, qb = ids([row["query"] for row in lines(work / "queries.jsonl")])
            d, db = ids(lines(work / "texts.jsonl"))
            save(path, q=q, qb=qb, d=d, db=db)
        found = load(path)
        self.q, self.qb, self.d, self.db = (found[name] for name in ("q", "qb", "d", "db"))
        pool = load(work / "pool.npz")
        self.bounds, self.places = pool["bounds"], pool["places"]
        self.trained = len(self.qb) - 1 - HELD_OUT  # questions to train on

    def query(self, at: int) -> list[int]:
        return self.q[self.qb[at] : self.qb[at + 1]][:QUERY_TOKENS].tolist()

    def document(self, at: int, tokens: int = DOCUMENT_TOKENS) -> list[int]:
        return self.d[self.db[at] : self.db[at + 1]][:tokens].tolist()

    def among_strangers(self, at: int, tokens: int, rng: np.random.Generator) -> list[int]:
        """A passage somewhere among others, so many tokens in all."""
        parts = [self.document(at)]
        while sum(map(len, parts)) < tokens:
            parts.append(self.document(int(rng.integers(len(self.db) - 1))))
        return [token for part in rng.permutation(len(parts)) for token in parts[part]][:tokens]

    def probes(self, count: int = 24) -> list[IdPair]:
        """Pairs on which heads are matched to slopes."""
        rng = np.random.default_rng(0)
        drawn = rng.integers(0, self.trained, count)
        return [(self.query(q), self.document(int(self.places[self.bounds[q] + rng.integers(5)]), 250)) for q in drawn]


def best_windows(teacher: Teacher, pairs: Sequence[IdPair], window: int) -> Tensor:
    """(P,) the largest logit over the windows of each document."""
    read: list[IdPair] = []
    counts: list[int] = []
    for query, document in pairs:
        parts = [document[at : at + window] for at in range(0, len(document), window)]
        counts.append(len(parts))
        read += [(query, part) for part in parts]
    return torch.stack([logits.max() for logits in teacher(pack(read))[1].split(counts)])


class HiddenAndLists:
    """The loss, for :meth:`Run.train`. ``rank``: of this process; each draws lists of its own."""

    long_every, window = 32, 350
    cuts, sizes, shares = (70, 110, 180, 300), (500, 1000, 2000), (0.3, 0.4, 0.3)  # tokens; of sizes: how often
    lists_from, lists_whole = 0.3, 300  # weight of the lists at step 0; the step from which it is 1
    # Steps, and what there is at each; between them it changes evenly.
    hidden = (60, 240, 299, 300), (3.0, 0.5, 0.5, 0.3)  # weight of the states
    science = (299, 300), (0.5, 0.75)  # share of scientific lists
    free = 5  # last layers whose states scientific lists do not learn

    def __init__(
        self, work: Path, corpus: Corpus, teacher: Teacher, first: Path, *, budget: int, seed: int, rank: int = 0
    ) -> None:
        self.corpus, self.teacher, self.budget, self.seeds = corpus, teacher, budget, (seed, rank)
        self.mix = mix(LISTS_LOSS)
        shards = [load(path) for path in sorted(work.glob("pools-[0-9]*.npz"))]
        query, places, cosines = (np.concatenate([s[n] for s in shards]) for n in ("q", "places", "bge"))
        kept = query < corpus.trained
        self.query, self.places, self.cosines = query[kept], places[kept], cosines[kept]
        sources = [row["source"] for row in lines(work / "queries.jsonl")]
        kinds = ["science" if sources[q].startswith(SCIENCE) else "web" for q in self.query]
        self.weights = np.array([WEIGHTS[kind] for kind in kinds], np.float32)  # (lists, 2)
        self.of_kind = {kind: np.flatnonzero(np.array(kinds) == kind) for kind in WEIGHTS}
        model = Student.load(first)
        numbers = {name: w.detach().numpy() for name, w in model.weights.items()}
        name, precision = engines.choose("torch" if torch.cuda.is_available() else "auto", config=model.config)
        self.first = engines.prepare(numbers, model.config, name=name, precision=precision, threads=1)

    def __call__(self, model: StudentModel, step: int) -> Loss:
        rows, members, pairs, is_long = self._draw(step)
        batch, states = pack(pairs), None
        if is_long:
            logits = best_windows(self.teacher, pairs, self.window)
        else:
            states, logits = self.teacher(batch)
        cosines = np.stack([self.cosines[row][chosen] for row, chosen in zip(rows, members, strict=True)])
        own = self.first.logits(batch).reshape(cosines.shape)
        of_cosine, of_own = self.weights[rows].T[:, :, None]
        added = torch.from_numpy(of_cosine * (cosines - COSINE_CENTRE) + of_own * own)
        wanted = logits.reshape(cosines.shape).float() + added.to(logits.device, torch.float32)
        trace: list[Tensor] = []
        have = model(tensors(batch, wanted.device), trace).view(wanted.shape)
        real = torch.ones_like(wanted, dtype=torch.bool)
        loss, parts = self.mix(have, Targets(wanted, None, real, real))
        loss = loss + LEVEL * F.mse_loss(have, wanted) / LOGIT_SCALE
        loss = loss * min(1.0, self.lists_from + (1 - self.lists_from) * step / self.lists_whole)
        if states is not None:
            science = np.isin(rows, self.of_kind["science"])
            learning = torch.from_numpy(np.repeat(~science, [len(some) for some in members])).to(wanted.device)
            hidden = self._hidden(trace[1:], [states[layer] for layer in TARGETS], learning, np.diff(batch.cu_seqlens))
            loss, parts["hidden"] = loss + float(np.interp(step, *self.hidden)) * hidden, hidden.item()
        return Loss(loss, parts, batch.tokens)

    def _hidden(
        self, states: Sequence[Tensor], targets: Sequence[Tensor], learning: Tensor, lengths: np.ndarray
    ) -> Tensor:
        """Mean over layers of MSE / variance; in the last ``free`` layers of the pairs that are ``learning`` (P,)."""
        tokens = learning.repeat_interleave(torch.from_numpy(lengths).to(learning.device))
        each: list[Tensor] = []
        for layer, (x, t) in enumerate(zip(states, targets, strict=True)):
            have, wanted, spread = x.float(), t.float(), t.float().var()
            if layer >= len(states) - self.free:
                kept = tokens if len(x) == len(tokens) else learning
                have, wanted = have[kept], wanted[kept]
            each.append(F.mse_loss(have, wanted) / spread if len(have) else have.sum())
        return torch.stack(each).mean()

    def _draw(self, step: int) -> tuple[list[int], list[np.ndarray], list[IdPair], bool]:
        """Lists of one step: row and members of each, all pairs, and whether the documents are long."""
        seed, rank = self.seeds
        rng = np.random.default_rng((seed, step, rank, 13))
        is_long = step % self.long_every == self.long_every - 1
        size = int(rng.choice(self.sizes, p=self.shares)) if is_long else 0
        cut = int(rng.choice(self.cuts))
        count = int(np.clip(self.budget // size, 3, K)) if is_long else K
        hard = 2 if is_long else 5
        rows, members, pairs, used = list[int](), list[np.ndarray](), list[IdPair](), 0
        while used < self.budget * (0.7 if is_long else 1):
            kind = self.of_kind["science" if rng.random() < np.interp(step, *self.science) else "web"]
            row = int(kind[rng.integers(len(kind))])
            order = np.argsort(-self.cosines[row])
            chosen = np.concatenate([rng.permutation(order[:8])[:hard], rng.permutation(order[8:])[: count - hard]])
            asked, places = self.corpus.query(int(self.query[row])), self.places[row][chosen]
            documents = [
                self.corpus.among_strangers(int(p), size, rng) if is_long else self.corpus.document(int(p), cut)
                for p in places
            ]
            used += sum(len(asked) + len(document) + 3 for document in documents)
            rows.append(row)
            members.append(chosen)
            pairs += [(asked, document) for document in documents]
        return rows, members, pairs, is_long


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("--data", type=Path, required=True, help="the folder with eval/, for the development sets")
    parser.add_argument("--first", type=Path, required=True, help="the folder of turborank-embedded-v1, a teacher")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--student", type=Path, help="begin with this folder instead of the teacher's layers")
    parser.add_argument("--steps", type=int, default=460)
    parser.add_argument("--lr", type=float, default=3e-4)
    parser.add_argument("--budget", type=int, default=6144, help="tokens of a step in each process")
    parser.add_argument("--every", type=int, default=115, help="steps between two evaluations")
    parser.add_argument("--seed", type=int, default=21)
    args = parser.parse_args()
    teacher = args.work / "teachers" / "ms-marco-MiniLM-L-12-v2"
    corpus = Corpus(args.work, teacher)
    student = args.student or args.work / "student"
    if not student.is_dir():
        make(teacher, corpus.probes(), student)
    schedule = Schedule(
        args.steps,
        learning_rate=args.lr,
        warmup=25,
        decay="linear",
        average=0.98,
        save_every=100,
        evaluate_every=args.every,
    )
    run = Run(Student.load(student), args.out, schedule, dtype=torch.bfloat16, freeze_words=True)
    run.resume()
    loss = HiddenAndLists(
        args.work, corpus, CrossEncoder(teacher), args.first, budget=args.budget, seed=args.seed, rank=run.rank
    )

    def told(row: dict, steps: int) -> None:
        if run.rank == 0 and row["step"] % 20 == 0:
            print(row, flush=True)

    run.train(loss, DevSets(args.data / "eval", args.work), told)
    run.finish(run.current())


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
