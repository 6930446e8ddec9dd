"""One queue for all requests: token-budget batches across requests, computed by one thread.

Requests are served by due time: arrival plus STRETCH times the seconds that the request's own tokens take. Due times
never change. A short request overtakes long ones and waits only for the current batch. A long request can be overtaken
only by requests that arrive within STRETCH times its own computing time, so no request starves.

A batch takes the windows of the request with the earliest due time, longest first, then those of the next requests for
the same model. A pair's logit does not depend on its batch, so scores have the same bits as in the library.
"""

from __future__ import annotations

import asyncio
import bisect
import threading
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from turborank.serve.wire import Problem
from turborank.tokens import pack
from turborank.types import Encoding, Engine, Float32

STRETCH = 4.0
MEMORY = 0.8  # decay of earlier measurements of the speed, for each new batch
FULL_ENOUGH = (
    0.25  # minimum share of the token budget of a batch that updates the speed; small ones are mostly overhead
)


class Computed(NamedTuple):
    """Figures of one computed batch, for the metrics."""

    tokens: int
    pairs: int
    requests: int
    seconds: float
    longest: int  # tokens of its longest pair; with padding the batch would have pairs × longest tokens


class Ticket:
    """A request in the queue. Windows are added in parts; ``future`` gets the logits of all windows at once."""

    def __init__(self, engine: Engine, expected: int, due: float, number: int) -> None:
        self.engine = engine
        self.urgency = (due, number)
        self.owed = expected  # tokens still to be computed: an estimate until all windows are added
        self.future: asyncio.Future[Float32] = asyncio.get_running_loop().create_future()
        self.ready: list[tuple[int, int, Encoding]] = []  # (length, −index, window), the longest last
        self.logits: list[float] = []
        self.running = 0  # windows in the current batch
        self.known = 0  # tokens of the windows added so far
        self.complete = False  # all windows have been added
        self.dropped = False
        self.started: float | None = None  # time.monotonic() at the start of its first batch
        self.computing = 0.0  # seconds of the batches it was part of

    @property
    def done(self) -> bool:
        return self.complete and not self.ready and not self.running


