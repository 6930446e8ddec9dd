"""The DSPy adapter with the real framework; skipped where dspy is not installed."""

import asyncio

import pytest

pytest.importorskip("dspy", reason="dspy is not installed in this environment")

import dspy
import pages
from helpers import write_checkpoint
from pages import QUERY, TEXTS

from turborank import Reranker
from turborank.integrations.dspy import TurborankRetriever

pytestmark = pytest.mark.filterwarnings("default")  # the framework's own


def test_passages_and_parallel_lists_are_in_the_librarys_order(tmp_path) -> None:
    model = str(write_checkpoint(tmp_path / "bees"))
    want = Reranker(model).rank(QUERY, TEXTS, top_n=3)

    def search(query: str) -> dspy.Prediction:
        assert query == QUERY
        return dspy.Prediction(passages=list(TEXTS), indices=[10, 11, 12, 13], source="notes")

    retriever = TurborankRetriever(search, k=3, model=model)
    for found in (retriever(query=QUERY), asyncio.run(retriever.acall(query=QUERY))):
        assert found.passages == [one.document for one in want]
        assert found.indices == [10 + one.index for one in want]
        assert found.scores == [one.score for one in want]
        assert found.spans == [one.span for one in want]
        assert found.source == "notes"


def test_the_page() -> None:
    pytest.importorskip("bm25s", reason="the page's first stage is not installed in this environment")
    pages.run("dspy.md")
