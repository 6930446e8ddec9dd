"""txtai: a similarity function for its reranking pipeline; see docs/integrations/txtai.md."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from txtai.pipeline.base import Pipeline

from turborank.integrations import LazyReranker
from turborank.types import Ranked


class TurborankSimilarity(Pipeline):
    """A similarity pipeline for ``txtai.pipeline.Reranker(embeddings, similarity)``; it can also be called directly.

    Args:
        model: a name, folder or Hub id, or a Reranker; None is the embedded model.
        options: other arguments of :class:`~turborank.Reranker`.

    """

    def __init__(self, model: Any = None, options: dict[str, Any] | None = None) -> None:
        self._lazy = LazyReranker(model, options or {})

    def __call__(self, query: str | Sequence[str], texts: Sequence[str]) -> list[Any]:
        """(index in ``texts``, score from 0 to 1) of every text, best first; for several queries, a list per query."""
        queries = [query] if isinstance(query, str) else query
        rankings = [[(found.index, found.score) for found in self.ranked(one, texts)] for one in queries]
        return rankings[0] if isinstance(query, str) else rankings

    def ranked(self, query: str, texts: Sequence[str]) -> list[Ranked]:
        """The same ranking with logits, tokens, truncated tokens and spans."""
        return self._lazy.get().rank(query, texts)
