"""faults.c from Python: builds it once, preloads it into child processes, arms it and counts faults."""

from __future__ import annotations

import ctypes
import functools
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).resolve().parent
NOTHING, MEMORY, FULL, READ_ONLY, KILL, RECORD = range(6)
NAMES = {MEMORY: "no memory", FULL: "full disk", READ_ONLY: "read-only disk", KILL: "kill -9"}
EVER = 2**62  # as the last of the calls that fail: all from the first on
VARIABLE = "TURBORANK_TEST_FAULTS_LIBRARY"


@functools.cache
def library() -> str:
    """The path of the compiled library; the test is skipped where it cannot be built."""
    compiler = shutil.which("cc")
    if not sys.platform.startswith("linux") or compiler is None:
        pytest.skip("faults are injected on Linux with a C compiler, cc")
    folder = tempfile.mkdtemp(prefix="turborank-faults-")
    built = Path(folder) / "faults.so"
    command = [
        compiler,
        "-O1",
        "-fPIC",
        "-shared",
        "-Wall",
        "-Werror",
        str(HERE / "faults.c"),
        "-o",
        str(built),
        "-ldl",
    ]
    run = subprocess.run(command, capture_output=True, text=True)
    if run.returncode:
        pytest.skip(f"faults are injected with glibc, which this system's cc does not build for: {run.stderr[:200]}")
    return str(built)


def command(program: str, *arguments: str) -> tuple[list[str], dict[str, str]]:
    """(arguments, environment) of a Python program of this folder with the library preloaded."""
    path = os.pathsep.join([str(HERE), str(HERE.parent), str(HERE.parent / "evaluate"), *sys.path])
    environment = {"LD_PRELOAD": library(), VARIABLE: library(), "PYTHONPATH": path}
    environment |= {"TURBORANK_FAULTS": "", "OMP_NUM_THREADS": "1"}
    return [sys.executable, str(HERE / program), *arguments], os.environ | environment


def run(program: str, *arguments: str, timeout: float = 3000) -> subprocess.CompletedProcess[str]:
    """Run :func:`command`. Fails with its output unless it ends well."""
    words, environment = command(program, *arguments)
    done = subprocess.run(words, capture_output=True, text=True, timeout=timeout, env=environment)
    assert done.returncode == 0, f"{program} ended with {done.returncode}\n{done.stdout[-3000:]}\n{done.stderr[-6000:]}"
    return done


FAILED = "not survived"
PLANNED = "planned"


def plan(what: str, faults: int) -> None:
    """Tell the reader of standard output how many faults will be reported."""
    print(json.dumps([PLANNED, what, faults]), flush=True)


def report(what: str, check: Callable[[], str]) -> None:
    """Inject one fault and tell the outcome; of a failed check also the reason, on standard error."""
    try:
        outcome = check()
    except AssertionError as error:
        outcome = FAILED
        print(f"{what}: {' '.join(map(str, error.args))[:2000]}", file=sys.stderr, flush=True)
    print(json.dumps([outcome, what, 1]), flush=True)


def line(text: str) -> tuple[str, str, int] | None:
    """(outcome, what, faults) of a line of :func:`plan` or :func:`report`; None of any other line."""
    try:
        outcome, what, faults = json.loads(text)
        return outcome, what, int(faults)
    except (ValueError, TypeError):
        return None


def outcomes(done: subprocess.CompletedProcess[str]) -> dict[str, Counter[str]]:
    """What -> outcome -> faults, of a program's output. Fails with the reasons if one was not survived."""
    found: dict[str, Counter[str]] = {}
    for outcome, what, faults in filter(None, map(line, done.stdout.splitlines())):
        if outcome != PLANNED:
            found.setdefault(what, Counter())[outcome] += faults
    assert not any(FAILED in counted for counted in found.values()), done.stderr
    return found


class Injector:
    """The preloaded library of this process."""

    def __init__(self) -> None:
        self._library: Any = ctypes.CDLL(os.environ[VARIABLE])
        self._library.faults_arm.argtypes = [
            ctypes.c_int, ctypes.c_long, ctypes.c_long, ctypes.c_char_p, ctypes.c_char_p,
        ]  # fmt: skip
        self._library.faults_disarm.restype = self._library.faults_hits.restype = ctypes.c_long
        self.count = 0  # calls that the last ``armed`` was about

    def arm(self, kind: int, first: int = 0, last: int = 0, below: str = "", record: str = "") -> None:
        """Let the calls ``first`` to ``last`` of ``kind`` fail from now on; (0, 0) only counts calls."""
        self._library.faults_arm(kind, first, last, below.encode(), record.encode())

    def disarm(self) -> int:
        """Stop failing calls; number of calls since ``arm``."""
        self.count = int(self._library.faults_disarm())
        return self.count

    @property
    def hits(self) -> int:
        """Calls that failed since ``arm``."""
        return int(self._library.faults_hits())

    @contextmanager
    def armed(self, kind: int, first: int = 0, last: int = 0) -> Iterator[None]:
        """``arm`` around a block."""
        self.arm(kind, first, last)
        try:
            yield
        finally:
            self.disarm()


def some(total: int, few: int, *, every: bool) -> list[int]:
    """Numbers from 1 to ``total``: all of them, or ``few`` spread over them with both ends."""
    if every or total <= few:
        return list(range(1, total + 1))
    return sorted({round(1 + (total - 1) * n / (few - 1)) for n in range(few)})
