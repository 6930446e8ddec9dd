"""Training, in two stages: the teacher's hidden states, and lists scored by three teachers, together.

    torchrun --nproc_per_node 2 runs/embedded/train.py first WORK --data DATA --v1 V1 --out WORK/first
    python runs/embedded/student.py WORK
    torchrun --nproc_per_node 2 runs/embedded/train.py second WORK --data DATA --v1 V1 --out WORK/second \
        --student WORK/second-student --teacher WORK/second-teacher

Of each batch of lists (one query, eight documents): the mean over layers of MSE / variance between the student's
states and the teacher's (FitNets, arXiv 1412.6550; the last layer's first token only), and KL (T = 3), MarginMSE and
squared error against

    l · L-12's logit + a · (bge's cosine - .7) + b · the first embedded model's logit

with l, a and b by stage and by the question's source: L-12 is the best of the three on web questions, the first model
on scientific ones. The teachers read each batch beside the student, so nothing is stored.

Half to three quarters of the lists are scientific ones. In these the states of the last layers are not learnt, because
L-12 ranks such lists badly. STAGES has every weight. The second stage begins with mixed weights: student.py.

Documents longer than L-12 reads are parts of meetings and stories, or made by hiding a passage among others: L-12
reads them in windows, each with the question, and its best window's logit counts. Word and position embeddings are
not trained. Runs stop and go on by themselves: the same command continues from the newest checkpoint.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from common import HELD_OUT, CrossEncoder, IdPair, TorchCrossEncoder, lines, load, pack, save
from dev import DevSets
from student import L12, TARGETS, make
from torch import Tensor

from turborank import checkpoint, engines
from turborank.distill import losses
from turborank.distill.students import Student
from turborank.distill.trainer import Loss, Run, Schedule, StudentModel, tensors

QUERY_TOKENS, DOCUMENT_TOKENS = 64, 300
SCIENCE = ("acl", "pubmedqa", "medquad", "openstax", "covid", "made", "stackexchange", "reuters")  # of sources' names
COSINE_CENTRE = 0.7  # of bge's cosines
LISTS_LOSS = "kl@3:0.11,margin_mse:0.006"
LEVEL, LOGIT_SCALE = 0.2, 25.0  # of the squared error, so that scores stay comparable from question to question
K = 8  # documents of a list

Teacher = CrossEncoder | TorchCrossEncoder


Steps = tuple[tuple[int, ...], tuple[float, ...]]  # some steps, and a value at each; linear between them
Weights = tuple[float, float, float]  # of L-12's logit, of bge's cosine and of v1's logit
WEB: Weights = (1.0, 22.0, 0.5)  # chosen on TREC DL 2021, those of science on SciFact's train split


@dataclass(frozen=True)
class Stage:
    """Length, learning rate, weights of the losses and of the teachers, and the mixture of lists."""

    steps: int
    rate: float
    lists: Steps  # weight of the losses on lists
    hidden: Steps  # weight of the loss on hidden states
    science: Steps  # share of scientific lists
    scientific: Weights
    long_every: int  # every such step has long documents
    parts: float  # share of parts of meetings and stories among long documents; the others hide a passage


STAGES = {
    "first": Stage(
        steps=460,
        rate=3e-4,
        lists=((0, 300), (0.3, 1.0)),
        hidden=((60, 240, 299, 300), (3.0, 0.5, 0.5, 0.3)),
        science=((299, 300), (0.5, 0.75)),
        scientific=(1.0, 60.0, 2.0),
        long_every=32,
        parts=0.0,
    ),
    "second": Stage(
        steps=430,
        rate=1.3e-4,
        lists=((0,), (1.0,)),
        hidden=((0,), (0.5,)),
        science=((0,), (0.65,)),
        scientific=(0.5, 60.0, 3.0),
        long_every=10,
        parts=0.5,
    ),
}


def at(step: int, values: Steps) -> float:
    """The value of a step."""
    return float(np.interp(step, *values))


class Texts:
    """Token ids of many texts, in one array."""

    def __init__(self, ids: np.ndarray, bounds: np.ndarray) -> None:
        self.ids, self.bounds = ids, bounds

    @classmethod
    def read(cls, path: Path, teacher: Path, texts: Callable[[], list[str]]) -> Texts:
        """Read the file. If there is none, tokenize ``texts`` with the teacher's tokenizer and write it."""
        if not path.is_file():
            tokenizer = checkpoint.load(teacher).tokenizer
            tokenizer.no_padding()
            tokenizer.no_truncation()
            flat, sizes, values = list[np.ndarray](), [0], texts()
            for start in range(0, len(values), 5000):
                encoded = tokenizer.encode_batch_fast(values[start : start + 5000], add_special_tokens=False)
                flat += [np.asarray(e.ids, np.uint16) for e in encoded]
            sizes += map(len, flat)
            save(path, ids=np.concatenate(flat), bounds=np.cumsum(sizes))
        return cls(**load(path))

    def __len__(self) -> int:
        return len(self.bounds) - 1

    def get(self, at: int, start: int = 0, tokens: int | None = None) -> list[int]:
        """The ids of text ``at``, ``tokens`` of them from ``start``; by default all."""
        whole = self.ids[self.bounds[at] : self.bounds[at + 1]]
        return whole[start : None if tokens is None else start + tokens].tolist()


