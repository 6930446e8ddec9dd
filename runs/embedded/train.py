"""Two stages of training: the teacher's hidden states and logits, pair by pair; then lists, scored by both teachers.

    python runs/embedded/train.py recover WORK --out WORK/recover
    python runs/embedded/train.py lists WORK --student WORK/recover/final --out WORK/lists

``recover``: of each pair, mean over layers of MSE / variance between the student's states and the teacher's
(FitNets, arXiv 1412.6550; student layer i learns teacher layer 2i, the last one its first token only), plus the
squared error of the logit / 25. ``lists``: the same states, and KL (T = 2), MarginMSE and squared error against the
list's scores: L-12's logit + 25·(bge's cosine - .7). The teacher reads each batch beside the student, so nothing is
stored.

Documents longer than the teacher reads are made by hiding a passage among others: the teacher reads them in
windows, each with the question; the student's states of a window's tokens learn that window's, its question's those
of the best one. Runs stop and go on by themselves: the same command continues from the newest checkpoint."""

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

from turborank import checkpoint
from turborank.distill.losses import Targets, mix
from turborank.distill.students import Student
from turborank.distill.trainer import Loss, Run, Schedule, StudentModel, tensors
from turborank.types import PackedBatch

QUERY_TOKENS, DOCUMENT_TOKENS = 64, 300
COSINE_WEIGHT, COSINE_CENTRE = (
    25.0,
    0.7,
)  # of bge's cosines beside L-12's logits: read on DL 2021 and SciFact's train split
LOGIT_SCALE = 25.0  # squared errors of logits are divided by it: their standard deviation in a list is 3.4
LISTS_LOSS, LEVEL = "kl@2:0.25,margin_mse:0.04", 0.2
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
        self.bounds, self.places, self.known = pool["bounds"], pool["places"], pool["known"]
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


def hidden_loss(states: Sequence[Tensor], targets: Sequence[Tensor]) -> Tensor:
    """(layers,) MSE / variance."""
    return torch.stack(
        [F.mse_loss(x.float(), t.float()) / t.float().var() for x, t in zip(states, targets, strict=True)]
    )


def moved(batch: PackedBatch, model: StudentModel) -> PackedBatch:
    """The batch as torch tensors where the model is."""
    return tensors(batch, next(model.parameters()).device)


