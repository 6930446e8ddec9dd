"""The scripts of examples/ are run as a user runs them, and their output is checked."""

import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
RUN = {
    "calibrate_threshold.py",
    "distil.sh",
    "evaluate_your_data.py",
    "long_document.py",
    "rank.py",
    "serve_and_call.py",
}


def run(name, capsys, monkeypatch, *arguments):
    """What a script prints, as lines."""
    monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
    monkeypatch.syspath_prepend(str(EXAMPLES))
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    return capsys.readouterr().out.splitlines()


def test_every_script_is_run_here():
    assert {path.name for path in EXAMPLES.iterdir() if path.is_file()} == RUN


def test_rank(capsys, monkeypatch):
    lines = run("rank.py", capsys, monkeypatch, "I have lost my library card")
    assert len(lines) == 3
    assert "I have lost my library card" in lines[0]  # the title of one document is the question itself
    scores = [float(line.split()[1]) for line in lines]
    assert scores == sorted(scores, reverse=True)


def test_a_long_document_is_read_to_its_end_and_its_sentence_is_found(capsys, monkeypatch):
    read, best, *_ = run("long_document.py", capsys, monkeypatch)
    assert int(re.search(r"read ([\d,]+) tokens, cut 0;", read)[1].replace(",", "")) > 8192
    assert "sun valve" in best  # the words of the question


def test_serve_and_call(capsys, monkeypatch):
    pytest.importorskip("starlette", reason="needs pip install 'turborank[serve]'")
    result, tokens = run("serve_and_call.py", capsys, monkeypatch)
    assert result.startswith("document 0 ")  # of bees and bread, the one about the bees' home
    assert re.fullmatch(r"\d+ tokens", tokens)


def test_evaluate_your_data(capsys, monkeypatch, tmp_path):
    pytest.importorskip("bm25s", reason="needs pip install 'turborank[eval]'")
    lines = run("evaluate_your_data.py", capsys, monkeypatch, tmp_path)
    assert [line.split()[0] for line in lines[:2]] == ["BM25", "turborank-embedded-v1"]
    assert (tmp_path / "results" / "report.html").is_file()


def test_calibrate_threshold(capsys, monkeypatch):
    pytest.importorskip("bm25s", reason="its data is the evaluation example's, which needs 'turborank[eval]'")
    [line] = run("calibrate_threshold.py", capsys, monkeypatch, "precision=0.5")
    chosen, *shares = map(float, re.findall(r"\d\.\d+", line.partition(":")[2]))
    assert 0 < chosen < 1
    for share, low, high in (shares[:3], shares[3:]):
        assert 0 <= low <= share <= high <= 1
    assert min(shares[0], shares[3]) > 0


@pytest.mark.slow
def test_distil(tmp_path):
    """Six processes, most of which import torch."""
    pytest.importorskip("torch", reason="needs pip install 'turborank[train]'")
    program = tmp_path / "bin" / "turborank"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -m turborank "$@"\n')
    program.chmod(0o755)
    environment = {**os.environ, "PATH": f"{program.parent}:{os.environ['PATH']}", "STEPS": "4"}
    command = ["bash", str(EXAMPLES / "distil.sh"), str(tmp_path / "work")]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "work" / "my-reranker" / "model.safetensors").is_file()
    assert "3 of 12 documents" in done.stdout
