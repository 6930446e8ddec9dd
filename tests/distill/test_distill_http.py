"""HTTP teachers: against turborank's service in every dialect, and against an endpoint with injected failures."""

import json
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import write_checkpoint
from little import pairs, tree, write_lines

import turborank
from turborank.cli import main
from turborank.distill import http_teacher, sources
from turborank.distill.batches import build_folder
from turborank.distill.folder import TrainingFolder
from turborank.distill.http_teacher import CLIENTS, HttpOptions, HttpTeacher, Pacer, retry_after
from turborank.distill.scores import score_pairs
from turborank.distill.sources import ListOptions, TrainingSource
from turborank.errors import InputError, UnknownKeyError
from turborank.types import no_progress

sys.path.append(str(Path(__file__).parents[1] / "serve"))  # its server on loopback

QUICK = {"timeout": 300.0, "documents": 3, "parallel": 2}


@pytest.fixture
def folder(tmp_path: Path) -> TrainingFolder:
    source = TrainingSource("animals", write_lines(tmp_path / "animals.jsonl", pairs()[:12]))
    plan = sources.PoolPlan(bm25=4, bm25_depth=8, dense=0, dense_depth=0, random=3)
    build_folder(ListOptions((source,)), tmp_path / "lists", plan)
    return TrainingFolder.load(tmp_path / "lists")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("http") / "bees")


@pytest.fixture(scope="module")
def up(model: Path) -> Iterator[Any]:
    pytest.importorskip("starlette", reason="the service needs pip install 'turborank[serve]'")
    from serving import running

    with running(model, length="truncate") as server:
        yield server


def scores(where: str, folder: TrainingFolder, cache: Path | None = None, **settings: Any) -> Any:
    teacher = HttpTeacher(where, HttpOptions(**{**QUICK, **settings}))
    return score_pairs(teacher, folder, cache or folder.path / "cache", no_progress)


@pytest.mark.parametrize("dialect", CLIENTS)
def test_every_dialect_of_the_service_gives_the_model_s_logits(up, model, folder, dialect):
    """Dialects that give probabilities lose some of a logit's digits, as float32 and JSON write them: 1e-4."""
    from turborank.serve.dialects import DIALECTS

    path = "/v1/rerank" if dialect == "turborank" else DIALECTS[dialect].paths[-1]
    found = scores(f"{dialect}:{up.url}{path}", folder)
    asked = [(folder.queries[q], folder.texts[d]) for q, d in zip(folder.query_index, folder.doc_index, strict=True)]
    expected = turborank.Reranker(str(model), engine="reference").score(asked)
    tolerance = 1e-4 if CLIENTS[dialect].probabilities else 1e-6
    np.testing.assert_allclose(found, expected, atol=tolerance)
    assert len(set(expected.tolist())) > len(expected) // 2  # there is an order to get wrong


def test_every_dialect_of_the_service_has_a_client():
    pytest.importorskip("msgspec", reason="the service needs pip install 'turborank[serve]'")
    from turborank.serve.dialects import DIALECTS

    assert set(CLIENTS) == {*DIALECTS, "turborank"}


# An endpoint that does what a script says before it answers well.


class Endpoint:
    """Speaks jina's dialect; a document's score is its share of the words of the longest: by arithmetic."""

    def __init__(self, script: list[Callable[[BaseHTTPRequestHandler, dict[str, Any]], bool]]) -> None:
        self.script = script
        self.asked: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.times: list[float] = []
        self.answered: list[tuple[str, str]] = []
        self.lock = threading.Lock()
        self.url = ""

    def handle(self, handler: BaseHTTPRequestHandler) -> None:
        body = json.loads(handler.rfile.read(int(handler.headers["Content-Length"])))
        with self.lock:
            self.asked.append(body)
            self.headers.append(dict(handler.headers))
            self.times.append(time.monotonic())
            misdeed = self.script.pop(0) if self.script else None
        if misdeed is not None and misdeed(handler, body):
            return
        with self.lock:  # before the answer: afterwards the test may look first
            self.answered += [(body["query"], document) for document in body["documents"]]
        answer(handler, 200, {"results": results(body)})


def probability(document: str) -> float:
    return len(document.split()) / 16


def results(body: dict[str, Any]) -> list[dict[str, Any]]:
    rows = [{"index": i, "relevance_score": probability(text)} for i, text in enumerate(body["documents"])]
    return sorted(rows, key=lambda row: -row["relevance_score"])


def answer(handler: BaseHTTPRequestHandler, status: int, body: Any, headers: dict[str, str] | None = None) -> bool:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    handler.send_response(status)
    for name, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
        handler.send_header(name, value)
    handler.end_headers()
    handler.wfile.write(content)
    return True


