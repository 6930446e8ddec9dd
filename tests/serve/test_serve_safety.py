"""Hostile and malformed requests: each is refused with a clear error, none causes a 500 or stops the server."""

import itertools
import json
import socket
import time
from http.client import HTTPConnection

import pytest

pytest.importorskip("starlette", reason="the service needs pip install 'turborank[serve]'")

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from serving import JSON, head, running, until

from turborank.serve.dialects import DIALECTS, by_path
from turborank.text import LONGEST, passages

BODY = {"query": "bees", "documents": ["scouts", "tides"]}
PATHS = sorted(by_path())

MALFORMED = {
    "nothing": b"",
    "no JSON": b"hello",
    "cut off": b'{"query": "a", "documents": ["b"',
    "trailing comma": b'{"query": "a", "documents": ["b"],}',
    "NaN": b'{"query": "a", "documents": ["b"], "threshold": NaN}',
    "byte order mark": b'\xef\xbb\xbf{"query": "a", "documents": ["b"]}',
    "not UTF-8": b'{"query": "\xff", "documents": ["b"]}',
    "UTF-16": '{"query": "a", "documents": ["b"]}'.encode("utf-16"),
    "deep": b'{"query": "a", "documents": ' + b"[" * 200_000,
    "deep mapping": b'{"query": "a", "documents": [' + b'{"a":' * 200_000,
    "deep unknown field": b'{"x": ' + b"[" * 200_000,
}
WRONG = {
    "a list": b"[]",
    "a string": b'"x"',
    "null": b"null",
    "huge integer": b'{"query": "a", "documents": ["b"], "top_n": ' + b"9" * 5000 + b"}",
    "overflowing float": b'{"query": "a", "documents": ["b"], "threshold": 1e999}',
    "overflow inside a document": b'{"query": "a", "documents": [{"text": 1e999}]}',
    "negative": b'{"query": "a", "documents": ["b"], "top_n": -1}',
    "fraction": b'{"query": "a", "documents": ["b"], "top_n": 1.5}',
    "boolean for a number": b'{"query": "a", "documents": ["b"], "top_n": true}',
    "too short a pair": b'{"query": "a", "documents": ["b"], "truncate_prompt_tokens": 3}',
}


@pytest.mark.parametrize("case", MALFORMED)
def test_what_is_no_json_is_400(up, case):
    reply = up.ask("/v1/rerank", MALFORMED[case])
    assert (reply.status, reply.json["error"]["code"]) == (400, "invalid_json"), reply.content


@pytest.mark.parametrize("case", WRONG)
def test_wrong_values_are_422_with_their_place(up, case):
    reply = up.ask("/v1/rerank", WRONG[case])
    assert (reply.status, reply.json["error"]["code"]) == (422, "invalid_input")
    assert reply.json["message"].startswith(("expected", "number", "integer"))


def test_lone_surrogates_become_replacement_characters_and_pairs_stay(up, library):
    documents = rb'["\ud83d\udc1d a \\ud83d", "\udc1d\ud83d b"]'
    body = rb'{"query": "bees \ud83d", "return_documents": true, "documents": ' + documents + b"}"
    reply = up.ask("/v1/rerank", body)
    assert reply.status == 200
    texts = {one["index"]: one["document"]["text"] for one in reply.json["results"]}
    assert texts == {0: "\U0001f41d a \\ud83d", 1: "\ufffd\ufffd b"}
    assert "surrogates" in reply.json["meta"]["warnings"][0]


def test_control_characters_and_nul_are_text(up):
    assert up.ask("/v1/rerank", {"query": "a\x00b", "documents": ["\x1f\u200f\u2028", "\x00"]}).status == 200


def test_a_body_must_be_called_json(up):
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", ""):
        reply = up.ask("/v1/rerank", json.dumps(BODY).encode(), {"Content-Type": kind})
        assert reply.status == 415
    assert up.ask("/v1/rerank", BODY, {"Content-Type": "application/json; charset=utf-8"}).status == 200
    assert up.ask("/v1/rerank", BODY, {"Content-Encoding": "gzip"}).status == 415


LIMITS = {
    "max_body": ({"max_body": 60}, {"query": "a", "documents": ["b" * 100]}),
    "max_values": ({"max_values": 9}, {"query": "a", "documents": [{"text": "b", "tags": [[]] * 9}]}),
    "max_documents": ({"max_documents": 2}, {"query": "a", "documents": ["b"] * 3}),
    "max_document_characters": ({"max_document_characters": 5}, {"query": "a", "documents": ["b", "c" * 6]}),
    "max_characters": ({"max_characters": 9}, {"query": "a", "documents": ["bbb", "ccc", "ddd"]}),
    "max_tokens": ({"max_tokens": 20}, {"query": "a", "documents": ["bbbbbbbb", "cccccccc"]}),
}


