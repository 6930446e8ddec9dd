"""What the adapters share: one lazily loaded reranker, and what they note on a ranked document."""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping
from typing import Any

from turborank.calibration import Calibration
from turborank.reranker import Reranker
from turborank.types import Ranked


class LazyReranker:
    """A reranker that is loaded on first use, once, whichever thread asks first.

    ``model`` is what :class:`~turborank.Reranker` takes, or a Reranker; ``options`` are its other arguments.
    """

    def __init__(self, model: str | os.PathLike[str] | Reranker | None, options: Mapping[str, Any]) -> None:
        self._reranker = model if isinstance(model, Reranker) else None
        self._model = None if isinstance(model, Reranker) else model
        self._options = dict(options)
        self._lock = threading.Lock()

    def get(self) -> Reranker:
        """The reranker. Raises what loading it raises."""
        with self._lock:
            if self._reranker is None:
                self._reranker = Reranker(self._model, **self._options)
            return self._reranker


def relevance_notes(ranked: Ranked, text: str, calibration: Calibration | None = None) -> dict[str, Any]:
    """What is noted on a ranked document, as metadata that JSON can hold.

    ``relevance_score``             0 to 1
    ``relevance_probability``       of a calibrated model
    ``relevance_span``              [start, end), characters of the text behind the score
    ``relevance_passage``           these characters, where they are not the whole text (``length="windows"``)
    ``relevance_truncated_tokens``  tokens that were not read, where there are any
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