@contextmanager
def endpoint(*script: Any) -> Iterator[Endpoint]:
    made = Endpoint(list(script))

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            made.handle(self)

        def log_message(self, *arguments: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    made.url = f"http://127.0.0.1:{server.server_port}/v1/rerank"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield made
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def expected_logits(folder: TrainingFolder) -> list[float]:
    share = [probability(folder.texts[place]) for place in folder.doc_index]
    return [float(np.log(p / (1 - p))) for p in share]


def status(code: int, headers: dict[str, str] | None = None, body: Any = None) -> Any:
    return lambda handler, asked: answer(handler, code, {"detail": "not now"} if body is None else body, headers)


def replaced(change: Callable[[list[dict[str, Any]]], Any]) -> Any:
    """A valid answer with some fields replaced."""
    return lambda handler, asked: answer(handler, 200, {"results": change(results(asked))})


def drop(handler: BaseHTTPRequestHandler, asked: dict[str, Any]) -> bool:
    handler.close_connection = True
    return True  # no answer at all


def half(handler: BaseHTTPRequestHandler, asked: dict[str, Any]) -> bool:
    handler.send_response(200)
    handler.send_header("Content-Length", "1000")
    handler.end_headers()
    handler.wfile.write(b'{"results": [')
    handler.close_connection = True
    return True


def sleepy(handler: BaseHTTPRequestHandler, asked: dict[str, Any]) -> bool:
    time.sleep(0.6)
    return False


PASSING = {
    "429 with Retry-After": status(429, {"Retry-After": "0.1"}),
    "429 without": status(429),
    "500": status(500),
    "503 with a date": status(503, {"Retry-After": formatdate(time.time() - 5, usegmt=True)}),
    "424 of TEI": status(424, body={"error": "backend", "error_type": "backend"}),
    "502, no JSON": status(502, body=b"<html>Bad Gateway</html>"),
    "hangs up": drop,
    "half an answer": half,
    "timeout": sleepy,
    "one score short": replaced(lambda rows: rows[:-1]),
    "an index twice": replaced(lambda rows: [rows[0], *rows[:-1]]),
    "an index beyond": replaced(lambda rows: [{**rows[0], "index": 99}, *rows[1:]]),
    "a negative index": replaced(lambda rows: [{**rows[0], "index": -1}, *rows[1:]]),
    "no number": replaced(lambda rows: [{**rows[0], "relevance_score": None}, *rows[1:]]),
    "not finite": status(200, body=b'{"results": [{"index": 0, "relevance_score": NaN}]}'),
    "another shape": status(200, body={"data": []}),
    "no JSON": status(200, body=b"ok"),
}


@pytest.mark.parametrize("misdeed", PASSING)
def test_transient_errors_are_retried(folder, misdeed):
    """The first and the third request fail; all scores arrive, and no answered pair is requested again."""
    good = lambda handler, asked: False  # noqa: E731
    with endpoint(PASSING[misdeed], good, PASSING[misdeed]) as up:
        found = scores(f"jina:{up.url}", folder, timeout=0.3 if misdeed == "timeout" else 300.0)
        np.testing.assert_allclose(found, expected_logits(folder), rtol=1e-6)
        assert len(up.asked) > len(up.answered) / QUICK["documents"]
        if misdeed != "timeout":  # there, the endpoint answers whom nobody hears any more
            assert sorted(up.answered) == sorted(set(up.answered))
            assert len(up.answered) == len(found)


def test_retry_after_is_waited_for_by_all(folder):
    with endpoint(status(429, {"Retry-After": "1"})) as up:
        scores(f"jina:{up.url}", folder, parallel=1)
        assert up.times[1] - up.times[0] >= 1
    with endpoint(status(503, {"Retry-After": "100000"})) as up:
        with pytest.raises(InputError, match=r"expected .* to answer within 600 s, got HTTP 503 .* to wait 100000 s"):
            scores(f"jina:{up.url}", folder, folder.path / "other", parallel=1)
        assert len(up.asked) == 1


def test_the_rate_is_kept(folder):
    with endpoint() as up:
        start = time.monotonic()
        scores(f"jina:{up.url}", folder, rate=20, parallel=4)
        assert len(up.times) >= 12
        for place, arrived in enumerate(sorted(up.times)):
            assert arrived - start >= place / 20


@pytest.mark.parametrize(
    ("code", "body", "expected"),
    [
        (
            401,
            {"detail": "no key"},
            r'got HTTP 401 Unauthorized \({"detail": "no key"}\); put the key into NO_SUCH_KEY',
        ),
        (404, b"", r"got HTTP 404 Not Found$"),
        (422, {"message": "documents: too many"}, r"got HTTP 422 .*documents: too many"),
        (413, b"x" * 9999, r"got HTTP 413 .* \(x{300}\)$"),
        (302, b"", r"got HTTP 302 Found"),
    ],
)
def test_permanent_errors_end_the_run_with_the_endpoints_message(folder, code, body, expected):
    with endpoint(status(code, {"Location": "http://127.0.0.1:9/"} if code == 302 else None, body)) as up:
        with pytest.raises(InputError, match=expected):
            scores(f"jina:{up.url}", folder, parallel=1, key_variable="NO_SUCH_KEY")
        assert len(up.asked) == 1


def test_giving_up_keeps_what_was_answered_and_the_next_run_asks_only_for_the_rest(folder):
    good = lambda handler, asked: False  # noqa: E731
    with endpoint(good, good, *[status(500)] * 3) as up:
        with pytest.raises(InputError, match=r"got HTTP 500 .* 3 times; run the command again to go on"):
            scores(f"jina:{up.url}", folder, attempts=3, parallel=1)
        assert up.script == []
        found = scores(f"jina:{up.url}", folder)
        assert len(up.answered) == len(set(up.answered)) == len(found)
    np.testing.assert_allclose(found, expected_logits(folder), rtol=1e-6)


def test_a_fault_of_one_request_does_not_lose_the_others(folder):
    """Of two concurrent requests one is refused at once, the other answers later; its answer is kept."""
    with endpoint(sleepy, status(422)) as up:
        with pytest.raises(InputError, match="HTTP 422"):
            scores(f"jina:{up.url}", folder)
        kept = set(up.answered)
        assert kept
        scores(f"jina:{up.url}", folder)
        assert len(up.answered) == len(set(up.answered)) == len(folder.doc_index)


def test_an_endpoint_that_does_not_answer(folder):
    with endpoint() as up:
        url = up.url
    with pytest.raises(InputError, match=r"expected http://127.0.0.1:\d+/v1/rerank to answer, got .*refused.* 2 times"):
        scores(f"jina:{url}", folder, attempts=2)


def test_probabilities_become_logits_and_other_scores_stay(folder):
    ones = replaced(lambda rows: [{**row, "relevance_score": float(row["index"] == 0)} for row in rows])
    with endpoint(*[ones] * 99) as up:
        found = scores(f"jina:{up.url}", folder)
        limit = np.float32(np.log((1 - 1e-7) / 1e-7))
        assert set(np.abs(found).tolist()) == {limit}
        raw = scores(f"jina:{up.url}", folder, scale="raw")  # another scale is another teacher for the cache
        assert set(raw.tolist()) == {0.0, 1.0}
    above = replaced(lambda rows: [{**row, "relevance_score": 3.5} for row in rows])
    with endpoint(*[above] * 99) as up, pytest.raises(InputError, match=r"between 0 and 1 from .*, got 3.5"):
        scores(f"jina:{up.url}", folder)


def test_the_key_comes_from_the_environment_and_is_written_nowhere(folder, monkeypatch, capsys):
    monkeypatch.setenv("MY_KEY", "s3cret")
    with endpoint() as up:
        arguments = [
            "-t",
            f"paid=http:jina:{up.url}",
            "--key-env",
            "MY_KEY",
            "--http-model",
            "jina-x",
            "--documents",
            "5",
        ]
        assert main.run(["distill", "score", str(folder.path), *arguments]) == 0
        assert {headers["Authorization"] for headers in up.headers} == {"Bearer s3cret"}
        assert {asked["model"] for asked in up.asked} == {"jina-x"}
        assert max(len(asked["documents"]) for asked in up.asked) == 5
        assert len(up.answered) == len(folder.doc_index)
        count = len(up.asked)
        assert main.run(["distill", "score", str(folder.path), *arguments]) == 0
        assert len(up.asked) == count
    files = {**tree(folder.path), "cache": b"".join(p.read_bytes() for p in (folder.path / "cache").iterdir())}
    assert not any(b"s3cret" in content for content in files.values())
    about = json.loads(files["scores/paid.json"])
    assert (about["url"], about["model"], about["scale"]) == (up.url, "jina-x", "logit")
    assert "s3cret" not in "".join(capsys.readouterr())
    np.testing.assert_allclose(folder.scores("paid"), expected_logits(folder), rtol=1e-6)


def test_invalid_settings_are_refused():
    with pytest.raises(InputError, match="expected parallel of an HTTP teacher to be positive, got 0"):
        HttpOptions(parallel=0)
    with pytest.raises(UnknownKeyError, match="expected scale to be one of auto, logit, raw, got 'log'"):
        HttpOptions(scale="log")


def test_retry_after_is_seconds_or_a_date():
    assert retry_after(None) is None
    assert retry_after("2.5") == 2.5
    assert retry_after("-3") == 0
    assert retry_after("soon") is None
    assert retry_after("nan") is None
    assert retry_after(formatdate(time.time() + 30, usegmt=True)) == pytest.approx(30, abs=2)
    assert retry_after("Wed, 21 Oct 2015 07:28:00 GMT") == 0


def test_a_pacer_that_is_stopped_wakes_whoever_waits():
    pacer = Pacer(None)
    pacer.hold(60)
    woken: list[bool] = []

    def wait() -> None:
        with pytest.raises(http_teacher._StoppedError):
            pacer.turn()
        woken.append(True)

    thread = threading.Thread(target=wait)
    thread.start()
    pacer.stop()
    thread.join(5)
    assert woken == [True]
