"""No text, key, header or path of a client in any line of the log, whatever it sent and whatever came of it."""

import json
import logging
import socket
import subprocess
import sys
from http.client import HTTPConnection

import pytest

pytest.importorskip("starlette", reason="the service needs pip install 'turborank[serve]'")

from serving import until

from turborank.errors import EngineError
from turborank.serve import auth, telemetry
from turborank.serve.dialects import by_path

MARK = "zebramark"  # in everything that the client sends
RERANK = {"query": f"{MARK} query", "documents": [f"{MARK} a", f"{MARK} b"], "return_documents": True}
SPANS = {**RERANK, "relevant_spans": True, "user": MARK, MARK: MARK}
OBJECTS = {**RERANK, "documents": [{"text": MARK, "id": MARK, MARK: {MARK: [MARK]}}], "rank_fields": ["text", "id"]}
ASKED = {
    "/v1/rerank": RERANK, "/v2/rerank": OBJECTS, "/cohere/v1/rerank": SPANS, "/infinity/rerank": RERANK,
    "/vllm/rerank": RERANK, "/voyage/v1/rerank": {**RERANK, "top_k": 1}, "/rerank": {**RERANK, "property": MARK},
    "/tei/rerank": {"query": MARK, "texts": [MARK], "return_text": True},
    "/score": {"text_1": MARK, "text_2": [MARK, MARK]}, "/weaviate/rerank": RERANK,
}  # fmt: skip
REFUSED = {
    "an unknown model": {**RERANK, "model": MARK},
    "a wrong type": {**RERANK, "top_n": MARK},
    "a wrong choice": {**RERANK, "length": MARK},
    "a wrong document": {**RERANK, "documents": [{MARK: MARK}]},
    "a wrong element": {**RERANK, "documents": [[MARK]]},
    "too long": {**RERANK, "documents": [MARK * 200], "length": "error"},
    "too many documents": {**RERANK, "documents": [MARK] * 60},
    "too many characters": {**RERANK, "documents": [MARK * 1000]},
    "too many values": {**RERANK, "x": [[MARK]] * 300},
    "a threshold of no calibration": {**RERANK, "threshold": MARK},
    "no JSON": f'{{"query": {MARK}'.encode(),
    "not UTF-8": f'{{"query": "{MARK}'.encode() + b'\xff"}',
    "a lone surrogate": f'{{"query": "{MARK}", "documents": ["\\ud83d {MARK}"]}}'.encode(),
    "a list": [MARK],
}
RAW = [
    f"GET /{MARK} HTTP/1.1\r\nHost: {MARK}\r\nCookie: {MARK}\r\n\r\n",
    f"{MARK} {MARK} {MARK}\r\n\r\n",
    f"POST /v1/rerank HTTP/1.1\r\n{MARK}\r\n\r\n",
    f"POST /v1/rerank HTTP/1.1\r\nHost: localhost\r\nContent-Length: {MARK}\r\n\r\n",
    f"GET /v1/models/{MARK}?{MARK} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n",
]


def test_no_line_of_the_log_quotes_a_client(model, tmp_path):
    keys, log = tmp_path / "keys.toml", tmp_path / "log"
    secret = auth.new(keys, "team")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    limits = ["--max-documents", "50", "--max-document-characters", "4000", "--max-values", "400"]
    command = [sys.executable, "-m", "turborank", "serve", "--model", str(model), "--keys", str(keys)]
    with log.open("wb") as file:
        server = subprocess.Popen([*command, "--port", str(port), "--log-level", "debug", *limits], stderr=file)
    statuses = []

    def ask(path, body, key=secret, **headers):
        connection = HTTPConnection("127.0.0.1", port, timeout=60)
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        given = {"Content-Type": "application/json", "Authorization": f"Bearer {key}", "User-Agent": MARK, **headers}
        connection.request("POST", f"{path}?{MARK}", content, given)
        response = connection.getresponse()
        statuses.append(response.status)
        response.read()
        connection.close()
        return response.status

    try:
        until(lambda: b"model_loaded" in log.read_bytes() and b"running on" in log.read_bytes(), 60)
        assert set(ASKED) <= set(by_path())
        for path, body in ASKED.items():
            assert ask(path, body) == 200, path
        for case, body in REFUSED.items():
            assert ask("/v1/rerank", body) in (200, 400, 404, 413, 422), case
        for headers in ({"Content-Type": f"text/{MARK}"}, {"Content-Encoding": MARK}, {"Host": MARK}):
            ask("/v1/rerank", RERANK, **headers)
        ask(f"/{MARK}", RERANK)
        for key in (MARK, f"{MARK} {MARK}", ""):
            assert ask("/v1/rerank", RERANK, key) == 401
        for content in RAW:
            with socket.create_connection(("127.0.0.1", port), timeout=60) as connection:
                connection.sendall(content.encode())
                connection.recv(100)
        keys.write_text(f"[[keys]]\nname = '{secret}")  # the file is broken while the server runs
        ask("/v1/rerank", RERANK)
        until(lambda: ask("/v1/rerank", RERANK) and b"keys_unreadable" in log.read_bytes())
    finally:
        server.terminate()
        server.wait(60)
    text = log.read_text()
    lines = [json.loads(line) for line in text.splitlines()]
    assert sum(line["event"] == "request" for line in lines) >= len(statuses)
    assert {200, 400, 401, 404, 413, 415, 422} <= set(statuses)
    for private in (MARK, secret, auth.digest(secret)):
        assert private.lower() not in text.lower()


def formatted(error: Exception) -> str:
    record = logging.LogRecord("turborank.serve", logging.ERROR, "", 0, "failed", (), (type(error), error, None))
    return json.loads(telemetry.JsonFormatter().format(record))["traceback"]


def test_an_unexpected_error_is_logged_without_its_words():
    try:
        try:
            {}[MARK]
        except KeyError as error:
            raise ValueError(f"got {MARK}") from error
    except ValueError as error:
        told = formatted(error)
    assert MARK not in told
    assert "ValueError" in told
    assert "KeyError" in told
    assert "test_serve_logs.py" in told


@pytest.mark.parametrize("error", [OSError(28, "No space left"), MemoryError("8 GiB"), EngineError("no tiles")])
def test_an_error_of_the_machine_is_logged_whole(error):
    assert str(error) in formatted(error)
