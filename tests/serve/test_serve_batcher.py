"""The queue: composition of batches, order, refusal, dropped requests."""

import asyncio
import math
import threading

import numpy as np
import pytest

pytest.importorskip("starlette", reason="the service needs pip install 'turborank[serve]'")

from serving import CountingEngine, until

from turborank.scheduler import Work
from turborank.serve.queue import FLOOR_TOKENS, LARGE_TOKENS, OVERDUE, SHRINK_SECONDS, STRETCH, Batcher
from turborank.serve.wire import Problem
from turborank.types import Encoding


def windows(*lengths: int) -> list[Encoding]:
    """Encodings whose token ids are all their own length, so that a pair's logit is -length²."""
    ones = [np.full(n, n, dtype=np.int32) for n in lengths]
    return [Encoding(ids, np.zeros_like(ids), read=len(ids)) for ids in ones]


class TimedEngine(CountingEngine):
    """An engine whose batches take ``cost(lengths)`` seconds of a clock of its own."""

    def __init__(self, cost) -> None:
        super().__init__()
        self.now, self.cost = 0.0, cost

    def clock(self) -> float:
        return self.now

    def logits(self, batch):
        found = super().logits(batch)
        self.now += self.cost(self.batches[-1])
        return found


class Queue:
    """A batcher with an engine behind a gate, and what it observed. ``cost``: as of TimedEngine."""

    def __init__(self, cost=None, **bounds):
        self.engine = TimedEngine(cost) if cost else CountingEngine()
        self.observed = []
        bounds = {"batch_tokens": 100, "queue_tokens": 10_000, "queue_seconds": 60.0, **bounds}
        if cost:
            bounds["clock"] = self.engine.clock
        self.batcher = Batcher(**bounds, observe=self.observed.append)

    def told(self, speed: float) -> None:
        """Set the speed that the batcher has measured, in tokens per second."""
        self.batcher.pace(self.engine).measure(Work(1, 1), 1 / speed)

    def ask(self, *lengths: int, engine=None, expected: int | None = None):
        given = windows(*lengths)
        work = Work(sum(lengths), sum(n * n for n in lengths)) if expected is None else Work(expected, expected)
        ticket = self.batcher.admit(engine or self.engine, work)
        self.batcher.add(ticket, given, last=True)
        return ticket

    async def hold(self):
        """Close the gate with a first batch behind it, so that later requests queue."""
        self.engine.gate.clear()
        ticket = self.ask(1)
        while not ticket.running:
            await asyncio.sleep(0.001)
        return ticket


@pytest.fixture
def run():
    """Run a coroutine function on a fresh queue; the worker thread is gone afterwards."""

    def runner(body, **bounds):
        async def main():
            queue = Queue(**bounds)
            try:
                await asyncio.wait_for(body(queue), 20)
            finally:
                queue.engine.gate.set()
                queue.batcher.close()

        asyncio.run(main())

    return runner


def test_logits_come_back_in_the_order_of_the_windows(run):
    async def body(queue):
        assert (await queue.ask(3, 1, 2).future).tolist() == [-9.0, -1.0, -4.0]
        assert (await queue.ask().future).tolist() == []

    run(body)


def test_a_batch_mixes_requests_longest_pair_first(run):
    async def body(queue):
        first = await queue.hold()
        tickets = [queue.ask(10, 30), queue.ask(20), queue.ask(5, 25)]
        queue.engine.gate.set()
        results = [(await ticket.future).tolist() for ticket in (first, *tickets)]
        assert results == [[-1.0], [-100.0, -900.0], [-400.0], [-25.0, -625.0]]
        assert queue.engine.batches == [[1], [30, 25, 20, 10, 5]]
        until(lambda: len(queue.observed) == 2)
        assert queue.observed[1][:3] == (90, 5, 3)
        assert queue.observed[1].longest == 30

    run(body)


