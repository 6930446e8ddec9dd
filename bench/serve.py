"""Benchmark of the HTTP service: its overhead over the library, comparison with other servers, and overload.

    python bench/serve_model.py MODEL                      a model that every server can load
    python bench/serve.py throughput --model MODEL --infinity ENV/bin/python --minimal ENV/bin/python
    python bench/serve.py lone       --model MODEL --infinity ENV/bin/python --minimal ENV/bin/python
    python bench/serve.py overload --seconds 60            the embedded model at twice the capacity
    python bench/serve.py wait --rounds 10                 a short request beside long ones, batch_seconds 0 and 0.25

Each peer has a virtual environment of its own, outside the repository (bench/results/serve.md names their versions).
Servers, clients and library share one machine, unlike in production, and are measured alternately in each round;
figures are medians over rounds. Every server's scores are compared with the numpy engine's.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import os
import random
import statistics
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import servers
from servers import QUERY, Served

from turborank.reranker import Reranker
from turborank.types import Pair

EXAMPLES = Path(__file__).resolve().parent.parent / "examples" / "texts"
CLIENTS, DOCUMENTS = 8, 100
PORT = 8191
LOOK_EVERY = 0.02  # seconds between polls of a server that recovers


def texts(count: int, words: int, seed: int = 0) -> list[str]:
    """English passages of ``words`` words each, from examples/texts/."""
    pool = " ".join(path.read_text(encoding="utf-8") for path in sorted(EXAMPLES.glob("*.md"))).split()
    draw = random.Random(seed)
    starts = [draw.randrange(len(pool) - words) for _ in range(count)]
    return [" ".join(pool[start : start + words]) for start in starts]


def timed(work: Callable[[], Any]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def throughput(library: dict[str, Reranker], served: dict[str, Served], rounds: int, words: int) -> None:
    """8 clients with 100 documents each, compared with the same pairs in one call of the library."""
    lists = [texts(DOCUMENTS, words, seed) for seed in range(CLIENTS)]
    pairs = [Pair(QUERY, text) for documents in lists for text in documents]
    tokens = int(next(iter(library.values())).score_detailed(pairs).tokens.sum())
    seconds: dict[str, list[float]] = {name: [] for name in [*library, *served]}
    with ThreadPoolExecutor(CLIENTS) as pool:
        for _ in range(rounds):
            for name, reranker in library.items():
                seconds[name].append(timed(lambda one=reranker: one.score(pairs)))
            for name, server in served.items():
                bodies = [server.content(documents) for documents in lists]
                seconds[name].append(timed(lambda one=server, all=bodies: list(pool.map(one.rank, all))))
    print(f"\n{CLIENTS} clients x {DOCUMENTS} documents, {tokens} tokens\n")
    print("| | documents/s | tokens/s | of the library | rounds, s |\n|---|--:|--:|--:|---|")
    for name, taken in seconds.items():
        middle = statistics.median(taken)
        base = statistics.median(seconds.get(f"library {name.rpartition(' ')[2]}", [float("nan")]))
        every = " ".join(f"{one:.2f}" for one in taken)
        share = f"{base / middle:.1%}" if base == base else ""
        print(f"| {name} | {len(pairs) / middle:.0f} | {tokens / middle:,.0f} | {share} | {every} |")


def lone(library: dict[str, Reranker], served: dict[str, Served], rounds: int) -> None:
    """One request of 10 short documents at a time."""
    documents = texts(10, 20)
    bodies = {name: server.content(documents) for name, server in served.items()}
    taken: dict[str, list[float]] = {name: [] for name in [*library, *served]}
    for _ in range(rounds):
        for name, reranker in library.items():
            taken[name].append(timed(lambda one=reranker: one.rank(QUERY, documents)))
        for name, server in served.items():
            taken[name].append(timed(lambda one=server, body=bodies[name]: one.rank(body)))
    print(f"\none request of 10 documents of 20 words at a time, {rounds} rounds\n")
    print("| | median ms | p95 ms | over the library, ms |\n|---|--:|--:|--:|")
    for name, every in taken.items():
        middle, high = statistics.median(every), sorted(every)[int(len(every) * 0.95)]
        base = taken.get(f"library {name.rpartition(' ')[2]}")
        over = f"{(middle - statistics.median(base)) * 1e3:+.2f}" if base else ""
        print(f"| {name} | {middle * 1e3:.2f} | {high * 1e3:.2f} | {over} |")


def errors(reference: Reranker, served: dict[str, Served]) -> None:
    """The largest difference between a server's score and the numpy engine's."""
    documents = texts(12, 60, seed=9)
    want = {one.index: one.score for one in reference.rank(QUERY, documents)}
    print("\nlargest difference of a score from the numpy engine's:")
    for name, server in served.items():
        got = server.rank(server.content(documents))["results"]
        print(f"{name} {max(abs(one['relevance_score'] - want[one['index']]) for one in got):.1e}")


async def arrival(port: int, body: bytes, outcomes: list[tuple[int, float]]) -> None:
    """One request on a new connection: (status, seconds); status 0 if it was not answered."""
    started, status = time.perf_counter(), 0
    try:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        head = (
            "POST /v1/rerank HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(body)}\r\n\r\n"
        )
        writer.write(head.encode() + body)
        await writer.drain()
        status = int((await reader.readline()).split()[1])
        await reader.read()
        writer.close()
    except (OSError, IndexError, ValueError):
        pass
    outcomes.append((status, time.perf_counter() - started))


async def open_loop(server: Served, body: bytes, per_second: float, seconds: float) -> Any:
    """Open-loop load: requests arrive at random times independent of earlier answers; memory is sampled every second.

    Returns ((status, seconds) of each request, MiB, seconds until the queue was empty, seconds of one request before
    and one after the load).
    """
    draw, tasks, memory = random.Random(1), [], [server.memory()]
    outcomes: list[tuple[int, float]] = []
    calm: list[tuple[int, float]] = []
    for _ in range(5):
        await arrival(server.port, body, calm)
    before = statistics.median(taken for _, taken in calm)
    moment = start = time.perf_counter()
    while moment < start + seconds:
        await asyncio.sleep(max(0.0, moment - time.perf_counter()))
        tasks.append(asyncio.create_task(arrival(server.port, body, outcomes)))
        if time.perf_counter() - start > len(memory):
            memory.append(server.memory())
        moment += draw.expovariate(per_second)
    over = time.perf_counter()
    while b"turborank_queue_requests 0.0" not in server.request("GET", "/metrics")[1]:
        await asyncio.sleep(LOOK_EVERY)
    recovery = time.perf_counter() - over
    await arrival(server.port, body, calm)
    await asyncio.gather(*tasks)
    return outcomes, memory, recovery, before, calm[-1][1]


def overload(server: Served, seconds: float, per_second: float | None) -> None:
    """Open-loop load at twice the capacity: accepted and refused requests, their latencies, and memory."""
    body = server.content(texts(20, 60))
    with ThreadPoolExecutor(3) as pool:
        list(pool.map(server.rank, [body] * 9))
        capacity = 80 / timed(lambda: list(pool.map(server.rank, [body] * 80)))
    per_second = per_second or 2 * capacity
    outcomes, memory, recovery, before, after = asyncio.run(open_loop(server, body, per_second, seconds))
    print(f"\n{per_second:.0f} requests/s of 20 documents for {seconds:.0f} s, open loop; capacity {capacity:.0f}/s\n")
    print(f"answers by status: {dict(sorted(Counter(status for status, _ in outcomes).items()))}")
    for name, good in (("accepted", True), ("refused", False)):
        taken = sorted(one for status, one in outcomes if (status == 200) is good) or [float("nan")]
        shares = (f"p{p} {taken[min(len(taken) - 1, int(len(taken) * p / 100))] * 1e3:.0f} ms" for p in (50, 95, 99))
        print(f"{name}: {', '.join(shares)}, most {taken[-1] * 1e3:.0f} ms")
    every = " ".join(f"{one:.0f}" for one in memory[:: max(1, len(memory) // 12)])
    print(f"memory, MiB: {every}; at the end {server.memory():.0f}")
    print(
        f"queue empty {recovery * 1e3:.0f} ms after the last arrival; one request alone took {before * 1e3:.0f} ms "
        f"before all this, {after * 1e3:.0f} ms right then"
    )


def long_body(documents: int, tokens: int, seed: int) -> bytes:
    """A request of documents that are cut to ``tokens`` tokens with the query."""
    content = {"query": QUERY, "documents": texts(documents, min(tokens, 9000), seed), "truncate_prompt_tokens": tokens}
    return json.dumps(content).encode()


def beside(server: Served, long: bytes, short: bytes, gap: float) -> list[float]:
    """Seconds of short requests that arrive one after another while a long request is computed."""
    taken: list[float] = []
    draw = random.Random(len(long))
    with ThreadPoolExecutor(1) as other:
        answer = other.submit(server.request, "POST", "/vllm/rerank", long)
        time.sleep(gap)
        while not answer.done():
            taken.append(timed(lambda: server.rank(short)))
            if answer.done():  # part of it had the engine to itself
                taken.pop()
            time.sleep(draw.uniform(0, gap))
        assert answer.result()[0] == 200, answer.result()
    return taken


def ratio(before: list[float], after: list[float]) -> str:
    """Geometric mean of after / before by pairs, with its standard error."""
    logs = np.log(np.array(after) / np.array(before))
    error = logs.std(ddof=1) / math.sqrt(len(logs)) if len(logs) > 1 else math.nan
    return f"{math.exp(logs.mean()):.3f} ± {error * math.exp(logs.mean()):.3f}"


def quantile(taken: list[float], share: float) -> str:
    """A quantile in ms and the half width of its 68 % interval (bootstrap)."""
    draws = np.random.default_rng(0).choice(taken, (2000, len(taken)))
    low, high = np.quantile(np.quantile(draws, share, axis=1), (0.16, 0.84))
    return f"{np.quantile(taken, share) * 1e3:.0f} ± {(high - low) / 2e-3:.0f}"


def cpu(server: Served) -> float:
    """CPU seconds of the server so far."""
    fields = Path(f"/proc/{server.process.pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def wait(served: dict[str, Served], rounds: int, sizes: list[tuple[int, int]], gap: float) -> None:
    """The wait of one-document requests beside long ones, and throughput: both servers in turn within each round."""
    (first, old), (second, new) = served.items()
    short = old.content(texts(1, 20))
    print(f"\none document of 20 words beside a long request, {rounds} rounds; p50 and p99 in ms\n")
    print(f"| long request | {first}: n, p50, p99 | {second}: n, p50, p99 | p50, after / before |\n|---|---|---|---|")
    for documents, tokens in sizes:
        taken: tuple[list[float], list[float]] = ([], [])
        middle: tuple[list[float], list[float]] = ([], [])
        for number in range(rounds):
            body = long_body(documents, tokens, number)
            for place, server in enumerate((old, new)):
                found = beside(server, body, short, gap)
                taken[place].extend(found)
                middle[place].append(statistics.median(found))
        cells = [f"{len(one)}, {quantile(one, 0.5)}, {quantile(one, 0.99)}" for one in taken]
        print(f"| {documents} × {tokens} tokens | {cells[0]} | {cells[1]} | {ratio(*middle)} |", flush=True)
    alone = [timed(lambda: new.rank(short)) for _ in range(20)]
    print(f"| none | | {len(alone)}, {quantile(alone, 0.5)}, {quantile(alone, 0.99)} | |")
    lists = [old.content(texts(DOCUMENTS, 60, seed)) for seed in range(CLIENTS)]
    walls: tuple[list[float], list[float]] = ([], [])
    spent: tuple[list[float], list[float]] = ([], [])
    with ThreadPoolExecutor(CLIENTS) as pool:
        for _ in range(rounds):
            for place, server in enumerate((old, new)):
                before = cpu(server)
                walls[place].append(timed(lambda one=server: list(pool.map(one.rank, lists))))
                spent[place].append(cpu(server) - before)
    print(f"\n{CLIENTS} clients x {DOCUMENTS} documents of 60 words, {rounds} pairs of runs, after / before: ", end="")
    print(f"{ratio(*walls)} of the seconds, {ratio(*spent)} of the server's CPU seconds")


def main() -> None:
    """Parse, run, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("measure", choices=["throughput", "lone", "overload", "wait"])
    parser.add_argument("--model", help="catalog name or folder; by default the embedded model")
    parser.add_argument("--precisions", nargs="+", default=["int8"], help="of turborank: int8, bf16, fp32")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--words", type=int, default=60, help="of each document, in the measure of throughput")
    parser.add_argument("--seconds", type=float, default=60.0, help="of overload")
    parser.add_argument("--per-second", type=float, help="arrivals in overload; by default twice the capacity")
    parser.add_argument("--queue-seconds", default="0.75", help="the server's setting in overload")
    parser.add_argument("--batch-seconds", default="0.25", help="the server's setting in wait, compared with 0")
    parser.add_argument("--long", nargs="+", default=["100x512", "8x8192"], help="long requests in wait")
    parser.add_argument("--gap", type=float, default=0.1, help="seconds between short requests in wait, at most")
    parser.add_argument("--infinity", help="python of an environment with infinity_emb[server,torch]")
    parser.add_argument("--minimal", help="python of an environment with sentence-transformers, fastapi and uvicorn")
    given = parser.parse_args()
    served: dict[str, Served] = {}
    try:
        if given.measure == "overload":
            served["turborank serve"] = servers.turborank(
                PORT, given.model, TURBORANK_QUEUE_SECONDS=given.queue_seconds
            )
            overload(served["turborank serve"], given.seconds, given.per_second)
            return
        if given.measure == "wait":
            for number, seconds in enumerate(("0", given.batch_seconds)):
                served[f"batch_seconds {seconds}"] = servers.turborank(
                    PORT + number, given.model, TURBORANK_BATCH_SECONDS=seconds, TURBORANK_QUEUE_SECONDS="600",
                    TURBORANK_TIMEOUT="600",
                )  # fmt: skip
            sizes = [(int(count), int(tokens)) for count, tokens in (one.split("x") for one in given.long)]
            wait(served, given.rounds, sizes, given.gap)
            return
        library = {f"library {p}": Reranker(given.model, precision=p) for p in given.precisions}
        for number, precision in enumerate(given.precisions):
            served[f"turborank serve, {precision}"] = servers.turborank(
                PORT + number, given.model, precision=precision, TURBORANK_QUEUE_SECONDS="600"
            )
        if given.infinity:
            served["Infinity, fp32"] = servers.infinity(PORT + 10, given.model, given.infinity)
        if given.minimal:
            served["sentence-transformers + FastAPI, fp32"] = servers.minimal(PORT + 11, given.model, given.minimal)
        engines = ", ".join(f"{one.engine.precision} {one.engine.isa}" for one in library.values())
        print(f"{next(iter(library.values())).name} · native, {engines}")
        errors(Reranker(given.model, engine="reference"), served)
        if given.measure == "throughput":
            throughput(library, served, given.rounds, given.words)
        else:
            lone(library, served, given.rounds * 20)
    finally:
        for server in served.values():
            server.stop()


if __name__ == "__main__":
    main()
