"""Suspected false negatives, on pools computed by hand."""

import csv

import numpy as np
import pytest
from little import write_lines

from turborank.cli import main
from turborank.distill import scores
from turborank.distill.folder import TrainingFolder

# query, document, a teacher's score, label or None
PLACES = [
    ("a", "d0", 5.0, 1), ("a", "d1", 7.0, None), ("a", "d2", 5.5, None), ("a", "d3", 9.0, 0), ("a", "d4", 1.0, None),
    ("b", "d0", 2.0, 2), ("b", "d1", 6.0, 1), ("b", "d2", 4.0, None), ("b", "d3", 2.0, None),
    ("c", "d0", 1.0, None), ("c", "d4", 2.0, None),
]  # fmt: skip


@pytest.fixture
def folder(tmp_path):
    lists = tmp_path / "lists"
    write_lines(lists / "corpus.jsonl", [{"_id": f"d{n}", "text": f"text\t{n}"} for n in range(5)])
    rows = [{"_id": name, "text": f"query {name}", "source": source} for name, source in zip("abc", "xxy", strict=True)]
    write_lines(lists / "queries.jsonl", rows)
    write_lines(lists / "candidates.trec", [f"{q} Q0 {d} 1 1.0 t" for q, d, *_ in PLACES])
    write_lines(lists / "qrels" / "train.tsv", [f"{q}\t{d}\t{label}" for q, d, _, label in PLACES if label is not None])
    loaded = TrainingFolder.load(lists)
    loaded.write_scores("t", np.array([score for *_, score, _ in PLACES], np.float32), {})
    return loaded


@pytest.mark.parametrize(
    ("margin", "expected"),
    [
        (0.0, {("a", "d1"), ("a", "d2"), ("b", "d2")}),  # d3 of a was judged; d3 of b is level; c has no label
        (0.5, {("a", "d1"), ("b", "d2")}),
        (1.75, {("a", "d1"), ("b", "d2")}),
        (2.0, set()),
        (-0.5, {("a", "d1"), ("a", "d2"), ("b", "d2"), ("b", "d3")}),
    ],
)
def test_suspects_by_hand(folder, margin, expected):
    found = scores.find_suspects(folder, folder.scores("t"), margin)
    assert {(q, d) for (q, d, *_), one in zip(PLACES, found, strict=True) if one} == expected


def test_the_summary_by_hand(folder):
    found = scores.find_suspects(folder, folder.scores("t"), 0.0)
    assert scores.suspect_summaries(folder, found) == [scores.SuspectSummary("x", 2, 2, 3, 3 + 2)]


def test_the_command_writes_a_table_with_the_largest_difference_first(folder, capsys):
    assert main.run(["distill", "suspects", str(folder.path), "-t", "t:2", "--margin", "0"]) == 0
    out = capsys.readouterr().out
    assert "100.0%" in out
    assert "60.0%" in out
    text = (folder.path / "suspects.tsv").read_text(encoding="utf-8")
    rows = list(csv.DictReader(text.splitlines(), delimiter="\t"))
    found = [(row["query_id"], row["labelled_id"], row["suspect_id"], float(row["difference"])) for row in rows]
    assert found == [("a", "d0", "d1", 4.0), ("b", "d0", "d2", 4.0), ("a", "d0", "d2", 1.0)]
    assert rows[0]["suspect_text"] == "text 1"  # a tab would be a column
    assert main.run(["distill", "suspects", str(folder.path), "-t", "nobody"]) == 2
    assert "expected the scores of 'nobody'" in capsys.readouterr().err
