"""Runs and judgements as other tools read and write them: trec_eval (pytrec_eval) and the ir_measures command."""

import csv
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import write_checkpoint
from mini import QRELS

from turborank import Reranker
from turborank.data.trec import read_qrels, read_run
from turborank.evaluate import EvaluateOptions, evaluate

pytest.importorskip("bm25s")
pytrec_eval = pytest.importorskip("pytrec_eval")
ir_measures = pytest.importorskip("ir_measures")

# Our names, the same measures as the ir_measures command calls them.
MEASURES = {"nDCG@10": "nDCG@10", "MRR@10": "RR@10", "MAP": "AP", "Success@1": "Success@1", "R@100": "R@100"}


@pytest.fixture
def folder(mini: Path, tmp_path: Path) -> Path:
    """Results of a random model, and judgements in TREC's four columns."""
    model = Reranker(write_checkpoint(tmp_path / "tiny"), engine="reference")
    evaluate([str(mini)], [model], EvaluateOptions(measures=list(MEASURES)), out=tmp_path / "out")
    (tmp_path / "out" / "qrels.trec").write_text("".join(f"{query} 0 {doc} {grade}\n" for query, doc, grade in QRELS))
    return tmp_path / "out"


def test_the_ir_measures_command_gives_our_figures(folder: Path) -> None:
    for system in ("tiny", "first-stage"):
        files = [str(folder / "qrels.trec"), str(folder / "mini" / system / "run.trec")]
        command = [sys.executable, "-m", "ir_measures", "--by_query", "--no_summary", "--places", "9"]
        done = subprocess.run([*command, *files, *MEASURES.values()], capture_output=True, text=True, check=True)
        theirs = {tuple(line.split()[:2]): float(line.split()[2]) for line in done.stdout.splitlines()}
        with (folder / "mini" / system / "per_query.csv").open() as file:
            rows = list(csv.DictReader(file))
        assert len(theirs) == len(rows) * len(MEASURES)
        for row in rows:
            for ours, name in MEASURES.items():
                assert float(row[ours]) == pytest.approx(theirs[row["query_id"], name], abs=1e-5), (system, row, name)


def test_trec_eval_reads_our_runs_and_we_read_its(folder: Path, mini: Path, tmp_path: Path) -> None:
    path = folder / "mini" / "tiny" / "run.trec"
    with path.open() as file:
        theirs = pytrec_eval.parse_run(file)
    assert theirs == {query: {s.doc_id: s.score for s in documents} for query, documents in read_run(path).items()}
    with (folder / "qrels.trec").open() as file:
        assert pytrec_eval.parse_qrel(file) == read_qrels(folder / "qrels.trec")[0]
    # the same run, written by another tool: shuffled, tabs, ranks from 0 and wrong
    lines = [f"{q}\tQ0\t{d}\t0\t{score!r}\tother\n" for q, docs in theirs.items() for d, score in docs.items()]
    (tmp_path / "other.trec").write_text("".join(reversed(lines)))
    assert read_run(tmp_path / "other.trec") == read_run(path)


def test_our_run_is_a_first_stage_again(folder: Path, mini: Path, tmp_path: Path) -> None:
    path = folder / "mini" / "tiny" / "run.trec"
    found = evaluate([str(mini)], ["bm25"], EvaluateOptions(run=path, measures=list(MEASURES)), out=tmp_path / "again")
    with (folder / "mini" / "tiny" / "per_query.csv").open() as file:
        for row in csv.DictReader(file):
            for name, values in found.results[0].systems[0].values.items():
                assert values[row["query_id"]] == pytest.approx(float(row[name]), abs=1e-5)
