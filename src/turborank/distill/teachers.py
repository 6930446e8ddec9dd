"""TEACHERS: who may say how relevant a document is to a query. Each scores the pools of a training folder."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from turborank import checkpoint as checkpoints
from turborank.data.bm25 import parameters
from turborank.data.download import Told, quiet
from turborank.data.files import file_hash
from turborank.distill import biencoder, http_teacher, pools
from turborank.distill.folder import CACHE, Ids, TrainingFolder, check_name, read_pairs
from turborank.distill.scores import PairTeacher, Question, score_pairs
from turborank.errors import InputError, UnknownKeyError
from turborank.reranker import Reranker
from turborank.types import Float32, Pair

PAIRS_AT_ONCE = 256  # given to a checkpoint together, to be sorted by length: what a kill can cost


@dataclass(frozen=True)
class Settings:
    """Options of teachers that have any."""

    reranker: Mapping[str, Any] = field(default_factory=dict)  # of turborank.Reranker
    http: http_teacher.Settings = field(default_factory=http_teacher.Settings)


class Teacher(Protocol):
    """Something that scores pools. ``about`` says whose the scores are: other facts, other scores."""

    def about(self) -> dict[str, Any]: ...

    def score(self, folder: TrainingFolder, cache: Path, told: Told) -> Float32:
        """(N,) the scores of all pool places."""


class Spec(NamedTuple):
    """A teacher on the command line: ``NAME=KIND:WHERE``, or a KIND that needs no more."""

    name: str
    kind: str
    where: str


class Row(NamedTuple):
    """A kind of teacher."""

    note: str
    where: str  # what WHERE is; "" where there is none
    open: Callable[[str, Settings], Teacher]


class Bm25:
    """BM25 over the folder's corpus, as the first stage scores."""

    def about(self) -> dict[str, Any]:
        return {"kind": "bm25", **parameters()}

    def score(self, folder: TrainingFolder, cache: Path, told: Told) -> Float32:
        """(N,) BM25 scores; 0 where no word is shared."""
        index = pools.index(folder.texts, progress=told("index passages"))
        scores = np.zeros(len(folder.places), dtype=np.float32)
        step = told("score with BM25")
        for at, query in enumerate(folder.queries):
            pool = folder.pool(at)
            scores[pool] = index.scores(query)[folder.places[pool]]
            if (at + 1) % pools.REPORT_EVERY == 0 or at + 1 == len(folder):
                step(at + 1, len(folder))
        return scores


class BiEncoderTeacher:
    """Cosines of a sentence-transformers bi-encoder; every text is embedded once."""

    def __init__(self, where: str) -> None:
        from turborank.distill.biencoder import BiEncoder

        self.model = BiEncoder.load(where)

    def about(self) -> dict[str, Any]:
        model = self.model
        return {"kind": "biencoder", "model": model.name, "sha256": model.revision, "max_tokens": model.max_tokens}

    def score(self, folder: TrainingFolder, cache: Path, told: Told) -> Float32:
        """(N,) cosines."""
        queries = biencoder.embed(self.model, folder.queries, cache / "vectors", progress=told("embed queries"))
        documents = biencoder.embed(self.model, folder.texts, cache / "vectors", progress=told("embed passages"))
        scores = np.zeros(len(folder.places), dtype=np.float32)
        for at in range(len(folder)):
            pool = folder.pool(at)
            scores[pool] = documents[folder.places[pool]] @ queries[at]
        return scores


class Checkpoint:
    """A cross-encoder that turborank loads; its logits."""

    at_once = PAIRS_AT_ONCE

    def __init__(self, reranker: Reranker) -> None:
        self.reranker = reranker

    def about(self) -> dict[str, Any]:
        """What a logit depends on; threads and batches are not among it."""
        model, engine = self.reranker, self.reranker.engine
        return {
            "kind": "checkpoint",
            "model": model.name,
            "sha256": checkpoints.hashes(model.checkpoint),
            "engine": engine.name,
            "precision": engine.precision,
            "isa": engine.isa,
            "max_length": model.max_length,
            "length": model.encoder.policy,
        }

    def answer(self, questions: Iterable[Question]) -> Iterator[tuple[Question, Float32]]:
        """Questions are gathered until they make PAIRS_AT_ONCE pairs."""
        waiting: list[Question] = []
        for question in questions:
            waiting.append(question)
            if sum(len(one.documents) for one in waiting) >= PAIRS_AT_ONCE:
                yield from self._together(waiting)
                waiting = []
        if waiting:
            yield from self._together(waiting)

    def _together(self, questions: list[Question]) -> Iterator[tuple[Question, Float32]]:
        pairs = [Pair(question.query, document) for question in questions for document in question.documents]
        logits = self.reranker.score_detailed(pairs).logits
        ends = np.cumsum([len(question.documents) for question in questions])
        yield from zip(questions, np.split(logits, ends[:-1]), strict=True)


class Remembered:
    """A teacher that is asked pair by pair, behind the cache."""

    def __init__(self, teacher: PairTeacher) -> None:
        self.teacher = teacher
        self.about = teacher.about

    def score(self, folder: TrainingFolder, cache: Path, told: Told) -> Float32:
        """(N,) scores, asked for or remembered."""
        return score_pairs(self.teacher, folder, cache, told)


