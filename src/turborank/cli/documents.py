"""Read documents from files and standard input. All errors are collected before anything is ranked.

    a text file               one document, named by its path
    .jsonl, .ndjson           one document per line, a JSON object (or a string)
    .csv, .tsv                one document per row; the first row has the column names; fields may be in double quotes
    "-", or no file at all    standard input, one document per line

A row's name is its ``id`` (``_id``, ``doc_id``) if it has one, else ``file:line``. Blank lines of line-wise input are
skipped. Text is UTF-8, with or without a byte-order mark. A file whose name ends in .gz is unpacked.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import math
import os
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from turborank.errors import InputError
from turborank.text import DEFAULT_FIELDS, document_text

MAX_BYTES = 256 << 20  # maximum bytes of one file; a larger collection needs a first stage
MAX_FAULTS = 10  # faults listed in one error; the rest are counted
ID_FIELDS = ("id", "_id", "doc_id")
STDIN = "standard input"
NEWLINE = b"\n"


class Named(NamedTuple):
    """A document with its name."""

    name: str
    text: str


class FaultError(Exception):
    """A fault of one file or row; collected into one InputError, never raised to the caller."""


Row = tuple[int, object]  # 1-based line and its value: a mapping, a string or a FaultError


def read(paths: Sequence[str], stdin: BinaryIO, *, fields: Sequence[str] | None = None) -> list[Named]:
    """All documents of ``paths`` in order; ``stdin`` is read for "-" and when there are no paths.

    ``fields`` are the fields of a row whose values form its text, by default title and text.
    Raises InputError, which lists the invalid files and rows.
    """
    documents: list[Named] = []
    faults: list[str] = []
    for path in paths or ("-",):
        try:
            documents.extend(_documents(path, _bytes(path, stdin), fields, faults))
        except FaultError as fault:
            faults.append(f"{shown(path)}: {fault}")
    if faults:
        more = f"; and {len(faults) - MAX_FAULTS} more" if len(faults) > MAX_FAULTS else ""
        raise InputError("; ".join(faults[:MAX_FAULTS]) + more)
    return documents


def shown(path: str) -> str:
    """A path as printable text; bytes that are not UTF-8 are replaced."""
    return STDIN if path == "-" else os.fsencode(path).decode("utf-8", "replace")


def _bytes(path: str, stdin: BinaryIO) -> bytes:
    try:
        if path == "-":
            data = stdin.read(MAX_BYTES + 1)
        elif Path(path).is_dir():
            raise FaultError("expected a file, got a directory; name the files in it")
        else:
            data = _unpacked(path) if path.endswith(".gz") else _opened(path)
    except FileNotFoundError:
        raise FaultError("expected a file, got none of that name") from None
    except (OSError, ValueError) as error:
        raise FaultError(f"expected a readable file, got {getattr(error, 'strerror', None) or error}") from None
    if len(data) > MAX_BYTES:
        raise FaultError(
            f"expected at most {MAX_BYTES >> 20} MiB, got more; retrieve candidates with a search engine first"
        )
    return data


def _opened(path: str) -> bytes:
    with Path(path).open("rb") as file:
        return file.read(MAX_BYTES + 1)


def _unpacked(path: str) -> bytes:
    data = bytearray()
    try:
        with gzip.open(path) as file:
            while len(data) <= MAX_BYTES and (part := file.read(1 << 20)):
                data += part
    except (gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise FaultError(f"expected a complete gzip file, got {error} in line {data.count(NEWLINE) + 1}") from None
    return bytes(data)


def _text(data: bytes) -> str:
    if data.startswith(b"%PDF-"):
        raise FaultError("expected text, got a PDF; convert it first, for example with pdftotext")
    if (offset := data.find(b"\0")) >= 0:
        raise FaultError(
            f"expected text, got binary data (a zero byte at offset {offset}); convert it to UTF-8 text first"
        )
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise FaultError(
            f"expected UTF-8 text, got the byte 0x{data[error.start]:02x} in line {line}; "
            "convert it, for example with iconv"
        ) from None


def _documents(path: str, data: bytes, fields: Sequence[str] | None, faults: list[str]) -> Iterator[Named]:
    """The documents of one file. Faults of rows are appended to ``faults``; a fault of the file is raised."""
    name, text = shown(path), _text(data)
    if not text.strip():
        raise FaultError(
            "expected some text, got only white space" if text else "expected some text, got an empty file"
        )
    rows = None if path == "-" else ROWS.get(Path(path.removesuffix(".gz")).suffix.lower())
    if path == "-":
        yield from (Named(f"line {n}", line.strip()) for n, line in enumerate(text.split("\n"), 1) if line.strip())
    elif rows is None:
        yield Named(name, text)
    else:
        yield from _table(name, rows(text), fields, faults)


def _table(name: str, rows: Iterator[Row], fields: Sequence[str] | None, faults: list[str]) -> Iterator[Named]:
    wanted = fields or DEFAULT_FIELDS
    seen: set[str] = set()
    lacking: list[str] = []  # faults of rows without any of the fields, reported only if no field is missing everywhere
    count = 0
    for line, row in rows:
        count += 1
        try:
            if isinstance(row, FaultError):
                raise row
            seen.update(row if isinstance(row, Mapping) else ())
            yield Named(_row_name(name, line, row), document_text(row, wanted))
        except (FaultError, InputError) as fault:
            hint = "; choose fields with --field" if isinstance(fault, InputError) and isinstance(row, Mapping) else ""
            lacks = isinstance(row, Mapping) and not row.keys() & set(wanted)
            (lacking if lacks else faults).append(f"{name}:{line}: {fault}{hint}")
    if not count:
        raise FaultError("expected some rows, got none")
    absent = [field for field in fields or () if field not in seen]
    if absent and seen:
        raise FaultError(f"expected the field {', '.join(absent)}, got only {', '.join(sorted(seen))}")
    faults += lacking


def _row_name(name: str, line: int, row: object) -> str:
    if isinstance(row, Mapping):
        for field in ID_FIELDS:
            if isinstance(row.get(field), str | int) and str(row[field]).strip():
                return str(row[field]).strip()
    return f"{name}:{line}"


def _no_number(name: str) -> Any:
    raise FaultError(f"expected a JSON object, got {name}, which is no number of JSON")


def _finite(digits: str) -> Any:
    value = float(digits)
    return value if math.isfinite(value) else _no_number(digits)


def _jsonl(text: str) -> Iterator[Row]:
    for number, line in enumerate(text.split("\n"), 1):  # not splitlines: a JSON string may contain U+2028
        if not line.strip():
            continue
        try:
            row: Any = json.loads(line, parse_constant=_no_number, parse_float=_finite)
            if not isinstance(row, dict | str):
                row = FaultError(f"expected a JSON object, got {json.dumps(row)[:40]}")
        except json.JSONDecodeError as error:
            row = FaultError(f"expected a JSON object, got malformed JSON ({error.msg}, column {error.colno})")
        except FaultError as fault:
            row = fault
        except ValueError:  # more digits than Python converts to an integer
            row = FaultError("expected a JSON object, got a number with too many digits")
        except RecursionError:
            row = FaultError("expected a JSON object, got one nested too deeply")
        yield number, row


def _delimited(delimiter: str) -> Callable[[str], Iterator[Row]]:
    def rows(text: str) -> Iterator[Row]:
        csv.field_size_limit(MAX_BYTES)
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
        names: list[str] = []
        line = 1
        try:
            for cells in reader:
                if names and cells:
                    fits = len(cells) == len(names)
                    fault = FaultError(f"expected {len(names)} columns, got {len(cells)}")
                    yield line, dict(zip(names, cells, strict=True)) if fits else fault
                elif twice := [name for name in dict.fromkeys(cells) if name and cells.count(name) > 1]:
                    yield line, FaultError(f"expected each column once, got {', '.join(twice)} more than once")
                    return
                names = names or cells
                line = reader.line_num + 1  # a row may span several lines
        except csv.Error as error:
            yield line, FaultError(f"expected well-formed columns, got {error}")

    return rows


# File extension -> reader of its rows. Any other file is one document.
ROWS: dict[str, Callable[[str], Iterator[Row]]] = {
    ".jsonl": _jsonl,
    ".ndjson": _jsonl,
    ".csv": _delimited(","),
    ".tsv": _delimited("\t"),
}