class Recovery:
    """The loss of ``recover``, for :meth:`Run.train`."""

    long_every, long_tokens, window = 24, (600, 1100, 2000), 400

    def __init__(self, corpus: Corpus, teacher: Teacher, budget: int, seed: int) -> None:
        self.corpus, self.teacher, self.budget, self.seed = corpus, teacher, budget, seed

    def __call__(self, model: StudentModel, step: int) -> Loss:
        rng = np.random.default_rng((self.seed, step))
        if step % self.long_every == self.long_every - 1:
            return self._long(model, rng)
        batch = pack(self._pairs(rng))
        states, logits = self.teacher(batch)
        return self._loss(model, batch, [states[layer] for layer in TARGETS], logits)

    def _pairs(self, rng: np.random.Generator) -> list[IdPair]:
        corpus, out, used = self.corpus, list[IdPair](), 0
        while used < self.budget:
            query, kind = int(rng.integers(corpus.trained)), rng.random()
            first, last = int(corpus.bounds[query]), int(corpus.bounds[query + 1])
            if kind < 0.15 and corpus.known[query] >= 0:
                place = int(corpus.known[query])
            elif kind < 0.85:
                place = int(corpus.places[first + int(rng.integers(min(12, last - first)))])
            elif kind < 0.93:
                place = int(corpus.places[int(rng.integers(first, last))])
            else:
                place = int(rng.integers(len(corpus.db) - 1))
            out.append((corpus.query(query), corpus.document(place)))
            used += sum(map(len, out[-1])) + 3
        return out

    def _loss(self, model: StudentModel, batch: PackedBatch, targets: Sequence[Tensor], logits: Tensor) -> Loss:
        trace: list[Tensor] = []
        have = model(moved(batch, model), trace)
        hidden = hidden_loss(trace[1:], targets)
        logit = F.mse_loss(have, logits) / LOGIT_SCALE
        parts = {"hidden": hidden.mean().item(), "first_token": hidden[-1].item(), "logit": logit.item()}
        return Loss(hidden.mean() + logit, parts, batch.tokens)

    def _long(self, model: StudentModel, rng: np.random.Generator) -> Loss:
        corpus, query = self.corpus, int(rng.integers(self.corpus.trained))
        size, first = int(rng.choice(self.long_tokens)), int(corpus.bounds[query])
        best = min(8, int(corpus.bounds[query + 1]) - first)
        places = [
            int(corpus.places[first + int(rng.integers(best))]) for _ in range(max(1, min(3, self.budget // size)))
        ]
        asked = corpus.query(query)
        pairs = [(asked, corpus.among_strangers(place, size, rng)) for place in places]
        states, logits, windows, spans = read_windows(self.teacher, pairs, self.window)
        offsets, rows, top = windows.cu_seqlens, list[int](), list[int]()
        for first_window, count in spans:
            best_window = first_window + int(logits[first_window : first_window + count].argmax())
            top.append(best_window)
            rows += range(offsets[best_window], offsets[best_window] + len(asked) + 2)
            for one in range(first_window, first_window + count):
                rows += range(offsets[one] + len(asked) + 2, offsets[one + 1] - 1)
            rows.append(offsets[best_window + 1] - 1)
        targets = [*(states[layer][rows] for layer in TARGETS[:-1]), states[TARGETS[-1]][top]]
        return self._loss(model, pack(pairs), targets, logits[top])


def read_windows(
    teacher: Teacher, pairs: Sequence[IdPair], window: int
) -> tuple[list[Tensor], Tensor, PackedBatch, list[tuple[int, int]]]:
    """The teacher's states and logits of all windows, their batch, and (first window, count) of each document."""
    read: list[IdPair] = []
    spans: list[tuple[int, int]] = []
    for query, document in pairs:
        parts = [document[at : at + window] for at in range(0, len(document), window)]
        spans.append((len(read), len(parts)))
        read += [(query, part) for part in parts]
    batch = pack(read)
    states, logits = teacher(batch)
    return states, logits, batch, spans


class Lists:
    """The loss of ``lists``, for :meth:`Run.train`."""

    long_every, long_tokens, window = 24, (500, 1000, 2000), 350
    cuts = (110, 180, 300)  # tokens of a document; one is drawn for each step

    def __init__(self, work: Path, corpus: Corpus, teacher: Teacher, budget: int, seed: int, hidden: float) -> None:
        self.corpus, self.teacher, self.budget, self.seed, self.hidden = corpus, teacher, budget, seed, hidden
        self.mix = mix(LISTS_LOSS)
        shards = [load(path) for path in sorted(work.glob("pools-[0-9]*.npz"))]
        self.query, self.places, self.cosines = (np.concatenate([s[n] for s in shards]) for n in ("q", "places", "bge"))

    def __call__(self, model: StudentModel, step: int) -> Loss:
        rng = np.random.default_rng((self.seed, step, 7))
        if step % self.long_every == self.long_every - 1:
            return self._long(model, rng)
        cut, pairs, cosines, used = int(rng.choice(self.cuts)), list[IdPair](), list[np.ndarray](), 0
        while used < self.budget:
            row = int(rng.integers(len(self.query)))
            order = np.argsort(-self.cosines[row])
            chosen = np.concatenate([rng.permutation(order[:8])[:5], rng.permutation(order[8:])[: K - 5]])
            query = self.corpus.query(int(self.query[row]))
            some = [(query, self.corpus.document(int(self.places[row, c]), cut)) for c in chosen]
            used += sum(len(q) + len(d) + 3 for q, d in some)
            pairs += some
            cosines.append(self.cosines[row][chosen])
        batch = pack(pairs)
        states, logits = self.teacher(batch)
        trace: list[Tensor] = []
        have = model(moved(batch, model), trace).view(len(cosines), -1)
        loss, parts = self._list_loss(have, logits.reshape(len(cosines), -1), np.stack(cosines))
        if self.hidden:
            hidden = hidden_loss(trace[1:], [states[layer] for layer in TARGETS]).mean()
            loss, parts["hidden"] = loss + self.hidden * hidden, hidden.item()
        return Loss(loss, parts, batch.tokens)

    def _list_loss(self, have: Tensor, logits: Tensor, cosines: np.ndarray) -> tuple[Tensor, dict[str, float]]:
        """Of (lists, documents)."""
        wanted = logits.float() + COSINE_WEIGHT * (torch.from_numpy(cosines).to(logits.device) - COSINE_CENTRE)
        real = torch.ones_like(wanted, dtype=torch.bool)
        loss, parts = self.mix(have, Targets(wanted, None, real, real))
        level = F.mse_loss(have, wanted) / LOGIT_SCALE  # so that scores stay comparable from question to question
        return loss + LEVEL * level, parts | {"level": level.item()}

    def _long(self, model: StudentModel, rng: np.random.Generator) -> Loss:
        size, row = int(rng.choice(self.long_tokens)), int(rng.integers(len(self.query)))
        order = np.argsort(-self.cosines[row])
        count = max(4, min(K, 2 * self.budget // size)) if size < 2000 else 4
        chosen = np.concatenate([order[:2], rng.permutation(order[2:])[: count - 2]])
        query = self.corpus.query(int(self.query[row]))
        pairs = [(query, self.corpus.among_strangers(int(self.places[row, c]), size, rng)) for c in chosen]
        _, logits, _, spans = read_windows(self.teacher, pairs, self.window)
        best = torch.stack([logits[first : first + many].max() for first, many in spans])
        batch = pack(pairs)
        loss, parts = self._list_loss(
            model(moved(batch, model)).view(1, -1), best[None], self.cosines[row][chosen][None]
        )
        return Loss(loss, parts, batch.tokens)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=("recover", "lists"))
    parser.add_argument("work", type=Path)
    parser.add_argument("--student", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=1300)
    parser.add_argument("--lr", type=float, default=6e-4)
    parser.add_argument("--budget", type=int, default=4096, help="tokens of a step")
    parser.add_argument("--average", type=float, default=0.0, help="of the exponential moving average of the weights")
    parser.add_argument("--hidden", type=float, default=1.0, help="weight of the hidden states in `lists`")
    parser.add_argument("--every", type=int, default=400, help="steps between two evaluations")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--data", type=Path, required=True, help="the folder with eval/, for the development sets")
    args = parser.parse_args()
    teacher = args.work / "teachers" / "ms-marco-MiniLM-L-12-v2"
    corpus = Corpus(args.work, teacher)
    student = args.student or args.work / "student"
    if not student.is_dir():
        drawn = np.random.default_rng(0).integers(0, corpus.trained, 16)
        first = [corpus.document(int(corpus.places[corpus.bounds[q]]), 200) for q in drawn]
        make(teacher, [(corpus.query(int(q)), document) for q, document in zip(drawn, first, strict=True)], student)
    schedule = Schedule(
        args.steps,
        learning_rate=args.lr,
        warmup=40,
        decay="linear",
        average=args.average,
        save_every=200,
        evaluate_every=args.every,
    )
    run = Run(Student.load(student), args.out, schedule, dtype=torch.bfloat16, freeze_words=True)
    run.resume()
    reader = CrossEncoder(teacher)
    loss = (
        Recovery(corpus, reader, args.budget, args.seed)
        if args.stage == "recover"
        else Lists(args.work, corpus, reader, args.budget, args.seed, args.hidden)
    )
    run.train(
        loss,
        DevSets(args.data / "eval", args.work),
        lambda row, steps: print(row, flush=True) if row["step"] % 20 == 0 else None,
    )
    run.finish(run.current())


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
