"""The servers that bench/serve.py measures, as processes on loopback, and requests to them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
QUERY = "how do honeybees choose a new home?"
HEADERS = {"Content-Type": "application/json"}
# No downloads and no telemetry; each server chooses its number of threads.
QUIET = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "DO_NOT_TRACK": "1", "INFINITY_ANONYMOUS_USAGE_STATS": "0"}
START_SECONDS = 180


class Served:
    """A server process, and requests to it on one keep-alive connection for each thread."""

    def __init__(
        self, command: list[str], port: int, *, path: str = "/v1/rerank", model: str | None = None, **environment: str
    ) -> None:
        self.port, self.path, self.model = port, path, model
        self.process = subprocess.Popen(
            command, env={**os.environ, **QUIET, **environment}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        self.connections = threading.local()
        until = time.monotonic() + START_SECONDS
        while time.monotonic() < until and self.process.poll() is None:
            try:
                if self.request("POST", self.path, self.content(["a document"]))[0] == 200:
                    return
            except OSError:
                self.connections.__dict__.clear()
            time.sleep(0.1)
        self.stop()
        raise SystemExit(f"the server did not start: {' '.join(command)}")

    def request(self, method: str, path: str, body: bytes | None = None) -> tuple[int, bytes]:
        """(status, body) of the response."""
        kept = getattr(self.connections, "one", None)
        for connection in (kept, None) if kept else (None,):  # the server may have closed the kept one
            if connection is None:
                connection = self.connections.one = HTTPConnection("127.0.0.1", self.port, timeout=120)
            try:
                connection.request(method, path, body, HEADERS if body else {})
                response = connection.getresponse()
                return response.status, response.read()
            except (BrokenPipeError, ConnectionResetError):
                if connection is not kept:
                    raise
        raise AssertionError("unreachable")

    def rank(self, body: bytes) -> dict[str, Any]:
        """Rank documents; raises if the status is not 200."""
        status, answer = self.request("POST", self.path, body)
        assert status == 200, answer[:300]
        result: dict[str, Any] = json.loads(answer)
        return result

    def content(self, documents: list[str]) -> bytes:
        """The body of a request, with the model's name if the server requires it."""
        named = {"model": self.model} if self.model else {}
        return json.dumps({"query": QUERY, "documents": documents, **named}).encode()

    def memory(self) -> float:
        """Resident memory in MiB."""
        lines = Path(f"/proc/{self.process.pid}/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS")) / 1024

    def stop(self) -> None:
        """End the process."""
        self.process.terminate()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait(10)


def turborank(port: int, model: str | None, *, precision: str = "auto", **settings: str) -> Served:
    """``turborank serve`` of this environment."""
    command = [sys.executable, "-c", "from turborank.cli.main import main; main()", "serve"]
    named = {"TURBORANK_MODEL": model} if model else {}
    return Served(command, port, TURBORANK_PORT=str(port), TURBORANK_PRECISION=precision, **named, **settings)


def infinity(port: int, model: str, python: str) -> Served:
    """Infinity as its documentation starts it on CPUs: its own batching, BetterTransformer if supported."""
    command = [str(Path(python).with_name("infinity_emb")), "v2", "--model-id", model, "--served-model-name", "it"]
    command += ["--engine", "torch", "--device", "cpu", "--host", "127.0.0.1", "--port", str(port), "--no-model-warmup"]
    return Served(command, port, path="/rerank", model="it")


def minimal(port: int, model: str, python: str) -> Served:
    """sentence-transformers behind FastAPI."""
    return Served([python, str(HERE / "serve_minimal.py"), model, str(port)], port)
