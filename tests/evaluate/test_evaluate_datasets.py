"""Collections: valid ones are read correctly, malformed ones reported with file and line."""

import gzip
import json
import re
import tracemalloc
from dataclasses import replace
from pathlib import Path

import pytest
from mini import DOCUMENTS, append

from turborank import InputError, UnknownKeyError
from turborank.data.bm25 import bm25_run
from turborank.data.corpus import JsonlCorpus, MemoryCorpus, cut, holder
from turborank.data.dataset_table import PUBLISHED
from turborank.data.datasets import expand, load
from turborank.data.trec import Scored, read_qrels, read_run, write_run
from turborank.evaluate import DATASETS, GROUPS
from turborank.evaluate.measures import means, per_query


def test_a_folder_in_beir_layout(mini: Path) -> None:
    dataset = load(str(mini))
    assert (dataset.name, dataset.split, list(dataset.queries)) == ("mini", "test", ["q1", "q2", "q3"])
    assert dataset.qrels["q1"] == {"d1": 2, "d4": 1}
    assert dataset.corpus.text("d1") == "Tides The moon pulls the sea twice a day."
    assert dataset.corpus.text("d4") == "The sea is salt because rivers carry salt into the sea."
    assert list(dataset.corpus.texts()) == [f"{title} {text}".strip() for title, text in DOCUMENTS.values()]
    assert [dataset.corpus.id_at(place) for place in range(6)] == list(DOCUMENTS)
    assert "d6" in dataset.corpus
    assert "d7" not in dataset.corpus
    assert dataset.notes == ()


def test_the_fingerprint_follows_the_content(mini: Path) -> None:
    before = load(str(mini)).fingerprint
    assert load(str(mini)).fingerprint == before
    path = mini / "corpus.jsonl"
    path.write_text(path.read_text().replace("twice a day", "once a day"))
    assert load(str(mini)).fingerprint != before


BAD = [  # (file, what is appended, what the message must say)
    ("corpus.jsonl", '{"_id": "d7", "text": "no end', r"corpus\.jsonl:7"),
    ("corpus.jsonl", '["d7"]', r"expected a JSON object, got list at .*corpus\.jsonl:7"),
    ("corpus.jsonl", '{"_id": "d7"}', r"field 'text', got nothing at .*corpus\.jsonl:7"),
    ("corpus.jsonl", '{"_id": 7, "text": ""}', r"field '_id', got int at .*corpus\.jsonl:7"),
    ("corpus.jsonl", '{"_id": "d2", "text": "again"}', r"got 'd2' at .*corpus\.jsonl:2 and again at .*corpus\.jsonl:7"),
    ("corpus.jsonl", b'{"_id": "d7", "text": "caf\xe9"}', r"expected UTF-8, got byte 0xe9 at .*corpus\.jsonl:7"),
    ("queries.jsonl", '{"_id": "q2", "text": "again"}', r"each query id once, got 'q2' again at .*queries\.jsonl:5"),
    ("queries.jsonl", "nonsense", r"queries\.jsonl:5"),
    ("queries.jsonl", b"\xff\xfe", r"expected UTF-8, got byte 0xff at .*queries\.jsonl:5"),
    ("qrels/test.tsv", "q1\td1", r"three columns .*test\.tsv:8"),
    ("qrels/test.tsv", "q1\td2\tyes", r"whole number as relevance in the last column, got 'yes' at .*test\.tsv:8"),
    ("qrels/test.tsv", "q1\td2\t1.5", r"whole number as relevance .*test\.tsv:8"),
    (
        "corpus.jsonl",
        r'{"_id": "d\ud83d", "text": ""}',
        r"without lone surrogates, got 'd\\ud83d' at .*corpus\.jsonl:7",
    ),
    ("queries.jsonl", r'{"_id": "\udc00", "text": ""}', r"surrogates, got '\\udc00' at .*queries\.jsonl:5"),
    ("qrels/test.tsv", "q1\td2\t1001", r"relevance between -1000 and 1000, got 1001 at .*test\.tsv:8"),
    ("qrels/test.tsv", "q1\td2\t-99999999999", r"relevance between .* at .*test\.tsv:8"),
    ("qrels/test.tsv", "q1\td1\t1", r"one relevance of 'd1' for 'q1', got 2 and 1 at .*test\.tsv:8"),
    ("qrels/test.tsv", "q1\td9\t1", r"judged document in the corpus of mini, got 'd9' missing"),
    ("qrels/test.tsv", "q9\td1\t1", r"judged query among the queries of mini, got 'q9' without text"),
]