def test_no_batch_is_over_the_budget_but_a_single_long_pair_is_let_through(run):
    async def body(queue):
        await queue.ask(60, 60, 30, 10, 250).future
        assert queue.engine.batches == [[250], [60, 30, 10], [60]] or queue.engine.batches == [
            [250],
            [60],
            [60, 30, 10],
        ]
        assert all(sum(batch) <= 100 or len(batch) == 1 for batch in queue.engine.batches)

    run(body)


def test_a_short_request_overtakes_a_long_one(run):
    async def body(queue):
        queue.told(100.0)  # tokens a second: the long one is 20 s of work, so is due 80 s after its arrival
        await queue.hold()
        long, short = queue.ask(*[100] * 20), queue.ask(10)
        queue.engine.gate.set()
        await short.future
        await long.future
        assert queue.engine.batches[1][-1] == 10 or queue.engine.batches[1] == [10]
        assert len(queue.engine.batches) > 2  # the rest of the long one came after it

    run(body)


def test_a_long_request_is_not_starved_by_short_ones(run):
    async def body(queue):
        queue.told(1000.0)
        first = await queue.hold()
        long = queue.ask(100)  # 0.1 s of work: whoever comes 0.4 s later cannot overtake it
        await asyncio.sleep(0.45)
        late = [queue.ask(50) for _ in range(20)]
        queue.engine.gate.set()
        await asyncio.gather(first.future, long.future, *(ticket.future for ticket in late))
        assert queue.engine.batches[1] == [100]

    run(body)


def test_windows_that_arrive_in_parts_are_computed_meanwhile(run):
    async def body(queue):
        ticket = queue.batcher.admit(queue.engine, Work(60, 1400))
        queue.batcher.add(ticket, windows(10, 20), last=False)
        until(lambda: queue.engine.batches == [[20, 10]])
        assert not ticket.future.done()
        queue.batcher.add(ticket, windows(30), last=True)
        assert (await ticket.future).tolist() == [-100.0, -400.0, -900.0]
        assert queue.batcher.waiting_tokens == 0

    run(body)


def test_a_full_queue_refuses_at_once_and_says_when_to_come_back(run):
    async def body(queue):
        await queue.hold()
        queue.ask(400)
        with pytest.raises(Problem) as refused:
            queue.ask(400)
        assert (refused.value.status, refused.value.code) == (429, "overloaded")
        assert "queue_tokens" in refused.value.message
        assert int(refused.value.headers["retry-after"]) >= 1
        assert queue.batcher.waiting_tokens == 401

    run(body, queue_tokens=500)


def test_a_queue_that_would_take_too_long_refuses(run):
    async def body(queue):
        queue.told(10.0)
        await queue.hold()
        queue.ask(100)
        with pytest.raises(Problem, match="queue_seconds"):
            queue.ask(100)

    run(body, queue_seconds=5.0)


def test_a_long_request_does_not_keep_out_those_that_overtake_it(run):
    async def body(queue):
        queue.told(10.0)
        await queue.hold()
        long = queue.ask(*[100] * 99)  # 990 s of work, and nearly all of queue_tokens
        short = queue.ask(10)
        queue.engine.gate.set()
        await asyncio.gather(short.future, long.future)
        assert queue.engine.batches == [[1], [10]] + [[100]] * 99

    run(body, queue_seconds=5.0)


def test_an_empty_queue_takes_any_request(run):
    async def body(queue):
        assert len(await queue.ask(*[10] * 100).future) == 100

    run(body, queue_tokens=50)


def test_what_is_dropped_is_never_computed_and_frees_its_place(run):
    async def body(queue):
        first = await queue.hold()
        gone, stays = queue.ask(7, 8), queue.ask(9)
        queue.batcher.drop(gone)
        assert queue.batcher.waiting_tokens == 1 + 9
        assert gone.future.cancelled()
        queue.engine.gate.set()
        await asyncio.gather(first.future, stays.future)
        assert queue.engine.batches == [[1], [9]]
        assert queue.batcher.waiting_tokens == 0

    run(body)


