"""Every reader treats the peculiarities of other programs' files alike: the table of docs/evaluation.md."""

import gzip
import io
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from turborank.cli import documents
from turborank.data import datasets, trec
from turborank.data.corpus import JsonlCorpus
from turborank.data.files import RowReader, read_records
from turborank.distill import formats
from turborank.errors import InputError
from turborank.evaluate import calibrate


def rows(path: Path) -> list[dict[str, Any]]:
    return [row for _, row in RowReader(path)]


def corpus(path: Path) -> list[str]:
    found = JsonlCorpus(path)
    texts = [found.text(found.id_at(place)) for place in range(len(found))]
    assert texts == list(found.texts())
    return texts


def named(path: Path) -> list[tuple[str, str]]:
    found = documents.read([str(path)], io.BytesIO())
    return [("" if one.name == str(path) else one.name.rpartition(":")[2], one.text) for one in found]


class Reader(NamedTuple):
    name: str  # of the file
    read: Callable[[Path], Any]
    lines: tuple[str, ...]  # a valid file, with a text of two words in its second line
    packed: bool = True  # whether it reads .gz


JSONL = ('{"_id": "a", "title": "", "text": "red"}', '{"_id": "b", "title": "old", "text": "blue bee"}')
CSV = ("_id,title,text", "a,,red", 'b,old,"blue bee"')
JUDGED = ('{"query": "q", "document": "red", "label": 0}', '{"query": "q", "document": "blue bee", "label": 1}')
PAIRS = ('{"query": "q", "passage": "red"}', '{"query": "q", "passage": "blue bee"}')
READERS = {
    "qrels of BEIR": Reader("test.tsv", trec.read_qrels, ("query-id\tcorpus-id\tscore", "q\ta\t1", "q\tb\t0")),
    "qrels of TREC": Reader("qrels", trec.read_qrels, ("q 0 a 1", "q 0 b 0")),
    "a run": Reader("run.trec", trec.read_run, ("q Q0 a 1 2.5 tag", "q Q0 b 2 1.5 tag")),
    "a corpus": Reader("corpus.jsonl", corpus, JSONL, packed=False),
    "records": Reader("records.jsonl", lambda path: [row for _, row in read_records(path)], JSONL),
    "rows of JSON": Reader("rows.jsonl", rows, JSONL),
    "rows of CSV": Reader("rows.csv", rows, CSV),
    "rows of TSV": Reader("rows.tsv", rows, tuple(line.replace(",", "\t") for line in CSV)),
    "training data": Reader("train.jsonl", lambda path: list(formats.examples(path)), PAIRS),
    "judged pairs": Reader("judged.jsonl", calibrate.read_judged, JUDGED),
    "judged pairs of CSV": Reader("judged.csv", calibrate.read_judged, ("query,document,label", "q,red,0", "q,blue,1")),
    "documents of JSON": Reader("documents.jsonl", named, JSONL),
    "documents of CSV": Reader("documents.csv", named, CSV),
    "a text": Reader("text.md", named, ("red", "blue bee")),
}
EACH = pytest.mark.parametrize("name", READERS)
JSON = pytest.mark.parametrize("name", [name for name, reader in READERS.items() if ".jsonl" in reader.name])
TABLES = pytest.mark.parametrize("name", [name for name, one in READERS.items() if one.name.endswith((".csv", ".tsv"))])
PACKED = pytest.mark.parametrize("name", [name for name, reader in READERS.items() if reader.packed])


def write(folder: Path, name: str, data: bytes) -> Path:
    path = folder / name
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def plainly(folder: Path, reader: Reader) -> Any:
    """The reader's result for its valid file."""
    (folder / "valid").mkdir()
    return reader.read(write(folder / "valid", reader.name, "\n".join([*reader.lines, ""]).encode()))


def refused(reader: Reader, path: Path) -> str:
    with pytest.raises(InputError) as caught:
        reader.read(path)
    return str(caught.value)


