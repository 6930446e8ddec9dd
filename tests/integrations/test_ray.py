"""Rerankers in a local Ray: the library's bits, one model per actor, and no pair lost when a worker is killed."""

import os
import signal
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

sys.path.append(str(Path(__file__).parent))  # for Ray's workers, too
os.environ.setdefault("RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S", "120")  # of a busy machine; read when Ray is imported
pytest.importorskip("ray", reason="ray is not installed in this environment")
pytest.importorskip("ray.serve", reason="ray[serve] is not installed in this environment")

import pages
from cluster import PAIRS, PYTHONPATH, bits, expected_bits, make_model, make_pairs

from turborank import InputError, Reranker
from turborank.integrations.ray import BatchReranker, deployment

pytestmark = pytest.mark.filterwarnings("ignore")  # of Ray's own code


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("ray"))


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    import ray

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ray.init(
            num_cpus=2, include_dashboard=False, log_to_driver=False, object_store_memory=200 << 20,
            runtime_env={"env_vars": {"PYTHONPATH": PYTHONPATH}},
        )  # fmt: skip
    ray.data.DataContext.get_current().enable_progress_bars = False
    yield ray
    ray.shutdown()


class Watched(BatchReranker):
    """Records the process and its models; the first process that scores row 1,500 is killed, once."""

    def __init__(self, model: Any, killed: str | None = None) -> None:
        super().__init__(model)
        self.killed = killed

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        import numpy as np

        if self.killed is not None and len(batch["id"]) and int(batch["id"].max()) >= 1500:
            try:
                os.close(os.open(self.killed, os.O_CREAT | os.O_EXCL))
            except FileExistsError:
                pass
            else:
                os.kill(os.getpid(), signal.SIGKILL)
        from turborank import reranker

        size = len(batch["id"])
        models = np.full(size, len(reranker._arrived))
        threads = np.full(size, self.reranker.engine.threads)
        return {**super().__call__(batch), "process": np.full(size, os.getpid()), "models": models, "threads": threads}


def test_map_batches(cluster: Any, folder: Path) -> None:
    pairs = make_pairs()
    data = cluster.data.from_items(pairs).map_batches(
        Watched, fn_constructor_args=(Reranker(folder),), concurrency=2, num_cpus=1, batch_size=2048
    )
    rows = data.take_all()
    assert len(rows) == PAIRS
    assert bits(rows) == expected_bits(folder, pairs)
    assert {row["models"] for row in rows} == {1}
    assert {row["threads"] for row in rows} == {1}
    assert os.getpid() not in {row["process"] for row in rows}
    assert {type(row["tokens"]) for row in rows} == {int}


def test_a_killed_worker_costs_no_pair(cluster: Any, folder: Path, tmp_path: Path) -> None:
    pairs = make_pairs(min(PAIRS, 20_000))
    data = cluster.data.from_items(pairs, override_num_blocks=20).map_batches(
        Watched, fn_constructor_args=(str(folder), str(tmp_path / "killed")), concurrency=2, num_cpus=1, batch_size=500
    )
    rows = data.take_all()
    assert (tmp_path / "killed").exists()
    assert bits(rows) == expected_bits(folder, pairs)


def test_bad_options_are_refused_where_they_are_written(folder: Path) -> None:
    with pytest.raises(InputError, match="expected no options beside a Reranker, got threads"):
        BatchReranker(Reranker(folder), options={"threads": 2})
    with pytest.raises(InputError, match="expected options of Reranker, got thread"):
        BatchReranker(folder, options={"thread": 2})
    with pytest.raises(InputError, match=r"expected a setting to be one of .*, got 'prot'"):
        deployment({"prot": 8080})


def test_serve_has_the_dialects_and_the_scores(cluster: Any, folder: Path) -> None:
    import json
    import urllib.request

    from ray import serve

    serve.start(http_options={"host": "127.0.0.1", "port": 18733})
    try:
        settings = {"model": (f"bees={folder}",)}
        serve.run(deployment(settings).options(num_replicas=1).bind(), name="bees", route_prefix="/")

        def ask(path: str, body: dict[str, Any]) -> Any:
            request = urllib.request.Request(
                f"http://127.0.0.1:18733{path}", json.dumps(body).encode(), {"Content-Type": "application/json"}
            )
            with urllib.request.urlopen(request, timeout=60) as answer:
                return json.load(answer)

        documents = ["scouts dance for it", "sourdough needs a starter", "the swarm votes"]
        expected = [(ranked.index, ranked.score) for ranked in Reranker(folder).rank("bees", documents)]
        for path in ("/v1/rerank", "/v2/rerank"):
            found = ask(path, {"model": "bees", "query": "bees", "documents": documents})["results"]
            assert [one["index"] for one in found] == [index for index, _ in expected]
            assert [one["relevance_score"] for one in found] == pytest.approx(
                [score for _, score in expected], abs=1e-6
            )
        tei = ask("/rerank", {"query": "bees", "texts": documents})
        assert [one["index"] for one in tei] == [index for index, _ in expected]
        with urllib.request.urlopen("http://127.0.0.1:18733/metrics", timeout=60) as answer:
            assert b"turborank_queue_seconds" in answer.read()
    finally:
        serve.shutdown()


def test_the_page_runs(cluster: Any) -> None:
    pages.run("ray.md")