@pytest.mark.parametrize("setting", LIMITS)
def test_each_limit_is_413_and_names_its_setting(model, setting):
    given, body = LIMITS[setting]
    with running(model, **given) as up:
        reply = up.ask("/v1/rerank", body)
        assert reply.status == 413
        assert f"at most {given[setting]}" in reply.json["message"]
        assert f"({setting})" in reply.json["message"]
        assert up.ask("/v1/rerank", {"query": "a", "documents": ["b"]}).status == 200


def raw(up, content: bytes, seconds: float = 10.0) -> bytes:
    """The response to raw request bytes."""
    with socket.create_connection(("127.0.0.1", up.port), timeout=seconds) as connection:
        connection.sendall(content)
        received = b""
        try:
            while part := connection.recv(65536):
                received += part
                head, blank, rest = received.partition(b"\r\n\r\n")
                if blank and b"content-length: %d\r\n" % len(rest) in head.lower() + b"\r\n":
                    break
        except (TimeoutError, ConnectionResetError):
            pass
        return received


def test_a_body_without_a_length_stops_at_the_limit(model):
    with running(model, max_body=1000) as up:
        chunk = b"3e8\r\n" + b"a" * 1000 + b"\r\n"
        assert b" 413 " in raw(up, head("Transfer-Encoding: chunked") + chunk + chunk).splitlines()[0]


@pytest.mark.parametrize(
    "content",
    [
        head("Content-Length: 5", "Transfer-Encoding: chunked") + b"0\r\n\r\n",
        head("Content-Length: -1"),
        head("Content-Length: 1, 2"),
        head("X: a\x00b"),
        head("X: " + "a" * 200_000),
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",  # a TLS hello
        b"GET / HTTP/9.9\r\n\r\n",
    ],
)
def test_malformed_headers_are_refused(up, content):
    answer = raw(up, content, seconds=5)
    assert answer.split(b" ", 2)[1:2] in ([b"400"], [b"431"], [b"415"], [b"421"], []), answer[:200]
    assert b"500" not in answer[:20]
    assert up.ask("/health").status == 200


def test_without_keys_only_local_names_are_answered_to(up):
    """In DNS rebinding, a foreign page's own host name resolves to this machine and is sent as Host."""
    assert up.ask("/v1/rerank", BODY, {"Host": f"localhost:{up.port}"}).status == 200
    for host in ("evil.example", "127.0.0.1.evil.example", "", "localhost.evil.example:80"):
        reply = up.ask("/v1/rerank", BODY, {"Host": host})
        assert (reply.status, reply.json["error"]["code"]) == (421, "wrong_host")


def test_pages_elsewhere_may_not_call_unless_named(model):
    origin = {"Origin": "https://page.example"}
    preflight = {**origin, "Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "content-type"}
    with running(model) as up:
        assert "access-control-allow-origin" not in up.ask("/v1/rerank", BODY, origin).headers
        assert up.ask("/v1/rerank", None, preflight, "OPTIONS").status == 405
    with running(model, cors_origin=("https://page.example",)) as up:
        assert up.ask("/v1/rerank", BODY, origin).headers["access-control-allow-origin"] == "https://page.example"
        assert up.ask("/v1/rerank", None, preflight, "OPTIONS").status == 200
        other = up.ask("/v1/rerank", BODY, {"Origin": "https://other.example"})
        assert "access-control-allow-origin" not in other.headers
        assert up.ask("/nope", None, origin).headers["access-control-allow-origin"] == "https://page.example"


def test_a_host_may_be_allowed_with_its_port(model):
    with running(model, allowed_host=("rank.example:8443",)) as up:
        assert up.ask("/v1/rerank", BODY, {"Host": "rank.example:8443"}).status == 200
        assert up.ask("/v1/rerank", BODY, {"Host": "other.example:8443"}).status == 421


def test_another_method_is_told_which_one_is_allowed(up):
    assert up.ask("/v1/rerank").headers["allow"] == "POST"


@pytest.mark.parametrize("prefix", ["/api", "/api/", "api"])
def test_a_path_prefix_may_end_in_a_slash(model, prefix):
    with running(model, root_path=prefix) as up:
        assert up.ask("/health").status == 200  # the proxy took the prefix off
        assert up.ask("/openapi.json").json["servers"] == [{"url": "/api"}]


@pytest.mark.parametrize(
    "path",
    [
        "/../etc/passwd",
        "/playground/../../config.py",
        "/%2e%2e/%2e%2e/etc/passwd",
        "/index.html",
        "/..%5c..%5cx",
        "/%00",
        "/v1/models/../../x",
    ],
)
def test_path_traversal_finds_nothing(up, path):
    reply = up.ask(path)
    assert reply.status == 404
    assert reply.headers["content-type"] == "application/json"


def test_slow_headers_and_slow_bodies_are_disconnected(model):
    with running(model, header_timeout=0.3, body_timeout=0.3) as up:
        started = time.monotonic()
        assert raw(up, b"POST /v1/rerank HTTP/1.1\r\nHost: loc") == b""
        assert time.monotonic() - started < 8
        assert b" 408 " in raw(up, head("Content-Length: 100") + b'{"query"').splitlines()[0]
        connection = HTTPConnection("127.0.0.1", up.port, timeout=10)
        for _ in range(3):  # idle connections are another matter, and are kept
            connection.request("GET", "/health")
            assert connection.getresponse().read()
            ours = connection.sock
            time.sleep(0.5)
            assert connection.sock is ours is not None
        connection.close()


def test_clients_that_do_not_read_are_disconnected_and_slow_readers_are_not(model):
    document = {"text": "bees", "payload": "a" * 900_000}  # is not read, but comes back
    content = json.dumps({"query": "a", "documents": [document] * 8, "return_documents": True}).encode()
    with running(model, answer_timeout=0.5) as up:
        connections = up.server.server_state.connections
        for header in ("Connection: keep-alive", "Connection: close"):
            with socket.socket() as silent:
                silent.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
                silent.connect(("127.0.0.1", up.port))
                silent.sendall(head(f"Content-Length: {len(content)}", header) + content)
                until(lambda: connections)
                until(lambda: not connections)
                until(lambda: not up.server.config.app.connections)  # and forgotten
        with socket.socket() as slow:
            slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65_536)
            slow.connect(("127.0.0.1", up.port))
            slow.sendall(head(f"Content-Length: {len(content)}", "Connection: close") + content)
            received = 0
            while part := slow.recv(200_000):
                received += len(part)
                time.sleep(0.01)
        assert received > len(content)