@pytest.mark.parametrize(
    ("file", "line", "message"), BAD, ids=[f"{file}-{number}" for number, (file, *_) in enumerate(BAD)]
)
def test_bad_files_are_named_with_their_line(mini: Path, file: str, line: str | bytes, message: str) -> None:
    append(mini / file, line)
    with pytest.raises(InputError, match=message):
        load(str(mini))


def test_unknown_judged_documents_may_be_kept_and_are_reported(mini: Path) -> None:
    append(mini / "qrels" / "test.tsv", "q1\td9\t1")
    dataset = load(str(mini), keep_unknown=True)
    assert dataset.qrels["q1"]["d9"] == 1
    assert any("judged documents not in the corpus: 1 ('d9')" in note for note in dataset.notes)


def test_repeated_judgements_and_empty_queries_are_reported(mini: Path) -> None:
    append(mini / "qrels" / "test.tsv", "q1\td1\t2")
    append(mini / "qrels" / "test.tsv", "blank\td1\t1")
    append(mini / "queries.jsonl", '{"_id": "blank", "text": "  "}')
    notes = load(str(mini)).notes
    assert any("repeat another: 1;" in note for note in notes)
    assert any("empty queries: 1 ('blank')" in note for note in notes)


def test_queries_without_relevant_documents_are_reported(mini: Path) -> None:
    append(mini / "qrels" / "test.tsv", "unjudged\td2\t0")
    assert any("queries without a relevant document (grade 1 or more): 1;" in note for note in load(str(mini)).notes)


def test_windows_line_ends_a_byte_order_mark_blank_lines_and_trec_qrels(mini: Path) -> None:
    corpus = mini / "corpus.jsonl"
    corpus.write_bytes(b"\xef\xbb\xbf" + corpus.read_bytes().replace(b"\n", b"\r\n\r\n"))
    (mini / "qrels" / "test.tsv").write_text("q1 0 d1 2\r\nq1 0 d4 1\r\n")
    dataset = load(str(mini))
    assert dataset.qrels == {"q1": {"d1": 2, "d4": 1}}
    assert (len(dataset.corpus), dataset.corpus.text("d1")) == (6, "Tides The moon pulls the sea twice a day.")


def test_missing_files_and_splits(mini: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"the split 'dev' .*got test"):
        load(str(mini), split="dev")
    (mini / "queries.jsonl").unlink()
    with pytest.raises(InputError, match=r"got no queries\.jsonl"):
        load(str(mini))
    with pytest.raises(UnknownKeyError, match="did you mean 'scifact'"):
        load("scifakt", data_dir=tmp_path)


def test_a_llamaindex_file(tmp_path: Path) -> None:
    path = tmp_path / "questions.json"
    value = {
        "queries": {"a": "why?"},
        "corpus": {"x": "because", "y": "no"},
        "relevant_docs": {"a": ["x"]},
        "mode": "text",
    }
    path.write_text(json.dumps(value))
    dataset = load(str(path))
    assert (dataset.queries, dataset.qrels, dataset.corpus.text("y")) == ({"a": "why?"}, {"a": {"x": 1}}, "no")
    path.write_text(json.dumps({"queries": {}}))
    with pytest.raises(InputError, match="got no corpus, relevant_docs"):
        load(str(path))
    path.write_text("{")
    with pytest.raises(InputError, match=r"expected JSON, got .*questions\.json:"):
        load(str(path))


def test_a_llamaindex_file_with_an_id_twice_and_a_query_without_answers(tmp_path: Path) -> None:
    path = tmp_path / "questions.json"
    path.write_text('{"queries": {"a": "why?", "a": "how?"}, "corpus": {}, "relevant_docs": {}}')
    with pytest.raises(InputError, match=r"each key once in a JSON object, got 'a' again in .*questions\.json"):
        load(str(path))
    path.write_text(
        '{"queries": {"a": "why?", "b": "how?"}, "corpus": {"x": "so"}, "relevant_docs": {"a": ["x"], "b": []}}'
    )
    dataset = load(str(path))
    assert any("queries without a relevant document (grade 1 or more): 1;" in note for note in dataset.notes)
    run = {"a": [Scored("x", 1.0)], "b": [Scored("x", 1.0)]}
    assert means(per_query(run, dataset.qrels, ["nDCG@10", "hit_rate@1"])) == {"nDCG@10": 0.5, "hit_rate@1": 0.5}


