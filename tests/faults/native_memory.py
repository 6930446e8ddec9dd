"""Lets every allocation of the native engine fail in turn. Prints a line for each fault.

python native_memory.py FEW [KIND]      FEW: allocations of each case that fail, 0 for all; KIND: 0 to 2, a row of KINDS
"""

import functools
import os
import sys

import injection
import numpy as np
from random_models import model_config, packed, random_weights

from turborank.engines import native
from turborank.errors import EngineError

FEW = int(sys.argv[1])
FAULTS = injection.Injector()
SMALL = {"hidden_size": 64, "num_attention_heads": 2, "intermediate_size": 64, "vocab_size": 100}
CONFIG = model_config(**SMALL, slopes=(0.25, 0.0625))
HEADS = {"classifier": CONFIG, "cosine": model_config(**SMALL, slopes=(0.25, 0.0625), head="cosine")}
BATCH = packed([5, 40, 700, 9, 1200, 64], vocab_size=100)


def resident() -> float:
    """Resident MiB of this process."""
    return int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


class Case:
    """One call of the engine, on a new engine each time, and the same call once more without faults."""

    def __init__(self, head: str, precision: str, threads: int, call: str) -> None:
        self.config, self.weights = HEADS[head], random_weights(HEADS[head])
        self.precision, self.threads, self.call = precision, threads, call
        self.expected = self.compute(self.prepared())

    def prepared(self) -> native.NativeEngine:
        return native.prepare(self.weights, self.config, precision=self.precision, threads=self.threads)

    def compute(self, engine: native.NativeEngine) -> list[bytes]:
        if self.call == "layers":
            return [layer.tobytes() for layer in engine.layers(BATCH)]
        return [engine.logits(BATCH).tobytes()]

    def attempt(self, first: int, last: int) -> str:
        """The outcome of the call while allocations ``first`` to ``last`` fail."""
        engine = None if self.call == "prepare" else self.prepared()
        outcome = "survived"
        with FAULTS.armed(injection.MEMORY, first, last):
            try:
                if self.call == "renew":
                    engine.renew()
                found = self.compute(engine or self.prepared())
                assert found == self.expected, "other bits"
            except MemoryError:
                outcome = "MemoryError"
            except EngineError as error:  # no thread
                outcome = type(error).__name__
        assert first == 0 or FAULTS.hits, (first, FAULTS.count)
        if engine is not None:  # usable: first a small batch, which must not want what the large one did not get
            assert np.isfinite(engine.logits(packed([7], vocab_size=100))).all()
        assert self.compute(engine or self.prepared()) == self.expected, "other bits after the fault"
        return outcome


KINDS = (("classifier", "int8", 1), ("classifier", "int8", 2), ("cosine", "fp32", 2))
CALLS = ("prepare", "logits", "layers", "renew")
GROWN = 1.0  # MiB that the process may grow by while all faults are injected once more


def faults(case: Case) -> list[tuple[int, int]]:
    """(first, last) allocation of each fault: one alone, and with all that follow."""
    case.attempt(0, 0)
    places = injection.some(FAULTS.count, FEW, every=not FEW)
    return [(first, last or first) for last in (0, injection.EVER) for first in places]


def flat(cases: list[tuple[Case, list[tuple[int, int]]]]) -> str:
    """Inject all faults once more, but those of ``renew``, which leaves the old engine to the parent process."""
    before = resident()
    for case, places in cases:
        for first, last in places:
            case.attempt(first, last)
    grown = resident() - before
    assert grown < GROWN, f"grown by {grown:.2f} MiB"
    return f"{grown:.2f} MiB"


def main() -> None:
    chosen = KINDS[int(sys.argv[2]) :][:1] if len(sys.argv) > 2 else KINDS
    cases = [(call, Case(*kind, call)) for kind in chosen for call in CALLS]
    planned = [(call, case, faults(case)) for call, case in cases]
    for call, _, places in planned:
        injection.plan(f"native engine, {call}: an allocation or thread", len(places))
    for call, case, places in planned:
        for first, last in places:
            check = functools.partial(case.attempt, first, last)
            injection.report(f"native engine, {call}: an allocation or thread", check)
    injection.plan("native engine, memory after as many again", 1)
    again = [(case, places) for call, case, places in planned if call != "renew"]
    injection.report("native engine, memory after as many again", lambda: flat(again))


if __name__ == "__main__":
    main()
