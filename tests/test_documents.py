import io
import json
import os
import sys
import tempfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from turborank.cli import documents
from turborank.cli.documents import Named, read
from turborank.errors import InputError

NOTHING = io.BytesIO()


def file(folder, name, data):
    path = folder / name
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return str(path)


def faults(paths, fields=None, stdin=NOTHING):
    with pytest.raises(InputError) as caught:
        read(paths, stdin, fields=fields)
    return str(caught.value)


def test_a_file_is_a_document_named_by_its_path(tmp_path):
    paths = [file(tmp_path, "b.md", "# Bees\n\nBees.\n"), file(tmp_path, "a.txt", "\ufeffmarked")]
    assert read(paths, NOTHING) == [Named(paths[0], "# Bees\n\nBees.\n"), Named(paths[1], "marked")]


def test_a_line_of_jsonl_is_a_document(tmp_path):
    rows = [{"id": 7, "title": "A", "text": "b"}, {"_id": "x", "text": "c"}, {"text": "no id"}, "plain"]
    path = file(tmp_path, "rows.jsonl", "\n\n".join(json.dumps(row) for row in rows) + "\n")
    named = read([path], NOTHING)
    assert named == [Named("7", "A b"), Named("x", "c"), Named(f"{path}:5", "no id"), Named(f"{path}:7", "plain")]


def test_a_line_separator_inside_json_is_text(tmp_path):
    path = file(tmp_path, "rows.jsonl", '{"text": "one\u2028two"}\n{"text": "three"}\n')
    assert [text for _, text in read([path], NOTHING)] == ["one\u2028two", "three"]


@pytest.mark.parametrize(("ending", "delimiter"), [("csv", ","), ("tsv", "\t"), ("CSV", ",")])
def test_a_row_of_a_table_is_a_document(tmp_path, ending, delimiter):
    lines = [["doc_id", "name", "notes"], ["w1", "Rioja", '"red, dry\nand old"'], ["w2", "Riesling", "white"]]
    path = file(tmp_path, f"wines.{ending}", "\r\n".join(delimiter.join(line) for line in lines))
    named = read([path], NOTHING, fields=["notes", "name"])
    assert named == [Named("w1", "red, dry\nand old Rioja"), Named("w2", "white Riesling")]


@pytest.mark.parametrize("paths", [[], ["-"]])
def test_a_line_of_standard_input_is_a_document(paths):
    stdin = io.BytesIO("first\r\n  \nthird Ü\n".encode())
    assert read(paths, stdin) == [Named("line 1", "first"), Named("line 3", "third Ü")]


def test_a_pipe_can_be_read_like_a_file(tmp_path):
    readable, writable = os.pipe()
    os.write(writable, b"through a pipe")
    os.close(writable)
    assert [text for _, text in read([f"/dev/fd/{readable}"], NOTHING)] == ["through a pipe"]
    os.close(readable)


@pytest.mark.parametrize(
    ("name", "data", "expected"),
    [
        ("a.txt", b"", "a.txt: expected some text, got an empty file"),
        ("a.txt", b" \n\t\n", "a.txt: expected some text, got only white space"),
        ("a.txt", b"line one\ncaf\xe9", "a.txt: expected UTF-8 text, got the byte 0xe9 in line 2"),
        ("a.txt", b"GIF\0", "a.txt: expected text, got binary data (a zero byte at offset 3)"),
        ("a.pdf", b"%PDF-1.7 ...", "a.pdf: expected text, got a PDF"),
        ("a.jsonl", b'{"text": "x"}\n\n{"text": }', "a.jsonl:3: expected a JSON object, got malformed JSON"),
        ("a.jsonl", b"[1, 2]", "a.jsonl:1: expected a JSON object, got [1, 2]"),
        ("a.jsonl", b"null", "a.jsonl:1: expected a JSON object, got null"),
        ("a.jsonl", b'{"x":' * 200_000, "a.jsonl:1: expected a JSON object, got one nested too deeply"),
        ("a.jsonl", b'{"body": "x"}', "a.jsonl:1: expected at least one of the fields title, text, got body"),
        ("a.jsonl", b'{"text": ["x"]}', "a.jsonl:1: expected text in the fields title, text, got list"),
        ("a.jsonl", b'{"text": ' + b"1" * 5000 + b"}", "a.jsonl:1: expected a JSON object, got a number with too many"),
        ("a.jsonl", b"[" * 200_000, "a.jsonl:1: expected a JSON object, got one nested too deeply"),
        ("a.csv", b"title,text\na\n", "a.csv:2: expected 2 columns, got 1"),
        ("a.tsv", b'title\ttext\n"a\nb"\tc\n"d\ne"\n', "a.tsv:4: expected 2 columns, got 1"),
        ("a.csv", b"text,id,text,\na,b,c,d\n", "a.csv:1: expected each column once, got text more than once"),
        ("a.csv", b"title,text\n", "a.csv: expected some rows, got none"),
        ("a.csv", b"title,text\na,b\nc,d,e\n", "a.csv:3: expected 2 columns, got 3"),
        ("a.csv", b'title,text\na,"b', "a.csv:2: expected well-formed columns"),
        ("a.csv", b"name\nx\n", "a.csv:2: expected at least one of the fields title, text, got name"),
    ],
)
def test_a_malformed_file_is_reported_with_its_fault(tmp_path, name, data, expected):
    assert expected in faults([file(tmp_path, name, data)])


