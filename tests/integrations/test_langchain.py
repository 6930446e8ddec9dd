"""The LangChain adapter with the real framework; skipped where langchain-core is not installed."""

import asyncio
from typing import Any

import pytest

pytest.importorskip("langchain_core", reason="langchain-core is not installed in this environment")

import pages
from helpers import write_checkpoint
from langchain_core.callbacks import AsyncCallbackHandler, BaseCallbackHandler
from langchain_core.documents import Document
from pages import LONG, QUERY, TEXTS

from turborank import InputError, Reranker
from turborank.integrations.langchain import TurborankCompressor

pytestmark = pytest.mark.filterwarnings("default")  # the framework's own


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_checkpoint(tmp_path_factory.mktemp("models") / "bees"))


def documents() -> list[Document]:
    return [Document(text, id=f"d{place}", metadata={"place": place}) for place, text in enumerate(TEXTS)]


def test_ranking_scores_ids_and_metadata_are_the_librarys(model: str) -> None:
    want = Reranker(model).rank(QUERY, TEXTS, top_n=3)
    given = documents()
    found = TurborankCompressor(model=model, top_n=3).compress_documents(given, QUERY)
    assert [(one.id, one.metadata["place"], one.page_content) for one in found] == [
        (f"d{one.index}", one.index, one.document) for one in want
    ]
    assert [one.metadata["relevance_score"] for one in found] == [one.score for one in want]
    assert [one.metadata["relevance_span"] for one in found] == [list(one.span) for one in want]
    assert all("relevance_score" not in one.metadata for one in given)  # copies


def test_the_passage_behind_the_score_is_in_the_metadata(model: str) -> None:
    compressor = TurborankCompressor(model=model, options={"length": "windows", "max_length": 64})
    [found] = compressor.compress_documents([Document(LONG)], QUERY)
    [want] = Reranker(model, length="windows", max_length=64).rank(QUERY, [LONG])
    assert found.metadata["relevance_passage"] == LONG[slice(*want.span)] != LONG
    [cut] = TurborankCompressor(model=model, options={"max_length": 64}).compress_documents([Document(LONG)], QUERY)
    assert cut.metadata["relevance_truncated_tokens"] == Reranker(model, max_length=64).rank(QUERY, [LONG])[0].truncated


def test_async_gives_the_same_and_many_at_once_load_one_model(model: str) -> None:
    compressor = TurborankCompressor(model=model, top_n=None)
    want = TurborankCompressor(model=model, top_n=None).compress_documents(documents(), QUERY)

    async def many() -> list[Any]:
        return await asyncio.gather(*(compressor.acompress_documents(documents(), QUERY) for _ in range(8)))

    assert asyncio.run(many()) == [want] * 8


class Seen(BaseCallbackHandler):
    def __init__(self) -> None:
        self.events: list[tuple[Any, ...]] = []

    def on_chain_start(self, serialized: Any, inputs: Any, **more: Any) -> None:
        self.events.append(("start", more["name"], inputs["query"], len(inputs["documents"])))

    def on_chain_end(self, outputs: Any, **more: Any) -> None:
        self.events.append(("end", [one.id for one in outputs["documents"]]))

    def on_chain_error(self, error: BaseException, **more: Any) -> None:
        self.events.append(("error", type(error).__name__))


class SeenAsync(AsyncCallbackHandler):
    def __init__(self) -> None:
        self.events: list[str] = []

    async def on_chain_start(self, serialized: Any, inputs: Any, **more: Any) -> None:
        self.events.append("start")

    async def on_chain_end(self, outputs: Any, **more: Any) -> None:
        self.events.append("end")


def test_callbacks_see_a_run_and_its_error(model: str) -> None:
    seen = Seen()
    compressor = TurborankCompressor(model=model, top_n=1)
    [best] = compressor.compress_documents(documents(), QUERY, callbacks=[seen])
    with pytest.raises(InputError):
        TurborankCompressor(model=model, threshold=2.0).compress_documents(documents(), QUERY, callbacks=[seen])
    start = ("start", "turborank", QUERY, len(TEXTS))
    assert seen.events == [start, ("end", [best.id]), start, ("error", "InputError")]
    waiting = SeenAsync()
    asyncio.run(compressor.acompress_documents(documents(), QUERY, callbacks=[waiting]))
    assert waiting.events == ["start", "end"]


def test_nothing_to_rank_and_wrong_fields(model: str) -> None:
    assert TurborankCompressor(model=model).compress_documents([], QUERY) == []
    with pytest.raises(ValueError, match="top_n"):
        TurborankCompressor(model=model, top_n=0)
    with pytest.raises(ValueError, match="topn"):
        TurborankCompressor(model=model, topn=1)


def test_the_page() -> None:
    pytest.importorskip("rank_bm25", reason="the page's first stage is not installed in this environment")
    pages.run("langchain.md")
