"""Teachers that are asked about one query and some documents at a time, and everything they say is kept."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from turborank.data.download import Told
from turborank.data.files import replacing
from turborank.distill.folder import UNKNOWN, TrainingFolder
from turborank.distill.score_cache import ScoreCache, key, open_cache
from turborank.errors import EngineError
from turborank.types import Float32


class Question(NamedTuple):
    """What a teacher is asked at once."""

    query: str
    documents: tuple[str, ...]
    places: npt.NDArray[np.int64]  # where the answers go; the teacher's only to carry
    keys: tuple[bytes, ...]


class PairTeacher(Protocol):
    """Answers questions of at most ``at_once`` documents, in any order, each as soon as it is known.

    ``about`` holds everything a score depends on: it is the teacher's identity in the cache.
    """

    at_once: int

    def about(self) -> dict[str, Any]: ...

    def answer(self, questions: Iterable[Question]) -> Iterator[tuple[Question, Float32]]: ...


def score_pairs(teacher: PairTeacher, folder: TrainingFolder, cache: Path, told: Told) -> Float32:
    """(N,) the scores of all pool places: those in the cache, and the teacher's answers about the others.

    Answers are in the cache before the next is waited for, so a kill costs what is under way and no more. Equal pairs
    are asked about once. Raises EngineError for an answer that is no score.
    """
    revision = json.dumps(teacher.about(), sort_keys=True, ensure_ascii=False)
    first, which = _different_pairs(folder)
    scores = np.full(len(first), np.nan, dtype=np.float32)
    step = told("ask the teacher")
    done = 0
    with open_cache(cache) as kept:
        questions = _questions(folder, first, scores, kept, revision, teacher.at_once)
        for question, answer in teacher.answer(questions):
            if answer.shape != question.places.shape or not np.isfinite(answer).all():
                got = f"{answer.tolist()!r:.80} for {question.query!r:.80}"
                raise EngineError(f"expected {len(question.places)} finite scores, got {got}")
            kept.put(question.keys, answer)
            scores[question.places] = answer
            done = max(done, int(question.places[-1]) + 1)
            step(done, len(scores))
    step(len(scores), len(scores))
    return scores[which]


def _different_pairs(folder: TrainingFolder) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Pool places of the first occurrence of each pair of texts; and for every pool place, which of those it is."""
    queries, documents = _first_places(folder.queries), _first_places(folder.texts)
    pairs = queries[folder.query_of] * len(documents) + documents[folder.places]
    _, first, which = np.unique(pairs, return_index=True, return_inverse=True)
    order = np.argsort(first, kind="stable")  # asked in the order of the folder
    rank = np.empty_like(order)
    rank[order] = np.arange(len(order))
    return first[order], rank[which.reshape(-1)]


def _first_places(texts: list[str]) -> npt.NDArray[np.int64]:
    known: dict[str, int] = {}
    return np.array([known.setdefault(text, place) for place, text in enumerate(texts)], dtype=np.int64)


def _questions(
    folder: TrainingFolder,
    first: npt.NDArray[np.int64],
    scores: Float32,
    kept: ScoreCache,
    revision: str,
    at_once: int,
) -> Iterator[Question]:
    """Questions about pairs that are not in the cache; the scores of the others are filled in on the way."""
    query_of = folder.query_of[first]
    bounds = np.flatnonzero(np.diff(query_of, prepend=-1)) if len(first) else np.zeros(0, dtype=np.int64)
    for start, end in zip(bounds, [*bounds[1:], len(first)], strict=True):
        query = folder.queries[query_of[start]]
        texts = [folder.texts[place] for place in folder.places[first[start:end]]]
        keys = [key(revision, query, text) for text in texts]
        scores[start:end] = kept.get(keys)
        missing = np.flatnonzero(np.isnan(scores[start:end]))
        for begin in range(0, len(missing), at_once):
            part = missing[begin : begin + at_once]
            documents = tuple(texts[i] for i in part)
            yield Question(query, documents, start + part, tuple(keys[i] for i in part))


# Suspected false negatives: documents nobody labelled that a teacher puts above one that somebody did.

SHOWN = 300  # characters of a text in the report
COLUMNS = (
    "query_id", "labelled_id", "suspect_id", "labelled_score", "suspect_score", "difference",
    "query", "labelled_text", "suspect_text",
)  # fmt: skip


class Summary(NamedTuple):
    """Of the queries of one source that have a labelled document in their pool."""

    source: str
    queries: int
    with_suspects: int
    suspects: int
    unlabelled: int  # pool places among which they are


def find(folder: TrainingFolder, scores: Float32, margin: float = 0.0) -> npt.NDArray[np.bool_]:
    """(N,) whether a pool place is a suspect: unlabelled, and more than ``margin`` above a relevant document.

    Of several relevant documents the one that the teacher likes least counts: whatever is above it may be relevant.
    """
    lowest = np.full(len(folder), np.inf, dtype=np.float32)
    relevant = folder.labels > 0
    np.minimum.at(lowest, folder.query_of[relevant], scores[relevant])
    found: npt.NDArray[np.bool_] = (folder.labels == UNKNOWN) & (scores > lowest[folder.query_of] + np.float32(margin))
    return found


def summaries(folder: TrainingFolder, suspects: npt.NDArray[np.bool_]) -> list[Summary]:
    """A summary for each source, in their order."""
    asked = np.zeros(len(folder), dtype=np.bool_)
    asked[folder.query_of[folder.labels > 0]] = True
    counts = np.bincount(folder.query_of[suspects], minlength=len(folder))
    unlabelled = np.bincount(folder.query_of[folder.labels == UNKNOWN], minlength=len(folder))
    sources = np.array(folder.sources)
    rows = []
    for source in dict.fromkeys(folder.sources):
        mine = asked & (sources == source)
        if mine.any():
            queries, suspected = int(mine.sum()), counts[mine]
            rows.append(
                Summary(source, queries, int((suspected > 0).sum()), int(suspected.sum()), int(unlabelled[mine].sum()))
            )
    return rows


def write(folder: TrainingFolder, scores: Float32, suspects: npt.NDArray[np.bool_], path: Path) -> None:
    """A table (TSV) of all suspects beside the labelled document they pass, the largest difference first."""
    rows = sorted(_rows(folder, scores, suspects), key=lambda row: (-float(row[5]), row[0], row[2]))
    with replacing(path) as file:
        for row in [COLUMNS, *rows]:
            file.write(("\t".join(row) + "\n").encode("utf-8", "replace"))


def _rows(folder: TrainingFolder, scores: Float32, suspects: npt.NDArray[np.bool_]) -> Iterator[tuple[str, ...]]:
    for query in np.unique(folder.query_of[suspects]).tolist():
        pool = np.arange(folder.bounds[query], folder.bounds[query + 1])
        relevant = pool[folder.labels[pool] > 0]
        passed = relevant[np.argmin(scores[relevant])]
        for at in pool[suspects[pool]]:
            labelled, suspect = folder.places[passed], folder.places[at]
            yield (
                folder.query_ids[query], folder.doc_ids[labelled], folder.doc_ids[suspect],
                f"{scores[passed]:.6g}", f"{scores[at]:.6g}", f"{scores[at] - scores[passed]:.6g}",
                *(" ".join(text.split())[:SHOWN] for text in (
                    folder.queries[query], folder.texts[labelled], folder.texts[suspect]
                )),
            )  # fmt: skip
