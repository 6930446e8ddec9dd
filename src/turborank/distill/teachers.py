"""TEACHERS: the sources of relevance scores for the pools of a training folder."""

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
from turborank.data.files import file_hash
from turborank.distill import biencoder, http_teacher, sources
from turborank.distill.folder import CACHE, Ids, TrainingFolder, check_name, read_pairs
from turborank.distill.scores import PairTeacher, Question, score_pairs
from turborank.errors import InputError, UnknownKeyError
from turborank.reranker import Reranker
from turborank.types import Float32, Pair, StartProgress, no_progress

PAIRS_PER_CALL = 256  # scored together, sorted by length; an interruption loses at most these


@dataclass(frozen=True)
class TeacherOptions:
    """Options of the teachers that have some."""

    reranker: Mapping[str, Any] = field(default_factory=dict)  # keyword arguments of turborank.Reranker
    http: http_teacher.HttpOptions = field(default_factory=http_teacher.HttpOptions)


class Teacher(Protocol):
    """Scores the pools of a folder. ``about`` holds everything the scores depend on."""

    def about(self) -> dict[str, Any]: ...

    def score(self, folder: TrainingFolder, cache: Path, progress: StartProgress) -> Float32:
        """(N,) scores of all pool entries."""


class TeacherSpec(NamedTuple):
    """A teacher as named on the command line: ``NAME=KIND:WHERE``, or a KIND without WHERE."""

    name: str
    kind: str
    where: str


class TeacherKind(NamedTuple):
    """A row of TEACHERS."""

    note: str
    where: str  # meaning of WHERE; "" for kinds without it
    open: Callable[[str, TeacherOptions], Teacher]


class Bm25Teacher:
    """BM25 over the folder's corpus (:mod:`turborank.data.bm25`)."""

    def about(self) -> dict[str, Any]:
        return {"kind": "bm25", **parameters()}

    def score(self, folder: TrainingFolder, cache: Path, progress: StartProgress) -> Float32:
        """(N,) BM25 scores; 0 for documents that share no word with the query."""
        index = sources.index(folder.texts, progress=progress("index passages"))
        scores = np.zeros(len(folder.doc_index), dtype=np.float32)
        step = progress("score with BM25")
        for at, query in enumerate(folder.queries):
            pool = folder.pool(at)
            scores[pool] = index.scores(query)[folder.doc_index[pool]]
            if (at + 1) % sources.REPORT_EVERY == 0 or at + 1 == len(folder):
                step(at + 1, len(folder))
        return scores


class BiEncoderTeacher:
    """Cosine similarities of a sentence-transformers bi-encoder; vectors are cached."""

    def __init__(self, where: str) -> None:
        self.model = biencoder.BiEncoder.load(where)

    def about(self) -> dict[str, Any]:
        model = self.model
        return {"kind": "biencoder", "model": model.name, "sha256": model.revision, "max_tokens": model.max_tokens}

    def score(self, folder: TrainingFolder, cache: Path, progress: StartProgress) -> Float32:
        """(N,) cosines of query and document."""
        queries = biencoder.embed(self.model, folder.queries, cache / "vectors", progress=progress("embed queries"))
        documents = biencoder.embed(self.model, folder.texts, cache / "vectors", progress=progress("embed passages"))
        scores = np.zeros(len(folder.doc_index), dtype=np.float32)
        for at in range(len(folder)):
            pool = folder.pool(at)
            scores[pool] = documents[folder.doc_index[pool]] @ queries[at]
        return scores


class CheckpointTeacher:
    """Logits of a cross-encoder that turborank loads."""

    max_documents = PAIRS_PER_CALL

    def __init__(self, reranker: Reranker) -> None:
        self.reranker = reranker

    def about(self) -> dict[str, Any]:
        """What a logit depends on; threads and batches do not change it."""
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
        """Scores of questions, computed PAIRS_PER_CALL pairs at a time."""
        waiting: list[Question] = []
        for question in questions:
            waiting.append(question)
            if sum(len(one.documents) for one in waiting) >= PAIRS_PER_CALL:
                yield from self._together(waiting)
                waiting = []
        if waiting:
            yield from self._together(waiting)

    def _together(self, questions: list[Question]) -> Iterator[tuple[Question, Float32]]:
        pairs = [Pair(question.query, document) for question in questions for document in question.documents]
        logits = self.reranker.score_detailed(pairs).logits
        ends = np.cumsum([len(question.documents) for question in questions])
        yield from zip(questions, np.split(logits, ends[:-1]), strict=True)


class CachedTeacher:
    """A teacher of single pairs behind the score cache."""

    def __init__(self, teacher: PairTeacher) -> None:
        self.teacher = teacher
        self.about = teacher.about

    def score(self, folder: TrainingFolder, cache: Path, progress: StartProgress) -> Float32:
        """(N,) scores, cached or computed."""
        return score_pairs(self.teacher, folder, cache, progress)