def test_a_failing_engine_fails_its_batch_and_nothing_else(run):
    class Broken(CountingEngine):
        def logits(self, batch):
            raise RuntimeError("the machine is on fire")

    async def body(queue):
        with pytest.raises(RuntimeError, match="on fire"):
            await queue.ask(1, engine=Broken()).future
        assert (await queue.ask(2).future).tolist() == [-4.0]

    run(body)


def test_engines_do_not_share_a_batch(run):
    async def body(queue):
        other = CountingEngine()
        first = await queue.hold()
        tickets = [queue.ask(2), queue.ask(3, engine=other), queue.ask(4)]
        queue.engine.gate.set()
        await asyncio.gather(first.future, *(ticket.future for ticket in tickets))
        assert queue.engine.batches == [[1], [4, 2]]
        assert other.batches == [[3]]

    run(body)


def long_ones(queue) -> list[list[int]]:
    return [batch for batch in queue.engine.batches if max(batch) >= 50]


def test_batches_are_bounded_by_time_at_the_measured_speed(run):
    async def body(queue):
        await queue.ask(*[50] * 200).future
        first, second, *rest = long_ones(queue)
        assert sum(first) <= FLOOR_TOKENS  # nothing is known of the engine yet
        assert sum(second) == 1000  # 0.001 s a token: 1 s
        assert all(sum(batch) <= 1000 for batch in rest)
        assert len(rest) <= 10

    run(body, cost=lambda lengths: sum(lengths) / 1000, batch_tokens=5000, batch_seconds=1.0)


def test_without_a_bound_on_time_only_tokens_count(run):
    async def body(queue):
        await queue.ask(*[50] * 200).future
        assert [sum(batch) for batch in queue.engine.batches] == [5000, 5000]

    run(body, cost=lambda lengths: sum(lengths) / 1000, batch_tokens=5000)


def test_a_slow_engine_gets_the_floor_and_a_longer_pair_its_own_batch(run):
    async def body(queue):
        await queue.ask(*[64] * 20, 2000).future
        assert [2000] in queue.engine.batches
        assert [sum(batch) for batch in queue.engine.batches if batch != [2000]] == [FLOOR_TOKENS] * 5

    run(body, cost=lambda lengths: sum(lengths) / 100, batch_tokens=5000, batch_seconds=1.0)


def test_a_short_request_waits_for_one_batch_of_a_long_one(run):
    async def body(queue):
        long = queue.ask(*[500] * 100)
        queue.engine.gate.clear()
        done = len(queue.engine.batches)
        await asyncio.to_thread(until, lambda: long.running)
        short = queue.ask(10)
        queue.engine.gate.set()
        await short.future
        assert not long.done
        batches = queue.engine.batches[done:]
        place = next(place for place, batch in enumerate(batches) if 10 in batch)
        assert place <= 2, "expected at most the batch that was running and one that was being made up"
        assert sum(batches[place]) <= 1000
        await long.future

    run(body, cost=lambda lengths: sum(lengths) / 1000, batch_tokens=5000, batch_seconds=1.0, queue_tokens=10**6)


def test_the_answer_of_a_short_request_does_not_wait_for_a_full_batch(run):
    async def body(queue):
        queue.told(1000.0)
        await queue.hold()
        long, short = queue.ask(*[500] * 10), queue.ask(10)
        queue.engine.gate.set()
        await asyncio.gather(long.future, short.future)
        [batch] = [batch for batch in queue.engine.batches if 10 in batch]
        assert sum(batch) <= FLOOR_TOKENS, "expected the efficient minimum, not the 1,000 tokens of one second"

    run(body, cost=lambda lengths: sum(lengths) / 1000, batch_tokens=5000, batch_seconds=1.0)


