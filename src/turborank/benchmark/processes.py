"""Contestants: each runs in a process of its own, takes orders, and is stopped while others work."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from turborank.benchmark.workloads import encodings, sizes
from turborank.errors import EngineError, InputError
from turborank.tokens import pack
from turborank.types import Encoding, Float32

TURN = 0.25  # seconds that a contestant works in one turn, and one call at least
SLOW = 2.0  # seconds a call, for those who have fewer turns
BATCH = 32  # pairs in a padded batch, as the libraries' default is

Scorer = Callable[[Sequence[Encoding], int], Float32]  # (encodings, batch size) -> logits (P,)


@dataclass(frozen=True)
class Contestant:
    """One way to run the model, in a process of its own.

    ``loader`` is ``"module:function"`` or ``"file.py:function"``; the function takes the model's folder, the number of
    threads and ``options`` and returns a Scorer.
    """

    name: str
    label: str
    loader: str = "turborank.benchmark:load_engine"
    options: Mapping[str, Any] = field(default_factory=dict)
    env: Mapping[str, str] = field(default_factory=dict)


class EngineScorer:
    """One of our engines, fed as the scheduler feeds it: unpadded batches of a token budget."""

    def __init__(self, engine: Any, token_budget: int) -> None:
        self.engine = engine
        self.token_budget = token_budget

    def __call__(self, pairs: Sequence[Encoding], _batch: int = BATCH) -> Float32:
        from turborank.scheduler import plan

        out = np.empty(len(pairs), dtype=np.float32)
        for places in plan([len(pair) for pair in pairs], self.token_budget):
            out[places] = self.engine.logits(pack([pairs[i] for i in places]))
        return out


def load_engine(model: Path, threads: int, options: Mapping[str, Any]) -> EngineScorer:
    """A row of ENGINES with a precision."""
    from turborank import checkpoint, engines
    from turborank.scheduler import budget

    given = checkpoint.read(model)
    name, precision = engines.choose(options["engine"], options.get("precision", "auto"), given.config)
    engine = engines.prepare(given.weights, given.config, name=name, precision=precision, threads=threads)
    return EngineScorer(engine, budget(engine))


def function(reference: str) -> Any:
    """What ``"module:name"`` or ``"file.py:name"`` means."""
    where, _, name = reference.rpartition(":")
    if not where.endswith(".py"):
        return getattr(importlib.import_module(where), name)
    spec = importlib.util.spec_from_file_location(Path(where).stem, where)
    if spec is None or spec.loader is None:
        raise InputError(f"expected a Python file with {name}, got {where}")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return getattr(module, name)


def peak_memory() -> int:
    """Bytes of memory that this process held at most (resident)."""
    try:
        status = Path("/proc/self/status").read_text()
        return 1024 * int(status.split("VmHWM:")[1].split()[0])
    except (OSError, IndexError):
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else 1024 * peak


class _Work:
    """The orders a worker obeys, by name."""

    def __init__(self, order: Mapping[str, Any]) -> None:
        began = time.perf_counter()
        load = function(order["loader"])
        imported = time.perf_counter()
        self.scorer: Scorer = load(Path(order["model"]), order["threads"], order["options"])
        self.sizes = sizes(Path(order["model"]))
        loaded = time.perf_counter()
        self.scorer(self._pairs("1x64"), BATCH)
        scored = time.perf_counter()
        engine = getattr(self.scorer, "engine", None)
        self.about = {
            "import_s": imported - began, "load_s": loaded - imported, "first_s": scored - loaded,
            "isa": getattr(engine, "isa", None), "precision": getattr(engine, "precision", None),
        }  # fmt: skip

    def _pairs(self, workload: str) -> list[Encoding]:
        return encodings(workload, *self.sizes)

    def time(self, workload: str, batch: int, seconds: float) -> list[float]:
        """Wall seconds of each call until ``seconds`` are used up, one at least."""
        pairs = self._pairs(workload)
        took: list[float] = []
        while not took or sum(took) < seconds:
            start = time.perf_counter()
            self.scorer(pairs, batch)
            took.append(time.perf_counter() - start)
        return took

    def logits(self, workload: str, batch: int) -> list[float]:
        return [float(x) for x in self.scorer(self._pairs(workload), batch)]

    def peak(self) -> int:
        return peak_memory()


def worker() -> None:
    """Obey orders, one JSON line each, until there are no more. Libraries may print: to standard error."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def answer(value: Any) -> None:
        answers.write(json.dumps(value) + "\n")
        answers.flush()

    work = _Work(json.loads(sys.stdin.readline()))
    answer(work.about)
    for line in sys.stdin:
        order = json.loads(line)
        answer(getattr(work, order.pop("do"))(**order))


