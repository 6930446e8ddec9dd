"""Ten minutes at twice the capacity: mixed lengths, models and dialects, clients that leave, a model swap, SIGTERM.

    python bench/load.py                 600 s after the capacity has been measured
    python bench/load.py --seconds 60

Server and clients share this machine, on loopback. The server has the embedded model and two more of its own weights
under other names, of which memory holds one: half-way the traffic goes from one to the other, which is a swap. After
``--seconds``, SIGTERM comes in the middle of the load. The run ends by itself and exits with 1 if an answer had
another status than 200, 429 or 503, if a client that stayed was not answered although its connection was accepted, if
a score changed a bit, or if the server did not end with code 0.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import hashlib
import itertools
import json
import random
import re
import signal
import statistics
import subprocess
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import servers
from serve import texts, timed
from servers import QUERY, Served

import turborank

PORT = 8290
EMBEDDED = Path(turborank.__file__).parent / "models" / "turborank-embedded-v2"
LEAVING = 0.05  # share of clients that leave before they are answered
IN_FLIGHT = 500  # requests at most at a time; more are counted, not sent
AFTER = 3.0  # seconds for which clients still arrive after SIGTERM
GRACE = 90.0  # seconds in which the server must have ended
# name: (share of requests, documents, words of each); 6,000 words are cut to the 8,192 tokens that the model reads
MIX = {"short": (0.72, 1, 20), "middle": (0.25, 20, 60), "long": (0.025, 50, 350), "8192": (0.005, 1, 9000)}
DIALECTS = {
    "jina": ("/v1/rerank", "documents", {}),
    "cohere": ("/v2/rerank", "documents", {}),
    "voyage": ("/v1/rerank", "documents", {"top_k": None}),
    "tei": ("/tei/rerank", "texts", {}),
    "infinity": ("/infinity/rerank", "documents", {}),
    "vllm": ("/vllm/v1/rerank", "documents", {}),
}
MODELS = ("", "first", "second")
REFUSED, UNANSWERED, LEFT = -1, 0, -2  # in place of a status
SCORES = re.compile(rb'"(?:index|relevance_score|score)": ?([-0-9.e]+)')


@dataclass(frozen=True)
class Query:
    """One request: its size, dialect and texts, without the model."""

    kind: str
    dialect: str
    documents: tuple[str, ...]

    def content(self, model: str) -> tuple[str, bytes]:
        """(path, body)."""
        path, name, extra = DIALECTS[self.dialect]
        named = {"model": model} if model and self.dialect != "tei" else {}
        return path, json.dumps({"query": QUERY, name: self.documents, **extra, **named}).encode()


@dataclass
class Outcome:
    """What became of a request."""

    kind: str
    status: int
    at: float  # seconds since the load began
    seconds: float


@dataclass
class Record:
    """What a run showed."""

    outcomes: list[Outcome] = field(default_factory=list)
    memory: list[float] = field(default_factory=list)  # MiB, each second
    scores: dict[Query, bytes] = field(default_factory=dict)  # digest of the scores of the first answer
    different: int = 0  # answers with other scores than the first
    unsent: int = 0
    ended: int | None = None  # exit code of the server

    def check(self, query: Query, answer: bytes) -> None:
        digest = hashlib.sha256(b",".join(SCORES.findall(answer))).digest()
        self.different += self.scores.setdefault(query, digest) != digest


def queries(seed: int) -> Iterator[Query]:
    """Requests of random size and dialect, from a fixed set, so that the same one comes again."""
    draw = random.Random(seed)
    ready = {
        kind: [
            Query(kind, dialect, tuple(texts(count, words, 7 * place + index)))
            for index, (place, dialect) in enumerate(itertools.product(range(3), DIALECTS))
        ]
        for kind, (_, count, words) in MIX.items()
    }
    while True:
        [kind] = draw.choices(list(MIX), [share for share, _, _ in MIX.values()])
        yield draw.choice(ready[kind])


def capacity(server: Served, seconds: float) -> float:
    """Requests of the mix per second that four clients get answered."""
    stream, done = queries(0), 0
    with ThreadPoolExecutor(4) as pool:

        def one(query: Query) -> None:
            path, body = query.content("")
            while (status := server.request("POST", path, body)[0]) == 429:  # a long one is before it
                time.sleep(0.1)
            assert status == 200, status

        taken = 0.0
        while taken < seconds:
            batch = list(itertools.islice(stream, 40))
            taken += timed(lambda all=batch: list(pool.map(one, all)))
            done += len(batch)
    return done / taken


async def send(port: int, query: Query, model: str, leave: float | None, record: Record, start: float) -> None:
    """One request on a connection of its own; the client leaves after ``leave`` seconds."""
    path, body = query.content(model)
    began, status = time.perf_counter(), REFUSED
    answer = b""
    with contextlib.suppress(OSError, IndexError, ValueError, asyncio.IncompleteReadError, TimeoutError):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        status = UNANSWERED
        try:
            head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Type: application/json\r\n"
            writer.write(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
            async with asyncio.timeout(leave):
                await writer.drain()
                answer = await reader.read()
            status = int(answer.split(maxsplit=2)[1])
        except TimeoutError:
            status = LEFT
        finally:
            writer.close()
    record.outcomes.append(Outcome(query.kind, status, began - start, time.perf_counter() - began))
    if status == 200:
        record.check(query, answer.partition(b"\r\n\r\n")[2])


async def run(server: Served, per_second: float, seconds: float) -> Record:
    """The load: open loop, so that arrivals do not wait for answers; then SIGTERM, while more arrive."""
    record, draw, tasks = Record(), random.Random(1), set()
    stream, start = queries(2), time.perf_counter()
    moment, told = start, False
    while (now := time.perf_counter()) < start + seconds + AFTER:
        if not told and now > start + seconds:
            told = True
            server.process.send_signal(signal.SIGTERM)
        if not told and now - start > len(record.memory):
            record.memory.append(server.memory())
        model = draw.choice(("", MODELS[1] if now < start + seconds / 2 else MODELS[2]))
        leave = draw.uniform(0, 1) if draw.random() < LEAVING else None
        if len(tasks) < IN_FLIGHT:
            task = asyncio.create_task(send(server.port, next(stream), model, leave, record, start))
            tasks.add(task)
            task.add_done_callback(tasks.discard)
        else:
            record.unsent += 1
        moment += draw.expovariate(per_second)
        await asyncio.sleep(max(0.0, moment - time.perf_counter()))
    await asyncio.wait_for(asyncio.gather(*tasks), GRACE)
    with contextlib.suppress(subprocess.TimeoutExpired):
        record.ended = await asyncio.to_thread(server.process.wait, GRACE)
    return record


def report(record: Record, seconds: float) -> list[str]:
    """Print the figures; the faults found."""
    before = [one for one in record.outcomes if one.at < seconds]
    names = {REFUSED: "connection refused", UNANSWERED: "not answered", LEFT: "client left"}
    for title, group in (("until SIGTERM", before), ("after", [o for o in record.outcomes if o.at >= seconds])):
        counts = Counter(one.status for one in group)
        print(f"{title}: " + ", ".join(f"{n} x {names.get(status, status)}" for status, n in sorted(counts.items())))
    print("\n| requests | sent | accepted | p50, s | p99, s | most, s | refused: p99, s |\n|---" + "|--:" * 6 + "|")
    for kind, (_, count, words) in MIX.items():
        mine = [one for one in before if one.kind == kind]
        taken = sorted(one.seconds for one in mine if one.status == 200) or [float("nan")]
        refused = sorted(one.seconds for one in mine if one.status in (429, 503)) or [float("nan")]
        cells = [taken[len(taken) // 2], taken[int(len(taken) * 0.99)], taken[-1], refused[int(len(refused) * 0.99)]]
        row = " | ".join(f"{one:.2f}" for one in cells)
        print(f"| {kind}: {count} x {words} words | {len(mine)} | {sum(o.status == 200 for o in mine)} | {row} |")
    words = {kind: count * min(words, 6000) for kind, (_, count, words) in MIX.items()}
    offered, accepted = (sum(words[o.kind] for o in before if o.status in kept) for kept in ((200, 429, 503), (200,)))
    print(f"\nwords of documents asked for: {offered:,}; answered: {accepted:,} ({accepted / offered:.0%})")
    memory = record.memory
    tenth = [statistics.median(memory[len(memory) * i // 10 : len(memory) * (i + 1) // 10 + 1]) for i in range(10)]
    print("\nmemory, MiB, medians of tenths: " + " ".join(f"{one:.0f}" for one in tenth))
    print(f"{len(record.scores)} different requests, {record.different} answers with other bits than the first")
    print(f"{record.unsent} requests not sent, as {IN_FLIGHT} were waiting")
    faults = [f"status {one.status}: {one}" for one in record.outcomes if one.status not in (200, 429, 503, *names)]
    faults += [f"not answered: {one}" for one in record.outcomes if one.status == UNANSWERED]
    faults += [f"refused before SIGTERM: {one}" for one in before if one.status == REFUSED]
    faults += ["scores changed"] * bool(record.different) + ["exit code"] * (record.ended != 0)
    return faults


def main() -> None:
    """Parse, run, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=600.0, help="of load until SIGTERM")
    parser.add_argument("--capacity-seconds", type=float, default=20.0, help="for which the capacity is measured")
    parser.add_argument("--per-second", type=float, help="requests that arrive, instead of a multiple of the capacity")
    parser.add_argument("--factor", type=float, default=2.0, help="of the capacity")
    given = parser.parse_args()
    names = ",".join(["turborank-embedded-v2", *(f"{name}={EMBEDDED}" for name in MODELS[1:])])
    server = servers.turborank(PORT, names, TURBORANK_MODEL_MEMORY="1")
    try:
        alone = capacity(server, given.capacity_seconds)
        arriving = given.per_second or given.factor * alone
        print(f"capacity {alone:.1f} requests/s; {arriving:.1f}/s for {given.seconds:.0f} s", flush=True)
        record = asyncio.run(run(server, arriving, given.seconds))
    finally:
        server.stop()
    faults = report(record, given.seconds)
    print(f"exit code {record.ended}; faults: {len(faults)}")
    for fault in faults[:20]:
        print(fault)
    raise SystemExit(bool(faults))


if __name__ == "__main__":
    main()
