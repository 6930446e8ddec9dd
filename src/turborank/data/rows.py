"""Read and write rows of JSON lines, CSV, TSV and Parquet; rows are streamed, so memory does not grow with the file.

JSON lines, CSV and TSV may be gzipped (``.gz``). Parquet needs pyarrow (the extra ``parquet``).
"""

from __future__ import annotations

import csv
import io
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from turborank.data.files import decode, numbered, open_binary, parse_object
from turborank.errors import InputError, UnknownKeyError
from turborank.text import plain

KINDS = ("jsonl", "csv", "tsv", "parquet")
ENDINGS = {".jsonl": "jsonl", ".ndjson": "jsonl", ".csv": "csv", ".tsv": "tsv", ".parquet": "parquet"}
DELIMITERS = {"csv": ",", "tsv": "\t"}
MAX_FIELD = 256 << 20  # maximum characters of a CSV field
PARQUET_ROWS = 1024  # rows read at a time

Record = dict[str, Any]
Columns = Mapping[str, type]  # columns that a writer adds: name -> str, int or float


def kind_of(path: Path) -> str:
    """The format (one of KINDS) by the file name's ending. Raises InputError for an unknown ending."""
    name = path.with_suffix("") if path.suffix == ".gz" else path
    kind = ENDINGS.get(name.suffix.lower())
    if kind is None or (kind == "parquet" and path.suffix == ".gz"):
        raise InputError(f"expected a file that ends in {', '.join(ENDINGS)} (or .gz, except Parquet), got {path}")
    return kind


class RowReader:
    """Iterate over (place, row) of a file; the place is ``path:line``, for Parquet the path and the row number.

    Raises InputError, during iteration, for a malformed row.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.kind = kind_of(path)
        self.size = path.stat().st_size if path.is_file() else 0
        self._tell: Callable[[], float] = lambda: 0.0

    def fraction(self) -> float:
        """Share of the file that has been read, 0 to 1."""
        return min(1.0, self._tell())

    def __iter__(self) -> Iterator[tuple[str, Record]]:
        if self.kind == "parquet":
            yield from self._parquet()
            return
        with open_binary(self.path) as file:
            raw = getattr(file, "fileobj", file)  # for gzip: position in the compressed file
            self._tell = lambda: raw.tell() / max(1, self.size)
            yield from self._json(file) if self.kind == "jsonl" else self._delimited(file)
            self._tell = lambda: 1.0

    def _json(self, file: BinaryIO) -> Iterator[tuple[str, Record]]:
        for number, raw in numbered(file, self.path):
            text = decode(raw, self.path, number)
            if text.strip():
                yield f"{self.path}:{number}", parse_object(text, self.path, number)

    def _delimited(self, file: BinaryIO) -> Iterator[tuple[str, Record]]:
        csv.field_size_limit(MAX_FIELD)
        reader = csv.reader(_decoded(file, self.path), delimiter=DELIMITERS[self.kind], strict=True)
        names: list[str] = []
        line = 1
        try:
            for cells in reader:
                if not names and len(set(cells)) < len(cells):
                    raise InputError(f"expected each column once, got {', '.join(cells)} at {self.path}:{line}")
                if names and cells:
                    if len(cells) != len(names):
                        got = f"expected {len(names)} columns, got {len(cells)}"
                        raise InputError(f"{got} at {self.path}:{line}")
                    yield f"{self.path}:{line}", dict(zip(names, cells, strict=True))
                names = names or cells
                line = reader.line_num + 1  # a row may span several lines
        except csv.Error as error:
            raise InputError(f"expected well-formed columns, got {error} at {self.path}:{line}") from error

    def _parquet(self) -> Iterator[tuple[str, Record]]:
        parquet = open_parquet(self.path)
        rows = max(1, parquet.metadata.num_rows)
        number = 0
        for batch in parquet.iter_batches(batch_size=PARQUET_ROWS):
            self._tell = lambda done=number: done / rows  # type: ignore[misc]
            for row in batch.to_pylist():
                number += 1
                yield f"{self.path}, row {number}", row
        self._tell = lambda: 1.0


def _decoded(file: BinaryIO, path: Path) -> Iterator[str]:
    """Decoded lines with their original line ends, which may be part of a quoted field."""
    for number, raw in numbered(file, path):
        yield decode(raw, path, number) + raw[len(raw.rstrip(b"\r\n")) :].decode()


def _pyarrow() -> Any:
    try:
        import pyarrow.parquet
    except ModuleNotFoundError as error:
        raise InputError("expected pyarrow for Parquet, got none", hint="pip install 'turborank[parquet]'") from error
    return pyarrow


def open_parquet(path: Path) -> Any:
    """A pyarrow ParquetFile. Raises InputError if the file cannot be read or pyarrow is not installed."""
    pyarrow = _pyarrow()
    try:
        return pyarrow.parquet.ParquetFile(path)
    except (OSError, pyarrow.ArrowInvalid) as error:
        raise InputError(f"expected a Parquet file, got {str(error).splitlines()[0]} at {path}") from error


class RowWriter(ABC):
    """Writes rows to an open file. ``close`` completes the format and leaves the file open."""

    @abstractmethod
    def write(self, rows: Sequence[Record]) -> None:
        """Append rows."""

    @abstractmethod
    def close(self) -> None:
        """Write what is buffered and the end of the format, if it has one."""


class JsonWriter(RowWriter):
    """One JSON object per line; a lone surrogate becomes U+FFFD."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file

    def write(self, rows: Sequence[Record]) -> None:
        lines = (json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows)
        self._file.write(plain("".join(lines)).encode())

    def close(self) -> None:
        """Do nothing: JSON lines have no end marker."""


