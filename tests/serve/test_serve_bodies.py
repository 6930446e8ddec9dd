"""Bodies whose decoded form is much larger than their bytes: refused before decoding, in each dialect's format."""

import json
import os
import re
import socket
import subprocess
import sys
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("starlette", reason="the service needs pip install 'turborank[serve]'")

from hypothesis import given
from hypothesis import strategies as st
from serving import JSON, head, running, until

from turborank.serve import app, http
from turborank.serve.wire import Problem
from turborank.text import plain

MIB = 1 << 20
SIZE = 16 * MIB
START = b'{"query":"q",'


def filled(start: bytes, unit: bytes, end: bytes) -> bytes:
    """A body of about SIZE bytes."""
    return start + unit * ((SIZE - len(start) - len(end)) // len(unit)) + end


FIELDS = b",".join(b'"%x":0' % number for number in range(SIZE // 11))
# Each took 10 to 70 times its size before it was refused, or ranked.
COSTLY = {
    "empty documents": filled(START + b'"documents":[""', b',""', b"]}"),
    "empty texts": filled(START + b'"texts":[""', b',""', b"]}"),
    "fields of a document": START + b'"documents":[{' + FIELDS + b"}]}",
    "lists in a field that is not read": filled(START + b'"documents":[{"text":"a","x":[[]', b",[]", b"]}]}"),
    "unknown fields": START + b'"documents":["a"],' + FIELDS + b"}",
    "rank_fields": filled(START + b'"documents":["a"],"rank_fields":["a"', b',"b"', b"]}"),
    "lone surrogates": filled(START + b'"documents":["', rb"\ud800", b'"]}'),
    "escapes, and a lone surrogate": filled(START + rb'"documents":["\ud800', rb"\n", b'"]}'),
}


@pytest.fixture(scope="module")
def process(model, tmp_path_factory):
    """(process, port) of a server in a process of its own, so that its memory can be measured."""
    command = [sys.executable, "-m", "turborank", "serve", "--model", str(model), "--engine", "reference"]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = tmp_path_factory.mktemp("log") / "log"
    with log.open("wb") as file:
        server = subprocess.Popen([*command, "--port", str(port)], stderr=file)
    try:
        until(lambda: ready(port), 60)
        yield server, port
    finally:
        server.terminate()
        server.wait(60)


def ready(port: int) -> bool:
    try:
        return ask(port, None, "/ready")[0] == 200
    except OSError:
        return False


def ask(port: int, body: bytes | None, path: str = "/rerank") -> tuple[int, Any]:
    connection = HTTPConnection("127.0.0.1", port, timeout=120)
    connection.request("GET" if body is None else "POST", path, body, JSON if body is not None else {})
    response = connection.getresponse()
    content = json.loads(response.read())
    connection.close()
    return response.status, content


def peak(pid: int) -> int:
    """Bytes of the largest resident size so far."""
    return int(re.findall(r"VmHWM:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())[0]) * 1024


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="resident memory is read from /proc")
@pytest.mark.parametrize("case", COSTLY)
def test_a_body_costs_a_few_times_its_bytes(process, case):
    server, port = process
    ask(port, b'{"query":"q","documents":["a"]}')
    before = peak(server.pid)
    status, answer = ask(port, COSTLY[case])
    assert (status, "expected at most" in (answer.get("message") or answer["error"])) == (413, True), answer
    assert peak(server.pid) - before < 5 * SIZE


DIALECTS = {
    "/v1/rerank": (b'"documents":[""', lambda answer: answer["error"]["message"]),
    "/rerank": (b'"texts":[""', lambda answer: answer["error_type"] == "validation" and answer["error"]),
    "/tei/rerank": (b'"texts":[""', lambda answer: answer["error_type"] == "validation" and answer["error"]),
    "/weaviate/rerank": (b'"documents":[""', lambda answer: answer["error"]),
    "/v2/rerank": (b'"documents":[""', lambda answer: answer["message"]),
    "/infinity/rerank": (b'"documents":[""', lambda answer: answer["error"]["message"]),
    "/score": (b'"text_1":"a","text_2":[""', lambda answer: answer["error"]["message"]),
}


@pytest.mark.parametrize("path", DIALECTS)
def test_the_refusal_has_the_format_of_its_dialect(up, path):
    start, message = DIALECTS[path]
    reply = up.ask(path, START + start + b',""' * 300_000 + b"]}")
    assert reply.status == 413
    assert "expected at most 250000 JSON values (max_values), got" in message(reply.json)


def test_rank_fields_are_bounded_and_read_once(up, library):
    body = {"query": "a", "documents": [{"a": "b c", "d": "e"}], "raw_scores": True}
    assert up.ask("/rerank", {**body, "rank_fields": [str(number) for number in range(101)]}).status == 422
    reply = up.ask("/rerank", {**body, "rank_fields": ["d", "a", "d", "d"]})
    assert reply.json["results"][0]["relevance_score"] == library.score([("a", "e b c")])[0]


def test_a_document_without_the_fields_is_told_by_ten_of_its_own(up):
    reply = up.ask("/rerank", {"query": "a", "documents": [{f"f{n}": "x" * 99 for n in range(1000)}]})
    assert reply.status == 422
    assert "f9 and 990 more" in reply.json["message"]
    assert len(reply.content) < 2000


def test_bodies_are_held_up_to_a_limit(model, monkeypatch):
    memories = []
    monkeypatch.setattr(app, "BodyMemory", lambda limit: memories.append(http.BodyMemory(limit)) or memories[-1])
    small = json.dumps({"query": "a", "documents": ["b" * 300_000]}).encode()
    with running(model, body_memory=1) as up:
        with socket.create_connection(("127.0.0.1", up.port), timeout=20) as slow:
            slow.sendall(head("Content-Length: 1500000") + b'{"query": "' + b"a" * 900_000)
            until(lambda: memories[0].held > 900_000)
            reply = up.ask("/v1/rerank", small)
            assert reply.json["error"]["code"] == "overloaded"
            assert "(body_memory)" in reply.json["message"]
            assert reply.headers["retry-after"] == "1"
        until(lambda: up.ask("/v1/rerank", small).status == 200)


def test_what_was_held_is_given_back():
    memory = http.BodyMemory(10)
    with memory.hold() as take, memory.hold() as other:
        take(8)
        take(8)  # one body alone is bounded by max_body
        with pytest.raises(Problem, match="body_memory"):
            other(1)
        assert memory.held == 16
    assert memory.held == 0
    with memory.hold() as take:
        take(10)


TEXT = st.text(st.sampled_from('a",[{}]\\:é🐝\n'), max_size=12)
VALUES = st.recursive(
    st.none() | st.integers() | TEXT,
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(TEXT, inner, max_size=5),
    max_leaves=30,
)


def structure(value: Any) -> int:
    """Brackets that open in a value, and the commas between its elements."""
    if not isinstance(value, list | dict):
        return 0
    inner = value if isinstance(value, list) else list(value.values())
    return 1 + max(0, len(inner) - 1) + sum(map(structure, inner))


@pytest.fixture(scope="module", params=[1, 2, 7, 1 << 18])
def piece(request):
    """Bytes that are examined at a time: texts and escapes are cut at every place."""
    before, http._PIECE = http._PIECE, request.param
    yield
    http._PIECE = before


@given(value=VALUES, ascii=st.booleans())
def test_values_are_counted_outside_of_texts(piece, value, ascii):
    body = json.dumps(value, ensure_ascii=ascii).encode()
    count = structure(value)
    http.check_values(body, count)
    if count:
        with pytest.raises(Problem, match=f"at most {count - 1} JSON values .* got {count} in"):
            http.check_values(body, count - 1)


ESCAPES = st.lists(st.sampled_from([r"\ud83d", r"\udc1d", r"\\", r"\"", "ud83d", "a", r"\n", r"\uD800", r"\u00e9"]))


@given(ESCAPES)
def test_lone_surrogates_are_those_that_python_finds(parts):
    body = b'{"a":"' + "".join(parts).encode() + b'"}'
    _, fields = http.decode_fields(body)
    assert json.loads(bytes(fields["a"])) == plain(json.loads(body)["a"])
