"""Training: the teacher's hidden states, and lists scored by three teachers, together.

    torchrun --nproc_per_node 2 runs/embedded/train.py first WORK/student WORK --data DATA --v1 V1 --out WORK/run-first
    torchrun --nproc_per_node 2 runs/embedded/train.py second WORK/second WORK --data DATA --v1 V1 --out WORK/run-second

Of each batch of lists (one query, eight documents): the mean over layers of MSE / variance between the student's
states and the teacher's (FitNets, arXiv 1412.6550; the last layer's first token only), and KL (T = 3), MarginMSE and
squared error against

    l · teacher's logit + a · (bge's cosine - .7) + b · the first embedded model's logit

with l, a and b by the question's source: WEB and SCIENTIFIC. The teacher is made by student.py from
ms-marco-MiniLM-L-12, the best of the three on web questions; the first model is best on scientific ones. The teachers
read each batch beside the student, so nothing is stored. In scientific lists the states of the last layers are not
learnt, because the fused scores rank such lists better than the teacher does; in the second stage, whose student has a
cosine of these states in its head (docs/model.md §3.5, sum), in no list.

Documents longer than the teacher's 512 positions are parts of meetings and stories, or made by hiding a passage among
others: it reads them in windows, each with the question, and its best window's logit counts. Word and position
embeddings are not trained. A run stops and goes on by itself: the same command continues from the newest checkpoint.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from common import (
    QUERY_TOKENS,
    BiEncoder,
    Corpus,
    IdPair,
    Model,
    NativeModel,
    bi_encoder,
    cross_encoder,
    lines,
    load,
    pack,
)
from dev import DevSets
from student import BGE, L12, TARGETS
from torch import Tensor

from turborank import engines
from turborank.distill import losses
from turborank.distill.students import Student
from turborank.distill.trainer import Loss, Run, Schedule, StudentModel, tensors
from turborank.types import Engine

SCIENCE = ("acl", "pubmedqa", "medquad", "openstax", "covid", "made", "stackexchange", "reuters", "wikinews")  # sources
COSINE_CENTRE = 0.7  # of bge's cosines
LISTS_LOSS = "kl@3:0.11,margin_mse:0.006"
LEVEL, LOGIT_SCALE = 0.2, 25.0  # of the squared error, so that scores stay comparable from question to question
K = 8  # documents of a list

Steps = tuple[tuple[int, ...], tuple[float, ...]]  # some steps, and a value at each; linear between them
Weights = tuple[float, float, float]  # of L-12's logit, of bge's cosine and of v1's logit
WEB: Weights = (1.0, 22.0, 0.5)  # chosen on TREC DL 2021
SCIENTIFIC: Weights = (0.75, 60.0, 2.5)  # chosen on SciFact's train split

SCIENCE_SHARE = 0.65  # of the lists
LONG_EVERY = 16  # every such step has long documents
PARTS = 0.5  # share of parts of meetings and stories among long documents; the others hide a passage


class Stage(NamedTuple):
    """Settings that differ between the two stages."""

    steps: int
    rate: float
    lists: Steps  # weight of the losses on lists
    hidden: Steps  # weight of the loss on hidden states
    free: tuple[str, ...]  # kinds of lists whose last layers' states are not learnt
    joined_shares: tuple[float, float, float]  # of the lengths in HiddenAndLists.joined
    seed: int


STAGES = {
    "first": Stage(
        steps=560,
        rate=2.5e-4,
        lists=((0, 200), (0.3, 1.0)),
        hidden=((0, 150), (3.0, 1.0)),
        free=("science",),
        joined_shares=(0.4, 0.3, 0.3),
        seed=21,
    ),
    "second": Stage(
        steps=1000,
        rate=2e-4,
        lists=((0,), (1.0,)),
        hidden=((0, 150), (1.25, 0.625)),
        free=("science", "web"),
        joined_shares=(0.5, 0.25, 0.25),
        seed=22,
    ),
}


def at(step: int, values: Steps) -> float:
    """The value of a step."""
    return float(np.interp(step, *values))


def best_windows(teacher: Model, pairs: Sequence[IdPair], window: int) -> Tensor:
    """(P,) the largest logit over the windows of each document."""
    read: list[IdPair] = []
    counts: list[int] = []
    for query, document in pairs:
        parts = [document[at : at + window] for at in range(0, len(document), window)]
        counts.append(len(parts))
        read += [(query, part) for part in parts]
    return torch.stack([logits.max() for logits in teacher(pack(read))[1].split(counts)])


class Teachers(NamedTuple):
    """The twelve averaged layers (states and logits), bge-small (cosines) and turborank-embedded-v1 (logits)."""

    averaged: Model
    bge: BiEncoder
    v1: Engine

    @classmethod
    def load(cls, work: Path, v1: Path, model: Callable[..., Model], engine: str = "native") -> Teachers:
        """``model``: builds a teacher from weights and config; ``engine``: name of the engine that runs v1."""
        averaged, bge = work / "teacher", work / "teachers" / BGE
        weights, config = cross_encoder(v1)
        _, precision = engines.choose(engine, config=config)
        return cls(
            model(*cross_encoder(averaged)),
            BiEncoder(model(*bi_encoder(bge)), bge / "tokenizer.json"),
            engines.prepare(weights, config, name=engine, precision=precision, threads=1),
        )


class HiddenAndLists:
    """The loss, for :meth:`Run.train`. ``rank``: of this process; each draws lists of its own."""

    window = 350
    cuts, sizes, shares = (110, 300, 300), (500, 1000, 2000), (0.3, 0.4, 0.3)  # tokens; of sizes: how often
    joined = 0, 280, 440  # tokens of a document made of a passage and those that follow it; 0: the passage alone
    last = 2  # number of last layers whose states are not learnt in lists of the kinds in Stage.free

    def __init__(
        self,
        work: Path,
        corpus: Corpus,
        teachers: Teachers,
        stage: Stage,
        *,
        budget: int,
        rank: int = 0,
    ) -> None:
        self.corpus, self.teachers, self.stage = corpus, teachers, stage
        self.budget, self.rank = budget, rank
        self.of_lists = losses.mix(LISTS_LOSS)
        shards = [load(path) for path in sorted(work.glob("pools-[0-9]*.npz"))]
        query, places, cosines = (np.concatenate([s[n] for s in shards]) for n in ("q", "places", "bge"))
        kept = query < corpus.trained
        self.query, self.places, self.cosines = query[kept], places[kept], cosines[kept]
        sources = [row["source"] for row in lines(work / "queries.jsonl")]
        kinds = ["science" if sources[q].startswith(SCIENCE) else "web" for q in self.query]
        weights = {"web": WEB, "science": SCIENTIFIC}
        # One more row stands for the lists of parts of long texts, which have no cosines.
        self.weights = np.array([*(weights[kind] for kind in kinds), WEB], np.float32)  # (lists + 1, 3)
        self.cosines = np.append(self.cosines, np.full_like(self.cosines[:1], COSINE_CENTRE), axis=0)
        self.of_kind = {kind: np.flatnonzero(np.array(kinds) == kind) for kind in weights}

    def __call__(self, model: StudentModel, step: int) -> Loss:
        rows, members, pairs, is_long = self._draw(step)
        batch, states = pack(pairs), None
        if is_long:  # longer than bge and the first teacher can read: the passage's stored cosine, the best window
            logits = best_windows(self.teachers.averaged, pairs, self.window)
            cosines = np.stack([self.cosines[row][chosen] for row, chosen in zip(rows, members, strict=True)])
        else:
            states, logits = self.teachers.averaged(batch)
            cosines = self.teachers.bge.cosines(pairs).reshape(len(rows), -1)
        own = self.teachers.v1.logits(batch).reshape(cosines.shape)
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
            free = np.isin(rows, np.concatenate([self.of_kind[kind] for kind in self.stage.free]))
            learning = torch.from_numpy(np.repeat(~free, [len(some) for some in members])).to(wanted.device)
            hidden = self._hidden(trace[1:], [states[layer] for layer in TARGETS], learning, np.diff(batch.cu_seqlens))
            loss, parts["hidden"] = loss + at(step, self.stage.hidden) * hidden, hidden.item()
        return Loss(loss, parts, batch.tokens)

    def _hidden(
        self, states: Sequence[Tensor], targets: Sequence[Tensor], learning: Tensor, lengths: np.ndarray
    ) -> Tensor:
        """Mean over layers of MSE / variance; in the ``last`` layers of the pairs that are ``learning`` (P,)."""
        tokens = learning.repeat_interleave(torch.from_numpy(lengths).to(learning.device))
        each: list[Tensor] = []
        for layer, (x, t) in enumerate(zip(states, targets, strict=True)):
            have, wanted, spread = x.float(), t.float(), t.float().var()
            if layer >= len(states) - self.last:
                kept = tokens if len(x) == len(tokens) else learning
                have, wanted = have[kept], wanted[kept]
            each.append(F.mse_loss(have, wanted) / spread if len(have) else have.sum())
        return torch.stack(each).mean()

    def _draw(self, step: int) -> tuple[list[int], list[np.ndarray], list[IdPair], bool]:
        """Lists of one step: row and members of each, all pairs, and whether the documents are long."""
        rng = np.random.default_rng((self.stage.seed, step, self.rank, 13))
        is_long = step % LONG_EVERY == LONG_EVERY - 1
        size = int(rng.choice(self.sizes, p=self.shares)) if is_long else 0
        cut = int(rng.choice(self.cuts))
        total = size or int(rng.choice(self.joined, p=self.stage.joined_shares))
        count = int(np.clip(self.budget // size, 3, K)) if is_long else K
        rows, members, pairs, used = list[int](), list[np.ndarray](), list[IdPair](), 0
        while used < self.budget * (0.7 if is_long else 1):
            if is_long and rng.random() < PARTS:
                row, chosen = len(self.query), np.arange(count)
                listed = self._parts(size, count, rng)
            else:
                kind = self.of_kind["science" if rng.random() < SCIENCE_SHARE else "web"]
                row = int(kind[rng.integers(len(kind))])
                order, hard = np.argsort(-self.cosines[row]), 2 if is_long else 5
                chosen = np.concatenate([rng.permutation(order[:8])[:hard], rng.permutation(order[8:])[: count - hard]])
                asked = self.corpus.query(int(self.query[row]))
                documents = [
                    self.corpus.among_others(int(p), total, rng, near=not is_long)
                    if total
                    else self.corpus.document(int(p), cut)
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
    parser.add_argument("student", type=Path, help="the folder of the student to begin with")
    parser.add_argument("work", type=Path)
    parser.add_argument("--data", type=Path, required=True, help="the folder with eval/, for the development sets")
    parser.add_argument("--v1", type=Path, required=True, help="the folder of turborank-embedded-v1, a teacher")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, help="default: the stage's")
    parser.add_argument("--budget", type=int, default=6144, help="tokens of a step in each process")
    parser.add_argument("--every", type=int, default=220, help="steps between two evaluations")
    args = parser.parse_args()
    work, stage = args.work, STAGES[args.stage]
    corpus = Corpus(work, work / "teachers" / L12)
    schedule = Schedule(
        args.steps or stage.steps,
        learning_rate=stage.rate,
        warmup=25,
        decay="linear",
        average=0.98,
        save_every=100,
        evaluate_every=args.every,
    )
    run = Run(Student.load(args.student), args.out, schedule, dtype=torch.bfloat16, freeze_words=True)
    run.resume()
    teachers = Teachers.load(work, args.v1, NativeModel)
    loss = HiddenAndLists(work, corpus, teachers, stage, budget=args.budget, rank=run.rank)

    def told(row: dict, steps: int) -> None:
        if run.rank == 0 and row["step"] % 20 == 0:
            print(row, flush=True)

    run.train(loss, DevSets(args.data / "eval", work), told)
    run.finish(run.current())


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