class DelimitedWriter(RowWriter):
    """CSV or TSV; the header is the first row's columns, which all rows must have."""

    def __init__(self, file: BinaryIO, kind: str) -> None:
        self._text = io.TextIOWrapper(file, encoding="utf-8", newline="", write_through=True)
        self._writer = csv.writer(self._text, delimiter=DELIMITERS[kind], lineterminator="\n")
        self._started = False

    def write(self, rows: Sequence[Record]) -> None:
        for row in rows:
            if not self._started:
                self._writer.writerow(row)
                self._started = True
            self._writer.writerow([plain(value) if isinstance(value, str) else value for value in row.values()])

    def close(self) -> None:
        self._text.detach()


class ParquetWriter(RowWriter):
    """Parquet with the columns ``keep`` of ``source``, with their types, and the ``added`` columns."""

    def __init__(self, file: BinaryIO, source: Path, keep: Iterable[str], added: Columns) -> None:
        self._arrow = _pyarrow()
        types = {str: self._arrow.string(), int: self._arrow.int64(), float: self._arrow.float64()}
        schema = open_parquet(source).schema_arrow
        fields = [schema.field(name) for name in keep]
        fields += [self._arrow.field(name, types[type_]) for name, type_ in added.items()]
        self._schema = self._arrow.schema(fields)
        self._writer = self._arrow.parquet.ParquetWriter(file, self._schema)

    def write(self, rows: Sequence[Record]) -> None:
        self._writer.write_table(self._arrow.Table.from_pylist(list(rows), schema=self._schema))

    def close(self) -> None:
        self._writer.close()


def writer(kind: str, file: BinaryIO, source: Path, keep: Iterable[str], added: Columns) -> RowWriter:
    """A writer of rows with the columns ``keep`` of ``source`` and the ``added`` columns, in the format ``kind``.

    Raises UnknownKeyError for another kind than KINDS.
    """
    if kind not in KINDS:
        raise UnknownKeyError("a format of rows", kind, KINDS)
    if kind == "jsonl":
        return JsonWriter(file)
    return ParquetWriter(file, source, keep, added) if kind == "parquet" else DelimitedWriter(file, kind)