@EACH
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("last", [True, False])
def test_line_ends_and_byte_order_marks_are_no_text(tmp_path, name, mark, end, last):
    reader = READERS[name]
    data = mark + end.join([*reader.lines, ""] if last else reader.lines).encode()
    found, expected = reader.read(write(tmp_path, reader.name, data)), plainly(tmp_path, reader)
    if name == "a text":  # the one format whose line ends are the document's own
        [(_, found)], [(_, expected)] = found, expected
        found, expected = found.replace("\r\n", "\n").rstrip("\n"), expected.rstrip("\n")
    assert found == expected


@EACH
def test_blank_lines_are_skipped_behind_a_byte_order_mark_too(tmp_path, name):
    reader = READERS[name]
    if name in ("a text", "qrels of BEIR"):  # a blank line is text; a header is the first line
        return
    data = "\ufeff\n" + "\n\n".join(reader.lines) + "\n\n"
    found, expected = reader.read(write(tmp_path, reader.name, data.encode())), plainly(tmp_path, reader)
    assert found == expected


@PACKED
def test_a_packed_file_is_the_file(tmp_path, name):
    reader = READERS[name]
    data = "\n".join([*reader.lines, ""]).encode()
    assert reader.read(write(tmp_path, f"{reader.name}.gz", data)) == plainly(tmp_path, reader)


@PACKED
@pytest.mark.parametrize("kept", [0.3, 0.6, 0.9])
def test_a_packed_file_that_is_cut_short_is_refused_with_its_place(tmp_path, name, kept):
    reader = READERS[name]
    many = {  # enough of them that lines come out before the cut
        "qrels of BEIR": lambda n: f"q{n}\ta\t1", "qrels of TREC": lambda n: f"q{n} 0 a 1",
        "a run": lambda n: f"q Q0 d{n} 1 {n} tag",
    }.get(name, lambda n: reader.lines[-1])  # fmt: skip
    data = "\n".join([*reader.lines, *(many(n) for n in range(3000)), ""]).encode()
    path = write(tmp_path, f"{reader.name}.gz", data)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * kept)])
    text = refused(reader, path)
    assert "expected a complete gzip file" in text
    assert re.search(rf"{re.escape(str(path))}:(\d+| .* in line \d+)$", text)
    path.write_bytes(whole[:12] + b"\xff" * 20 + whole[32:])
    assert str(path) in refused(reader, path)


def test_the_place_of_a_cut_is_the_line(tmp_path):
    path = write(tmp_path, "run.trec.gz", b"".join(b"q Q0 d%d 1 %d tag\n" % (n, n * 7919 % 1000) for n in range(9999)))
    path.write_bytes(path.read_bytes()[:-9])  # the checksum and a byte: all lines but the last come out
    text = refused(READERS["a run"], path)
    line = int(text.rpartition(":")[2])
    assert 9000 < line <= 10_000


@EACH
def test_what_is_not_utf_8_is_refused_with_its_line(tmp_path, name):
    reader = READERS[name]
    data = "\n".join(reader.lines).encode()
    broken = data[:-2] + b"\xe9" + data[-2:]
    text = refused(reader, write(tmp_path, reader.name, broken))
    assert "0xe9" in text
    assert f":{len(reader.lines)}" in text or f"line {len(reader.lines)}" in text


@JSON
@pytest.mark.parametrize("value", ["NaN", "Infinity", "-Infinity", "1e999", "9" * 5000, "[" * 100_000])
def test_what_json_has_no_number_for_is_refused_with_its_line(tmp_path, name, value):
    reader = READERS[name]
    first, second = reader.lines
    path = write(tmp_path, reader.name, f'{first}\n{second[:-1]}, "more": {value}}}\n'.encode())
    text = refused(reader, path)
    assert f"{path}:2" in text
    assert len(text) < 500


@JSON
def test_a_cut_line_of_json_is_refused_with_its_line(tmp_path, name):
    reader = READERS[name]
    path = write(tmp_path, reader.name, f"{reader.lines[0]}\n{reader.lines[1][:-3]}".encode())
    assert f"{path}:2" in refused(reader, path)


