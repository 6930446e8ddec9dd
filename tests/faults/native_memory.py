"""Lets every allocation of the native engine fail in turn. Prints, as JSON, the number of faults and each outcome.

python native_memory.py FEW      FEW: allocations of each case that fail, 0 for all
"""

import json
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


def sweep(case: Case) -> dict[str, int]:
    case.attempt(0, 0)
    total, outcomes = FAULTS.count, {}
    for last in (0, injection.EVER):
        for first in injection.some(total, FEW, every=not FEW):
            outcome = case.attempt(first, last or first)
            outcomes[outcome] = outcomes.get(outcome, 0) + 1
    return outcomes


def main() -> None:
    kinds = [("classifier", "int8", 1), ("classifier", "int8", 2), ("cosine", "fp32", 2)]
    cases = {
        f"{head} {precision} {threads} {call}": Case(head, precision, threads, call)
        for head, precision, threads in kinds
        for call in ("prepare", "logits", "layers", "renew")
    }
    found = {name: sweep(case) for name, case in cases.items()}
    before = resident()
    for name, case in cases.items():
        if not name.endswith("renew"):  # which leaves the old engine to the parent process, by design
            sweep(case)
    print(json.dumps({"outcomes": found, "grown": resident() - before}))


if __name__ == "__main__":
    main()
