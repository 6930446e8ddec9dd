"""Score a training folder with a teacher through a persistent cache; list suspected false negatives.

The cache is an SQLite file, so that no score is computed, or paid for, twice. The key of a score is a hash of its
query, its document and everything about the teacher that it depends on. One file may serve several folders and
processes. The cache of a serving reranker is :mod:`turborank.score_cache`.
"""

from __future__ import annotations

import contextlib
import json
import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from turborank import score_cache
from turborank.data.files import replacing
from turborank.distill.folder import UNKNOWN, TrainingFolder
from turborank.errors import EngineError, InputError
from turborank.types import Float32, StartProgress

FILE = "scores.sqlite3"
LOCK_TIMEOUT = 60.0  # seconds to wait for the lock of another process
MAX_PARAMETERS = 500  # per statement; every build of SQLite takes 999


def key(revision: str, query: str, document: str) -> bytes:
    """The 16-byte key of a score of the teacher with this revision."""
    return score_cache.key(revision, query, document, 16)


class TeacherScoreCache:
    """Scores by key; float32 values are returned bit for bit."""

    def __init__(self, connection: sqlite3.Connection, path: Path) -> None:
        self._connection = connection
        self._path = path

    def get(self, keys: Sequence[bytes]) -> Float32:
        """(K,) the score of every key; NaN where there is none."""
        known: dict[bytes, float] = {}
        for start in range(0, len(keys), MAX_PARAMETERS):
            part = keys[start : start + MAX_PARAMETERS]
            marks = ",".join("?" * len(part))  # only placeholders
            known.update(self._connection.execute(f"SELECT key, score FROM scores WHERE key IN ({marks})", part))
        return np.array([known.get(one, np.nan) for one in keys], dtype=np.float32)

    def put(self, keys: Sequence[bytes], scores: Float32) -> None:
        """Store scores (K,), durably and all or none. Raises InputError where the file cannot be written."""
        with self._faults(), self._connection:
            self._connection.executemany(
                "INSERT OR REPLACE INTO scores VALUES (?, ?)", zip(keys, scores.tolist(), strict=True)
            )

    @contextlib.contextmanager
    def _faults(self) -> Iterator[None]:
        with _faults(self._path):
            yield


@contextlib.contextmanager
def _faults(path: Path) -> Iterator[None]:
    try:
        yield
    except sqlite3.Error as error:
        raise InputError(
            f"expected to keep scores at {path}, got {error}",
            hint="make room, or choose another --cache; stored scores remain",
        ) from error


@contextlib.contextmanager
def open_cache(folder: Path) -> Iterator[TeacherScoreCache]:
    """The cache in a folder, created if missing. Raises InputError where it cannot be read or written."""
    path = folder / FILE
    with _faults(path):
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"expected a folder for the cache, got {error.strerror} at {folder}") from error
        connection = sqlite3.connect(path, timeout=LOCK_TIMEOUT)
    try:
        with _faults(path):
            connection.execute("PRAGMA journal_mode = WAL")
            connection.execute("PRAGMA synchronous = NORMAL")
            connection.execute("CREATE TABLE IF NOT EXISTS scores (key BLOB PRIMARY KEY, score REAL) WITHOUT ROWID")
        yield TeacherScoreCache(connection, path)
    finally:
        connection.close()


class Question(NamedTuple):
    """A query with K documents to score."""

    query: str
    documents: tuple[str, ...]
    entries: npt.NDArray[np.int64]  # (K,) which distinct pairs these are; teachers only pass them on
    keys: tuple[bytes, ...]


class PairTeacher(Protocol):
    """Scores questions of at most ``max_documents`` documents; yields (question, scores (K,)) in any order.

    ``about`` holds everything a score depends on. It identifies the teacher in the cache.
    """

    max_documents: int

    def about(self) -> dict[str, Any]: ...

    def answer(self, questions: Iterable[Question]) -> Iterator[tuple[Question, Float32]]: ...


def score_pairs(teacher: PairTeacher, folder: TrainingFolder, cache: Path, progress: StartProgress) -> Float32:
    """(N,) scores of all pool entries: from the cache, or from the teacher.

    Every answer is cached before the next one is awaited, so an interruption loses only questions under way. Equal
    pairs are scored once. Raises EngineError for an answer that is not one finite score per document.
    """
    revision = json.dumps(teacher.about(), sort_keys=True, ensure_ascii=False)
    first, which = _different_pairs(folder)
    scores = np.full(len(first), np.nan, dtype=np.float32)
    step = progress("ask the teacher")
    done = 0
    with open_cache(cache) as stored:
        questions = _questions(folder, first, scores, stored, revision, teacher.max_documents)
        for question, answer in teacher.answer(questions):
            if answer.shape != question.entries.shape or not np.isfinite(answer).all():
                got = f"{answer.tolist()!r:.80} for {question.query!r:.80}"
                raise EngineError(f"expected {len(question.entries)} finite scores, got {got}")
            stored.put(question.keys, answer)
            scores[question.entries] = answer
            done = max(done, int(question.entries[-1]) + 1)
            step(done, len(scores))
    step(len(scores), len(scores))
    return scores[which]


