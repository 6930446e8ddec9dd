"""All faults of which an ordinary test run injects a few: `make faults`.

python tests/faults/everything.py [PROCESSES] [SECONDS]      default: one process per core, 1,200 seconds

Independent programs share the cores. Progress is printed every few seconds, the counts at the end: also those of a run
that Ctrl-C or the limit has ended early, which then says what is missing. Exit code 0: all were injected and survived;
1: one was not survived; 3: incomplete.
"""

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import injection

HERE = Path(__file__).resolve().parent
EVERY = 10.0  # seconds between two lines of progress
SERVER = ("serve/test_serve_faults.py", "faults/test_faults_memory.py")
FILES = (  # the longest first
    "evaluate", "evaluate over older results", "distill score", "Hub download", "score", "distill lists",
    "distill student", "distill suspects", "checkpoint of a training run",
)  # fmt: skip


class Job:
    """One program, and what it has reported so far."""

    def __init__(self, name: str, words: list[str], environment: dict[str, str]) -> None:
        self.name, self.words, self.environment = name, words, environment
        self.process: subprocess.Popen[str] | None = None
        self.found: dict[str, Counter[str]] = {}
        self.said: list[str] = []
        self.reader = threading.Thread(target=self._read, daemon=True)

    def start(self, folder: str) -> None:
        self.process = subprocess.Popen(
            self.words, env=self.environment | {"TMPDIR": folder}, text=True, start_new_session=True,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        self.reader.start()

    def _read(self) -> None:
        assert self.process is not None
        assert self.process.stdout is not None
        for text in self.process.stdout:
            told = injection.line(text)
            if told is None:
                self.said.append(text)
            else:
                self.found.setdefault(told[1], Counter())[told[0]] += told[2]

    @property
    def running(self) -> bool:
        return self.process is not None and (self.process.poll() is None or self.reader.is_alive())

    @property
    def complete(self) -> bool:
        """Whether the program has ended well."""
        return self.process is not None and self.process.poll() == 0 and not self.reader.is_alive()

    @property
    def ended_badly(self) -> bool:
        return self.process is not None and self.process.poll() not in (None, 0)

    def stop(self) -> None:
        """End the program and the processes that it has started."""
        if self.running:
            assert self.process is not None
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()

    def count(self, *, planned: bool = False) -> int:
        """Faults injected, or planned."""
        return sum(
            number
            for counted in self.found.values()
            for outcome, number in counted.items()
            if (outcome == injection.PLANNED) is planned
        )


def jobs() -> list[Job]:
    """All programs. The server's clients mostly wait, so they begin first."""
    tests = [str(HERE.parent / name) for name in SERVER]
    words = [sys.executable, "-m", "pytest", "-q", "-s", "-p", "no:cacheprovider", *tests]
    words += ["-k", "not every_allocation"]  # which is what the programs "native" do
    server = Job("server", words, os.environ | {"TURBORANK_FAULTS": "all", "TURBORANK_FAULTS_LINES": "1"})
    files = [Job(name, *injection.command("file_faults.py", name, "0")) for name in FILES]
    native = [Job(f"native {kind}", *injection.command("native_memory.py", "0", str(kind))) for kind in range(3)]
    return [server, *files, *native]


def progress(all_jobs: list[Job], started: float) -> str:
    """One line: faults so far, and what is running."""
    seconds = int(time.monotonic() - started)
    running = [f"{job.name} {job.count()}/{job.count(planned=True) or '?'}" for job in all_jobs if job.running]
    return (
        f"{seconds // 60:3}:{seconds % 60:02}  {sum(job.count() for job in all_jobs):,} faults injected; "
        f"{sum(job.complete for job in all_jobs)} of {len(all_jobs)} programs complete; {', '.join(running)}"
    )


def work(all_jobs: list[Job], processes: int, limit: float, folder: str) -> None:
    """Run the jobs, ``processes`` at a time, until all have ended or ``limit`` seconds are over."""
    started = told = time.monotonic()
    waiting = list(all_jobs)
    while waiting or any(job.running for job in all_jobs):
        while waiting and sum(job.running for job in all_jobs) < processes + all_jobs[0].running:
            waiting.pop(0).start(folder)
        if time.monotonic() - started > limit:
            return
        if time.monotonic() - told > EVERY:
            told = time.monotonic()
            print(progress(all_jobs, started), flush=True)
        time.sleep(0.2)


def table(all_jobs: list[Job]) -> list[str]:
    """One line for each kind of fault: injected, planned, and what became of them."""
    rows: dict[str, Counter[str]] = {}
    for job in all_jobs:
        for what, counted in job.found.items():
            rows.setdefault(what, Counter()).update(counted)
    lines = []
    for what, counted in rows.items():
        planned = counted.pop(injection.PLANNED, None)
        became = ", ".join(f"{number:,} {outcome}" for outcome, number in counted.most_common())
        of = f" of {planned:,}" if planned not in (None, counted.total()) else ""
        lines.append(f"  {what:58} {counted.total():6,}{of}: {became}")
    return lines


def verdict(all_jobs: list[Job]) -> int:
    """Print the counts and what is missing; the exit code."""
    for job in all_jobs:
        if job.ended_badly or any(injection.FAILED in counted for counted in job.found.values()):
            print(f"{job.name} said:\n{''.join(job.said)[-4000:]}")
    print("\n".join(table(all_jobs)))
    total = sum(job.count() for job in all_jobs)
    lost = sum(counted[injection.FAILED] for job in all_jobs for counted in job.found.values())
    failed = [job.name for job in all_jobs if job.ended_badly]
    missing = [job.name for job in all_jobs if not (job.complete or job.ended_badly)]
    print(f"{total:,} faults injected, {lost:,} not survived" + (f"; failed: {', '.join(failed)}" if failed else ""))
    if missing:
        print(f"INCOMPLETE: not ended: {', '.join(missing)}")
    return 1 if lost or failed else 3 if missing else 0


def main() -> int:
    numbers: list[Any] = [float(word) for word in sys.argv[1:]]
    processes, limit = [*numbers, *(len(os.sched_getaffinity(0)), 1200.0)[len(numbers) :]]
    all_jobs = jobs()
    with tempfile.TemporaryDirectory(prefix="turborank-faults-") as folder:
        try:
            work(all_jobs, int(processes), limit, folder)
        except KeyboardInterrupt:
            print("interrupted", flush=True)
        code = verdict(all_jobs)
        for job in all_jobs:
            job.stop()
    return code


if __name__ == "__main__":
    sys.exit(main())
