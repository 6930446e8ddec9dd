"""gunicorn --preload and Celery's prefork pool: a reranker used before the fork has the same bits in every worker."""

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers import native_config, write_checkpoint

from turborank import Reranker
from turborank.engines import native

PAIRS = [("a bee", "a tree of bees " * n) for n in (1, 3, 50)]
PATIENCE = 120.0  # seconds, on a machine that is busy
WORKERS, REQUESTS = 3, 24
LOADED = """
import json, os
from turborank import Reranker
reranker = Reranker("model", engine="native", threads=2)
pairs = [("a bee", "a tree of bees " * n) for n in (1, 3, 50)]
def answer():
    return [os.getpid(), reranker.score(pairs).tobytes().hex()]
answer()  # its threads are started before the fork
"""
GUNICORN = """
def app(environ, start):
    body = json.dumps(answer()).encode()
    start("200 OK", [("Content-Length", str(len(body)))])
    return [body]
"""
CELERY = """
import celery
app = celery.Celery("tasks", broker="filesystem://localhost//", backend="file://results")
folders = {"data_folder_in": "queue", "data_folder_out": "queue", "control_folder": "control"}
app.conf.update(broker_transport_options=folders, worker_hijack_root_logger=False)
score = app.task(name="score")(answer)
"""


@pytest.fixture
def expected(tmp_path: Path) -> str:
    if native.available() is not None or not hasattr(os, "fork"):
        pytest.skip("needs the native engine and a system that forks")
    folder = write_checkpoint(tmp_path / "model", native_config())
    with Reranker(folder, engine="native", threads=1) as reranker:
        return reranker.score(PAIRS).tobytes().hex()


@contextlib.contextmanager
def started(folder: Path, *arguments: str) -> Iterator[Path]:
    """Run ``python -m`` with a program and stop it at the end; the file with its output."""
    said = folder / "said"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(folder), *sys.path]), "C_FORCE_ROOT": "1"}
    with said.open("wb") as out:
        process = subprocess.Popen(
            [sys.executable, "-m", *arguments], cwd=folder, stdout=out, stderr=out, env=environment
        )
    try:
        yield said
    finally:
        process.terminate()
        assert process.wait(PATIENCE) == 0
    text = said.read_text()
    assert "Traceback" not in text
    assert "turborank" not in text
    assert "nanobind" not in text


def check(answers: list[list[object]], expected: str) -> None:
    assert {bits for _, bits in answers} == {expected}
    assert len({process for process, _ in answers}) > 1


def test_gunicorn_with_preload(expected: str, tmp_path: Path) -> None:
    pytest.importorskip("gunicorn", reason="gunicorn is not installed in this environment")
    (tmp_path / "web.py").write_text(LOADED + GUNICORN)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def ask() -> list[object]:
        end = time.monotonic() + PATIENCE
        while True:
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=PATIENCE) as reply:
                    return list(json.load(reply))
            except OSError:
                assert time.monotonic() < end
                time.sleep(0.1)

    command = ("gunicorn", "--preload", "-w", str(WORKERS), "-b", f"127.0.0.1:{port}", "web:app")
    with started(tmp_path, *command):
        answers = [ask()]
        while len(answers) < REQUESTS or len({process for process, _ in answers}) < 2:
            answers.append(ask())
        check(answers, expected)


def test_celery_prefork(expected: str, tmp_path: Path) -> None:
    pytest.importorskip("celery", reason="celery is not installed in this environment")
    (tmp_path / "jobs.py").write_text(LOADED + CELERY)
    for name in ("queue", "control", "results"):
        (tmp_path / name).mkdir()
    client = (
        "import jobs, json\n"
        f"results = [jobs.score.delay() for _ in range({REQUESTS})]\n"
        f"print(json.dumps([one.get(timeout={PATIENCE}) for one in results]))\n"
    )
    command = ("celery", "-A", "jobs", "worker", "-P", "prefork", "-c", str(WORKERS), "-l", "warning")
    with started(tmp_path, *command):
        environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
        asked = subprocess.run(
            [sys.executable, "-c", client], cwd=tmp_path, env=environment, capture_output=True, text=True,
            timeout=2 * PATIENCE,
        )  # fmt: skip
        assert asked.returncode == 0, asked.stderr
        check(json.loads(asked.stdout), expected)