def _different_pairs(folder: TrainingFolder) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Distinct pairs of texts: (M,) first pool entry of each, in folder order; and (N,) each entry's pair."""
    queries, documents = _first_index(folder.queries), _first_index(folder.texts)
    pairs = queries[folder.query_index] * len(documents) + documents[folder.doc_index]
    _, first, which = np.unique(pairs, return_index=True, return_inverse=True)
    order = np.argsort(first, kind="stable")  # in folder order
    rank = np.empty_like(order)
    rank[order] = np.arange(len(order))
    return first[order], rank[which.reshape(-1)]


def _first_index(texts: list[str]) -> npt.NDArray[np.int64]:
    known: dict[str, int] = {}
    return np.array([known.setdefault(text, index) for index, text in enumerate(texts)], dtype=np.int64)


def _questions(
    folder: TrainingFolder,
    first: npt.NDArray[np.int64],
    scores: Float32,
    stored: TeacherScoreCache,
    revision: str,
    max_documents: int,
) -> Iterator[Question]:
    """Questions for pairs missing in the cache; fills in ``scores`` of the cached ones as it goes."""
    query_index = folder.query_index[first]
    bounds = np.flatnonzero(np.diff(query_index, prepend=-1)) if len(first) else np.zeros(0, dtype=np.int64)
    for start, end in zip(bounds, [*bounds[1:], len(first)], strict=True):
        query = folder.queries[query_index[start]]
        texts = [folder.texts[document] for document in folder.doc_index[first[start:end]]]
        keys = [key(revision, query, text) for text in texts]
        scores[start:end] = stored.get(keys)
        missing = np.flatnonzero(np.isnan(scores[start:end]))
        for begin in range(0, len(missing), max_documents):
            part = missing[begin : begin + max_documents]
            documents = tuple(texts[i] for i in part)
            yield Question(query, documents, start + part, tuple(keys[i] for i in part))


# Suspected false negatives: unlabelled documents that a teacher scores above a labelled one.

SHOWN = 300  # characters of a text in the report
COLUMNS = (
    "query_id", "labelled_id", "suspect_id", "labelled_score", "suspect_score", "difference",
    "query", "labelled_text", "suspect_text",
)  # fmt: skip


class SuspectSummary(NamedTuple):
    """Counts over the queries of one source that have a relevant document in their pool."""

    source: str
    queries: int
    with_suspects: int
    suspects: int
    unlabelled: int  # pool entries without a label


def find_suspects(folder: TrainingFolder, scores: Float32, margin: float = 0.0) -> npt.NDArray[np.bool_]:
    """(N,) whether a pool entry is a suspect: unlabelled, and scored more than ``margin`` above a relevant document.

    Of several relevant documents the one with the lowest score counts.
    """
    lowest = np.full(len(folder), np.inf, dtype=np.float32)
    relevant = folder.labels > 0
    np.minimum.at(lowest, folder.query_index[relevant], scores[relevant])
    found: npt.NDArray[np.bool_] = (folder.labels == UNKNOWN) & (
        scores > lowest[folder.query_index] + np.float32(margin)
    )
    return found


def suspect_summaries(folder: TrainingFolder, suspects: npt.NDArray[np.bool_]) -> list[SuspectSummary]:
    """A summary per source, in order of first occurrence."""
    relevant = np.zeros(len(folder), dtype=np.bool_)
    relevant[folder.query_index[folder.labels > 0]] = True
    counts = np.bincount(folder.query_index[suspects], minlength=len(folder))
    unlabelled = np.bincount(folder.query_index[folder.labels == UNKNOWN], minlength=len(folder))
    sources = np.array(folder.sources)
    rows = []
    for source in dict.fromkeys(folder.sources):
        mine = relevant & (sources == source)
        if mine.any():
            queries, suspected = int(mine.sum()), counts[mine]
            rows.append(
                SuspectSummary(
                    source, queries, int((suspected > 0).sum()), int(suspected.sum()), int(unlabelled[mine].sum())
                )
            )
    return rows


def write_suspects(folder: TrainingFolder, scores: Float32, suspects: npt.NDArray[np.bool_], path: Path) -> None:
    """Write a table (TSV) of suspects and the labelled documents they outscore, largest difference first."""
    rows = sorted(_rows(folder, scores, suspects), key=lambda row: (-float(row[5]), row[0], row[2]))
    with replacing(path) as file:
        for row in [COLUMNS, *rows]:
            file.write(("\t".join(row) + "\n").encode("utf-8", "replace"))


def _rows(folder: TrainingFolder, scores: Float32, suspects: npt.NDArray[np.bool_]) -> Iterator[tuple[str, ...]]:
    for query in np.unique(folder.query_index[suspects]).tolist():
        pool = np.arange(folder.bounds[query], folder.bounds[query + 1])
        relevant = pool[folder.labels[pool] > 0]
        passed = relevant[np.argmin(scores[relevant])]
        for at in pool[suspects[pool]]:
            labelled, suspect = folder.doc_index[passed], folder.doc_index[at]
            yield (
                folder.query_ids[query], folder.doc_ids[labelled], folder.doc_ids[suspect],
                f"{scores[passed]:.6g}", f"{scores[at]:.6g}", f"{scores[at] - scores[passed]:.6g}",
                *(" ".join(text.split())[:SHOWN] for text in (
                    folder.queries[query], folder.texts[labelled], folder.texts[suspect]
                )),
            )  # fmt: skip