class Steps:
    """A queue whose engine computes one batch of one second at a time, with a long request of 20 s that is due now."""

    def __init__(self, queue) -> None:
        self.queue, self.engine = queue, queue.engine
        self.engine.gate.clear()
        queue.batcher.pace(self.engine).measure(Work(1000, 1000**2), 1.0)
        self.long = queue.ask(*[1000] * 20)
        self.engine.now = self.long.due

    async def step(self, *lengths: int):
        """Release the waiting batch after a request has arrived."""
        await asyncio.to_thread(self.engine.entered.wait, 20)
        self.engine.entered.clear()
        ticket = self.queue.ask(*lengths) if lengths else None
        self.engine.gate.set()
        return ticket


def stepping(run, body):
    async def main(queue):
        def second(lengths):
            queue.engine.gate.clear()
            return 1.0

        queue.engine.cost = second
        try:
            await body(Steps(queue))
        finally:
            queue.engine.cost = lambda lengths: 1.0

    bounds = {"batch_tokens": 1000, "batch_seconds": 1.0, "queue_seconds": math.inf, "queue_tokens": 10**6}
    run(main, cost=lambda lengths: 1.0, **bounds)


def test_a_short_request_is_served_between_the_batches_of_a_long_one_that_is_due(run):
    async def body(steps):
        short = await steps.step(999)
        for _ in range(int(STRETCH / OVERDUE) + 2):
            await steps.step()
        await asyncio.wait_for(short.future, 5)
        assert [999] in steps.engine.batches[: int(STRETCH / OVERDUE) + 2]
        assert not steps.long.done

    stepping(run, body)


def test_a_long_request_that_is_due_is_not_starved(run):
    """With a short request of one second for each second, the long one is every third batch or more."""

    async def body(steps):
        for _ in range(3 * 20 + int(STRETCH)):
            await steps.step(999)
        await asyncio.wait_for(steps.long.future, 5)
        assert steps.engine.batches.count([1000]) == 20

    stepping(run, body)


def test_a_request_that_would_be_late_is_due_earlier(run):
    async def body(queue):
        for seconds, due in ((1, STRETCH), (10, 30 - OVERDUE * 10), (20, 0)):
            queue.batcher.pace(queue.engine).measure(Work(1000, 1000**2), 1.0)
            ticket = queue.batcher.admit(queue.engine, Work(1000 * seconds, 1000**2 * seconds))
            assert ticket.due == pytest.approx(due)
            queue.batcher.drop(ticket)

    run(body, cost=lambda lengths: 1.0, timeout=60.0, queue_tokens=10**6)


def test_a_busy_server_refuses_what_it_cannot_answer_in_time(run):
    async def body(queue):
        queue.told(1000.0)
        queue.engine.gate.clear()
        queue.ask(100)
        with pytest.raises(Problem, match="timeout"):
            queue.ask(*[100] * 250)  # 25 s by itself, 75 s beside others
        queue.engine.gate.set()

    run(body, cost=lambda lengths: sum(lengths) / 1000, timeout=60.0, queue_tokens=10**6)


def test_an_engine_gives_back_its_work_space_when_no_large_batch_came_for_a_while(run):
    async def body(queue):
        shrunk = []
        queue.engine.shrink = lambda: shrunk.append(len(queue.engine.batches))
        for length in (LARGE_TOKENS, LARGE_TOKENS + 1, 10, 20, 30):
            await queue.ask(length).future
            queue.engine.now += SHRINK_SECONDS / 2
        until(lambda: len(queue.observed) == 5)
        assert shrunk == [3], "expected it before the fourth batch, SHRINK_SECONDS after the second one"

    run(body, cost=lambda lengths: 0.0)


def test_the_worker_ends():
    async def main():
        Batcher(batch_tokens=1, queue_tokens=1, queue_seconds=1.0).close()

    before = threading.active_count()
    asyncio.run(main())
    assert threading.active_count() == before
