"""The service against the library it serves: what HTTP costs, and what happens at twice the capacity.

    python bench/serve.py [--model FOLDER] [--seconds 60] [--st-model FOLDER]

Server and clients share the machine, as they do not in life. Each figure is the median of several rounds in which
library and service take turns. ``--st-model`` adds a minimal sentence-transformers + FastAPI server as a peer, with a
model of the same shape in a folder it can load. Error: the largest difference between a served score and the library's.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import statistics
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

from turborank.reranker import Reranker
from turborank.types import Pair

WORDS = Path(__file__).resolve().parent.parent / "examples"
CLIENTS, DOCUMENTS = 8, 100
HEADERS = {"Content-Type": "application/json"}


def texts(count: int, words: int, seed: int = 0) -> list[str]:
    """Passages of English from the examples, of ``words`` words each."""
    pool = " ".join(path.read_text(encoding="utf-8") for path in sorted(WORDS.glob("*.md"))).split()
    draw = random.Random(seed)
    starts = [draw.randrange(len(pool) - words) for _ in range(count)]
    return [" ".join(pool[start : start + words]) for start in starts]


def body(documents: list[str], query: str = "how do honeybees choose a new home?") -> dict[str, Any]:
    return {"query": query, "documents": documents}


class Served:
    """A server process, and requests to it."""

    def __init__(self, command: list[str], port: int, environment: dict[str, str]) -> None:
        self.port = port
        self.process = subprocess.Popen(
            command, env={**os.environ, **environment}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        self.connections = threading.local()
        until = time.monotonic() + 120
        while time.monotonic() < until:
            try:
                if self.request("GET", "/ready")[0] in (200, 404):  # the peer has no /ready
                    return
            except OSError:
                self.connections.__dict__.clear()
            time.sleep(0.1)
        raise SystemExit(f"the server did not start: {' '.join(command)}")

    def request(self, method: str, path: str, content: bytes | None = None) -> tuple[int, bytes]:
        connection = getattr(self.connections, "one", None)
        if connection is None:
            connection = self.connections.one = HTTPConnection("127.0.0.1", self.port, timeout=120)
        connection.request(method, path, content, HEADERS if content else {})
        response = connection.getresponse()
        return response.status, response.read()

    def rank(self, content: bytes) -> dict[str, Any]:
        status, answer = self.request("POST", "/v1/rerank", content)
        assert status == 200, answer[:300]
        result: dict[str, Any] = json.loads(answer)
        return result

    def memory(self) -> float:
        """Resident MiB."""
        lines = Path(f"/proc/{self.process.pid}/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS")) / 1024

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait(30)


def timed(work: Callable[[], Any]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def throughput(library: Reranker, served: dict[str, Served], rounds: int, words: int) -> None:
    """8 clients × 100 documents, against the same pairs in one call of the library."""
    lists = [texts(DOCUMENTS, words, seed) for seed in range(CLIENTS)]
    contents = [json.dumps(body(documents)).encode() for documents in lists]
    pairs = [(body([])["query"], text) for documents in lists for text in documents]
    tokens = int(library.score_detailed([Pair(*pair) for pair in pairs]).tokens.sum())
    seconds: dict[str, list[float]] = {"library": [], **{name: [] for name in served}}
    with ThreadPoolExecutor(CLIENTS) as pool:
        for _ in range(rounds):
            seconds["library"].append(timed(lambda: library.score(pairs)))
            for name, server in served.items():
                seconds[name].append(timed(lambda server=server: list(pool.map(server.rank, contents))))
    base = statistics.median(seconds["library"])
    print(f"\n{CLIENTS} clients x {DOCUMENTS} documents, {tokens} tokens\n")
    print("| | documents/s | tokens/s | of the library | rounds, s |\n|---|---|---|---|---|")
    for name, taken in seconds.items():
        middle = statistics.median(taken)
        every = " ".join(f"{one:.2f}" for one in taken)
        print(f"| {name} | {len(pairs) / middle:.0f} | {tokens / middle:.0f} | {base / middle:.1%} | {every} |")


def lone(library: Reranker, served: dict[str, Served], rounds: int) -> None:
    """One request of 10 short documents at a time."""
    documents = texts(10, 20)
    content = json.dumps(body(documents)).encode()
    taken: dict[str, list[float]] = {"library": [], **{name: [] for name in served}}
    for _ in range(rounds):
        taken["library"].append(timed(lambda: library.rank(body([])["query"], documents)))
        for name, server in served.items():
            taken[name].append(timed(lambda server=server: server.rank(content)))
    print("\none request of 10 documents at a time\n")
    print("| | median ms | p95 ms | over the library, ms |\n|---|---|---|---|")
    base = statistics.median(taken["library"])
    for name, all_seconds in taken.items():
        middle, high = statistics.median(all_seconds), sorted(all_seconds)[int(len(all_seconds) * 0.95)]
        print(f"| {name} | {middle * 1e3:.2f} | {high * 1e3:.2f} | {(middle - base) * 1e3:+.2f} |")


def error(library: Reranker, server: Served) -> float:
    documents = texts(50, 120, seed=9)
    want = {one.index: one.score for one in library.rank(body([])["query"], documents)}
    got = server.rank(json.dumps(body(documents)).encode())["results"]
    return max(abs(one["relevance_score"] - want[one["index"]]) for one in got)


async def arrival(port: int, content: bytes, outcomes: list[tuple[int, float]]) -> None:
    """One request on a connection of its own; (status, seconds), status 0 when it was not answered."""
    started, status = time.perf_counter(), 0
    try:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        head = (
            "POST /v1/rerank HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(content)}\r\n\r\n"
        )
        writer.write(head.encode() + content)
        await writer.drain()
        status = int((await reader.readline()).split()[1])
        await reader.read()
        writer.close()
    except (OSError, IndexError, ValueError):
        pass
    outcomes.append((status, time.perf_counter() - started))


async def open_loop(port: int, content: bytes, per_second: float, seconds: float) -> list[tuple[int, float]]:
    """Requests that arrive at random moments, whatever became of those before."""
    draw, tasks = random.Random(1), []
    outcomes: list[tuple[int, float]] = []
    end = time.perf_counter() + seconds
    moment = time.perf_counter()
    while moment < end:
        await asyncio.sleep(max(0.0, moment - time.perf_counter()))
        tasks.append(asyncio.create_task(arrival(port, content, outcomes)))
        moment += draw.expovariate(per_second)
    await asyncio.gather(*tasks)
    return outcomes


def overload(server: Served, seconds: float) -> None:
    """Twice the capacity, open loop: what is accepted, what is refused, how long both take, what memory does."""
    content = json.dumps(body(texts(20, 60))).encode()
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(server.rank, [content] * 8))
        capacity = 40 / timed(lambda: list(pool.map(server.rank, [content] * 40)))
    before = server.memory()
    outcomes = asyncio.run(open_loop(server.port, content, 2 * capacity, seconds))
    after = server.memory()
    recovered = timed(lambda: server.rank(content))
    accepted = sorted(taken for status, taken in outcomes if status == 200)
    refused = sorted(taken for status, taken in outcomes if status != 200) or [0.0]
    print(f"\ntwice the capacity ({capacity:.1f} requests/s of 20 documents) for {seconds:.0f} s, open loop\n")
    print(f"answers by status: {dict(sorted(Counter(status for status, _ in outcomes).items()))}")
    shares = {f"p{p}": accepted[min(len(accepted) - 1, int(len(accepted) * p / 100))] for p in (50, 95, 99)}
    print("accepted: " + ", ".join(f"{name} {value:.2f} s" for name, value in shares.items()))
    print(f"refused: median {statistics.median(refused) * 1e3:.0f} ms")
    print(f"memory: {before:.0f} MiB before, {after:.0f} MiB after; first request afterwards: {recovered * 1e3:.0f} ms")


def main() -> None:
    """Parse, run, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="catalog name or folder; by default the embedded model")
    parser.add_argument("--engine", default="auto")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--words", type=int, default=150, help="of each document, in the measure of throughput")
    parser.add_argument("--seconds", type=float, default=60.0, help="of overload; 0 leaves it out")
    parser.add_argument("--st-model", help="folder of a cross-encoder for the sentence-transformers peer")
    given = parser.parse_args()
    library = Reranker(given.model, engine=given.engine)
    engine = library.engine
    print(f"{library.name} · {engine.name} {engine.precision} {engine.isa} · {engine.threads} threads")
    settings = {"TURBORANK_PORT": "8191", "TURBORANK_ENGINE": given.engine, "TURBORANK_QUEUE_SECONDS": "600"}
    settings |= {"TURBORANK_MODEL": given.model} if given.model else {}
    command = [sys.executable, "-c", "from turborank.cli import main; main()", "serve"]
    served = {"turborank serve": Served(command, 8191, settings)}
    if given.st_model:
        peer = Path(__file__).with_name("serve_peer.py")
        served["sentence-transformers + FastAPI"] = Served(
            [sys.executable, str(peer), given.st_model, "8192"], 8192, {}
        )
    try:
        print(f"largest error of a served score: {error(library, served['turborank serve']):g}")
        throughput(library, served, given.rounds, given.words)
        lone(library, served, given.rounds * 20)
        if given.seconds:
            served["overload"] = Served(
                command, 8193, {**settings, "TURBORANK_PORT": "8193", "TURBORANK_QUEUE_SECONDS": "2"}
            )
            overload(served["overload"], given.seconds)
    finally:
        for server in served.values():
            server.stop()


if __name__ == "__main__":
    main()
