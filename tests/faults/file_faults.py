"""Commands that write, with a full disk, a read-only disk or a kill at every call that changes a file.

python file_faults.py CASE FEW      FEW: calls of each kind that fail, 0 for all. Prints a line for each fault.

Each attempt is a forked process in a copy of the same folder. After it, every file is what it was before, or one of the
contents it had in an undisturbed run; and the same command, run again, leaves what an undisturbed run leaves. The clock
is stopped, so that files with durations are equal, too.
"""

import contextlib
import datetime
import functools
import io
import json
import os
import shutil
import signal
import sqlite3
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import injection
from helpers import native_config, write_checkpoint
from mini import write_mini

from turborank.cli import main as cli
from turborank.data.files import replacing_folder


class Still(datetime.datetime):
    @classmethod
    def now(cls, zone: datetime.tzinfo | None = None) -> "Still":
        return cls(2001, 1, 1, tzinfo=zone)


datetime.datetime = Still
for clock in ("time", "monotonic", "perf_counter"):
    setattr(time, clock, lambda: 1.75e9)

FAULTS = injection.Injector()
PATIENCE = 300  # seconds for one attempt
SQLITE = ".sqlite3"

Tree = dict[str, bytes]


class Case(NamedTuple):
    """A command, in a folder with a model, a collection and rows of pairs; ``before`` are commands run there first."""

    arguments: str
    before: tuple[str, ...] = ()
    growing: tuple[str, ...] = ()  # names of files that are appended to
    whole: str = ""  # a folder whose files change together
    run: Callable[[list[str]], int] = cli.run


def _hub(arguments: list[str]) -> int:
    """Load a repository of the stand-in Hub; 2 and a message if that fails."""
    from turborank import checkpoint
    from turborank.errors import TurborankError

    try:
        loaded = checkpoint.load(arguments[0], revision="a" * 40)
        assert loaded.weights["embeddings.word_embeddings.weight"].shape
        return 0
    except TurborankError as error:
        print(f"turborank: {error}", file=sys.stderr)
        return 2


def _replace(arguments: list[str]) -> int:
    try:
        with replacing_folder(Path(arguments[0])) as folder:
            for name in ("config.json", "model.safetensors"):
                (folder / name).write_bytes(b"new " * 3000)
        return 0
    except OSError as error:
        print(f"turborank: {error}", file=sys.stderr)
        return 2


EVALUATE = "evaluate mini --models model --depth 4 --threads 1 --out out"
LISTS = "distill lists mine=mini --out lists --depth 3"
TEACHER = "distill score lists -t slow=checkpoint:model --threads 1"
CASES = {
    "evaluate": Case(EVALUATE, growing=("scores.jsonl",)),
    "evaluate over older results": Case(EVALUATE, (f"{EVALUATE} --measures MRR@10",), ("scores.jsonl",)),
    "score": Case("score pairs.jsonl --model model --threads 1 --shard-pairs 3 --out out"),
    "distill lists": Case(LISTS),
    "distill score": Case(TEACHER, (LISTS,)),
    "distill student": Case("distill student layers --from model --layers 1 --out student", whole="student"),
    "distill suspects": Case("distill suspects lists -t slow", (LISTS, TEACHER)),
    "Hub download": Case("acme/reranker", run=_hub),
    "checkpoint of a training run": Case("best", run=_replace, whole="best"),
}