@TABLES
def test_ragged_rows_and_open_quotes_are_refused_with_their_line(tmp_path, name):
    reader = READERS[name]
    if name == "qrels of BEIR":
        return
    delimiter = "\t" if reader.name.endswith(".tsv") else ","
    for row in (delimiter.join("abcde"), "a", f'a{delimiter}"b{delimiter}c'):
        path = write(tmp_path, reader.name, f"{reader.lines[0]}\n{reader.lines[1]}\n{row}\n".encode())
        assert f"{path}:3" in refused(reader, path)


# Titles: null, empty and absent are the same ---------------------------------------------------------------------

TITLES = {"null": ', "title": null', "empty": ', "title": ""', "absent": ""}


@pytest.mark.parametrize("title", TITLES)
@pytest.mark.parametrize("name", ["a corpus", "documents of JSON"])
def test_a_document_without_title_is_its_text(tmp_path, name, title):
    reader = READERS[name]
    found = reader.read(write(tmp_path, reader.name, f'{{"_id": "a", "text": "red"{TITLES[title]}}}\n'.encode()))
    assert [one if isinstance(one, str) else one[1] for one in found] == ["red"]


def test_a_table_has_no_other_null(tmp_path):
    assert named(write(tmp_path, "a.csv", b"title,text\n,red\nold,\n")) == [("2", "red"), ("3", "old")]
    judged = calibrate.read_judged(write(tmp_path, "b.csv", b"query,title,text,label\nq,,red,1\nq,,blue,0\n"))
    assert [pair.document for pair, _ in judged] == ["red", "blue"]


def test_a_null_text_is_refused_with_its_line(tmp_path):
    for name in ("a corpus", "documents of JSON", "training data"):
        reader = READERS[name]
        line = '{"_id": "a", "query": "q", "passage": null, "text": null, "title": null}'
        path = write(tmp_path, reader.name, f"{reader.lines[0]}\n{line}\n".encode())
        assert f"{path}:2" in refused(reader, path), name


# Grades -----------------------------------------------------------------------------------------------------------

GRADES = {"1": 1, "1.0": 1, "0.0": 0, "2.": 2, "-1": -1, "-1.0": -1, "+3": 3, "1000": 1000, "-1000": -1000}
NO_GRADES = ("0.5", "1.5", "nan", "inf", "1e0", "1_0", "x", "", "1,0", "٣", "1001", "-1001", "99999999999")
FORMS = {"BEIR": "q\ta\t{}", "TREC": "q 0 a {}"}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("text", GRADES)
def test_a_grade_is_a_whole_number_however_it_is_written(tmp_path, form, text):
    path = write(tmp_path, "test.tsv", (FORMS[form].format(text) + "\n").encode())
    assert trec.read_qrels(path) == ({"q": {"a": GRADES[text]}}, 0)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("text", NO_GRADES)
def test_no_other_grade_is_read(tmp_path, form, text):
    path = write(tmp_path, "test.tsv", ("q\tb\t1\n" + FORMS[form].format(text) + "\n").encode())
    with pytest.raises(InputError, match=f"{path.name}:2"):
        trec.read_qrels(path)


@pytest.mark.parametrize(
    ("label", "grade"), [("1", 1), ("1.0", 1), ("-1", 0), ("true", 1), ("0.5", None), ('"1"', None)]
)
def test_a_label_of_training_data_is_a_whole_number(tmp_path, label, grade):
    path = write(tmp_path, "a.jsonl", f'{{"query": "q", "passage": "p", "label": {label}}}\n'.encode())
    if grade is None:
        with pytest.raises(InputError, match=r"whole number.*a\.jsonl:1"):
            list(formats.examples(path))
    else:
        [example] = formats.examples(path)
        assert [one.label for one in example.documents] == [grade]


@pytest.mark.parametrize("label", ["nan", "inf", "x", "[]"])
def test_a_judgement_to_calibrate_by_is_a_finite_number(tmp_path, label):
    path = write(tmp_path, "a.csv", f"query,document,label\nq,d,0.5\nq,e,{label}\n".encode())
    with pytest.raises(InputError, match=r"finite number.*a\.csv:3"):
        calibrate.read_judged(path)