class Corpus:
    """Token ids of all questions and passages, BM25's candidates, and long texts with their questions."""

    def __init__(self, work: Path, teacher: Path) -> None:
        asked = lines(work / "long-queries.jsonl")
        parts = {
            "queries": lambda: [row["query"] for row in lines(work / "queries.jsonl")],
            "texts": lambda: lines(work / "texts.jsonl"),
            "long-queries": lambda: [row["query"] for row in asked],
            "long-texts": lambda: lines(work / "long-texts.jsonl"),
        }
        read = [Texts.read(work / f"tokens-{name}.npz", teacher, texts) for name, texts in parts.items()]
        self.queries, self.texts, self.long_queries, self.long_texts = read
        self.long_text_of = [row["text"] for row in asked]
        pool = load(work / "pool.npz")
        self.bounds, self.places = pool["bounds"], pool["places"]
        self.trained = len(self.queries) - HELD_OUT  # questions to train on

    def query(self, at: int) -> list[int]:
        return self.queries.get(at, tokens=QUERY_TOKENS)

    def document(self, at: int, tokens: int = DOCUMENT_TOKENS) -> list[int]:
        return self.texts.get(at, tokens=tokens)

    def among_strangers(self, at: int, tokens: int, rng: np.random.Generator) -> list[int]:
        """A passage somewhere among others, so many tokens in all."""
        parts = [self.document(at)]
        while sum(map(len, parts)) < tokens:
            parts.append(self.document(int(rng.integers(len(self.texts)))))
        return [token for part in rng.permutation(len(parts)) for token in parts[part]][:tokens]

    def part_of(self, text: int, tokens: int, rng: np.random.Generator) -> list[int]:
        """``tokens`` consecutive tokens of a long text, from a random place."""
        last = int(np.diff(self.long_texts.bounds)[text]) - tokens
        return self.long_texts.get(text, int(rng.integers(max(1, last))), tokens)

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

    window = 350
    cuts, sizes, shares = (70, 110, 180, 300), (500, 1000, 2000), (0.3, 0.4, 0.3)  # tokens; of sizes: how often
    free = 5  # last layers whose states scientific lists do not learn

    def __init__(
        self,
        work: Path,
        corpus: Corpus,
        teacher: Teacher,
        v1: Path,
        stage: Stage,
        *,
        budget: int,
        seed: int,
        rank: int = 0,
    ) -> None:
        self.corpus, self.teacher, self.stage = corpus, teacher, stage
        self.budget, self.seeds = budget, (seed, rank)
        self.of_lists = losses.mix(LISTS_LOSS)
        shards = [load(path) for path in sorted(work.glob("pools-[0-9]*.npz"))]
        query, places, cosines = (np.concatenate([s[n] for s in shards]) for n in ("q", "places", "bge"))
        kept = query < corpus.trained
        self.query, self.places, self.cosines = query[kept], places[kept], cosines[kept]
        sources = [row["source"] for row in lines(work / "queries.jsonl")]
        kinds = ["science" if sources[q].startswith(SCIENCE) else "web" for q in self.query]
        weights = {"web": WEB, "science": stage.scientific}
        # One more row stands for the lists of parts of long texts, which have no cosines.
        self.weights = np.array([*(weights[kind] for kind in kinds), WEB], np.float32)  # (lists + 1, 3)
        self.cosines = np.append(self.cosines, np.full_like(self.cosines[:1], COSINE_CENTRE), axis=0)
        self.of_kind = {kind: np.flatnonzero(np.array(kinds) == kind) for kind in weights}
        model = Student.load(v1)
        numbers = {name: w.detach().numpy() for name, w in model.weights.items()}
        name, precision = engines.choose("torch" if torch.cuda.is_available() else "auto", config=model.config)
        self.v1 = engines.prepare(numbers, model.config, name=name, precision=precision, threads=1)

    def __call__(self, model: StudentModel, step: int) -> Loss:
        rows, members, pairs, is_long = self._draw(step)
        batch, states = pack(pairs), None
        if is_long:
            logits = best_windows(self.teacher, pairs, self.window)
        else:
            states, logits = self.teacher(batch)
        cosines = np.stack([self.cosines[row][chosen] for row, chosen in zip(rows, members, strict=True)])
        own = self.v1.logits(batch).reshape(cosines.shape)
        of_teacher, of_cosine, of_own = self.weights[rows].T[:, :, None]
        added = torch.from_numpy(of_cosine * (cosines - COSINE_CENTRE) + of_own * own).to(logits.device, torch.float32)
        wanted = torch.from_numpy(of_teacher).to(logits.device) * logits.reshape(cosines.shape).float() + added
        trace: list[Tensor] = []
        have = model(tensors(batch, wanted.device), trace).view(wanted.shape)
        real = torch.ones_like(wanted, dtype=torch.bool)
        loss, parts = self.of_lists(have, losses.Targets(wanted, None, real, real))
        loss = loss + LEVEL * F.mse_loss(have, wanted) / LOGIT_SCALE
        loss = loss * at(step, self.stage.lists)
        if states is not None:
            science = np.isin(rows, self.of_kind["science"])
            learning = torch.from_numpy(np.repeat(~science, [len(some) for some in members])).to(wanted.device)
            hidden = self._hidden(trace[1:], [states[layer] for layer in TARGETS], learning, np.diff(batch.cu_seqlens))
            loss, parts["hidden"] = loss + at(step, self.stage.hidden) * hidden, hidden.item()
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
        every = self.stage.long_every
        is_long = step % every == every - 1
        size = int(rng.choice(self.sizes, p=self.shares)) if is_long else 0
        cut = int(rng.choice(self.cuts))
        count = int(np.clip(self.budget // size, 3, K)) if is_long else K
        rows, members, pairs, used = list[int](), list[np.ndarray](), list[IdPair](), 0
        while used < self.budget * (0.7 if is_long else 1):
            if is_long and rng.random() < self.stage.parts:
                row, chosen = len(self.query), np.arange(count)
                listed = self._parts(size, count, rng)
            else:
                kind = self.of_kind["science" if rng.random() < at(step, self.stage.science) else "web"]
                row = int(kind[rng.integers(len(kind))])
                order, hard = np.argsort(-self.cosines[row]), 2 if is_long else 5
                chosen = np.concatenate([rng.permutation(order[:8])[:hard], rng.permutation(order[8:])[: count - hard]])
                asked = self.corpus.query(int(self.query[row]))
                documents = [
                    self.corpus.among_strangers(int(p), size, rng) if is_long else self.corpus.document(int(p), cut)
                    for p in self.places[row][chosen]
                ]
                listed = [(asked, document) for document in documents]
            used += sum(len(query) + len(document) + 3 for query, document in listed)
            rows.append(row)
            members.append(chosen)
            pairs += listed
        return rows, members, pairs, is_long

    def _parts(self, size: int, count: int, rng: np.random.Generator) -> list[IdPair]:
        """A question about a meeting or a story, with two parts of its text and parts of others."""
        corpus = self.corpus
        at = int(rng.integers(len(corpus.long_queries)))
        own = corpus.long_text_of[at]
        texts = [own, own, *rng.integers(len(corpus.long_texts), size=count - 2).tolist()]
        asked = corpus.long_queries.get(at, tokens=QUERY_TOKENS)
        return [(asked, corpus.part_of(text, size, rng)) for text in texts]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=STAGES)
    parser.add_argument("work", type=Path)
    parser.add_argument("--data", type=Path, required=True, help="the folder with eval/, for the development sets")
    parser.add_argument("--v1", type=Path, required=True, help="the folder of turborank-embedded-v1, a teacher")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--student", type=Path, help="begin with this folder instead of some of the teacher's layers")
    parser.add_argument("--teacher", type=Path, help=f"default: WORK/teachers/{L12}")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--lr", type=float)
    parser.add_argument("--budget", type=int, default=6144, help="tokens of a step in each process")
    parser.add_argument("--every", type=int, default=115, help="steps between two evaluations")
    parser.add_argument("--seed", type=int, default=21)
    args = parser.parse_args()
    work, stage = args.work, STAGES[args.stage]
    teacher = args.teacher or work / "teachers" / L12
    corpus = Corpus(work, teacher)
    student = args.student or work / "student"
    if not student.is_dir():
        make(teacher, corpus.probes(), student)
    schedule = Schedule(
        args.steps or stage.steps,
        learning_rate=args.lr or stage.rate,
        warmup=25,
        decay="linear",
        average=0.98,
        save_every=100,
        evaluate_every=args.every,
    )
    run = Run(Student.load(student), args.out, schedule, dtype=torch.bfloat16, freeze_words=True)
    run.resume()
    loss = HiddenAndLists(
        work, corpus, CrossEncoder(teacher), args.v1, stage, budget=args.budget, seed=args.seed, rank=run.rank
    )

    def told(row: dict, steps: int) -> None:
        if run.rank == 0 and row["step"] % 20 == 0:
            print(row, flush=True)

    run.train(loss, DevSets(args.data / "eval", work), told)
    run.finish(run.current())


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
