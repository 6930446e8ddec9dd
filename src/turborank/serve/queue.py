"""One queue for all requests: batches across requests, bounded by tokens and by predicted time, computed by one thread.

Requests are served by due time: arrival plus STRETCH times the seconds that the request's own tokens take. A short
request overtakes long ones and waits only for the current batch, which is why a batch is bounded by time. A long
request can be overtaken only by requests that arrive within STRETCH times its own computing time. Once it is due it
does not keep the engine to itself: each of its batches moves its due time by OVERDUE times the batch's seconds, so that
requests that arrive from then on have about half of the engine, and are served between its batches. A request that
would be late for ``timeout`` in this way is due earlier.

A batch takes the windows of the request with the earliest due time, longest first, then those of the next requests for
the same model. A batch with the last windows of a request is filled with others only as far as efficiency needs, so
that an answer does not wait for other requests. A pair's logit does not depend on its batch, so scores have the same
bits as in the library.
"""

from __future__ import annotations

import asyncio
import bisect
import math
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from turborank.scheduler import Pace, Work
from turborank.serve.wire import Problem
from turborank.tokens import pack
from turborank.types import Encoding, Engine, Float32

STRETCH = 4.0
OVERDUE = 2.0
BESIDE_OTHERS = 3.0  # times as long as by itself a request may take that shares a busy server (its share: 1/2 to 1/3)
FLOOR_TOKENS = 256  # a batch may have as many whatever its time: below, per-batch costs would show (docs/serving.md)
ENOUGH = 0.1  # share of batch_seconds to which a batch that completes a request is filled with others
LARGE_TOKENS = 4096  # batches of more leave the engine with work space that others do not need (docs/scale.md)
SHRINK_SECONDS = 30.0  # after the last large batch, when that work space is released
UNKNOWN_SPEED = 10_000.0  # tokens per second assumed for due times until the engine's first batch is measured


class Computed(NamedTuple):
    """Figures of one computed batch, for the metrics."""

    tokens: int
    pairs: int
    requests: int
    seconds: float
    longest: int  # tokens of its longest pair; with padding the batch would have pairs × longest tokens


class Ticket:
    """A request in the queue. Windows are added in parts; ``future`` gets the logits of all windows at once."""

    def __init__(self, engine: Engine, expected: Work, due: float, number: int) -> None:
        self.engine = engine
        self.due = due
        self.number = number  # in the order of arrival
        self.owed = int(expected.tokens)  # tokens still to be computed: an estimate until all windows are added
        self.length = expected.squares / max(1.0, expected.tokens)  # mean length of a token's pair
        self.future: asyncio.Future[Float32] = asyncio.get_running_loop().create_future()
        self.ready: list[tuple[int, int, Encoding]] = []  # (length, −index, window), the longest last
        self.logits: list[float] = []
        self.running = 0  # windows in the current batch
        self.known = 0  # tokens of the windows added so far
        self.complete = False  # all windows have been added
        self.dropped = False
        self.started: float | None = None  # time.monotonic() at the start of its first batch

    @property
    def urgency(self) -> tuple[float, int]:
        return self.due, self.number

    @property
    def done(self) -> bool:
        return self.complete and not self.ready and not self.running


