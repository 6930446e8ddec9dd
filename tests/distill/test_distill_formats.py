"""Each format, read from a file as its library writes it; malformed files are reported with file and line."""

import json
from pathlib import Path

import pytest
from little import write_lines

from turborank.distill.formats import FORMATS, Example, JudgedDocument, beir, examples, recognise
from turborank.errors import InputError

QUERY = "who sleeps?"


def test_pairs(tmp_path):
    rows = [{"query": QUERY, "passage": "bees"}, {"anchor": QUERY, "positive": "cats", "source": "x"}]
    assert list(examples(write_lines(tmp_path / "a.jsonl.gz", rows))) == [
        Example(QUERY, (JudgedDocument("bees", 1),)),
        Example(QUERY, (JudgedDocument("cats", 1),)),
    ]


def test_pairs_with_a_label_or_a_score(tmp_path):
    rows = [
        {"query": QUERY, "passage": "bees", "label": 0},
        {"query": QUERY, "passage": "cats", "label": 2.0},
        {"query": QUERY, "passage": "dogs", "score": -1.5},
        {"query": QUERY, "passage": "elks", "score": 3, "label": 1},
    ]
    found = [one.documents[0] for one in examples(write_lines(tmp_path / "a.jsonl", rows))]
    assert [(one.label, one.score) for one in found] == [(0, None), (2, None), (None, -1.5), (1, 3.0)]


def test_triplets_in_the_order_of_their_numbers(tmp_path):
    row = {"anchor": QUERY, "positive": "bees", "negative_10": "k", "negative_2": "b", "negative_1": "a"}
    [found] = examples(write_lines(tmp_path / "a.jsonl", [row]))
    assert found == Example(
        QUERY, (JudgedDocument("bees", 1), JudgedDocument("a", 0), JudgedDocument("b", 0), JudgedDocument("k", 0))
    )
    [found] = examples(write_lines(tmp_path / "b.jsonl", [{"query": QUERY, "positive": "bees", "negative": "a"}]))
    assert found == Example(QUERY, (JudgedDocument("bees", 1), JudgedDocument("a", 0)))


def test_labelled_lists(tmp_path):
    rows = [
        {"query": QUERY, "docs": ["a", "b", "c"], "labels": [0, 1, 3]},
        {"query": QUERY, "documents": ["a", "b"], "scores": [0.25, -4]},
        {"query": QUERY, "documents": ["a", "b"], "labels": [True, False], "scores": [1.0, 0.5]},
    ]
    found = list(examples(write_lines(tmp_path / "a.jsonl", rows)))
    assert found[0].documents == (JudgedDocument("a", 0), JudgedDocument("b", 1), JudgedDocument("c", 3))
    assert found[1].documents == (JudgedDocument("a", None, 0.25), JudgedDocument("b", None, -4.0))
    assert found[2].documents == (JudgedDocument("a", 1, 1.0), JudgedDocument("b", 0, 0.5))


def test_flagembedding(tmp_path):
    row = {"query": QUERY, "pos": ["a"], "neg": ["b", "c"], "pos_scores": [9.5], "neg_scores": [1, -2.5], "prompt": "p"}
    [found] = examples(write_lines(tmp_path / "a.jsonl", [row]))
    assert found.documents == (JudgedDocument("a", 1, 9.5), JudgedDocument("b", 0, 1.0), JudgedDocument("c", 0, -2.5))
    row = {"query": QUERY, "pos": ["a"], "neg": ["b"], "pos_scores": None}
    [found] = examples(write_lines(tmp_path / "b.jsonl", [row]))
    assert found.documents == (JudgedDocument("a", 1), JudgedDocument("b", 0))


@pytest.mark.parametrize("as_text", [False, True], ids=["lists", "lists in strings"])
def test_pylate(tmp_path, as_text):
    """PyLate's tables store ids as numbers, and lists sometimes as text."""
    row = {"query_id": 7, "document_ids": [3, 1], "scores": [0.9, 0.125]}
    if as_text:
        row = {name: json.dumps(value) if isinstance(value, list) else value for name, value in row.items()}
    write_lines(tmp_path / "train.jsonl", [row])
    write_lines(tmp_path / "queries.jsonl.gz", [{"query_id": 7, "text": QUERY}])
    write_lines(tmp_path / "documents.jsonl", [{"document_id": n, "text": f"text {n}"} for n in range(5)])
    assert recognise(tmp_path) == "pylate"
    [found] = examples(tmp_path)
    assert found == Example(
        QUERY, (JudgedDocument("text 3", None, 0.9, "3"), JudgedDocument("text 1", None, 0.125, "1")), "7"
    )


def collection(folder: Path) -> Path:
    write_lines(folder / "corpus.jsonl", [{"_id": f"d{n}", "title": "T", "text": f"text {n}"} for n in range(4)])
    write_lines(folder / "queries.jsonl", [{"_id": "a", "text": QUERY}, {"_id": "b", "text": "who runs?"}])
    write_lines(folder / "qrels" / "train.tsv", ["query-id\tcorpus-id\tscore", "a\td1\t2", "a\td3\t-1"])
    return folder


