"""LangChain: a document compressor that reranks, for ``ContextualCompressionRetriever``.

See docs/integrations/langchain.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from langchain_core.callbacks import AsyncCallbackManager, CallbackManager, Callbacks
from langchain_core.documents import BaseDocumentCompressor, Document
from langchain_core.runnables import run_in_executor
from pydantic import ConfigDict, Field, PrivateAttr

from turborank.integrations import LazyReranker, relevance_notes

RUN_NAME = "turborank"


class TurborankCompressor(BaseDocumentCompressor):
    """Ranks documents by relevance to the query, best first; ids and metadata are kept.

    Each returned document is a copy whose metadata also has the keys of
    :func:`turborank.integrations.relevance_notes`. Callbacks receive one chain run named "turborank". The first
    use loads the model and raises what :class:`~turborank.Reranker` raises; ranking raises InputError.
    """

    model_config = ConfigDict(arbitrary_types_allowed=True, extra="forbid")

    model: Any = Field(default=None, description="Name, folder or Hub id, or a Reranker; None: the embedded model.")
    top_n: int | None = Field(default=3, ge=1, description="Number of documents to keep; None keeps all.")
    threshold: float | str | None = Field(default=None, description="As in Reranker.rank.")
    depth: int | str | None = Field(default=None, description="As in Reranker.rank.")
    options: dict[str, Any] = Field(default_factory=dict, description="Other arguments of Reranker, such as length.")
    _lazy: LazyReranker = PrivateAttr()

    def model_post_init(self, context: Any, /) -> None:
        self._lazy = LazyReranker(self.model, self.options)

    def compress_documents(
        self, documents: Sequence[Document], query: str, callbacks: Callbacks | None = None
    ) -> list[Document]:
        """The best ``top_n`` documents, best first."""
        manager = CallbackManager.configure(inheritable_callbacks=callbacks)
        run = manager.on_chain_start(None, {"query": query, "documents": list(documents)}, name=RUN_NAME)
        try:
            kept = self._rank(documents, query)
        except BaseException as error:
            run.on_chain_error(error)
            raise
        run.on_chain_end({"documents": kept})
        return kept

    async def acompress_documents(
        self, documents: Sequence[Document], query: str, callbacks: Callbacks | None = None
    ) -> list[Document]:
        """Rank in a thread of the executor, so that the event loop is not blocked."""
        manager = AsyncCallbackManager.configure(inheritable_callbacks=callbacks)
        run = await manager.on_chain_start(None, {"query": query, "documents": list(documents)}, name=RUN_NAME)
        try:
            kept: list[Document] = await run_in_executor(None, self._rank, documents, query)
        except BaseException as error:
            await run.on_chain_error(error)
            raise
        await run.on_chain_end({"documents": kept})
        return kept

    def _rank(self, documents: Sequence[Document], query: str) -> list[Document]:
        if not documents:
            return []
        texts = [document.page_content for document in documents]
        reranker = self._lazy.get()
        kept = []
        for ranked in reranker.rank(query, texts, top_n=self.top_n, threshold=self.threshold, depth=self.depth):
            document = documents[ranked.index]
            notes = relevance_notes(ranked, texts[ranked.index], reranker.calibration)
            kept.append(document.model_copy(update={"metadata": {**document.metadata, **notes}}))
        return kept
