"""Concurrent requests: full queues, disconnecting clients, deadlines, loading, shutdown, several models."""

import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest

pytest.importorskip("starlette", reason="the service needs pip install 'turborank[serve]'")

from helpers import write_checkpoint
from serving import GatedEngine, head, running, until

from turborank.errors import InputError, ModelNotFoundError
from turborank.serve import app, server
from turborank.serve.config import Settings
from turborank.serve.models import Models
from turborank.serve.service import CHARACTERS_PER_TOKEN, OVERHEAD, expected_work
from turborank.tokens import Limits
from turborank.types import Pair

BODY = {"query": "bees", "documents": ["scouts", "tides"]}


def gate(up, seconds: float = 0.0) -> GatedEngine:
    """Put a gate in front of the engine of the first model."""
    reranker = up.service.models.default.reranker
    reranker.engine = GatedEngine(reranker.engine, seconds)
    return reranker.engine


@pytest.mark.parametrize("batch_seconds", [0.0, 0.001])
def test_concurrent_requests_get_the_librarys_scores_whatever_shares_their_batch(model, library, batch_seconds):
    requests = [(f"bees {i}", [f"scouts {i} {j}" * (1 + (i * j) % 7) for j in range(12)]) for i in range(24)]
    with running(model, batch_tokens=2048, batch_seconds=batch_seconds) as up, ThreadPoolExecutor(12) as clients:
        replies = list(clients.map(lambda one: up.ask("/v1/rerank", {"query": one[0], "documents": one[1]}), requests))
    for reply, (query, documents) in zip(replies, requests, strict=True):
        got = [(one["index"], one["relevance_score"]) for one in reply.json["results"]]
        assert got == [(one.index, one.score) for one in library.rank(query, documents)]


def test_a_full_queue_answers_429_with_retry_after_in_every_dialect(model):
    with running(model, queue_tokens=30) as up, ThreadPoolExecutor(1) as other:
        engine = gate(up)
        engine.gate.clear()
        first = other.submit(up.ask, "/v1/rerank", BODY)
        until(engine.entered.is_set)
        started = time.monotonic()
        refused = up.ask("/v1/rerank", BODY)
        assert time.monotonic() - started < 5, "expected the refusal at once, not after a wait"
        tei = up.ask("/rerank", {"query": "a", "texts": ["b" * 50]})
        engine.gate.set()
        assert first.result().status == 200
    assert (refused.status, refused.json["error"]["code"]) == (429, "overloaded")
    assert int(refused.headers["retry-after"]) >= 1
    assert (tei.status, tei.json["error_type"]) == (429, "overloaded")


def test_work_of_a_client_that_left_is_not_computed(model):
    with running(model) as up:
        engine = gate(up)
        engine.gate.clear()
        with ThreadPoolExecutor(1) as other:
            first = other.submit(up.ask, "/v1/rerank", BODY)
            until(engine.entered.is_set)
            leaving = socket.create_connection(("127.0.0.1", up.port))
            content = b'{"query": "q", "documents": ["never computed"]}'
            leaving.sendall(head(f"Content-Length: {len(content)}") + content)
            until(lambda: up.service.batcher.waiting_requests == 2)
            leaving.close()
            until(lambda: up.service.batcher.waiting_requests == 1)
            engine.gate.set()
            assert first.result().status == 200
        assert [len(batch) for batch in engine.batches] == [2]
        until(lambda: 'dialect="jina",status="499"} 1.0' in up.ask("/metrics").content.decode())


def test_empty_texts_do_not_change_the_estimate_of_tokens(model):
    with running(model) as up:
        for _ in range(200):
            assert up.ask("/v1/rerank", {"query": "", "documents": [""]}).status == 200
        assert up.service._characters_per_token == CHARACTERS_PER_TOKEN
        assert up.ask("/v1/rerank", BODY).status == 200