class Batcher:
    """Bounded queue with one compute thread. Call all methods from the event loop's thread.

    ``queue_tokens`` and ``queue_seconds`` limit the tokens and the expected seconds of requests with earlier due times.
    ``observe`` is called in the compute thread after each batch.
    """

    def __init__(
        self,
        *,
        batch_tokens: int,
        queue_tokens: int,
        queue_seconds: float,
        observe: Callable[[Computed], None] = lambda computed: None,
    ) -> None:
        self.batch_tokens = batch_tokens
        self.queue_tokens = queue_tokens
        self.queue_seconds = queue_seconds
        self.observe = observe
        self.waiting_tokens = 0
        self.speed: float | None = None  # measured tokens per second
        self._measured = (0.0, 0.0)  # exponentially decayed sums of tokens and seconds
        self._tickets: list[Ticket] = []  # sorted by due time
        self._count = 0
        self._closing = False
        self._wake = threading.Condition()
        self._thread = threading.Thread(target=self._work, name="turborank-compute", daemon=True)
        self._thread.start()

    @property
    def waiting_requests(self) -> int:
        return len(self._tickets)

    def wait_seconds(self) -> float:
        """Seconds that the queued tokens take at the measured speed; 0 before the first measurement."""
        return self.waiting_tokens / self.speed if self.speed else 0.0

    def admit(self, engine: Engine, expected: int, *, always: bool = False) -> Ticket:
        """Queue a request of about ``expected`` tokens.

        Raises Problem 429 when the requests with earlier due times exceed a limit. A request with none before it is
        always admitted, and so is one with ``always``: the second part of an admitted request.
        """
        with self._wake:
            due = time.monotonic() + STRETCH * (expected / self.speed if self.speed else 0.0)
            ahead = [ticket.owed for ticket in self._tickets if ticket.urgency[0] <= due]
            wait = sum(ahead) / self.speed if self.speed else 0.0
            full = sum(ahead) + expected > self.queue_tokens or wait > self.queue_seconds
            if full and ahead and not always:
                setting = "queue_seconds" if wait > self.queue_seconds else "queue_tokens"
                raise Problem(
                    429,
                    "overloaded",
                    f"the server is busy: {sum(ahead)} tokens of {len(ahead)} requests are waiting, "
                    f"which takes about {wait:.1f} s ({setting}); try again later",
                    retry_after=max(1.0, min(wait, 60.0) / 2),
                )
            self._count += 1
            ticket = Ticket(engine, expected, due, self._count)
            bisect.insort(self._tickets, ticket, key=lambda one: one.urgency)
            self.waiting_tokens += expected
            return ticket

    def add(self, ticket: Ticket, windows: Sequence[Encoding], *, last: bool) -> None:
        """Add windows to a request; ``last`` says that no more will follow."""
        with self._wake:
            if ticket.dropped:
                return
            first = len(ticket.logits)
            ticket.logits.extend([0.0] * len(windows))
            ticket.ready.extend((len(window), -place, window) for place, window in enumerate(windows, first))
            ticket.ready.sort(key=lambda item: item[:2])
            ticket.known += sum(map(len, windows))
            ticket.complete = last
            if last:  # replace the estimate by the exact number of tokens
                self._owe(ticket, sum(length for length, _, _ in ticket.ready))
            if ticket.done:
                self._finish(ticket)
            self._wake.notify()

    def drop(self, ticket: Ticket) -> None:
        """Remove a request (answered, disconnected or timed out); windows not yet in a batch are not computed."""
        with self._wake:
            ticket.dropped = True
            self._forget(ticket)
        ticket.future.cancel()

    def close(self) -> None:
        """Stop the compute thread after the current batch."""
        with self._wake:
            self._closing = True
            self._wake.notify()
        self._thread.join()

    def _owe(self, ticket: Ticket, tokens: int) -> None:
        self.waiting_tokens += tokens - ticket.owed
        ticket.owed = tokens

    def _forget(self, ticket: Ticket) -> None:
        if ticket in self._tickets:
            self._tickets.remove(ticket)
        self._owe(ticket, 0)
        ticket.ready.clear()

    def _finish(self, ticket: Ticket, error: Exception | None = None) -> None:
        self._forget(ticket)
        ticket.dropped = True
        result = np.asarray(ticket.logits, dtype=np.float32)

        def tell() -> None:
            if not ticket.future.done():
                if error is None:
                    ticket.future.set_result(result)
                else:
                    ticket.future.set_exception(error)

        ticket.future.get_loop().call_soon_threadsafe(tell)

    def _pick(self) -> list[tuple[Ticket, int, Encoding]]:
        """The next batch: (ticket, index of the window in its request, window), longest first."""
        batch: list[tuple[Ticket, int, Encoding]] = []
        room = self.batch_tokens
        for ticket in self._tickets:
            if batch and ticket.engine is not batch[0][0].engine:
                continue
            while ticket.ready and (not batch or ticket.ready[-1][0] <= room):
                length, negative_place, window = ticket.ready.pop()
                batch.append((ticket, -negative_place, window))
                room -= length
                ticket.running += 1
        return sorted(batch, key=lambda item: -len(item[2]))

    def _work(self) -> None:
        while True:
            with self._wake:
                batch = self._pick()
                while not batch and not self._closing:
                    self._wake.wait()
                    batch = self._pick()
                if self._closing:
                    return
            self._compute(batch)

    def _measure(self, tokens: int, seconds: float) -> None:
        if tokens >= FULL_ENOUGH * self.batch_tokens:
            before = self._measured
            self._measured = (MEMORY * before[0] + tokens, MEMORY * before[1] + max(seconds, 1e-9))
            self.speed = self._measured[0] / self._measured[1]

    def _compute(self, batch: list[tuple[Ticket, int, Encoding]]) -> None:
        tickets = list(dict.fromkeys(ticket for ticket, _, _ in batch))
        packed = pack([window for _, _, window in batch])
        started = time.monotonic()
        error: Exception | None = None
        try:
            logits = tickets[0].engine.logits(packed).tolist()
        except Exception as failure:  # fail the requests of this batch and keep the queue running
            error, logits = failure, [0.0] * len(batch)
        seconds = time.monotonic() - started
        with self._wake:
            if error is None:
                self._measure(packed.tokens, seconds)
            for (ticket, place, window), logit in zip(batch, logits, strict=True):
                ticket.running -= 1
                if not ticket.dropped:
                    ticket.logits[place] = logit
                    self._owe(ticket, max(0, ticket.owed - len(window)))
            for ticket in tickets:
                ticket.started = started if ticket.started is None else ticket.started
                ticket.computing += seconds
                if not ticket.dropped and (ticket.done or error):
                    self._finish(ticket, error)
        self.observe(Computed(packed.tokens, packed.pairs, len(tickets), seconds, packed.max_seqlen))