def test_chunks_hold_every_character_once_and_know_their_references() -> None:
    text = "one two three  four five\nsix seven"
    spans = cut(text, words=3)
    assert [text[a:b] for a, b in spans] == ["one two three  ", "four five\nsix ", "seven"]
    assert "".join(text[a:b] for a, b in spans) == text
    place = text.index("three")
    assert holder(spans, place, place + len("three  four f")) == 0  # 7 characters of the first chunk, 6 of the second
    assert holder(spans, place, place + len("three  four fiv")) == 1


def test_counts_of_the_table_are_asserted(mini: Path, tmp_path: Path) -> None:
    mini.rename(tmp_path / "scifact")
    with pytest.raises(
        InputError, match=r"expected scifact with 300 queries, got 3; 5183 documents, got 6; 339 judgements"
    ):
        load("scifact", data_dir=tmp_path)


def test_groups_and_rows() -> None:
    beir = {name.partition("-")[0] if name.startswith("cqadup") else name for name in GROUPS["beir"]}
    assert len(beir) == 19
    assert len(GROUPS["cqadupstack"]) == 12
    assert len(GROUPS["loco"]) == 5
    assert sum(DATASETS[name].queries or 0 for name in GROUPS["cqadupstack"]) == 13_145  # BEIR's table
    assert expand(["loco", "scifact", "loco-qmsum"]) == [*GROUPS["loco"], "scifact"]
    for row in DATASETS.values():
        assert row.files or row.note, row.name
        for file in row.files:
            assert file.url.startswith("https://")
            assert file.md5 is None or re.fullmatch("[0-9a-f]{32}", file.md5)
            assert file.sha256 is None or re.fullmatch("[0-9a-f]{64}", file.sha256)
        if row.group in ("beir", "loco"):
            assert all(file.md5 or file.sha256 for file in row.files), row.name
    assert {figure.value for figure in PUBLISHED["scifact"]} == {0.6789, 0.9253, 0.739}


def test_a_corpus_far_larger_than_what_is_kept_of_it(tmp_path: Path) -> None:
    path = tmp_path / "corpus.jsonl"
    filler = "salt " * 2000
    with path.open("w") as file:
        for number in range(4000):
            file.write(json.dumps({"_id": f"document-{number}", "title": "", "text": f"{number} {filler}"}) + "\n")
    assert path.stat().st_size > 40_000_000
    tracemalloc.start()
    corpus = JsonlCorpus(path)
    total = sum(len(text) for text in corpus.texts())
    assert corpus.text("document-3999").startswith("3999 salt")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert total > 40_000_000 - 4000 * 60
    assert peak < 2_000_000


