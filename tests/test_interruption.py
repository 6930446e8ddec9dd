"""Ctrl-C: exit code 130, one line on how to continue, no traceback, no incomplete file."""

import json
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import pytest
from helpers import heed_interrupts, write_checkpoint, write_safetensors
from sample_tokenizers import WORDS, bpe_tokenizer, wordpiece_tokenizer

from turborank.cli import main
from turborank.data import files

sys.path.append(str(Path(__file__).parent / "distill"))  # its small data sets

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


def interrupted_at(line: int, arguments: list[str]) -> tuple[int | None, bool]:
    """Run the command here with Ctrl-C at a line of data/files.py; exit code, and whether it came to that."""
    before = sys.gettrace()
    reached = interrupting(line)
    try:
        return main.run(arguments), reached()
    finally:
        sys.settrace(before)


def lines_of_files(arguments: list[str]) -> int:
    """Lines of data/files.py that run during the command."""
    low, high = 1, 1
    while interrupted_at(high, arguments)[1]:
        low, high = high, 2 * high
    while low + 1 < high:
        middle = (low + high) // 2
        low, high = (middle, high) if interrupted_at(middle, arguments)[1] else (low, middle)
    return low


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


UNWRITTEN = "turborank: interrupted; nothing incomplete was written; run it again\n"


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("old", [True, False], ids=["replaced", "new"])
def test_a_model_folder_is_the_old_or_the_new_one_wherever_ctrl_c_comes(tmp_path: Path, old: bool) -> None:
    """No weights of one beside the settings of another, and nothing else touched."""
    students = pytest.importorskip("turborank.distill.students", reason="needs torch", exc_type=ImportError)
    made = [students.from_scratch(bpe_tokenizer(), shape="micro", layers=layers) for layers in (1, 2)]
    for student in made:
        student.save(tmp_path / str(len(student.weights)))
    before, after = (content(tmp_path / str(len(student.weights))) for student in made)
    assert before.keys() == after.keys() == {"config.json", "model.safetensors", "tokenizer.json"}
    assert all(before[name] != after[name] for name in ("config.json", "model.safetensors"))
    out, line, reached, found = tmp_path / "out", 0, True, set()
    while reached:
        line += 1
        shutil.rmtree(out, ignore_errors=True)
        if old:
            made[0].save(out)
            (out / "notes.txt").write_text("of the user")
        trace, came = sys.gettrace(), interrupting(line)
        try:
            made[1].save(out)
        except KeyboardInterrupt:
            pass
        finally:
            sys.settrace(trace)
        reached, left = came(), content(out)
        assert left.pop("notes.txt", None) == (b"of the user" if old else None)
        assert left in ([before, after] if old else [{}, after]), f"line {line}"
        found.add(left == after)
        assert reached or left == after
        made[1].save(out)
        assert not list(tmp_path.rglob(".*")), f"line {line}"
    assert (line > 50, found) == (True, {False, True})


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_distill_student(tmp_path: Path, capsys: Any) -> None:
    pytest.importorskip("torch", reason="needs torch")
    model, out = write_checkpoint(tmp_path / "model"), tmp_path / "out"
    arguments = ["distill", "student", "layers", "--from", str(model), "--layers", "1", "--out", str(out)]
    line = lines_of_files(arguments) - 9
    capsys.readouterr()
    assert interrupted_at(line, arguments) == (130, True)
    assert capsys.readouterr().err == UNWRITTEN


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_distill_lists(tmp_path: Path, capsys: Any) -> None:
    """Wherever Ctrl-C comes: every file is whole, and the same command writes what an undisturbed one writes."""
    pytest.importorskip("bm25s", reason="bm25s is not installed in this environment")
    from little import pairs, write_lines

    source, out = write_lines(tmp_path / "animals.jsonl", pairs()[:8]), tmp_path / "out"
    arguments = ["distill", "lists", f"animals={source}", "--held-out", "0.3", "--bm25", "3", "--random", "2"]
    assert main.run([*arguments, "--out", str(tmp_path / "expected")]) == 0
    expected = content(tmp_path / "expected")
    assert len(expected) == 6
    total = lines_of_files([*arguments, "--out", str(out)])
    places = sorted({*range(1, total, max(1, total // 12)), *range(total - 60, total + 1, 6)})
    partial = 0
    for line in places:
        shutil.rmtree(out, ignore_errors=True)
        capsys.readouterr()
        assert interrupted_at(line, [*arguments, "--out", str(out)]) == (130, True)
        assert capsys.readouterr().err == f"{AGAIN}\n"
        left = content(out)
        assert left.items() <= expected.items(), line
        partial += 0 < len(left) < len(expected)
        assert main.run([*arguments, "--out", str(out)]) == 0
        assert content(out) == expected
    assert partial >= 3


def content(folder: Path) -> dict[str, bytes]:
    """Relative path -> bytes of the files that are not hidden."""
    names = {path: path.relative_to(folder) for path in sorted(folder.rglob("*")) if path.is_file()}
    return {
        str(name): path.read_bytes()
        for path, name in names.items()
        if not any(part.startswith(".") for part in name.parts)
    }


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
    code, said = interrupted(arguments, lambda: has_step(run, 4), tmp_path)
    assert (code, said.splitlines()[-1:]) == (130, [AGAIN]), said
    assert "Traceback" not in said
    assert not leftovers(run)
    saved = max(int(path.name.removeprefix("step-")) for path in run.glob("step-*"))
    again = subprocess.run([*command, *arguments, "--stop", str(saved + 1)], capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    assert json.loads((run / "curve.jsonl").read_text().splitlines()[-1])["step"] == saved + 1


def test_distill_recover(tmp_path: Path) -> None:
    """As training: the last checkpoint stays complete, and the same command continues from it."""
    students = pytest.importorskip("turborank.distill.students", reason="needs torch", exc_type=ImportError)
    pytest.importorskip("accelerate", reason="accelerate is not installed in this environment")
    source, student, lists, run = (tmp_path / name for name in ("source", "student", "lists", "run"))
    write_bi_encoder(source)
    students.from_bert(source).save(student)
    write_pools(lists)
    arguments = ["distill", "recover", str(student), "--source", str(source), "--texts", str(lists), "--out", str(run)]
    arguments += ["--steps", "100000", "--budget", "200", "--save-every", "2", "--long-tokens", "40", "--fp32"]
    code, said = interrupted(arguments, lambda: has_step(run, 4), tmp_path)
    assert (code, said.splitlines()[-1:]) == (130, [AGAIN]), said
    assert "Traceback" not in said
    assert not leftovers(run)
    saved = max(int(path.name.removeprefix("step-")) for path in run.glob("step-*"))
    assert main.run([*arguments, "--stop", str(saved + 1)]) == 0
    assert json.loads((run / "curve.jsonl").read_text().splitlines()[-1])["step"] == saved + 1


def has_step(run: Path, step: int) -> bool:
    """Whether a run has a checkpoint of that step or a later one: only the last two are kept."""
    return any(int(path.name.removeprefix("step-")) >= step for path in run.glob("step-*"))


def write_bi_encoder(folder: Path) -> None:
    """A random BERT in sentence-transformers' layout."""
    from turborank.architectures import bert, encoder

    raw = {"architectures": ["BertModel"], "model_type": "bert", "vocab_size": 8, "hidden_size": 32}
    raw |= {"num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64, "hidden_act": "gelu"}
    raw |= {"max_position_embeddings": 64, "type_vocab_size": 2, "layer_norm_eps": 1e-12}
    config, rng = bert.recognise(raw, {}), np.random.default_rng(0)
    assert config is not None
    tensors = {
        name: ("F32", rng.normal(0, 0.1, shape).astype(np.float32)) for name, shape in encoder.body_shapes(config)
    }
    folder.mkdir()
    write_safetensors(folder / "model.safetensors", tensors)
    (folder / "config.json").write_text(json.dumps(raw))
    wordpiece_tokenizer().save(str(folder / "tokenizer.json"))


def write_pools(folder: Path) -> None:
    """A training folder: four queries with four candidates each."""
    folder.mkdir()
    corpus = [
        {"_id": f"d{n}", "text": " ".join(["red bee", "blue tree", "bee tree red", "tree"][n:] * 5)} for n in range(4)
    ]
    queries = [{"_id": f"q{n}", "text": WORDS[n]} for n in range(4)]
    for name, rows in (("corpus", corpus), ("queries", queries)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    lines = [f"q{q} Q0 d{d} {d + 1} {4 - d} pool" for q in range(4) for d in range(4)]
    (folder / "candidates.trec").write_text("\n".join(lines) + "\n")


def test_an_http_teacher_that_is_silent(tmp_path: Path) -> None:
    """One request is answered before Ctrl-C, one after it, two never. The command ends all the same, and the next one
    asks only for what was not answered."""
    from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

    pytest.importorskip("httpx", reason="httpx is not installed in this environment")
    write_pools(tmp_path / "lists")
    asked: list[str] = []
    stopped, done = threading.Event(), threading.Event()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            asked.append(body["query"])
            if not done.is_set() and len(asked) > 1:
                stopped.wait(PATIENCE)
                if len(asked) > 2 and body["query"] != asked[1]:
                    done.wait(PATIENCE)
                    return
            rows = [{"index": n, "relevance_score": 0.5} for n in range(len(body["documents"]))]
            content = json.dumps({"results": rows}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *arguments: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}/v1/rerank"
    arguments = ["distill", "score", str(tmp_path / "lists"), "-t", f"far=http:jina:{url}", "--parallel", "3"]

    def ready() -> bool:
        if len(asked) == 4:
            threading.Timer(0.5, stopped.set).start()
        return len(asked) == 4

    try:
        started = time.monotonic()
        code, said = interrupted([*arguments, "--timeout", str(3 * PATIENCE)], ready, tmp_path)
        assert (code, said.splitlines()[-1:]) == (130, [AGAIN]), said
        assert "Traceback" not in said
        assert time.monotonic() - started < PATIENCE
        assert not leftovers(tmp_path / "lists")
        done.set()
        before = set(asked)
        asked.clear()
        assert main.run(arguments) == 0
        assert len(before) == 4
        assert len(asked) == 2, "two were answered"
    finally:
        done.set()
        server.shutdown()
        server.server_close()


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
