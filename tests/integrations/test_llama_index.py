"""The LlamaIndex adapter with the real framework; skipped where llama-index-core is not installed."""

import asyncio
from typing import ClassVar

import pytest

pytest.importorskip("llama_index.core", reason="llama-index-core is not installed in this environment")

import pages
from helpers import write_checkpoint
from llama_index.core.instrumentation import get_dispatcher
from llama_index.core.instrumentation.event_handlers import BaseEventHandler
from llama_index.core.schema import MetadataMode, NodeRelationship, NodeWithScore, RelatedNodeInfo, TextNode
from pages import LONG, QUERY, TEXTS

from turborank import InputError, Reranker
from turborank.integrations.llama_index import TurborankPostprocessor

pytestmark = pytest.mark.filterwarnings("default")  # the framework's own


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_checkpoint(tmp_path_factory.mktemp("models") / "bees"))


def nodes() -> list[NodeWithScore]:
    source = {NodeRelationship.SOURCE: RelatedNodeInfo(node_id="book")}
    return [
        NodeWithScore(
            node=TextNode(id_=f"n{place}", text=text, metadata={"place": place}, relationships=source), score=place / 8
        )
        for place, text in enumerate(TEXTS)
    ]


def test_ranking_scores_ids_and_metadata_are_the_librarys(model: str) -> None:
    want = Reranker(model).rank(QUERY, TEXTS, top_n=3)
    given = nodes()
    found = TurborankPostprocessor(model=model, top_n=3).postprocess_nodes(given, query_str=QUERY)
    assert [(one.node.node_id, one.score) for one in found] == [(f"n{one.index}", one.score) for one in want]
    assert [one.node.metadata["retrieval_score"] for one in found] == [one.index / 8 for one in want]
    assert all(one.node.source_node.node_id == "book" for one in found)
    assert all(one.node.hash for one in found)
    # programs see what was noted, LLMs and embeddings do not, and what was given is as it was
    assert all(one.node.metadata["relevance_span"] == [0, len(one.node.text)] for one in found)
    for mode in (MetadataMode.LLM, MetadataMode.EMBED):
        assert found[0].node.get_content(mode) == given[want[0].index].node.get_content(mode)
    assert given == nodes()


def test_metadata_is_read_where_it_is_asked_for(model: str) -> None:
    texts = [one.node.get_content(MetadataMode.EMBED) for one in nodes()]
    assert texts[1].startswith("place: 1")
    want = Reranker(model).rank(QUERY, texts)
    ranker = TurborankPostprocessor(model=model, top_n=None, metadata_mode=MetadataMode.EMBED)
    found = ranker.postprocess_nodes(nodes(), query_str=QUERY)
    assert [(one.node.node_id, one.score) for one in found] == [(f"n{one.index}", one.score) for one in want]


def test_the_passage_behind_the_score_is_in_the_metadata(model: str) -> None:
    ranker = TurborankPostprocessor(model=model, options={"length": "windows", "max_length": 64})
    [found] = ranker.postprocess_nodes([NodeWithScore(node=TextNode(text=LONG))], query_str=QUERY)
    [want] = Reranker(model, length="windows", max_length=64).rank(QUERY, [LONG])
    assert found.node.metadata["relevance_passage"] == LONG[slice(*want.span)] != LONG
    assert "retrieval_score" not in found.node.metadata


def test_async_gives_the_same(model: str) -> None:
    ranker = TurborankPostprocessor(model=model)
    found = asyncio.run(ranker.apostprocess_nodes(nodes(), query_str=QUERY))
    assert found == ranker.postprocess_nodes(nodes(), query_str=QUERY)


class Events(BaseEventHandler):
    names: ClassVar[list[str]] = []

    @classmethod
    def class_name(cls) -> str:
        return "Events"

    def handle(self, event: object, **more: object) -> None:
        self.names.append(type(event).__name__)


def test_rerank_events_are_sent(model: str) -> None:
    handler = Events()
    get_dispatcher().add_event_handler(handler)
    TurborankPostprocessor(model=model).postprocess_nodes(nodes(), query_str=QUERY)
    assert handler.names == ["ReRankStartEvent", "ReRankEndEvent"]


def test_serialised_and_made_again(model: str) -> None:
    ranker = TurborankPostprocessor(model=model, top_n=2, options={"max_length": 64})
    again = TurborankPostprocessor.from_dict(ranker.to_dict())
    assert again.to_dict() == ranker.to_dict()
    assert again.postprocess_nodes(nodes(), query_str=QUERY) == ranker.postprocess_nodes(nodes(), query_str=QUERY)


def test_without_a_query_or_nodes(model: str) -> None:
    with pytest.raises(InputError, match="expected a query"):
        TurborankPostprocessor(model=model).postprocess_nodes(nodes())
    assert TurborankPostprocessor(model=model).postprocess_nodes([], query_str=QUERY) == []


def test_the_page() -> None:
    pytest.importorskip("llama_index.retrievers.bm25", reason="the page's first stage is not installed here")
    pages.run("llama_index.md")