# Judgements of what is not there -----------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "qrels").mkdir()
    write(tmp_path, "corpus.jsonl", "\n".join(JSONL).encode())
    write(tmp_path, "queries.jsonl", b'{"_id": "q1", "text": "which bee"}\n')
    return tmp_path


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("q2\ta\t1", "expected every judged query among the queries of .*, got 'q2' without text at .*test.tsv:4"),
        ("q1\tc\t1", "expected every judged document in the corpus of .*, got 'c' missing at .*test.tsv:4"),
    ],
)
def test_a_judgement_of_what_has_no_text_is_refused_with_its_line(folder, line, message):
    path = folder / "qrels" / "test.tsv"
    path.write_text(f"query-id\tcorpus-id\tscore\nq1\ta\t1\nq1\tb\t0\n{line}\n")
    with pytest.raises(InputError, match=message):
        datasets.load(str(folder))
    path.rename(folder / "qrels" / "train.tsv")
    with pytest.raises(InputError, match=r"got '(q2|c)' missing at .*train.tsv:4"):
        list(formats.examples(folder))


def test_a_query_twice_is_refused_by_both_readers_of_beir(folder):
    (folder / "qrels" / "test.tsv").write_text("q1\ta\t1\n")
    with (folder / "queries.jsonl").open("a") as file:
        file.write('{"_id": "q1", "text": "another"}\n')
    for read in (lambda: datasets.load(str(folder)), lambda: list(formats.examples(folder))):
        with pytest.raises(InputError, match=r"once, got 'q1' again at .*queries\.jsonl:2"):
            read()


# Runs -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("score", ["nan", "NaN", "inf", "-inf", "1e999", "1_0", "x", "٣"])
def test_a_score_of_a_run_is_a_finite_number(tmp_path, score):
    path = write(tmp_path, "run.trec", f"q Q0 a 1 2.5 tag\nq Q0 b 2 {score} tag\n".encode())
    with pytest.raises(InputError, match=r"finite score in column five.*run\.trec:2"):
        trec.read_run(path)


def test_a_document_is_listed_once_a_query(tmp_path):
    path = write(tmp_path, "run.trec", b"q Q0 a 1 2.5 tag\nr Q0 a 1 2.5 tag\nq Q0 a 2 1.5 tag\n")
    with pytest.raises(InputError, match=r"each document once per query, got 'a' again at .*run\.trec:3"):
        trec.read_run(path)


# Files of settings ------------------------------------------------------------------------------------------------


def test_files_of_settings_may_begin_with_a_byte_order_mark(tmp_path):
    pytest.importorskip("starlette", reason="the service needs pip install 'turborank[serve]'")
    from turborank.serve import auth, config

    settings, keys = tmp_path / "turborank.toml", tmp_path / "keys.toml"
    settings.write_bytes(b"\xef\xbb\xbfmax_documents = 7\r\n")
    assert config.load(environment={}, path=str(settings)).max_documents == 7
    keys.write_bytes(f"\ufeff[[keys]]\r\nname = 'a'\r\nsha256 = '{'0' * 64}'\r\n".encode())
    assert [key.name for key in auth.read(keys)] == ["a"]
    auth.new(keys, "b")
    assert [key.name for key in auth.read(keys)] == ["a", "b"]
    settings.write_bytes(b"max_documents = 7\nport = x\n")
    with pytest.raises(InputError, match=r"turborank\.toml.*line 2"):
        config.load(environment={}, path=str(settings))


def test_json_of_a_model_may_begin_with_a_byte_order_mark(tmp_path):
    from turborank.checkpoint import verify

    path = write(tmp_path, "config.json", b'\xef\xbb\xbf{"a": 1}\r\n')
    assert verify.json_object(path) == {"a": 1}


def test_a_packed_corpus_is_refused_where_documents_are_looked_up(tmp_path):
    path = write(tmp_path, "corpus.jsonl.gz", "\n".join(JSONL).encode())
    with pytest.raises(InputError, match="expected an unpacked corpus"):
        JsonlCorpus(path)
    assert json.loads(gzip.decompress(path.read_bytes()).splitlines()[0])["_id"] == "a"