def test_beir_with_and_without_a_run(tmp_path):
    folder = collection(tmp_path / "mine")
    assert recognise(folder) == "beir"
    labelled = (JudgedDocument("T text 1", 2, None, "d1"), JudgedDocument("T text 3", 0, None, "d3"))
    assert list(examples(folder)) == [Example(QUERY, labelled, "a"), Example("who runs?", (), "b")]
    lines = ["a Q0 d0 1 9.5 x", "a Q0 d2 2 8.5 x", "b Q0 d2 1 1.5 x"]
    run = write_lines(tmp_path / "first.trec", lines)
    assert [tuple(one.id for one in found.documents) for found in beir(folder, run)] == [
        ("d1", "d3", "d0", "d2"),
        ("d2",),
    ]
    assert [len(found.documents) for found in beir(folder, run, depth=1)] == [3, 1]


def test_an_unknown_format_is_answered_with_the_table(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", ["", {"question": "q", "answer": "a"}])
    with pytest.raises(InputError, match=r"got question, answer at .*a.jsonl:2") as fault:
        recognise(path)
    assert all(row.fields in str(fault.value) for row in FORMATS.values() if not row.folder)
    with pytest.raises(InputError, match="expected the files of a known format"):
        recognise(tmp_path)


GOOD = {
    "pairs": {"query": "q", "passage": "p"},
    "triplets": {"query": "q", "positive": "p", "negative": "n"},
    "lists": {"query": "q", "documents": ["a", "b"], "labels": [0, 1]},
    "flagembedding": {"query": "q", "pos": ["a"], "neg": ["b"]},
}
BAD = [
    ("pairs", "{", "expected one JSON object on the line"),
    ("pairs", "[1]", "expected a JSON object, got list"),
    ("pairs", {"query": 1, "passage": "p"}, "expected a string in the field 'query', got int"),
    ("pairs", {"query": "q"}, "expected a string in the field 'passage', got nothing"),
    ("pairs", {"query": "q", "passage": "p", "label": 0.5}, "expected a whole number in the field 'label', got 0.5"),
    ("pairs", {"query": "q", "passage": "p", "score": "1"}, "expected a finite number in the field 'score', got '1'"),
    (
        "pairs",
        '{"query": "q", "passage": "p", "score": NaN}',
        "expected one JSON object on the line, got NaN",
    ),
    ("triplets", {"query": "q", "positive": "p", "negative": ["n"]}, "expected a string in the field 'negative'"),
    ("lists", {"query": "q", "documents": "a"}, "expected a list in the field 'documents', got str"),
    ("lists", {"query": "q", "documents": ["a", 2]}, "expected strings in the field 'documents', got int"),
    ("lists", {"query": "q", "documents": ["a"], "labels": [1, 0]}, "expected 1 values in the field 'labels', got 2"),
    ("flagembedding", {"query": "q", "pos": ["a"]}, "expected a list in the field 'neg', got NoneType"),
    ("flagembedding", {"query": "q", "pos": [], "neg": ["b"], "neg_scores": [None]}, None),
]


@pytest.mark.parametrize(("kind", "row", "fault"), [case for case in BAD if case[2]])
def test_a_malformed_line_is_named(tmp_path, kind, row, fault):
    path = write_lines(tmp_path / "a.jsonl", [GOOD[kind], "", row])
    assert recognise(path) == kind
    with pytest.raises(InputError) as raised:
        list(examples(path))
    assert fault in str(raised.value)
    assert str(raised.value).partition(";")[0].endswith(f"at {path}:3")


def test_every_format_of_files_has_its_faults():
    assert {kind for kind, *_ in BAD} == {name for name, row in FORMATS.items() if not row.folder}


def test_unknown_ids_are_named(tmp_path):
    folder = collection(tmp_path / "mine")
    with pytest.raises(InputError, match=r"got 'd9' missing at .*first.trec"):
        list(beir(folder, write_lines(tmp_path / "first.trec", ["a Q0 d9 1 1.0 x"])))
    with pytest.raises(InputError, match=r"got 'z' missing at .*first.trec"):
        list(beir(folder, write_lines(tmp_path / "first.trec", ["z Q0 d1 1 1.0 x"])))
    write_lines(folder / "qrels" / "train.tsv", ["a\td9\t1"])
    with pytest.raises(InputError, match=r"got 'd9' missing at .*train.tsv"):
        list(examples(folder))
    write_lines(tmp_path / "kd" / "train.jsonl", [{"query_id": "q", "document_ids": ["z"], "scores": [1]}])
    write_lines(tmp_path / "kd" / "queries.jsonl", [{"query_id": "q", "text": QUERY}])
    write_lines(tmp_path / "kd" / "documents.jsonl", [{"document_id": "d", "text": "t"}])
    with pytest.raises(InputError, match=r"expected the text of every id, got 'z' without at .*train.jsonl:1"):
        list(examples(tmp_path / "kd"))
