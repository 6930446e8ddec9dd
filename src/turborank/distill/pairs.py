"""Teachers that are asked about one query and some documents at a time, and everything they say is kept."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from turborank.distill.cache import ScoreCache, key, open_cache
from turborank.distill.folder import TrainingFolder
from turborank.errors import EngineError
from turborank.evaluate.download import Told
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
