"""mteb itself evaluates a turborank reranker on a small local reranking task.

Needs an environment with mteb (``pip install mteb`` beside turborank's dependencies); skipped elsewhere.
"""

import math
from pathlib import Path
from typing import Any

import pytest

mteb = pytest.importorskip("mteb", reason="mteb is not installed in this environment")
from datasets import Dataset  # noqa: E402
from helpers import write_checkpoint  # noqa: E402
from mteb.abstasks.retrieval import AbsTaskRetrieval  # noqa: E402
from mteb.abstasks.retrieval_dataset_loaders import RetrievalSplitData  # noqa: E402
from mteb.abstasks.task_metadata import TaskMetadata  # noqa: E402

from turborank import Reranker  # noqa: E402
from turborank.compat import MtebCrossEncoder  # noqa: E402

pytestmark = pytest.mark.filterwarnings("default")  # mteb's own

QUERIES = {"q1": "how do bees choose a home", "q2": "when does the sea rise", "q3": "who keeps a lighthouse"}
CORPUS = {
    "d1": ("bees", "scouts visit hollow trees and dance for the best of them"),
    "d2": ("tides", "the moon pulls the water twice a day"),
    "d3": ("", "a keeper trims the lamp of the lighthouse at dusk"),
    "d4": ("bread", "sourdough needs flour water salt and time"),
    "d5": ("", "rents in the city rose again"),
}
RELEVANT = {"q1": {"d1": 1}, "q2": {"d2": 1, "d5": 0}, "q3": {"d3": 1, "d4": 1}}


class LocalReranking(AbsTaskRetrieval):
    metadata = TaskMetadata(
        type="Reranking",
        name="LocalReranking",
        main_score="ndcg_at_10",
        description="Three questions over five texts.",
        reference=None,
        dataset={"path": "NA", "revision": "NA"},
        category="t2t",
        modalities=["text"],
        eval_splits=["test"],
        eval_langs=["eng-Latn"],
        bibtex_citation="",
    )

    def load_data(self, num_proc: int | None = None, **_: Any) -> None:
        split = RetrievalSplitData(
            queries=Dataset.from_list([{"id": k, "text": v} for k, v in QUERIES.items()]),
            corpus=Dataset.from_list([{"id": k, "title": t, "text": v} for k, (t, v) in CORPUS.items()]),
            relevant_docs=RELEVANT,
            top_ranked={query: list(CORPUS) for query in QUERIES},
        )
        self.dataset = {"default": {"test": split}}
        self.data_loaded = True


@pytest.fixture(scope="module")
def reranker(tmp_path_factory: pytest.TempPathFactory) -> Reranker:
    return Reranker(write_checkpoint(tmp_path_factory.mktemp("model") / "random"), engine="reference")


def document(identifier: str) -> str:
    """As mteb joins title and text."""
    title, text = CORPUS[identifier]
    return f"{title} {text}".strip()


def ndcg_at_10(reranker: Reranker) -> float:
    """The task's measure from the library's own ranking, by the formula of trec_eval (linear gain)."""
    total = 0.0
    for query, text in QUERIES.items():
        names = list(CORPUS)
        ranking = [names[ranked.index] for ranked in reranker.rank(text, [document(name) for name in names])]
        gains = [RELEVANT[query].get(name, 0) / math.log2(place + 2) for place, name in enumerate(ranking[:10])]
        best = sorted(RELEVANT[query].values(), reverse=True)
        total += sum(gains) / sum(gain / math.log2(place + 2) for place, gain in enumerate(best))
    return total / len(QUERIES)


def test_mteb_takes_it_for_a_cross_encoder(reranker: Reranker) -> None:
    model = MtebCrossEncoder(reranker)
    assert isinstance(model, mteb.CrossEncoderProtocol)
    meta = model.mteb_model_meta
    assert (meta.name, meta.revision, meta.is_cross_encoder) == ("turborank/random", "local", True)
    assert meta.max_tokens == 512


def test_mteb_evaluates_it(reranker: Reranker, tmp_path: Path) -> None:
    result = mteb.evaluate(
        MtebCrossEncoder(reranker),
        LocalReranking(),
        cache=None,
        prediction_folder=tmp_path,
        encode_kwargs={"batch_size": 2, "show_progress_bar": False},
        show_progress_bar=False,
        co2_tracker=False,
    )
    (scores,) = result.task_results[0].scores["test"]
    assert scores["ndcg_at_10"] == pytest.approx(ndcg_at_10(reranker), abs=1e-4)
    assert 0 < scores["ndcg_at_10"] < 1  # a random model: neither perfect nor worthless, so order matters


def test_what_mteb_ranks_by_are_our_logits(reranker: Reranker, tmp_path: Path) -> None:
    import json

    model = MtebCrossEncoder(reranker)
    mteb.evaluate(
        model, LocalReranking(), cache=None, prediction_folder=tmp_path, show_progress_bar=False, co2_tracker=False
    )
    (path,) = tmp_path.rglob("*.json")
    predictions = json.loads(path.read_text())["default"]["test"]
    for query, text in QUERIES.items():
        logits = reranker.score([(text, document(name)) for name in CORPUS])
        assert predictions[query] == pytest.approx(dict(zip(CORPUS, logits.tolist(), strict=True)), abs=1e-6)
