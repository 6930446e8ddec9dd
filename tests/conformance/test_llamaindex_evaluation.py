"""LlamaIndex's own RetrieverEvaluator gives our hit rate and MRR on the same lists.

Needs an environment with llama-index-core beside turborank's ``eval`` dependencies (0.12.52 still has the class of its
question files, 0.14 does not); skipped elsewhere.
"""

import asyncio
import random
from pathlib import Path
from typing import Any, NamedTuple

import pytest

pytest.importorskip("llama_index.core", reason="llama-index-core is not installed in this environment")
pytest.importorskip("bm25s")
from helpers import write_checkpoint
from llama_index.core.evaluation import RetrieverEvaluator
from llama_index.core.retrievers import BaseRetriever
from llama_index.core.schema import NodeWithScore, QueryBundle, TextNode

from turborank import Reranker
from turborank.data.trec import Run, Scored
from turborank.evaluate import EvaluateOptions, evaluate
from turborank.evaluate.measures import per_query

pytestmark = pytest.mark.filterwarnings("default")  # llama-index's own

WORDS = ("sea", "moon", "tide", "salt", "bread", "yeast", "dough", "flour", "wing", "bird", "sail", "wind", "lamp")


class Questions(NamedTuple):
    """The fields of LlamaIndex's EmbeddingQAFinetuneDataset."""

    queries: dict[str, str]
    corpus: dict[str, str]
    relevant_docs: dict[str, list[str]]


class Listed(BaseRetriever):
    """Returns a run's first ``k`` documents for the text of a query."""

    def __init__(self, run: Run, texts: dict[str, str], k: int) -> None:
        self._lists = {texts[query]: documents[:k] for query, documents in run.items()}
        super().__init__()

    def _retrieve(self, query_bundle: QueryBundle) -> list[NodeWithScore]:
        return [
            NodeWithScore(node=TextNode(id_=scored.doc_id, text=scored.doc_id), score=scored.score)
            for scored in self._lists[query_bundle.query_str]
        ]


def theirs(dataset: Questions, run: Run, k: int) -> dict[str, dict[str, float]]:
    """hit_rate and mrr of every query, by LlamaIndex."""
    evaluator = RetrieverEvaluator.from_metric_names(["hit_rate", "mrr"], retriever=Listed(run, dataset.queries, k))

    async def each() -> list[Any]:
        return [
            await evaluator.aevaluate(query=text, expected_ids=dataset.relevant_docs[query])
            for query, text in dataset.queries.items()
        ]

    found = asyncio.run(each())
    return {
        name: {query: result.metric_vals_dict[name] for query, result in zip(dataset.queries, found, strict=True)}
        for name in ("hit_rate", "mrr")
    }


def make_dataset(seed: int) -> Questions:
    rng = random.Random(seed)
    corpus = {f"node-{n}": " ".join(rng.choices(WORDS, k=8)) for n in range(30)}
    queries = {f"query-{n}": f"{n} {' '.join(rng.choices(WORDS, k=3))}" for n in range(20)}
    relevant = {query: rng.sample(sorted(corpus), rng.randint(1, 3)) for query in queries}
    return Questions(queries=queries, corpus=corpus, relevant_docs=relevant)


@pytest.mark.parametrize("k", [1, 2, 5, 10])
def test_hit_rate_and_mrr_on_random_lists(k: int) -> None:
    """Lists of twelve; every third query has a relevant document first, so that each cut-off has hits and misses."""
    dataset, rng = make_dataset(k), random.Random(k)
    run: Run = {}
    for number, (query, relevant) in enumerate(dataset.relevant_docs.items()):
        names = rng.sample(sorted(dataset.corpus), 12)
        listed = dict.fromkeys([*(relevant[:1] if number % 3 == 0 else []), *names])
        run[query] = [Scored(name, float(-place)) for place, name in enumerate(listed)]
    qrels = {query: dict.fromkeys(names, 1) for query, names in dataset.relevant_docs.items()}
    ours = per_query(run, qrels, [f"hit_rate@{k}", f"MRR@{k}"])
    expected = theirs(dataset, run, k)
    assert ours[f"hit_rate@{k}"] == expected["hit_rate"]
    assert ours[f"MRR@{k}"] == pytest.approx(expected["mrr"], abs=1e-12)
    assert 0 < sum(expected["hit_rate"].values()) < len(qrels)


def test_a_dataset_that_llamaindex_saved_is_reranked_to_its_own_figures(tmp_path: Path) -> None:
    legacy = pytest.importorskip(
        "llama_index.core.llama_dataset.legacy.embedding",
        reason="this llama-index-core no longer has the format's class",
    )
    dataset, path = make_dataset(0), tmp_path / "questions.json"
    legacy.EmbeddingQAFinetuneDataset(**dataset._asdict()).save_json(str(path))
    model = Reranker(write_checkpoint(tmp_path / "model"), engine="reference")
    found = evaluate(
        [str(path)], [model], EvaluateOptions(depth=10, measures=["hit_rate@5", "MRR@5"]), out=tmp_path / "out"
    )
    for system in found.results[0].systems:
        expected = theirs(dataset, system.run, 5)
        assert system.values["hit_rate@5"] == expected["hit_rate"]
        assert system.values["MRR@5"] == pytest.approx(expected["mrr"], abs=1e-12)
