"""A little world in which the right answer is known: does a student learn more from a teacher than from labels?

Words name concepts, and every concept has several names. A query names some concepts; a document's true relevance is
how many of them it speaks of, under whatever names. What a training set usually has is made from that truth:

``labels``   one relevant document of each query, the rest unjudged (as in MS MARCO), although many are as good
``teacher``  a score of every document: the truth, and noise
``first stage``  how many words query and document share, which knows no second names

Held-out queries are judged completely, with the true grades, so nDCG on them measures what a student knows and not
whether it repeats the labels' omissions.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from turborank.data.trec import Scored, format_run, read_qrels, read_run
from turborank.distill import students, train
from turborank.distill.batches import BatchOptions
from turborank.distill.folder import CANDIDATES, CORPUS, DEV, QUERIES, SCORES, TRAIN
from turborank.distill.trainer import CURVE, Schedule
from turborank.evaluate.measures import means, per_query

TEACHER, PERFECT = "teacher", "perfect"  # the runs in scores/: truth with noise, and truth alone


class World(NamedTuple):
    """How large, and how hard."""

    concepts: int = 40
    names: int = 4  # of each concept
    asked: int = 3  # concepts of a query
    words: int = 12  # of a document
    pool: int = 16  # documents of a query
    queries: int = 400  # to learn from
    held_out: int = 100  # to measure with
    noise: float = 0.3  # standard deviation of the teacher's error; grades are 1 apart
    complete: bool = False  # judge every document of the training queries, too


class Pool(NamedTuple):
    """A query with its documents: concepts and words of both."""

    query: str
    documents: list[str]
    grades: list[int]  # the truth
    shared: list[int]  # words that query and document have in common


def concepts(world: World, rng: np.random.Generator) -> list[list[str]]:
    """Names of each concept: different words of three syllables."""
    syllables = [consonant + vowel for consonant in "bdfgklmnprstvz" for vowel in "aeiou"]
    found: dict[str, None] = {}
    while len(found) < world.concepts * world.names:
        found["".join(rng.choice(syllables, 3))] = None
    words = list(found)
    return [words[i :: world.concepts] for i in range(world.concepts)]


def pool(world: World, names: list[list[str]], rng: np.random.Generator) -> Pool:
    """A query about random concepts, and documents that speak of none to all of them."""
    asked = rng.choice(world.concepts, world.asked, replace=False)
    query = [str(rng.choice(names[concept])) for concept in asked]
    others = np.setdiff1d(np.arange(world.concepts), asked)
    documents, grades, shared = [], [], []
    for _ in range(world.pool):
        about = rng.choice(asked, rng.binomial(world.asked, 0.35), replace=False)
        rest = rng.choice(others, world.words - len(about), replace=False)
        words = [str(rng.choice(names[concept])) for concept in rng.permutation([*about, *rest])]
        documents.append(" ".join(words))
        grades.append(len(about))
        shared.append(len({*words} & {*query}))
    return Pool(" ".join(query), documents, grades, shared)


def write(folder: Path, world: World = World(), seed: int = 0) -> list[str]:  # noqa: B008 (it is immutable)
    """A training folder with the runs TEACHER and PERFECT in it; every word there is."""
    rng = np.random.default_rng(seed)
    names = concepts(world, rng)
    pools = [pool(world, names, rng) for _ in range(world.queries + world.held_out)]
    (folder / "qrels").mkdir(parents=True)
    (folder / SCORES).mkdir()
    _lines(folder / QUERIES, (json.dumps({"_id": f"q{q}", "text": each.query}) for q, each in enumerate(pools)))
    _lines(
        folder / CORPUS,
        (
            json.dumps({"_id": f"q{q}d{d}", "text": t})
            for q, each in enumerate(pools)
            for d, t in enumerate(each.documents)
        ),
    )
    judged: dict[str, list[str]] = {TRAIN: [], DEV: []}
    runs: dict[Path, list[str]] = {}
    for q, each in enumerate(pools):
        grades = np.asarray(each.grades, dtype=np.float64)
        split = TRAIN if q < world.queries else DEV
        known = range(world.pool) if split == DEV or world.complete else _one(grades, rng)
        judged[split] += [f"q{q}\tq{q}d{d}\t{each.grades[d]}" for d in known]
        for path, scores in (
            (folder / CANDIDATES, np.asarray(each.shared) + 1e-3 * rng.random(world.pool)),
            (folder / SCORES / f"{TEACHER}.trec", grades + rng.normal(0, world.noise, world.pool)),
            (folder / SCORES / f"{PERFECT}.trec", grades),
        ):
            found = [Scored(f"q{q}d{d}", float(scores[d])) for d in np.argsort(-scores, kind="stable")]
            runs.setdefault(path, []).append(format_run(f"q{q}", found, path.stem).rstrip("\n"))
    for split, rows in judged.items():
        _lines(folder / "qrels" / f"{split}.tsv", ["query-id\tcorpus-id\tscore", *rows])
    for path, rows in runs.items():
        _lines(path, rows)
    return [word for concept in names for word in concept]


def _one(grades: np.ndarray[tuple[int], np.dtype[np.float64]], rng: np.random.Generator) -> list[int]:
    """The document that got the label: any relevant one, by its grade the likelier; none where none is relevant."""
    return [int(rng.choice(len(grades), p=grades / grades.sum()))] if grades.sum() else []


def _lines(path: Path, lines: Iterable[str]) -> None:
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def ndcg(folder: Path, run: Path) -> float:
    """nDCG@10 of a run in the folder, over the held-out queries."""
    qrels, found = read_qrels(folder / "qrels" / f"{DEV}.tsv")[0], read_run(run)
    return means(per_query({query: found[query] for query in qrels}, qrels, ("nDCG@10",)))["nDCG@10"]


def novice(words: Sequence[str], seed: int) -> students.Student:
    """Four layers of 64 with random weights; it knows the words apart, and nothing of their meaning."""
    tokenizer = students.train_tokenizer(words, size=len(words) * 20)
    return students.from_scratch(tokenizer, shape="micro", layers=4, head="cosine", seed=seed)


def learn(
    folder: Path,
    student: Path,
    out: Path,
    loss: str,
    teacher: str | None,
    *,
    steps: int,
    evaluations: int = 5,
    budget: int = 2048,
    seed: int = 0,
) -> list[float]:
    """Train as ``turborank distill train`` does, on one thread; nDCG@10 of the held-out queries at each evaluation."""
    train.train(
        folder, student, out,
        Schedule(steps, 3e-3, average=0.97, save_every=steps, evaluate_every=max(1, steps // evaluations)),
        BatchOptions(budget=budget, hard_depth=8, document_tokens=(64,), long_every=0),
        train.TrainOptions(
            teachers=[teacher] if teacher else [], loss=loss, dev=[folder], max_length=128, bf16=False,
            train_words=True, threads=1, seed=seed,
        ),
    )  # fmt: skip
    rows = [json.loads(line) for line in (out / CURVE).read_text(encoding="utf-8").splitlines()]
    return [row["ndcg@10"] for row in rows if "ndcg@10" in row]
