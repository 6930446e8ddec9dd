"""LlamaIndex: a node postprocessor that reranks; see docs/integrations/llama_index.md."""

from __future__ import annotations

from typing import Any

from llama_index.core.bridge.pydantic import ConfigDict, Field, PrivateAttr
from llama_index.core.instrumentation import get_dispatcher
from llama_index.core.instrumentation.events.rerank import ReRankEndEvent, ReRankStartEvent
from llama_index.core.postprocessor.types import BaseNodePostprocessor
from llama_index.core.schema import BaseNode, MetadataMode, NodeWithScore, QueryBundle

from turborank.errors import InputError
from turborank.integrations import LazyReranker, relevance_notes

dispatcher = get_dispatcher(__name__)


class TurborankPostprocessor(BaseNodePostprocessor):
    """Ranks nodes by relevance to the query, best first; ids, metadata and relationships are kept.

    Each returned node is a copy. Its metadata also has the keys of
    :func:`turborank.integrations.relevance_notes`, hidden from LLMs and embeddings, and ``retrieval_score``, the
    score of the input node. Raises InputError without a query. ``apostprocess_nodes`` ranks in a thread.
    """

    model_config = ConfigDict(arbitrary_types_allowed=True, extra="forbid")

    model: Any = Field(default=None, description="Name, folder or Hub id, or a Reranker; None: the embedded model.")
    top_n: int | None = Field(default=3, ge=1, description="Number of nodes to keep; None keeps all.")
    threshold: float | str | None = Field(default=None, description="As in Reranker.rank.")
    depth: int | str | None = Field(default=None, description="As in Reranker.rank.")
    metadata_mode: MetadataMode = Field(
        default=MetadataMode.NONE, description="Metadata that is read with the text; spans are offsets in both."
    )
    options: dict[str, Any] = Field(default_factory=dict, description="Other arguments of Reranker, such as length.")
    _lazy: LazyReranker = PrivateAttr()

    def model_post_init(self, context: Any, /) -> None:
        super().model_post_init(context)
        self._lazy = LazyReranker(self.model, self.options)

    @classmethod
    def class_name(cls) -> str:
        """Name of the class in serialised pipelines."""
        return "TurborankPostprocessor"

    def _postprocess_nodes(
        self, nodes: list[NodeWithScore], query_bundle: QueryBundle | None = None
    ) -> list[NodeWithScore]:
        if query_bundle is None:
            raise InputError("expected a query, got none", hint="give query_str or query_bundle")
        if not nodes:
            return []
        reranker = self._lazy.get()
        dispatcher.event(
            ReRankStartEvent(
                query=query_bundle, nodes=nodes, top_n=self.top_n or len(nodes), model_name=reranker.name
            )
        )  # fmt: skip
        texts = [node.node.get_content(metadata_mode=self.metadata_mode) for node in nodes]
        ranking = reranker.rank(
            query_bundle.query_str, texts, top_n=self.top_n, threshold=self.threshold, depth=self.depth
        )
        kept = [
            _noted(nodes[one.index], one.score, relevance_notes(one, texts[one.index], reranker.calibration))
            for one in ranking
        ]
        dispatcher.event(ReRankEndEvent(nodes=kept))
        return kept


def _noted(found: NodeWithScore, score: float, notes: dict[str, Any]) -> NodeWithScore:
    """A copy with the new score; the notes are added to the metadata and excluded from LLM and embedding input."""
    if found.score is not None:
        notes["retrieval_score"] = found.score
    node: BaseNode = found.node.model_copy()
    node.metadata = {**node.metadata, **notes}
    hidden = [key for key in notes if key not in found.node.metadata]
    node.excluded_llm_metadata_keys = [*node.excluded_llm_metadata_keys, *hidden]
    node.excluded_embed_metadata_keys = [*node.excluded_embed_metadata_keys, *hidden]
    return NodeWithScore(node=node, score=score)
