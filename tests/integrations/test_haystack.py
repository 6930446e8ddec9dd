"""The Haystack adapter with the real framework; skipped where haystack-ai is not installed."""

import asyncio

import pytest

pytest.importorskip("haystack", reason="haystack-ai is not installed in this environment")

import pages
from haystack import Document, Pipeline
from helpers import write_checkpoint
from pages import LONG, QUERY, TEXTS

from turborank import InputError, Reranker
from turborank.integrations.haystack import TurborankRanker

pytestmark = pytest.mark.filterwarnings("default")  # the framework's own


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_checkpoint(tmp_path_factory.mktemp("models") / "bees"))


def documents() -> list[Document]:
    return [
        Document(id=f"d{place}", content=text, meta={"place": place, "title": f"note {place}"}, score=place / 8)
        for place, text in enumerate(TEXTS)
    ]


def test_ranking_scores_ids_and_metadata_are_the_librarys(model: str) -> None:
    want = Reranker(model).rank(QUERY, TEXTS, top_n=3)
    given = documents()
    found = TurborankRanker(model, top_k=3).run(query=QUERY, documents=given)["documents"]
    assert [(one.id, one.score) for one in found] == [(f"d{one.index}", one.score) for one in want]
    assert [one.meta["retrieval_score"] for one in found] == [one.index / 8 for one in want]
    assert [one.meta["title"] for one in found] == [f"note {one.index}" for one in want]
    assert given == documents()
    assert len(TurborankRanker(model, top_k=3).run(query=QUERY, documents=given, top_k=1)["documents"]) == 1


def test_fields_of_the_metadata_are_read_where_they_are_named(model: str) -> None:
    want = Reranker(model).rank(QUERY, [f"note {place}\n{text}" for place, text in enumerate(TEXTS)])
    found = TurborankRanker(model, meta_fields=["title", "author"]).run(query=QUERY, documents=documents())["documents"]
    assert [(one.id, one.score) for one in found] == [(f"d{one.index}", one.score) for one in want]


def test_the_passage_behind_the_score_is_in_the_metadata(model: str) -> None:
    ranker = TurborankRanker(model, options={"length": "windows", "max_length": 64})
    [found] = ranker.run(query=QUERY, documents=[Document(content=LONG)])["documents"]
    [want] = Reranker(model, length="windows", max_length=64).rank(QUERY, [LONG])
    assert found.meta["relevance_passage"] == LONG[slice(*want.span)] != LONG


def test_async_gives_the_same(model: str) -> None:
    ranker = TurborankRanker(model)
    assert asyncio.run(ranker.run_async(query=QUERY, documents=documents())) == ranker.run(
        query=QUERY, documents=documents()
    )


def test_a_pipeline_is_saved_and_made_again(model: str) -> None:
    pipeline = Pipeline()
    pipeline.add_component("ranker", TurborankRanker(model, top_k=2, threshold=0.01, options={"max_length": 64}))
    again = Pipeline.loads(pipeline.dumps(), allowed_modules=["turborank.integrations.haystack"])
    asked = {"ranker": {"query": QUERY, "documents": documents()}}
    assert again.run(asked) == pipeline.run(asked)
    assert again.get_component("ranker").to_dict() == pipeline.get_component("ranker").to_dict()


def test_warm_up_loads_the_model_and_says_what_is_wrong(model: str, tmp_path) -> None:
    ranker = TurborankRanker(model)
    assert ranker._lazy._reranker is None
    ranker.warm_up()
    assert ranker._lazy._reranker is not None
    with pytest.raises(Exception, match="expected a model folder"):
        TurborankRanker(str(tmp_path / "nothing")).warm_up()


def test_a_document_without_text_is_named(model: str) -> None:
    with pytest.raises(InputError, match=r"documents\[1\]"):
        TurborankRanker(model).run(query=QUERY, documents=[Document(content="a"), Document(content=None)])
    assert TurborankRanker(model).run(query=QUERY, documents=[]) == {"documents": []}


def test_the_page() -> None:
    scope = pages.run("haystack.md")
    assert scope["again"].get_component("ranker").top_k == 2