class Batcher:
    """Bounded queue with one compute thread. Call all methods from the event loop's thread.

    ``batch_tokens`` and ``batch_seconds`` bound a batch by tokens and by its predicted time; a single longer pair is a
    batch of its own. ``queue_tokens`` and ``queue_seconds`` limit the tokens and the expected seconds of requests with
    earlier due times. The caller drops a request ``timeout`` seconds after its arrival. ``observe`` is called in the
    compute thread after each batch. ``clock`` tells seconds.
    """

    def __init__(
        self,
        *,
        batch_tokens: int,
        queue_tokens: int,
        queue_seconds: float,
        batch_seconds: float = math.inf,
        timeout: float = math.inf,
        observe: Callable[[Computed], None] = lambda computed: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.batch_tokens, self.batch_seconds = batch_tokens, batch_seconds
        self.queue_tokens, self.queue_seconds = queue_tokens, queue_seconds
        self.timeout, self.observe = timeout, observe
        self.waiting_tokens = 0
        self.speed: float | None = None  # tokens per second of the engine that computed last
        self._clock = clock
        self._paces: weakref.WeakKeyDictionary[Engine, Pace] = weakref.WeakKeyDictionary()
        self._large: weakref.WeakKeyDictionary[Engine, float] = weakref.WeakKeyDictionary()  # when large
        self._tickets: list[Ticket] = []  # sorted by due time
        self._count = 0
        self._closing = False
        self._wake = threading.Condition()
        self._thread = threading.Thread(target=self._work, name="turborank-compute", daemon=True)
        self._thread.start()

    @property
    def waiting_requests(self) -> int:
        return len(self._tickets)

    def pace(self, engine: Engine) -> Pace:
        """The measured speed of an engine."""
        return self._paces.setdefault(engine, Pace())

    def wait_seconds(self) -> float:
        """Seconds that the queued tokens take at the measured speeds; 0 before the first measurement."""
        with self._wake:
            return sum(map(self._seconds, self._tickets))

    def _seconds(self, ticket: Ticket) -> float:
        return self.pace(ticket.engine).seconds(Work(ticket.owed, ticket.owed * ticket.length))

    def _ahead(self, ticket: Ticket, due: float, now: float) -> float:
        """Seconds of a queued request that are computed before another one that is due at ``due``, later than it."""
        yields = max(0.0, ticket.due - now) + (due - ticket.due) / OVERDUE
        return min(self._seconds(ticket), yields)

    def admit(self, engine: Engine, expected: Work, *, always: bool = False) -> Ticket:
        """Queue a request of about ``expected`` work.

        Raises Problem 429 when the requests with earlier due times exceed a limit. A request with none before it is
        always admitted, and so is one with ``always``: the second part of an admitted request.
        """
        with self._wake:
            pace, now = self.pace(engine), self._clock()
            alone = pace.seconds(expected) if pace.known else expected.tokens / UNKNOWN_SPEED
            due = now + min(STRETCH * alone, max(0.0, self.timeout / 2 - OVERDUE * alone))
            ahead = [ticket for ticket in self._tickets if ticket.due <= due]
            tokens, wait = sum(one.owed for one in ahead), sum(self._ahead(one, due, now) for one in ahead)
            late = pace.known and wait + BESIDE_OTHERS * alone > self.timeout
            full = tokens + expected.tokens > self.queue_tokens or wait > self.queue_seconds or late
            if full and (tokens or (late and self._tickets)) and not always:
                setting = "queue_seconds" if wait > self.queue_seconds else "timeout" if late else "queue_tokens"
                raise Problem(
                    429,
                    "overloaded",
                    f"the server is busy: {tokens} tokens of {len(ahead)} requests are waiting, "
                    f"which takes about {wait:.1f} s ({setting}); try again later",
                    retry_after=max(1.0, min(wait, 60.0) / 2),
                )
            self._count += 1
            ticket = Ticket(engine, expected, due, self._count)
            bisect.insort(self._tickets, ticket, key=lambda one: one.urgency)
            self.waiting_tokens += ticket.owed
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
                left = [length for length, _, _ in ticket.ready]
                self._owe(ticket, sum(left))
                ticket.length = sum(n * n for n in left) / max(1, sum(left))
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

    def _fits(self, pace: Pace, work: Work, *, completes: bool) -> bool:
        """Whether a batch of several pairs may have so much work. ``completes``: a request is answered after it."""
        if work.tokens > self.batch_tokens:
            return False
        bound = self.batch_seconds * (ENOUGH if completes else 1)
        if work.tokens <= FLOOR_TOKENS or bound == math.inf:
            return True
        return pace.known and pace.seconds(work) <= bound

    def _pick(self) -> list[tuple[Ticket, int, Encoding]]:
        """The next batch: (ticket, index of the window in its request, window), longest first."""
        batch: list[tuple[Ticket, int, Encoding]] = []
        work, completes = Work(0, 0), False
        for ticket in self._tickets:
            if batch and ticket.engine is not batch[0][0].engine:
                continue
            pace = self.pace(ticket.engine)
            while ticket.ready:
                more = work.plus(ticket.ready[-1][0])
                if batch and not self._fits(pace, more, completes=completes):
                    break
                _, negative_place, window = ticket.ready.pop()
                batch.append((ticket, -negative_place, window))
                work = more
                ticket.running += 1
            completes |= ticket.running > 0 and ticket.complete and not ticket.ready
        return sorted(batch, key=lambda item: -len(item[2]))

    def _work(self) -> None:
        while True:
            with self._wake:
                self._shrink()
                while not (batch := self._pick()) and not self._closing:
                    self._wake.wait(SHRINK_SECONDS if self._large else None)
                    self._shrink()
                if self._closing:
                    return
            self._compute(batch)

    def _shrink(self) -> None:
        """Release the work space of engines that computed no large batch in the last SHRINK_SECONDS."""
        now = self._clock()
        for engine, last in list(self._large.items()):
            if now - last >= SHRINK_SECONDS:
                del self._large[engine]
                engine.shrink()

    def _postpone(self, ticket: Ticket, now: float, seconds: float) -> None:
        """Move the due time of an unfinished request, so that later requests are computed between its batches."""
        if ticket.due <= now:
            self._tickets.remove(ticket)
            ticket.due += OVERDUE * seconds
            bisect.insort(self._tickets, ticket, key=lambda one: one.urgency)

    def _compute(self, batch: list[tuple[Ticket, int, Encoding]]) -> None:
        tickets = list(dict.fromkeys(ticket for ticket, _, _ in batch))
        packed = pack([window for _, _, window in batch])
        started = self._clock()
        error: Exception | None = None
        try:
            logits = tickets[0].engine.logits(packed).tolist()
        except Exception as failure:  # fail the requests of this batch and keep the queue running
            error, logits = failure, [0.0] * len(batch)
        now = self._clock()
        seconds, tokens = now - started, dict.fromkeys(tickets, 0)
        if packed.tokens > LARGE_TOKENS:
            self._large[tickets[0].engine] = now
        with self._wake:
            if error is None:
                pace = self.pace(tickets[0].engine)
                pace.measure(Work(packed.tokens, sum(len(window) ** 2 for _, _, window in batch)), seconds)
                self.speed = pace.speed
            for (ticket, place, window), logit in zip(batch, logits, strict=True):
                ticket.running -= 1
                tokens[ticket] += len(window)
                if not ticket.dropped:
                    ticket.logits[place] = logit
                    self._owe(ticket, max(0, ticket.owed - len(window)))
            for ticket in tickets:
                ticket.started = started if ticket.started is None else ticket.started
                if not ticket.dropped and (ticket.done or error):
                    self._finish(ticket, error)
                elif not ticket.dropped:
                    self._postpone(ticket, now, seconds * tokens[ticket] / packed.tokens)
        self.observe(Computed(packed.tokens, packed.pairs, len(tickets), seconds, packed.max_seqlen))
