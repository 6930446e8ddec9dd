"""Haystack: a ranker component; see docs/integrations/haystack.md."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

from haystack import Document, component, default_from_dict, default_to_dict

from turborank.errors import InputError
from turborank.integrations import LazyReranker, relevance_notes
from turborank.types import Pair


@component
class TurborankRanker:
    """Ranks documents by relevance to the query, best first; ids, metadata and embeddings are kept.

    Each returned document is a copy with the relevance score as its ``score``; its ``meta`` also has the keys of
    :func:`turborank.integrations.relevance_notes` and ``retrieval_score``, the score of the input document.

    Args:
        model: a name, folder or Hub id; None is the embedded model.
        top_k: number of documents to keep; None keeps all.
        threshold: as in ``Reranker.rank``.
        depth: as in ``Reranker.rank``.
        meta_fields: fields of ``meta`` that are read before the content; spans are offsets in the joined text.
        options: other arguments of :class:`~turborank.Reranker`, such as ``{"length": "windows"}``.

    """

    def __init__(
        self,
        model: str | None = None,
        *,
        top_k: int | None = 10,
        threshold: float | str | None = None,
        depth: int | str | None = None,
        meta_fields: list[str] | None = None,
        options: dict[str, Any] | None = None,
    ) -> None:
        if model is not None and not isinstance(model, str):
            raise InputError(
                f"expected model to be a string, got {type(model).__name__}",
                hint="give a name, a folder or a Hub id, which a saved pipeline can hold",
            )
        self.model = model
        self.top_k = top_k
        self.threshold = threshold
        self.depth = depth
        self.meta_fields = list(meta_fields or [])
        self.options = dict(options or {})
        self._lazy = LazyReranker(model, self.options)
        self._warm = False

    def warm_up(self) -> None:
        """Load the model and score one pair, so that the first query does not wait for loading."""
        if not self._warm:
            self._lazy.get().score([Pair("warm", "up")])
            self._warm = True

    def to_dict(self) -> dict[str, Any]:
        """The component's arguments, as a pipeline's YAML stores them; loading the pipeline opens the weights again."""
        data: dict[str, Any] = default_to_dict(
            self, model=self.model, top_k=self.top_k, threshold=self.threshold, depth=self.depth,
            meta_fields=self.meta_fields, options=self.options,
        )  # fmt: skip
        return data

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> TurborankRanker:
        """The component of a dictionary that :meth:`to_dict` returned."""
        made: TurborankRanker = default_from_dict(cls, data)
        return made

    @component.output_types(documents=list[Document])
    def run(self, query: str, documents: list[Document], top_k: int | None = None) -> dict[str, list[Document]]:
        """``{"documents": …}``, best first. Raises InputError for a document without text content."""
        texts = [self._text(index, document) for index, document in enumerate(documents)]
        if not documents:
            return {"documents": []}
        reranker = self._lazy.get()
        ranking = reranker.rank(
            query, texts, top_n=self.top_k if top_k is None else top_k, threshold=self.threshold, depth=self.depth
        )
        kept = []
        for ranked in ranking:
            document, notes = (
                documents[ranked.index],
                relevance_notes(ranked, texts[ranked.index], reranker.calibration),
            )
            if document.score is not None:
                notes["retrieval_score"] = document.score
            kept.append(replace(document, score=ranked.score, meta={**document.meta, **notes}))
        return {"documents": kept}

    @component.output_types(documents=list[Document])
    async def run_async(
        self, query: str, documents: list[Document], top_k: int | None = None
    ) -> dict[str, list[Document]]:
        """Run :meth:`run` in a thread, so that the event loop is not blocked."""
        found: dict[str, list[Document]] = await asyncio.to_thread(self.run, query, documents, top_k)
        return found

    def _text(self, index: int, document: Document) -> str:
        if document.content is None:
            raise InputError(f"expected text as the content of documents[{index}], got none ({document.id})")
        fields = (document.meta.get(field) for field in self.meta_fields)
        return "\n".join([*(str(value) for value in fields if value is not None), document.content])
