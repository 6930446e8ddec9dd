"""Adapters to retrieval frameworks and cluster engines. They rerank in the caller's process, without a server.

Each module imports its framework; ``import turborank`` imports none of them. docs/integrations has a page for each.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from turborank.calibration import Calibration, sigmoid
from turborank.errors import InputError
from turborank.reranker import Reranker, arrive, listed
from turborank.text import document_text
from turborank.types import Pair, Ranked, RerankerOptions, RerankerRecipe


class LazyReranker:
    """A reranker that is loaded once, on first use; threads may share it.

    ``model``: a Reranker, or the first argument of :class:`~turborank.Reranker`; ``options``: its other arguments.
    """

    def __init__(self, model: str | os.PathLike[str] | Reranker | None, options: Mapping[str, Any]) -> None:
        self._reranker = model if isinstance(model, Reranker) else None
        self._model = None if isinstance(model, Reranker) else model
        self._options = dict(options)
        self._lock = threading.Lock()

    def get(self) -> Reranker:
        """The reranker; the first call loads it and raises what :class:`~turborank.Reranker` raises."""
        with self._lock:
            if self._reranker is None:
                self._reranker = Reranker(self._model, **self._options)
            return self._reranker


def relevance_notes(ranked: Ranked, text: str, calibration: Calibration | None = None) -> dict[str, Any]:
    """Metadata of a ranked document, as JSON values.

    ``relevance_score``             0 to 1
    ``relevance_probability``       0 to 1, if the model is calibrated
    ``relevance_span``              [start, end): character offsets of the text that the score is based on
    ``relevance_passage``           that text, if it is not the whole document (``length="windows"``)
    ``relevance_truncated_tokens``  number of tokens that were not read, if any
    """
    start, end = ranked.span
    noted: dict[str, Any] = {"relevance_score": ranked.score, "relevance_span": [start, end]}
    if text[start:end].strip() != text.strip():
        noted["relevance_passage"] = text[start:end]
    if calibration is not None:
        noted["relevance_probability"] = calibration.probability(ranked.logit)
    if ranked.truncated:
        noted["relevance_truncated_tokens"] = ranked.truncated
    return noted


def recipe_of(model: str | os.PathLike[str] | Reranker | None, options: Mapping[str, Any] | None) -> RerankerRecipe:
    """The recipe to send to a worker: a Reranker's own, or one made of a model and other arguments of Reranker.

    Raises InputError for options beside a Reranker, and for an option that Reranker does not have.
    """
    options = dict(options or {})
    if isinstance(model, Reranker):
        if options:
            raise InputError(f"expected no options beside a Reranker, got {', '.join(options)}")
        return model.recipe
    try:
        return RerankerRecipe(None if model is None else os.fspath(model), RerankerOptions(**options))
    except TypeError as error:
        raise InputError(f"expected options of Reranker, got {', '.join(options)}: {error}") from None


def open_in_process(recipe: RerankerRecipe, threads: int) -> Reranker:
    """Open the reranker of a recipe, once per process, with ``threads`` threads unless the recipe gives a number."""
    return arrive(recipe.with_threads(recipe.options.threads or threads), {})


def score_columns(
    reranker: Reranker, queries: Iterable[str], documents: Iterable[Any]
) -> dict[str, npt.NDArray[np.generic]]:
    """Columns for P pairs: logit (P,) float32, score (P,) float64, tokens (P,) int32, truncated (P,) int32.

    Raises InputError, with the row, for a query that is not a string and for a document without text.
    """
    pairs = []
    for index, (query, document) in enumerate(
        zip(listed("queries", queries), listed("documents", documents), strict=True)
    ):
        if not isinstance(query, str):
            raise InputError(f"expected a string, got {type(query).__name__} at row {index} of the queries")
        try:
            pairs.append(Pair(query, document_text(document)))
        except InputError as error:
            raise InputError(f"{error.message} at row {index} of the documents") from None
    scores = reranker.score_detailed(pairs)
    relevance = np.array([sigmoid(logit) for logit in scores.logits.tolist()], dtype=np.float64)
    return {"logit": scores.logits, "score": relevance, "tokens": scores.tokens, "truncated": scores.truncated}