def test_all_faults_are_collected(tmp_path):
    good = file(tmp_path, "good.txt", "text")
    rows = file(tmp_path, "rows.jsonl", 'oops\n{"text": "fine"}\n{"other": 1}\n')
    message = faults([good, str(tmp_path / "missing"), rows, str(tmp_path)])
    assert "good.txt" not in message
    assert "missing: expected a file, got none of that name" in message
    assert "rows.jsonl:1:" in message
    assert "rows.jsonl:3:" in message
    assert f"{tmp_path}: expected a file, got a directory" in message


def test_many_faults_are_counted(tmp_path):
    message = faults([str(tmp_path / str(i)) for i in range(documents.MAX_FAULTS + 7)])
    assert message.count("got none of that name") == documents.MAX_FAULTS
    assert message.endswith("; and 7 more")


def test_a_field_that_no_row_has_is_a_fault(tmp_path):
    path = file(tmp_path, "rows.jsonl", '{"text": "x", "titel": "y"}\n')
    assert "expected the field title, got only text, titel" in faults([path], fields=["title", "text"])
    path = file(tmp_path, "more.jsonl", '{"text": "x"}\n{"text": "y"}\noops\n')
    message = faults([path], fields=["titel"])
    assert message.count("titel") == 1
    assert "more.jsonl:3" in message


def test_a_row_of_several_lines_has_the_name_of_its_first(tmp_path):
    path = file(tmp_path, "a.csv", 'title,text\n"one\ntwo",three\n\nfour,five\n')
    assert [name for name, _ in read([path], NOTHING)] == [f"{path}:2", f"{path}:5"]


def test_standard_input_without_a_document_is_a_fault():
    assert faults([], stdin=io.BytesIO(b"")) == "standard input: expected some text, got an empty file"
    assert "expected UTF-8 text, got the byte 0xff in line 2" in faults(["-"], stdin=io.BytesIO(b"a\n\xff"))


def test_a_file_too_large_is_a_fault(tmp_path, monkeypatch):
    monkeypatch.setattr(documents, "MAX_BYTES", 1 << 20)
    assert read([file(tmp_path, "fits.txt", b"x" * (1 << 20))], NOTHING)
    assert "expected at most 1 MiB, got more" in faults([file(tmp_path, "large.txt", b"x" * ((1 << 20) + 1))])


@pytest.fixture
def nobodys():
    """A folder with unreadable files; where tests run as root, as another user."""
    if root := os.geteuid() == 0:
        os.seteuid(65534)
    try:
        with tempfile.TemporaryDirectory() as folder:
            yield Path(folder)
    finally:
        if root:
            os.seteuid(0)


@pytest.mark.skipif(sys.platform == "win32", reason="there are no file modes on Windows")
def test_a_file_that_may_not_be_read_is_a_fault(nobodys):
    path = file(nobodys, "secret.txt", "text")
    os.chmod(path, 0)
    assert "secret.txt: expected a readable file, got Permission denied" in faults([path])


def test_a_name_that_is_not_utf8_can_be_shown(tmp_path):
    path = os.fsdecode(os.fsencode(str(tmp_path)) + b"/caf\xe9.txt")
    with open(path, "w") as target:
        target.write("text")
    assert [name for name, _ in read([path], NOTHING)] == [f"{tmp_path}/caf\ufffd.txt"]


@given(st.lists(st.binary(max_size=60), max_size=4), st.sampled_from(["a.txt", "a.jsonl", "a.csv", "a.tsv"]))
def test_any_bytes_give_documents_or_one_error(tmp_path_factory, lines, name):
    path = file(tmp_path_factory.mktemp("bytes"), name, b"\n".join(lines))
    try:
        found = read([path], NOTHING)
    except InputError:
        return
    assert found
    assert all(isinstance(text, str) for _, text in found)