class RunFile:
    """Scores that are there already, in a TREC run with the folder's ids."""

    def __init__(self, where: str) -> None:
        self.path = Path(where).expanduser()

    def about(self) -> dict[str, Any]:
        return {"kind": "run", "file": self.path.name, "sha256_of_file": file_hash(self.path)}

    def score(self, folder: TrainingFolder, cache: Path, told: Told) -> Float32:
        """(N,) the run's scores. Raises InputError where a pool place has none."""
        run = read_pairs(self.path, Ids(folder.query_ids), Ids(folder.doc_ids))
        return folder.align(run, self.path)


TEACHERS: Mapping[str, Row] = {
    "bm25": Row("BM25 over the folder's corpus", "", lambda where, settings: Bm25()),
    "biencoder": Row("cosines of a bi-encoder", "FOLDER", lambda where, settings: BiEncoderTeacher(where)),
    "checkpoint": Row(
        "logits of a cross-encoder",
        "MODEL",
        lambda where, settings: Remembered(Checkpoint(Reranker(where, **settings.reranker))),
    ),
    "http": Row(
        "an HTTP endpoint",
        "DIALECT:URL",
        lambda where, settings: Remembered(http_teacher.HttpTeacher(where, settings.http)),
    ),
    "run": Row("a TREC run", "FILE", lambda where, settings: RunFile(where)),
}


def parse(text: str) -> Spec:
    """A teacher as the command line gives it. Raises InputError with the table for an unknown kind."""
    name, equals, rest = text.partition("=") if "=" in text.partition(":")[0] else ("", "", text)
    kind, _, where = rest.partition(":")
    if kind not in TEACHERS:
        raise UnknownKeyError("a kind of teacher", kind, TEACHERS, hint="write NAME=KIND:WHERE")
    row = TEACHERS[kind]
    if bool(where) != bool(row.where):
        raise InputError(f"expected {kind}{':' + row.where if row.where else ''}, got {rest!r}")
    if where and not equals:
        raise InputError(f"expected a name for the teacher, as in NAME={text}, got none")
    return Spec(check_name(name or kind), kind, where)


def score(
    folder: TrainingFolder,
    spec: Spec,
    settings: Settings | None = None,
    *,
    cache: Path | None = None,
    progress: Told = quiet,
) -> Path:
    """A teacher's scores of all pools, written to the folder; the path of the run.

    What the teacher has said before is remembered in ``cache`` (by default the folder's own), so that a run that was
    interrupted goes on, to the same bytes.
    """
    teacher = TEACHERS[spec.kind].open(spec.where, settings or Settings())
    values = teacher.score(folder, cache or folder.path / CACHE, progress)
    return folder.write_scores(spec.name, values, teacher.about())


# Several teachers as one: each teacher's scores brought to a common footing, then summed with weights.

NORMS = ("raw", "z", "minmax")
_LEAST_SPREAD = 1e-3  # of a pool's scores: what is flatter than that stays flat


class TeacherSpec(NamedTuple):
    """One teacher of an ensemble, as NAME[:WEIGHT[:NORM]] says it."""

    name: str
    weight: float = 1.0
    norm: str = "raw"


def parse_weighted(text: str) -> TeacherSpec:
    """``minilm:20:raw`` -> TeacherSpec. Raises InputError for anything else."""
    name, *rest = text.split(":")
    try:
        weight = float(rest[0]) if rest else 1.0
    except ValueError:
        weight = math.nan
    if not name or len(rest) > 2 or not math.isfinite(weight):
        raise InputError(f"expected NAME[:WEIGHT[:NORM]], say minilm:20:raw, got {text!r}")
    norm = rest[1] if len(rest) > 1 else "raw"
    if norm not in NORMS:
        raise UnknownKeyError("norm", norm, NORMS)
    return TeacherSpec(name, weight, norm)


def normalise(scores: Float32, bounds: npt.NDArray[np.int64], norm: str) -> Float32:
    """Scores (N,) of pools ``bounds`` (Q+1,); each pool to mean 0 and deviation 1 (``z``), or to 0 … 1 (``minmax``)."""
    if norm == "raw":
        return scores.astype(np.float32)
    if norm not in NORMS:
        raise UnknownKeyError("norm", norm, NORMS)
    starts, sizes = bounds[:-1], np.diff(bounds)
    filled = sizes > 0
    starts, sizes = starts[filled], sizes[filled]
    wide = scores.astype(np.float64)
    if not len(starts):
        return scores.astype(np.float32)
    if norm == "minmax":
        low, high = np.minimum.reduceat(wide, starts), np.maximum.reduceat(wide, starts)
        spread = high - low
    else:
        low = np.add.reduceat(wide, starts) / sizes
        spread = np.sqrt(np.add.reduceat((wide - np.repeat(low, sizes)) ** 2, starts) / sizes)
    out: Float32 = ((wide - np.repeat(low, sizes)) / np.repeat(np.maximum(spread, _LEAST_SPREAD), sizes)).astype(
        np.float32
    )
    return out


def fuse(teachers: Sequence[TeacherSpec], scores: Mapping[str, Float32], bounds: npt.NDArray[np.int64]) -> Float32:
    """Weighted sum (N,) of the teachers' scores, each normalised within its pool."""
    if not teachers:
        raise InputError("expected at least one teacher, got none")
    total = np.zeros(len(scores[teachers[0].name]), dtype=np.float32)
    for teacher in teachers:
        total += np.float32(teacher.weight) * normalise(scores[teacher.name], bounds, teacher.norm)
    return total