class RunTeacher:
    """Existing scores, in a TREC run with the folder's ids."""

    def __init__(self, where: str) -> None:
        self.path = Path(where).expanduser()

    def about(self) -> dict[str, Any]:
        return {"kind": "run", "file": self.path.name, "sha256_of_file": file_hash(self.path)}

    def score(self, folder: TrainingFolder, cache: Path, progress: StartProgress) -> Float32:
        """(N,) the run's scores. Raises InputError where a pool entry has none."""
        run = read_pairs(self.path, Ids(folder.query_ids), Ids(folder.doc_ids))
        return folder.align(run, self.path)


TEACHERS: Mapping[str, TeacherKind] = {
    "bm25": TeacherKind("BM25 over the folder's corpus", "", lambda where, options: Bm25Teacher()),
    "biencoder": TeacherKind("cosines of a bi-encoder", "FOLDER", lambda where, options: BiEncoderTeacher(where)),
    "checkpoint": TeacherKind(
        "logits of a cross-encoder",
        "MODEL",
        lambda where, options: CachedTeacher(CheckpointTeacher(Reranker(where, **options.reranker))),
    ),
    "http": TeacherKind(
        "an HTTP endpoint",
        "DIALECT:URL",
        lambda where, options: CachedTeacher(http_teacher.HttpTeacher(where, options.http)),
    ),
    "run": TeacherKind("a TREC run", "FILE", lambda where, options: RunTeacher(where)),
}


def parse(text: str) -> TeacherSpec:
    """Parse NAME=KIND:WHERE. Raises UnknownKeyError for an unknown kind, InputError for anything else malformed."""
    name, equals, rest = text.partition("=") if "=" in text.partition(":")[0] else ("", "", text)
    kind, _, where = rest.partition(":")
    if kind not in TEACHERS:
        raise UnknownKeyError("a kind of teacher", kind, TEACHERS, hint="write NAME=KIND:WHERE")
    row = TEACHERS[kind]
    if bool(where) != bool(row.where):
        raise InputError(f"expected {kind}{':' + row.where if row.where else ''}, got {rest!r}")
    if where and not equals:
        raise InputError(f"expected a name for the teacher, as in NAME={text}, got none")
    return TeacherSpec(check_name(name or kind), kind, where)


def score(
    folder: TrainingFolder,
    spec: TeacherSpec,
    options: TeacherOptions | None = None,
    *,
    cache: Path | None = None,
    progress: StartProgress = no_progress,
) -> Path:
    """Score all pools with a teacher and write the run to the folder; its path.

    Scores are cached in ``cache`` (default: ``cache/`` in the folder), so an interrupted call can be repeated and gives
    the same bytes.
    """
    teacher = TEACHERS[spec.kind].open(spec.where, options or TeacherOptions())
    values = teacher.score(folder, cache or folder.path / CACHE, progress)
    return folder.write_scores(spec.name, values, teacher.about())


# Ensembles: each teacher's scores are normalised within pools, then summed with weights.

NORMS = ("raw", "z", "minmax")
_MIN_SPREAD = 1e-3  # of a pool's scores; pools with less spread are not stretched to unit spread


class WeightedTeacher(NamedTuple):
    """One teacher of an ensemble: NAME[:WEIGHT[:NORM]]."""

    name: str
    weight: float = 1.0
    norm: str = "raw"


def parse_weighted(text: str) -> WeightedTeacher:
    """Parse NAME[:WEIGHT[:NORM]], as in ``minilm:20:raw``. Raises InputError for anything else."""
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
    return WeightedTeacher(name, weight, norm)


def normalise(scores: Float32, bounds: npt.NDArray[np.int64], norm: str) -> Float32:
    """Normalise scores (N,) within the pools given by ``bounds`` (Q+1,).

    ``z``: mean 0, standard deviation 1; ``minmax``: 0 to 1; ``raw``: unchanged. Raises UnknownKeyError for others.
    """
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
    out: Float32 = ((wide - np.repeat(low, sizes)) / np.repeat(np.maximum(spread, _MIN_SPREAD), sizes)).astype(
        np.float32
    )
    return out


def fuse(teachers: Sequence[WeightedTeacher], scores: Mapping[str, Float32], bounds: npt.NDArray[np.int64]) -> Float32:
    """Weighted sum (N,) of the teachers' scores, each normalised within pools. Raises InputError without teachers."""
    if not teachers:
        raise InputError("expected at least one teacher, got none")
    total = np.zeros(len(scores[teachers[0].name]), dtype=np.float32)
    for teacher in teachers:
        total += np.float32(teacher.weight) * normalise(scores[teacher.name], bounds, teacher.norm)
    return total
