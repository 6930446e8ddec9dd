"""Ctrl-C: exit code 130, one line on how to continue, no traceback, no incomplete file."""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
from helpers import heed_interrupts, write_checkpoint

from turborank.data import files

AGAIN = "turborank: interrupted; the same command continues from what is complete"
PATIENCE = 120.0  # seconds, on a machine that is busy
TEXT = "a bee in the trees of the hive " * 40


def interrupted(arguments: list[str], ready: Callable[[], bool], cwd: Path) -> tuple[int, str]:
    """Start the command, press Ctrl-C once it is ``ready``; exit code and standard error."""
    command = [sys.executable, "-m", "turborank", *arguments]
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, cwd=cwd, preexec_fn=heed_interrupts
    )
    deadline = time.monotonic() + PATIENCE
    while not ready() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=PATIENCE)
    return process.returncode, said


def leftovers(folder: Path) -> list[Path]:
    """Temporary and partial files."""
    return [path for path in folder.rglob(".*") if path.is_file() and path.stat().st_size]


def interrupting(line: int) -> Callable[[], bool]:
    """Press Ctrl-C at the n-th line of data/files.py from now on; returns a function that tells if it was reached."""
    passed = 0

    def trace(frame: FrameType, event: str, argument: object) -> Any:
        nonlocal passed
        if frame.f_code.co_filename != files.__file__:
            return None
        passed += event == "line"
        if passed == line and event == "line":
            sys.settrace(None)
            raise KeyboardInterrupt
        return trace

    sys.settrace(trace)
    return lambda: passed >= line


WRITES: dict[str, Callable[[Path], None]] = {
    "text": lambda path: files.write_text(path, "new"),
    "JSON": lambda path: files.write_json(path, "new"),
}


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # a file that no block has yet
@pytest.mark.parametrize("name", WRITES)
def test_a_file_is_the_old_or_the_new_one_wherever_ctrl_c_comes(tmp_path: Path, name: str) -> None:
    path, line, came = tmp_path / "file", 0, True
    before = sys.gettrace()
    while came:
        line += 1
        path.write_text("old")
        reached = interrupting(line)
        try:
            WRITES[name](path)
        except KeyboardInterrupt:
            pass
        finally:
            sys.settrace(before)
        came = reached()
        assert path.read_text().strip('"\n') == ("old" if came and path.read_text() == "old" else "new")
        assert [one.name for one in tmp_path.iterdir()] == ["file"], f"line {line}"
    assert line > 8


@pytest.fixture
def collection(tmp_path: Path) -> Path:
    """A BEIR folder that takes longer to rerank than the test runs."""
    folder = tmp_path / "collection"
    (folder / "qrels").mkdir(parents=True)
    documents = [{"_id": f"d{n}", "title": "", "text": f"{n} {TEXT}"} for n in range(400)]
    queries = [{"_id": f"q{n}", "text": f"which bee {n}"} for n in range(200)]
    for name, rows in (("corpus", documents), ("queries", queries)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    lines = ["query-id\tcorpus-id\tscore", *(f"q{n}\td{n}\t1" for n in range(200))]
    (folder / "qrels" / "test.tsv").write_text("\n".join(lines) + "\n")
    return folder


def test_evaluate(collection: Path, tmp_path: Path) -> None:
    pytest.importorskip("bm25s", reason="bm25s is not installed in this environment")
    model, out = write_checkpoint(tmp_path / "model"), tmp_path / "out"
    arguments = ["evaluate", str(collection), "--models", str(model), "--out", str(out), "--depth", "400"]
    code, said = interrupted(arguments, lambda: any(out.rglob("*.trec")), tmp_path)
    assert (code, said.splitlines()[-1:]) == (130, [AGAIN])
    assert "Traceback" not in said
    assert not leftovers(out)
    assert not list(out.rglob("report.html"))


def test_distill_score(collection: Path, tmp_path: Path) -> None:
    pytest.importorskip("bm25s", reason="bm25s is not installed in this environment")
    lists = tmp_path / "lists"
    command = [sys.executable, "-m", "turborank", "distill", "lists", f"mine={collection}", "--out", str(lists)]
    subprocess.run(command, check=True, capture_output=True)
    before = {path for path in lists.rglob("*") if path.is_file()}
    arguments = ["distill", "score", str(lists), "-t", f"slow=checkpoint:{write_checkpoint(tmp_path / 'model')}"]

    def started() -> bool:
        return any(path.is_file() and path not in before for path in lists.rglob("*"))

    code, said = interrupted(arguments, started, tmp_path)
    assert (code, said.splitlines()[-1:]) == (130, [AGAIN])
    assert "Traceback" not in said
    assert not leftovers(lists)


def test_distill_train(collection: Path, tmp_path: Path) -> None:
    """The last checkpoint is complete, and the same command continues from it."""
    for library in ("bm25s", "accelerate", "ir_measures"):
        pytest.importorskip(library, reason=f"{library} is not installed in this environment")
    lists, run = tmp_path / "lists", tmp_path / "run"
    (collection / "qrels" / "test.tsv").rename(collection / "qrels" / "train.tsv")
    command = [sys.executable, "-m", "turborank"]
    make = ["distill", "lists", f"mine={collection}", "--held-out", "0.2", "--out", str(lists)]
    subprocess.run([*command, *make], check=True, capture_output=True)
    student = write_checkpoint(tmp_path / "student")
    arguments = ["distill", "train", str(lists), "--student", str(student), "--loss", "infonce", "--out", str(run)]
    arguments += ["--steps", "100000", "--budget", "800", "--save-every", "2", "--document-tokens", "32", "--fp32"]
    arguments += ["--documents", "4", "--long-tokens", "", "--evaluate-every", "50000"]
    code, said = interrupted(arguments, lambda: (run / "step-000004").is_dir(), tmp_path)
    assert (code, said.splitlines()[-1:]) == (130, [AGAIN]), said
    assert "Traceback" not in said
    assert not leftovers(run)
    saved = max(int(path.name.removeprefix("step-")) for path in run.glob("step-*"))
    again = subprocess.run([*command, *arguments, "--stop", str(saved + 1)], capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    assert json.loads((run / "curve.jsonl").read_text().splitlines()[-1])["step"] == saved + 1


def test_serve(tmp_path: Path) -> None:
    pytest.importorskip("starlette", reason="the service needs pip install 'turborank[serve]'")
    started = time.monotonic()
    arguments = ["serve", "--model", str(write_checkpoint(tmp_path / "model")), "--port", "18741"]
    code, said = interrupted(arguments, lambda: reachable(18741) or time.monotonic() > started + PATIENCE, tmp_path)
    assert (code, said.splitlines()[-1:]) == (130, ["turborank: interrupted"])
    assert "Traceback" not in said


def reachable(port: int) -> bool:
    import urllib.error
    import urllib.request

    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/ready", timeout=2) as answer:
            return bool(answer.status == 200)
    except (OSError, urllib.error.URLError):
        return False