@contextlib.contextmanager
def hub(folder: Path) -> Iterator[None]:
    """The stand-in Hub with one repository, in a process of its own."""
    import http.server

    import test_hub

    files = {("acme/reranker", "a" * 40): write_checkpoint(folder, native_config())}
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), test_hub.handler(test_hub.Hub(files)))
    os.environ["HF_ENDPOINT"] = f"http://127.0.0.1:{server.server_port}"
    child = os.fork()
    if child == 0:
        server.serve_forever()
    server.server_close()
    try:
        yield
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def stage(folder: Path) -> None:
    """Create the folder of a case."""
    write_checkpoint(folder / "model", native_config())
    write_mini(folder / "mini")
    (folder / "best").mkdir()
    for name in ("config.json", "model.safetensors"):
        (folder / "best" / name).write_bytes(b"old " * 3000)
    rows = [{"query": f"which bee {n}", "document": f"a tree {n} of bees", "n": n} for n in range(8)]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def tree(folder: Path) -> Tree:
    """Relative path -> bytes of every file that is not hidden; of a database, its rows."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        hidden = any(part.startswith(".") for part in Path(name).parts)
        if hidden or not path.is_file() or path.name.endswith(".incomplete"):
            continue
        if path.parent.name == "blobs" and path.name.startswith("tmp_"):  # of huggingface_hub
            continue
        if path.name == "CACHEDIR.TAG":  # of huggingface_hub, too: tells backup programs to leave the folder out
            continue
        if path.name.endswith((f"{SQLITE}-wal", f"{SQLITE}-shm", f"{SQLITE}-journal")):
            continue
        found[name] = _rows(path) if path.name.endswith(SQLITE) else path.read_bytes()
    return found


def _rows(path: Path) -> bytes:
    copy = Path(tempfile.mkdtemp()) / path.name
    for one in path.parent.glob(f"{path.name}*"):
        shutil.copyfile(one, copy.with_name(one.name))
    with sqlite3.connect(copy) as database:
        assert database.execute("PRAGMA integrity_check").fetchone() == ("ok",), path
        named = database.execute("SELECT name FROM sqlite_master WHERE name = 'scores'").fetchall()
        rows = database.execute("SELECT * FROM scores ORDER BY key").fetchall() if named else []
    database.close()
    shutil.rmtree(copy.parent)
    return repr(rows).encode()


def attempt(case: Case, folder: Path, fault: tuple[int, int, int] | None = None, record: Path | None = None) -> int:
    """Run the case's command in a forked process in ``folder``; its exit code, negative for a signal."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            os.chdir(folder)
            for number, name in ((1, "stdout"), (2, "stderr")):
                os.dup2(os.open(folder.with_name(name), os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
            kind, first, last = fault or (injection.RECORD if record else injection.NOTHING, 0, 0)
            FAULTS.arm(kind, first, last, str(folder), str(record or ""))
            code = case.run(case.arguments.split())
            sys.stdout.flush()
        except BaseException:
            traceback.print_exc()
        finally:
            count = FAULTS.disarm()
            folder.with_name("count").write_text(str(count))
            sys.stderr.flush()
            os._exit(code)
    signal.alarm(PATIENCE)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    signal.alarm(0)
    return code


class Sweep:
    """All faults of one case."""

    def __init__(self, name: str, root: Path) -> None:
        self.case, self.root = CASES[name], root
        self.pristine, self.work, self.record = root / "pristine", root / "work", root / "record"
        self.pristine.mkdir()
        stage(self.pristine)
        self.warm_up()
        for command in self.case.before:
            assert attempt(Case(command), self.pristine) == 0, self.said()
        self.before = tree(self.pristine)
        self.record.mkdir()
        self.fresh()
        assert attempt(self.case, self.work, record=self.record) == 0, self.said()
        self.after = tree(self.work)
        self.versions: dict[str, set[bytes]] = {}
        for path in self.record.iterdir():
            self.versions.setdefault(path.name.partition("-")[2], set()).add(path.read_bytes())
        self.fresh()
        assert attempt(self.case, self.work) == 0, self.said()
        assert (names := different(tree(self.work), self.after)) == [], (
            f"expected two runs to write the same, got {names}"
        )

    def warm_up(self) -> None:
        """Run the commands in this process once, so that forked ones have all modules."""
        here = Path.cwd()
        self.fresh()
        os.chdir(self.work)
        with contextlib.redirect_stdout(io.StringIO()):
            for command in self.case.before:
                assert cli.run(command.split()) == 0
            assert self.case.run(self.case.arguments.split()) == 0
        os.chdir(here)

    def fresh(self) -> None:
        """A copy of the case's initial folder."""
        shutil.rmtree(self.work, ignore_errors=True)
        shutil.copytree(self.pristine, self.work, symlinks=True)

    def said(self) -> str:
        return (self.root / "stderr").read_text(errors="replace")

    def calls(self, kind: int) -> int:
        """Number of calls of an undisturbed run at which a fault of ``kind`` can be injected."""
        self.fresh()
        assert attempt(self.case, self.work, (kind, 0, 0)) == 0, self.said()
        return int((self.root / "count").read_text())

    def check(self, kind: int, first: int, last: int) -> str:
        """Inject one fault, check the files, and run the same command again."""
        self.fresh()
        code, what = attempt(self.case, self.work, (kind, first, last)), f"{injection.NAMES[kind]} at {first}"
        if kind == injection.KILL:
            assert code == -signal.SIGKILL, (what, code, self.said())
        else:
            assert code in (0, 2), (what, code, self.said())
            assert "Traceback" not in self.said(), (what, self.said())
            assert code == 0 or "turborank: " in self.said(), what
        left = tree(self.work)
        lost = [name for name in self.before if name not in left]
        assert not lost, (what, "lost", lost)
        for name, data in left.items():
            assert self.allowed(name, data), (what, "half-written", name, data[-200:])
        if self.case.whole:
            kept = {name: data for name, data in left.items() if name.startswith(f"{self.case.whole}/")}
            assert any(kept.items() <= state.items() for state in (self.before, self.after)), (what, "a mixture")
        if code == 0:
            assert different(left, self.after) == [], (what, "said to be done", different(left, self.after))
        assert attempt(self.case, self.work) == 0, (what, "again", self.said())
        assert different(tree(self.work), self.after) == [], (what, "again", different(tree(self.work), self.after))
        return "went on" if code == 0 else "killed" if code < 0 else "told"

    def allowed(self, name: str, data: bytes) -> bool:
        """Whether a file may have this content after a fault: the old, the new, or what it had in between."""
        path = Path(name)
        if data in (self.before.get(name), self.after.get(name)) or data in self.versions.get(path.name, ()):
            return True
        if path.name in self.case.growing:
            return self.after[name].startswith(data)
        return path.name.endswith(SQLITE)  # _rows() has asked the database whether it is whole


def different(found: Mapping[str, bytes], expected: Mapping[str, bytes]) -> list[str]:
    return sorted(name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name))


def main() -> None:
    name, few = sys.argv[1], int(sys.argv[2])
    with tempfile.TemporaryDirectory(prefix="turborank-faults-") as root, hub(Path(root) / "hub"):
        os.environ["HF_HOME"] = str(Path(root).resolve() / "work" / "hub")
        sweep = Sweep(name, Path(root).resolve())
        calls = {
            kind: injection.some(sweep.calls(kind), few, every=not few)
            for kind in (injection.KILL, injection.FULL, injection.READ_ONLY)
        }
        for kind, places in calls.items():
            injection.plan(f"{name}: {injection.NAMES[kind]}", len(places))
        for kind, places in calls.items():
            for first in places:
                check = functools.partial(sweep.check, kind, first, injection.EVER)
                injection.report(f"{name}: {injection.NAMES[kind]}", check)


if __name__ == "__main__":
    main()