def test_ids_with_equal_hashes_are_told_apart(mini: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("turborank.data.corpus._hash", lambda doc_id: 7)
    corpus = JsonlCorpus(mini / "corpus.jsonl")
    assert [corpus.text(name) for name in DOCUMENTS] == list(corpus.texts())
    assert "d9" not in corpus
    append(mini / "corpus.jsonl", '{"_id": "d3", "text": ""}')
    with pytest.raises(InputError, match="'d3'"):
        JsonlCorpus(mini / "corpus.jsonl")


def test_a_corpus_in_memory() -> None:
    corpus = MemoryCorpus({"a": "x", "b": "y"})
    assert (len(corpus), corpus.text("b"), corpus.id_at(1), list(corpus.texts())) == (2, "y", "b", ["x", "y"])
    assert corpus.fingerprint != MemoryCorpus({"a": "x", "b": "z"}).fingerprint


BAD_RUNS = [
    ("q1 Q0 d1 1 2.5", r"six columns .*got 5 at .*run\.trec:2"),
    ("q1 Q0 d1 1 nan tag", r"finite score in column five, got 'nan' at .*run\.trec:2"),
    ("q1 Q0 d1 1 high tag", r"got 'high' at .*run\.trec:2"),
    (b"q1 Q0 \xe9 2 1.5 tag", r"expected UTF-8, got byte 0xe9 at .*run\.trec:2"),
    ("q1 Q0 d2 2 1.5 tag", r"each document once per query, got 'd2' again at .*run\.trec:2"),
]


@pytest.mark.parametrize(("line", "message"), BAD_RUNS)
def test_bad_runs_are_named_with_their_line(tmp_path: Path, line: str | bytes, message: str) -> None:
    path = tmp_path / "run.trec"
    path.write_text("q1 Q0 d2 1 3.5 tag\n")
    append(path, line)
    with pytest.raises(InputError, match=message):
        read_run(path)


def test_a_run_survives_the_file_and_may_be_packed(tmp_path: Path) -> None:
    run = {"q1": [Scored("b\u00a0c", 0.1), Scored("a", -1.25e-9)], "q2": [Scored("z", 7.0)]}
    write_run(tmp_path / "run.trec", run, "a model")
    text = (tmp_path / "run.trec").read_text()
    assert text.splitlines()[2] == "q2 Q0 z 1 7 a_model"
    (tmp_path / "run.trec.gz").write_bytes(gzip.compress(text.encode()))
    assert read_run(tmp_path / "run.trec") == read_run(tmp_path / "run.trec.gz") == run
    with pytest.raises(InputError, match="white space"):
        write_run(tmp_path / "bad.trec", {"q 1": [Scored("a", 1.0)]}, "tag")
    assert not (tmp_path / "bad.trec").exists()


def test_qrels_without_a_header(tmp_path: Path) -> None:
    path = tmp_path / "test.tsv"
    path.write_text("q1\td1\t1\nq1\td1\t1\n")
    assert read_qrels(path) == ({"q1": {"d1": 1}}, 1)
    path.write_text("query-id\tcorpus-id\tscore\n")
    with pytest.raises(InputError, match="expected judgements, got none"):
        read_qrels(path)


def test_where_queries_are_documents_a_query_does_not_find_itself(mini: Path, tmp_path: Path) -> None:
    append(mini / "corpus.jsonl", '{"_id": "q2", "text": "what makes dough rise?"}')
    own = replace(load(str(mini)), queries_are_documents=True)
    plain = load(str(mini))
    assert [s.doc_id for s in bm25_run(plain, 2, tmp_path / "plain")[0]["q2"]] == ["q2", "d2"]
    assert [s.doc_id for s in bm25_run(own, 2, tmp_path / "own")[0]["q2"]] == ["d2"]


@pytest.mark.parametrize("packed", [gzip.compress(b"q1 Q0 d1 1 2.5 tag\n")[:-9], b"q1 Q0 d1 1 2.5 tag\n"])
def test_a_damaged_gzip_file_is_named(tmp_path: Path, packed: bytes) -> None:
    path = tmp_path / "run.trec.gz"
    path.write_bytes(packed)
    with pytest.raises(InputError, match=r"expected a complete gzip file, got .* at .*run\.trec\.gz"):
        read_run(path)


BAD_LLAMAINDEX = [
    ("5", "got no queries, corpus, relevant_docs in"),
    ('{"queries": {"a": "why?"}, "corpus": {"x": "so"}, "relevant_docs": {}}', "judged queries in questions, got none"),
    ('{"queries": {}, "corpus": {"\\ud83d": "so"}, "relevant_docs": {}}', r"surrogates, got '\\ud83d' at .*questions"),
]


@pytest.mark.parametrize(("text", "message"), BAD_LLAMAINDEX)
def test_bad_llamaindex_files(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "questions.json"
    path.write_text(text)
    with pytest.raises(InputError, match=message):
        load(str(path))


def test_a_llamaindex_file_has_no_splits(tmp_path: Path) -> None:
    path = tmp_path / "questions.json"
    path.write_text('{"queries": {"a": "why?"}, "corpus": {"x": "so"}, "relevant_docs": {"a": ["x"]}}')
    with pytest.raises(InputError, match=r"expected no split of a LlamaIndex file.* got 'nosuch'"):
        load(str(path), split="nosuch")
