"""The command ``turborank evaluate``."""

from pathlib import Path

import pytest
from helpers import write_checkpoint

from turborank.cli.main import run

pytest.importorskip("bm25s")


def test_a_table_and_a_report(mini: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = write_checkpoint(tmp_path / "tiny")
    out = tmp_path / "out"
    assert run(["evaluate", str(mini), "-m", str(model), "--engine", "reference", "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    table = {line.split()[0]: line.split()[-1] for line in printed.splitlines()[:3]}
    assert table.keys() == {"system", "BM25", "tiny"}
    assert f"| tiny | {table['tiny']} |" in (out / "report.md").read_text()
    assert str(out / "report.html") in printed


def test_parts_from_the_command(mini: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = write_checkpoint(tmp_path / "tiny")
    rest = ["-m", str(model), "--engine", "reference", "--out", str(tmp_path / "out")]
    assert run(["evaluate", str(mini), "--shard", "1/2", *rest]) == 0
    assert (tmp_path / "out" / "mini" / "tiny" / "run.1-of-2.trec").exists()
    assert "without --shard" in capsys.readouterr().out
    assert run(["evaluate", str(mini), "--shard", "1-2", *rest]) == 2
    assert "expected k/n" in capsys.readouterr().err


def test_the_datasets_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["evaluate", "--list"]) == 0
    printed = capsys.readouterr().out
    assert "scifact" in printed
    assert "cqadupstack" in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give a dataset"),
        (["scifakt", "--models", "bm25"], "did you mean 'scifact'"),
        (["robust04", "--models", "bm25", "--offline"], "no public download"),
        (["scifact", "--models", "bm25", "--offline"], "thakur/BEIR/datasets/scifact.zip"),
    ],
)
def test_errors_are_one_line(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    places = ["--out", str(tmp_path / "out"), "--data-dir", str(tmp_path / "data")]
    assert run(["evaluate", *arguments, *places]) == 2
    said = capsys.readouterr().err.strip()
    assert message in said
    assert "\n" not in said
