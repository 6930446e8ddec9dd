"""Clients that misbehave, a model folder that is replaced: the next good client is answered, and memory stays flat."""

import contextlib
import json
import os
import shutil
import socket
import struct
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fault_counts
import pytest
from helpers import native_config, write_checkpoint

pytest.importorskip("starlette", reason="the service needs pip install 'turborank[serve]'")

from serving import head, running, until

from turborank.engines import native

BODY = json.dumps({"query": "bees", "documents": ["scouts", "tides"]}).encode()
REQUEST = head(f"Content-Length: {len(BODY)}") + BODY
PATIENCE = 0.3  # seconds that the server waits for headers and bodies
ROUNDS = 20 if fault_counts.EVERY else 1


def received(connection: socket.socket) -> bytes:
    """All bytes until the server closes the connection or sends nothing for a while."""
    found = b""
    with contextlib.suppress(TimeoutError, ConnectionResetError):
        while part := connection.recv(65_536):
            found += part
    return found


def drip(connection: socket.socket, text: bytes) -> None:
    """A byte at a time, more slowly than the server waits for all of them."""
    with contextlib.suppress(ConnectionResetError, BrokenPipeError):
        for byte in text[:40]:
            connection.sendall(bytes([byte]))
            time.sleep(PATIENCE / 10)


def slow_headers(connection: socket.socket) -> None:
    drip(connection, REQUEST)
    assert received(connection) == b""


def slow_body(connection: socket.socket) -> None:
    connection.sendall(head("Content-Length: 4000"))
    drip(connection, BODY)
    assert b" 408 " in received(connection).splitlines()[0]


def _reset(text: bytes) -> Callable[[socket.socket], None]:
    def client(connection: socket.socket) -> None:
        connection.sendall(text)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # close() resets

    return client


def half_close(connection: socket.socket) -> None:
    connection.sendall(REQUEST)
    connection.shutdown(socket.SHUT_WR)
    answer = received(connection)  # the client may have left, or only have said all it has to say
    assert not answer or b" 200 " in answer.splitlines()[0]


def half_close_in_body(connection: socket.socket) -> None:
    connection.sendall(REQUEST[:-5])
    connection.shutdown(socket.SHUT_WR)
    assert b" 200 " not in received(connection)


def pipeline(connection: socket.socket) -> None:
    connection.sendall(REQUEST * 20)
    connection.settimeout(5)
    found = b""
    while found.count(b"HTTP/1.1 200") < 20:
        found += connection.recv(65_536)


def pipeline_and_leave(connection: socket.socket) -> None:
    connection.sendall(REQUEST * 50)


def _headers(*headers: str) -> Callable[[socket.socket], None]:
    def client(connection: socket.socket) -> None:
        with contextlib.suppress(ConnectionResetError, BrokenPipeError):
            connection.sendall(head(f"Content-Length: {len(BODY)}", *headers) + BODY)
        answer = received(connection)
        status = answer.split(b" ", 2)[1] if answer else b"400"  # how much is too much depends on how it arrives
        assert status == b"200" or status.startswith(b"4"), answer[:200]

    return client


def _sent(text: bytes) -> Callable[[socket.socket], None]:
    def client(connection: socket.socket) -> None:
        with contextlib.suppress(ConnectionResetError, BrokenPipeError):
            connection.sendall(text)
        assert b" 200 " not in received(connection)

    return client


CLIENTS: dict[str, Callable[[socket.socket], None]] = {
    "a byte at a time, headers": slow_headers,
    "a byte at a time, body": slow_body,
    "reset in the headers": _reset(REQUEST[:30]),
    "reset in the body": _reset(REQUEST[:-5]),
    "reset before the answer": _reset(REQUEST),
    "half-close": half_close,
    "half-close in the body": half_close_in_body,
    "20 requests at once": pipeline,
    "50 requests at once, and gone": pipeline_and_leave,
    "10,000 headers": _headers(*(f"X-{n}: 1" for n in range(10_000))),
    "one header of 1 MB": _headers("X-A: " + "a" * 1_000_000),
    "a path of 1 MB": _sent(b"GET /" + b"a" * 1_000_000 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n"),
    "TLS to a plain port": _sent(b"\x16\x03\x01\x02\0\x01\0\x01\xfc\x03\x03" + bytes(range(256))),
    "not HTTP": _sent(bytes(range(1, 256)) * 40),
    "chunks that lie": _sent(head("Transfer-Encoding: chunked") + b"fffffffffffffffff\r\n{}\r\n0\r\n\r\n"),
}


def talk(up: Any, client: Callable[[socket.socket], None]) -> None:
    with socket.create_connection(("127.0.0.1", up.port), timeout=4 * PATIENCE) as connection:
        client(connection)


def resident() -> float:
    """MiB of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_the_next_good_client_is_answered_whatever_the_last_one_did(model: Path) -> None:
    with running(model, header_timeout=PATIENCE, body_timeout=PATIENCE, log_level="error") as up:
        expected = up.ask("/v1/rerank", BODY).json["results"]
        before = 0.0
        for number in range(1 + ROUNDS):
            for name, client in CLIENTS.items():
                talk(up, client)
                reply = up.ask("/v1/rerank", BODY)
                assert (reply.status, reply.json["results"]) == (200, expected), name
                fault_counts.count(f"client: {name}", 1)
            if number == 0:  # every path has its memory now
                before = resident()
        until(lambda: not up.server.server_state.connections)
        assert up.service.batcher.waiting_tokens == 0
        assert resident() - before < 8  # MiB


def test_a_model_folder_may_be_replaced_and_deleted_while_it_is_served(tmp_path: Path) -> None:
    """By renaming, as turborank, hf and mv do. The served model stays the one that was loaded."""
    if native.available() is not None:
        pytest.skip(str(native.available()))
    folder, other = tmp_path / "served", tmp_path / "other"
    write_checkpoint(folder, native_config())
    write_checkpoint(other, native_config(num_hidden_layers=1))
    with running(folder, engine="native") as up:
        expected = up.ask("/v1/rerank", BODY).json["results"]

        def replace_file() -> None:
            shutil.copyfile(other / "model.safetensors", folder / "new")
            (folder / "new").replace(folder / "model.safetensors")

        def replace_folder() -> None:
            folder.rename(tmp_path / "old")
            shutil.copytree(other, folder)

        steps = (replace_file, replace_folder, lambda: shutil.rmtree(folder), lambda: shutil.rmtree(tmp_path / "old"))
        for step in steps:
            step()
            reply = up.ask("/v1/rerank", BODY)
            assert (reply.status, reply.json["results"]) == (200, expected)
    fault_counts.count("server: its model folder replaced or deleted", len(steps))