def test_an_engine_failure_reveals_no_internals(model):
    class Broken:
        name, precision, isa, threads = "broken", "fp32", "none", 1

        def logits(self, batch):
            raise RuntimeError("secret path /srv/x")

    with running(model) as up:
        good = up.service.models.default.reranker.engine
        up.service.models.default.reranker.engine = Broken()
        reply = up.ask("/v1/rerank", BODY)
        assert reply.status == 500
        assert b"secret" not in reply.content
        assert reply.json["id"] == reply.headers["x-request-id"]
        up.service.models.default.reranker.engine = good
        assert up.ask("/v1/rerank", BODY).status == 200


def test_a_nan_logit_is_never_returned(model):
    class NotANumber:
        name, precision, isa, threads = "nan", "fp32", "none", 1

        def logits(self, batch):
            import numpy as np

            return np.full(batch.pairs, np.nan, dtype=np.float32)

    with running(model) as up:
        up.service.models.default.reranker.engine = NotANumber()
        assert up.ask("/v1/rerank", BODY).status == 500


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
FIELDS = sorted({field for row in DIALECTS.values() for field in row.request.__struct_fields__})


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    path=st.sampled_from(PATHS),
    body=st.dictionaries(st.sampled_from(FIELDS), JSON_VALUES, max_size=6).map(
        lambda extra: {"query": "q", "documents": ["a", "b"], **extra}
    ),
)
def test_no_request_finds_a_500(up, path, body):
    reply = up.ask(path, body)
    assert reply.status in (200, 400, 404, 413, 422), (body, reply.content)
    assert reply.json is not None


@settings(max_examples=200, deadline=None)
@given(st.text(alphabet=st.sampled_from("ab. !?\n。é🐝\"'"), max_size=3000))
def test_passages_cover_all_text_once_and_are_not_long(text):
    places = passages(text)
    assert all(0 <= start < end <= len(text) for start, end in places)
    assert all(first[1] <= second[0] for first, second in itertools.pairwise(places))
    outside, at = [], 0
    for start, end in places:
        outside.append(text[at:start])
        at = end
    assert "".join([*outside, text[at:]]).strip() == ""
    assert all(end - start <= LONGEST for start, end in places)


def test_a_sentence_a_little_too_long_is_halved_instead_of_losing_its_last_word():
    text = "word " * (LONGEST // 5 + 1) + "it."
    sizes = [end - start for start, end in passages(text)]
    assert len(sizes) == 2
    assert min(sizes) > LONGEST // 3


def test_the_openapi_document_describes_every_path(up):
    document = up.ask("/openapi.json").json
    assert document["openapi"] == "3.1.0"
    assert set(by_path()) <= set(document["paths"])
    known = {f"#/components/schemas/{name}" for name in document["components"]["schemas"]}
    used = set()

    def walk(value):
        if isinstance(value, dict):
            used.update([value["$ref"]] if "$ref" in value else [])
            [walk(inner) for inner in value.values()]
        elif isinstance(value, list):
            [walk(inner) for inner in value]

    walk(document)
    assert used <= known
    assert JSON["Content-Type"] in document["paths"]["/v1/rerank"]["post"]["requestBody"]["content"]