def test_the_estimate_of_a_pair_is_at_most_the_models_maximum(library):
    pairs = [Pair("q" * 100_000, "d")] * 3  # 25,000 tokens each at four characters; the model reads 512
    expect = partial(expected_work, pairs, library.encoder, characters_per_token=4.0)
    assert expect(Limits()) == (3 * 512, 3 * 512**2)
    assert expect(Limits(max_length=100)) == (3 * 100, 3 * 100**2)
    windows = 66  # 25,008 tokens in steps of 384
    assert expect(Limits(policy="windows")) == (3 * windows * 512, 3 * windows * 512**2)
    assert expect(Limits(policy="windows", max_windows=2)) == (3 * 2 * 512, 3 * 2 * 512**2)
    [alone] = [Pair("q" * 40, "d" * 360)]
    assert expected_work([alone], library.encoder, Limits(), 4.0) == (100 + OVERHEAD, (100 + OVERHEAD) ** 2)


def test_a_model_continues_loading_after_its_clients_disconnected(tmp_path, model, monkeypatch):
    other = write_checkpoint(tmp_path / "other")
    opened = []
    whole = Models._open

    def slowly(self, one):
        opened.append(one.name)
        time.sleep(0.3 if one.name == "other" else 0.0)
        return whole(self, one)

    monkeypatch.setattr(Models, "_open", slowly)
    with running(model, model=(str(model), str(other)), timeout=0.1) as up:
        assert {up.ask("/v1/rerank", {**BODY, "model": "other"}).status for _ in range(2)} == {504}
        assert up.ask("/v1/rerank", BODY).status == 200  # meanwhile the others are served
        until(lambda: up.service.models.find("other").reranker is not None)
        assert opened == ["bees", "other"]
        assert up.ask("/v1/rerank", {**BODY, "model": "other"}).status == 200


def test_as_many_connections_as_the_setting_says(model):
    with running(model, max_connections=1) as up:
        assert up.ask("/health").status == 200
        with socket.create_connection(("127.0.0.1", up.port)):
            until(lambda: len(up.server.server_state.connections) == 1)
            assert up.ask("/health").status == 503


@pytest.mark.parametrize("settings", [{"timeout": 0.3}, {}])
def test_a_deadline_is_504(model, settings):
    with running(model, **settings) as up:
        engine = gate(up)
        engine.gate.clear()
        reply = up.ask("/v1/rerank", {**BODY, **({} if settings else {"timeout": 0.3})})
        assert (reply.status, reply.json["error"]["code"]) == (504, "deadline_exceeded")
        assert up.service.batcher.waiting_requests == 0
        engine.gate.set()


def test_not_ready_until_the_model_is_loaded(model, monkeypatch):
    from turborank.serve.models import Models

    loaded, opened = threading.Event(), Models._open

    def slowly(self, which):
        loaded.wait(10)
        return opened(self, which)

    monkeypatch.setattr(Models, "_open", slowly)
    with running(model, wait=False) as up:
        assert up.ask("/health").status == 200
        for path in ("/ready", "/weaviate/.well-known/ready"):
            assert up.ask(path).status == 503
        early = up.ask("/v1/rerank", BODY)
        assert (early.status, early.json["error"]["code"]) == (503, "loading")
        assert early.headers["retry-after"]
        loaded.set()
        until(lambda: up.ask("/ready").status == 200)
        assert up.ask("/v1/rerank", BODY).status == 200


def test_shutting_down_answers_what_is_in_and_says_not_ready_first(model):
    import signal

    with running(model, drain=0.5) as up, ThreadPoolExecutor(1) as other:
        engine = gate(up)
        engine.gate.clear()
        first = other.submit(up.ask, "/v1/rerank", BODY)
        until(engine.entered.is_set)
        up.server.handle_exit(signal.SIGTERM, None)
        assert up.ask("/ready").status == 503
        assert up.ask("/health").status == 200
        until(lambda: up.service.closing)
        engine.gate.set()
        assert first.result().status == 200
        with pytest.raises(OSError, match=r"refused|reset"):
            until(lambda: up.ask("/health").status != 200)


