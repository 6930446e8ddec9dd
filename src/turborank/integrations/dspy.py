"""DSPy: a module that reranks the passages of a retriever; see docs/integrations/dspy.md."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import dspy

from turborank.integrations import LazyReranker


class TurborankRetriever(dspy.Module):
    """A retriever that reranks the passages of another one and returns the best ``k``, best first.

    Args:
        retrieve: a callable that returns a ``dspy.Prediction`` with ``passages``, such as ``dspy.Embeddings``.
            Its other lists of the same length (``indices``, ids, metadata) are reordered with the passages.
        k: number of passages to keep; None keeps all.
        model: a name, folder or Hub id, or a Reranker; None is the embedded model.
        threshold: as in ``Reranker.rank``.
        options: other arguments of :class:`~turborank.Reranker`.

    The prediction also has ``scores`` (0 to 1) and ``spans``, the character offsets that each score is based on.
    """

    def __init__(
        self,
        retrieve: Callable[[str], Any],
        *,
        k: int | None = 3,
        model: Any = None,
        threshold: float | str | None = None,
        options: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.retrieve = retrieve
        self.k = k
        self.threshold = threshold
        self._lazy = LazyReranker(model, options or {})

    def forward(self, query: str) -> Any:
        """The prediction of ``retrieve`` with its passages reranked, best first."""
        found = self.retrieve(query)
        ranking = self._lazy.get().rank(query, found.passages, top_n=self.k, threshold=self.threshold)
        size = len(found.passages)
        lists = {name: values for name, values in found.items() if isinstance(values, list) and len(values) == size}
        ordered = {name: [values[ranked.index] for ranked in ranking] for name, values in lists.items()}
        return dspy.Prediction(
            **{**dict(found.items()), **ordered},
            scores=[ranked.score for ranked in ranking],
            spans=[ranked.span for ranked in ranking],
        )

    async def aforward(self, query: str) -> Any:
        """Run :meth:`forward` in a thread."""
        return await asyncio.to_thread(self.forward, query)
