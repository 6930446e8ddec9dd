"""TEACHERS: who may say how relevant a document is to a query. Each scores the pools of a training folder."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from turborank.distill import mine, vectors
from turborank.distill.folder import CACHE, TrainingFolder, check_name
from turborank.errors import InputError, UnknownKeyError
from turborank.evaluate.corpus import Step
from turborank.evaluate.download import Told, _quiet
from turborank.evaluate.first_stage import parameters
from turborank.types import Float32


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

    about: str  # for help and messages
    needs: str  # what WHERE is; "" where there is none
    open: Callable[[str], Teacher]


class Bm25:
    """BM25 over the folder's corpus, as the first stage scores."""

    def about(self) -> dict[str, Any]:
        return {"kind": "bm25", **parameters()}

    def score(self, folder: TrainingFolder, cache: Path, told: Told) -> Float32:
        """(N,) BM25 scores; 0 where no word is shared."""
        index = mine.index(folder.texts, progress=told("index passages"))
        scores = np.zeros(len(folder.places), dtype=np.float32)
        step = told("score with BM25")
        for at, query in enumerate(folder.queries):
            pool = folder.pool(at)
            scores[pool] = index.scores(query)[folder.places[pool]]
            _tell(step, at + 1, len(folder))
        return scores


class BiEncoderTeacher:
    """Cosines of a sentence-transformers bi-encoder; every text is embedded once."""

    def __init__(self, where: str) -> None:
        from turborank.distill.biencoder import BiEncoder

        self.model = BiEncoder.load(where)

    def about(self) -> dict[str, Any]:
        model = self.model
        return {"kind": "bi-encoder", "model": model.name, "sha256": model.revision, "max_tokens": model.max_tokens}

    def score(self, folder: TrainingFolder, cache: Path, told: Told) -> Float32:
        """(N,) cosines."""
        queries = vectors.embed(self.model, folder.queries, cache / "vectors", progress=told("embed queries"))
        documents = vectors.embed(self.model, folder.texts, cache / "vectors", progress=told("embed passages"))
        scores = np.zeros(len(folder.places), dtype=np.float32)
        for at in range(len(folder)):
            pool = folder.pool(at)
            scores[pool] = documents[folder.places[pool]] @ queries[at]
        return scores


TEACHERS: Mapping[str, Row] = {
    "bm25": Row("BM25 over the folder's corpus", "", lambda where: Bm25()),
    "biencoder": Row("a folder in sentence-transformers' layout", "FOLDER", BiEncoderTeacher),
}


def _tell(step: Step, done: int, total: int) -> None:
    if done % mine.REPORT_EVERY == 0 or done == total:
        step(done, total)


def parse(text: str) -> Spec:
    """A teacher as the command line gives it. Raises InputError with the table for an unknown kind."""
    name, equals, rest = text.partition("=") if "=" in text else ("", "", text)
    kind, _, where = rest.partition(":")
    if kind not in TEACHERS:
        raise UnknownKeyError("a kind of teacher", kind, TEACHERS, hint="write NAME=KIND:WHERE")
    row = TEACHERS[kind]
    if bool(where) != bool(row.needs):
        raise InputError(f"expected {kind}{':' + row.needs if row.needs else ''}, got {rest!r}")
    if where and not equals:
        raise InputError(f"expected a name for the teacher, as in NAME={text}, got none")
    return Spec(check_name(name or kind), kind, where)


def score(folder: TrainingFolder, spec: Spec, *, cache: Path | None = None, progress: Told = _quiet) -> Path:
    """A teacher's scores of all pools, written to the folder; the path of the run.

    What the teacher has said before is remembered in ``cache`` (by default the folder's own), so that a run that was
    interrupted goes on, to the same bytes.
    """
    teacher = TEACHERS[spec.kind].open(spec.where)
    values = teacher.score(folder, cache or folder.path / CACHE, progress)
    return folder.write_scores(spec.name, values, teacher.about())