def test_a_model_that_cannot_be_loaded_ends_the_server(tmp_path):
    made = server.make(Settings(model=(f"gone={tmp_path / 'gone'}",), port=0), app.build)
    made.run()
    assert made.failure is not None
    assert isinstance(made.failure.__cause__, ModelNotFoundError)


def test_models_are_loaded_on_first_use_and_evicted_to_stay_within_memory(tmp_path, model):
    folders = [write_checkpoint(tmp_path / name) for name in ("second", "third")]
    names = (str(model), *map(str, folders))
    with running(model, model=names, alias=("rerank-v3.5=second",), model_memory=1) as up:
        loaded = lambda: [entry["id"] for entry in up.ask("/v1/models").json["data"] if entry["loaded"]]  # noqa: E731
        assert loaded() == ["bees"]
        assert up.ask("/v1/rerank", {**BODY, "model": "rerank-v3.5"}).json["model"] == "second"
        assert loaded() == ["bees", "second"]
        for one in up.service.models.all:
            one.bytes = 600 * 1024  # so that two of them do not fit into 1 MiB
        assert up.ask("/v1/rerank", {**BODY, "model": "third"}).json["model"] == "third"
        assert loaded() == ["bees", "third"]
        assert up.ask("/v1/rerank", {**BODY, "model": "second"}).status == 200


def test_a_model_in_use_is_let_go_when_its_requests_are_done(tmp_path, model):
    folders = [write_checkpoint(tmp_path / name) for name in ("second", "third")]
    names = (str(model), *map(str, folders))
    with running(model, model=names, model_memory=1) as up, ThreadPoolExecutor(2) as clients:
        ask = lambda name: up.ask("/v1/rerank", {**BODY, "model": name})  # noqa: E731
        assert ask("second").status == 200
        for one in up.service.models.all:
            one.bytes = 1024 * 1024
        second, third = map(up.service.models.find, ("second", "third"))
        second.reranker.engine = engine = GatedEngine(second.reranker.engine)
        engine.gate.clear()
        busy = clients.submit(ask, "second")
        until(engine.entered.is_set)
        waiting = clients.submit(ask, "third")
        until(lambda: third.reranker is not None)
        assert second.reranker is not None, "expected a model with a request in progress to stay"
        engine.gate.set()
        assert (busy.result().status, waiting.result().status) == (200, 200)
        until(lambda: second.reranker is None)
        assert third.reranker is not None


def test_names_must_differ_and_aliases_must_name_a_served_model(model):
    with pytest.raises(InputError, match="its own name"):
        server.make(Settings(model=(str(model), str(model))), app.build)
    with pytest.raises(InputError, match="alias 'x'"):
        server.make(Settings(model=(str(model),), alias=("x=y",)), app.build)


def test_metrics_count_what_happened(model):
    with running(model, batch_seconds=0.0) as up:  # one batch for both
        reply = up.ask("/v1/rerank", {"query": "abc", "documents": ["abc", "a" * 600]})
        assert reply.status == 200
        page = up.ask("/metrics").content.decode()
    for line in (
        'turborank_requests_total{dialect="jina",status="200"} 1.0',
        "turborank_documents_total 2.0",
        f"turborank_tokens_total {float(10 + 512)}",
        "turborank_truncated_documents_total 1.0",
        f"turborank_truncated_tokens_total {float(3 + 600 + 4 - 512)}",
        f"turborank_computed_tokens_total {float(10 + 512)}",
        f"turborank_padding_saved_tokens_total {float(512 - 10)}",
        "turborank_queue_tokens 0.0",
        "turborank_ready 1.0",
        'turborank_stage_seconds_count{stage="compute"} 1.0',
        "turborank_batch_seconds_count 1.0",
    ):
        assert line in page.splitlines()
