"""Out of memory: each allocation of the native engine fails in turn; a batch exceeds a memory limit."""

import subprocess
import sys
from pathlib import Path

import fault_counts
import injection
import pytest

from turborank.engines import native

if native.available() is not None:
    pytest.skip(str(native.available()), allow_module_level=True)


def test_every_allocation_of_the_native_engine_fails_in_turn() -> None:
    """Each allocation alone, and together with all later ones: MemoryError (for a thread, EngineError) or the right
    bits; then the same engine gives the right bits. "survived": the call succeeded without that allocation."""
    done = injection.run("native_memory.py", "0" if fault_counts.EVERY else "2")
    for what, outcomes in injection.outcomes(done).items():
        assert outcomes["MemoryError"] > outcomes["EngineError"] + outcomes["survived"] or "again" in what, what
        fault_counts.count(what, outcomes.total())


LIMITED = """
import resource
import numpy as np
from random_models import model_config, packed, random_weights
from turborank.engines import native
config = model_config()
engine = native.prepare(random_weights(config), config, precision="int8", threads=1)
small = packed([30, 40])
expected = engine.logits(small).tobytes()
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (16 << 20), resource.RLIM_INFINITY))
try:
    engine.logits(packed([6000]))  # its rows alone are 9 MiB, and q, k and v as much again
except MemoryError:
    for _ in range(3):
        assert engine.logits(small).tobytes() == expected
    resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    assert np.isfinite(engine.logits(packed([6000]))).all()
    print("survived")
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits the address space as Linux does")
def test_a_batch_that_is_too_large_for_the_memory_leaves_room_for_small_ones() -> None:
    path = str(Path(__file__).resolve().parent.parent)
    command = [sys.executable, "-c", f"import sys\nsys.path.insert(0, {path!r})\n{LIMITED}"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert (run.stdout, run.returncode) == ("survived\n", 0), run.stderr
    fault_counts.count("native engine, a limit of memory", 1)
