"""A real server on loopback, in a thread, and a plain client for it."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import numpy as np

from turborank.serve import app, server
from turborank.serve.config import Settings
from turborank.types import PackedBatch

JSON = {"Content-Type": "application/json"}


def head(*headers: str) -> bytes:
    """Request line and headers of a rerank request, as bytes."""
    lines = ["POST /v1/rerank HTTP/1.1", "Host: localhost", "Content-Type: application/json", *headers, "", ""]
    return "\r\n".join(lines).encode()


@dataclass
class Reply:
    status: int
    headers: dict[str, str]
    content: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.content)


class Running:
    """A running server."""

    def __init__(self, made: server.Server, port: int) -> None:
        self.server = made
        self.service = made._service
        self.port = port
        self.url = f"http://127.0.0.1:{port}"

    def ask(
        self, path: str, body: Any = None, headers: dict[str, str] | None = None, method: str | None = None
    ) -> Reply:
        """POST ``body`` (as JSON unless it is bytes), or GET when there is none."""
        content = body if isinstance(body, bytes | None) else json.dumps(body).encode()
        connection = HTTPConnection("127.0.0.1", self.port, timeout=120)
        given = {**(JSON if content is not None else {}), **(headers or {})}
        connection.request(method or ("GET" if content is None else "POST"), path, content, given)
        response = connection.getresponse()
        reply = Reply(response.status, {name.lower(): value for name, value in response.getheaders()}, response.read())
        connection.close()
        return reply


@contextmanager
def running(model: Path, /, *, wait: bool = True, **settings: Any) -> Iterator[Running]:
    """A server for ``model``, ready when ``wait``."""
    made = server.make(Settings(**{"model": (str(model),), "engine": "reference", "port": 0, **settings}), app.build)
    thread = threading.Thread(target=made.run)
    thread.start()
    try:
        until(lambda: made.started)
        [socket] = made.servers[0].sockets
        up = Running(made, socket.getsockname()[1])
        if wait:
            until(lambda: up.service.ready)
        yield up
    finally:
        made.should_exit = True
        thread.join(120)
        assert not thread.is_alive(), "expected the server to stop"


def until(happened: Any, seconds: float = 20.0) -> None:
    """Wait until the condition is true."""
    end = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < end, "expected it to happen in time"
        time.sleep(0.005)


class CountingEngine:
    """A pair's logit is minus the sum of its token ids; what each batch held can be read off the record."""

    name, precision, isa, threads = "counting", "fp32", "python", 1

    def __init__(self, seconds_per_batch: float = 0.0) -> None:
        self.seconds = seconds_per_batch
        self.batches: list[list[int]] = []  # lengths of the pairs of each batch
        self.entered = threading.Event()
        self.gate = threading.Event()
        self.gate.set()

    def logits(self, batch: PackedBatch) -> Any:
        self.entered.set()
        self.gate.wait(20)
        time.sleep(self.seconds)
        self.batches.append(np.diff(batch.cu_seqlens).tolist())
        return -np.add.reduceat(batch.input_ids, batch.cu_seqlens[:-1]).astype(np.float32)

    def shrink(self) -> None:
        """Do nothing: no work space is kept."""


class GatedEngine(CountingEngine):
    """A real engine that tests can block or slow down."""

    def __init__(self, engine: Any, seconds_per_batch: float = 0.0) -> None:
        super().__init__(seconds_per_batch)
        self.engine = engine

    def logits(self, batch: PackedBatch) -> Any:
        super().logits(batch)
        return self.engine.logits(batch)
