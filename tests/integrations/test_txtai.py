"""The txtai adapter with the real framework; skipped where txtai is not installed."""

import pytest

pytest.importorskip("txtai", reason="txtai is not installed in this environment")

import pages
from helpers import write_checkpoint
from pages import LONG, QUERY, TEXTS
from txtai import Embeddings
from txtai.pipeline import Reranker as Pipeline

from turborank import Reranker
from turborank.integrations.txtai import TurborankSimilarity

pytestmark = pytest.mark.filterwarnings("default")  # the framework's own


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_checkpoint(tmp_path_factory.mktemp("models") / "bees"))


def test_indices_and_scores_are_the_librarys(model: str) -> None:
    library = Reranker(model)
    similarity = TurborankSimilarity(model)
    want = [[(one.index, one.score) for one in library.rank(query, TEXTS)] for query in (QUERY, "the moon")]
    assert similarity(QUERY, TEXTS) == want[0]
    assert similarity([QUERY, "the moon"], TEXTS) == want
    options = {"length": "windows", "max_length": 64}
    [found] = TurborankSimilarity(model, options).ranked(QUERY, [LONG])
    assert found == Reranker(model, **options).rank(QUERY, [LONG])[0]


def test_txtais_reranker_keeps_rows_in_the_librarys_order(model: str) -> None:
    rows = [{"id": f"d{place}", "text": f"{text} home", "place": place} for place, text in enumerate(TEXTS)]
    embeddings = Embeddings(keyword=True, content=True)
    embeddings.index([(row["id"], row, None) for row in rows])
    found = Pipeline(embeddings, TurborankSimilarity(model))("home", limit=3)
    want = {one.document: one.score for one in Reranker(model).rank("home", [row["text"] for row in rows])}
    assert [row["score"] for row in found] == sorted(want.values(), reverse=True)[:3]
    assert all(row["score"] == want[row["text"]] and row["id"] == f"d{TEXTS.index(row['text'][:-5])}" for row in found)


def test_the_page() -> None:
    pages.run("txtai.md")