class Process:
    """A contestant's process, stopped (where the system can) while others work."""

    def __init__(self, contestant: Contestant, model: Path, threads: int) -> None:
        self.contestant = contestant
        env = os.environ | {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"} | dict(contestant.env)
        self._child = subprocess.Popen(
            [sys.executable, "-c", "from turborank.benchmark import worker; worker()"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=env, text=True,
        )  # fmt: skip
        order = {"loader": contestant.loader, "options": dict(contestant.options), "model": str(model)}
        self.about = self._ask(order | {"threads": threads})

    def _ask(self, order: Mapping[str, Any]) -> Any:
        assert self._child.stdin is not None
        assert self._child.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self._child.stdin.write(json.dumps(order) + "\n")
            self._child.stdin.flush()
        line = self._child.stdout.readline()
        if not line:
            assert self._child.stderr is not None
            said = self._child.stderr.read().strip().splitlines()
            reason = said[-1] if said else f"exit code {self._child.wait()}"
            self.close()
            raise EngineError(f"expected {self.contestant.name} to run, got: {reason}")
        return json.loads(line)

    def time(self, workload: str, batch: int, seconds: float) -> list[float]:
        """Wall seconds of each call until ``seconds`` are used up, one at least."""
        return [float(took) for took in self._order("time", workload=workload, batch=batch, seconds=seconds)]

    def logits(self, workload: str, batch: int) -> list[float]:
        """The workload's logits (P,)."""
        return [float(logit) for logit in self._order("logits", workload=workload, batch=batch)]

    def peak(self) -> int:
        """Bytes of memory that the process held at most."""
        return int(self._order("peak"))

    def _order(self, do: str, **arguments: Any) -> Any:
        self.signal("SIGCONT")
        try:
            return self._ask({"do": do, **arguments})
        finally:
            self.signal("SIGSTOP")

    def signal(self, name: str) -> None:
        """Stop or continue the process, where the system can."""
        if hasattr(signal, name) and self._child.poll() is None:
            self._child.send_signal(getattr(signal, name))

    def close(self) -> None:
        """End the process."""
        self._child.kill()
        with contextlib.suppress(BrokenPipeError), self._child:
            pass  # leaving closes the pipes and waits


@contextlib.contextmanager
def processes(contestants: Sequence[Contestant], model: Path, threads: int) -> Iterator[dict[str, Process]]:
    """All contestants, loaded and waiting; one that cannot run here is an error."""
    running: dict[str, Process] = {}
    try:
        for contestant in contestants:
            running[contestant.name] = Process(contestant, model, threads)
            running[contestant.name].signal("SIGSTOP")
        yield running
    finally:
        for process in running.values():
            process.close()


Turn = tuple[str, int]  # a contestant's name and a batch size


def in_turns(
    running: Mapping[str, Process], turns: Mapping[str, Sequence[Turn]], rounds: int
) -> dict[str, dict[Turn, list[float]]]:
    """Workload -> turn -> seconds of every call. The order is turned round each time. The first call of each turn is
    a warm-up and not counted, except that those who need over SLOW seconds for it save time: it counts, and they
    have a turn only every second round."""
    took: dict[str, dict[Turn, list[float]]] = {w: {turn: [] for turn in each} for w, each in turns.items()}
    for number in range(rounds):
        for workload, each in took.items():
            for turn in list(each)[:: -1 if number % 2 else 1]:
                name, batch = turn
                if number == 0:
                    first = running[name].time(workload, batch, 0.0)
                    each[turn] += [s for s in first if s > SLOW]
                slow = bool(each[turn]) and each[turn][0] > SLOW
                if not (slow and number % 2 == 0):
                    each[turn] += running[name].time(workload, batch, TURN)
    return took
