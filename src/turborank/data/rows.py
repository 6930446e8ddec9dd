"""Rows of JSON lines, CSV, TSV and Parquet, read one after another whatever the size of the file, and written.

JSON lines and CSV may be gzipped (``.gz``). Parquet needs pyarrow (the extra ``parquet``).
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
MAX_FIELD = 256 << 20  # characters of one field of a CSV file
PARQUET_ROWS = 1024  # read at a time

Record = dict[str, Any]
Columns = Mapping[str, type]  # columns that a writer adds: name -> str, int or float


def kind_of(path: Path) -> str:
    """The format, by the ending of the file's name. Raises InputError for another one."""
    name = path.with_suffix("") if path.suffix == ".gz" else path
    kind = ENDINGS.get(name.suffix.lower())
    if kind is None or (kind == "parquet" and path.suffix == ".gz"):
        raise InputError(f"expected a file that ends in {', '.join(ENDINGS)} (or .gz, except Parquet), got {path}")
    return kind


class RowReader:
    """Iterates over (place, row) of a file; the place is ``path:line``, or the row's number in a Parquet file.

    Raises InputError, while it is read, for a row that is not of its format.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.kind = kind_of(path)
        self.size = path.stat().st_size if path.is_file() else 0
        self._tell: Callable[[], float] = lambda: 0.0

    def fraction(self) -> float:
        """Share of the file that was read, from 0 to 1."""
        return min(1.0, self._tell())

    def __iter__(self) -> Iterator[tuple[str, Record]]:
        if self.kind == "parquet":
            yield from self._parquet()
            return
        with open_binary(self.path) as file:
            raw = getattr(file, "fileobj", file)  # of gzip: what is packed
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
                line = reader.line_num + 1  # a row may have several
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
    """Lines with their own line ends, which a quoted field may hold."""
    for number, raw in numbered(file, path):
        yield decode(raw, path, number) + raw[len(raw.rstrip(b"\r\n")) :].decode()


def _pyarrow() -> Any:
    try:
        import pyarrow.parquet
    except ModuleNotFoundError as error:
        raise InputError("expected pyarrow for Parquet, got none", hint="pip install 'turborank[parquet]'") from error
    return pyarrow


def open_parquet(path: Path) -> Any:
    """A pyarrow ParquetFile. Raises InputError where there is none, or no pyarrow."""
    pyarrow = _pyarrow()
    try:
        return pyarrow.parquet.ParquetFile(path)
    except (OSError, pyarrow.ArrowInvalid) as error:
        raise InputError(f"expected a Parquet file, got {str(error).splitlines()[0]} at {path}") from error


class RowWriter(ABC):
    """Writes rows to an open file. ``close`` finishes the format; the file stays open."""

    @abstractmethod
    def write(self, rows: Sequence[Record]) -> None:
        """Append rows."""

    @abstractmethod
    def close(self) -> None:
        """Write what is left."""


class JsonWriter(RowWriter):
    """One JSON object a line; a lone surrogate is written as U+FFFD."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file

    def write(self, rows: Sequence[Record]) -> None:
        lines = (json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows)
        self._file.write(plain("".join(lines)).encode())

    def close(self) -> None:
        """Do nothing: every line is complete."""


class DelimitedWriter(RowWriter):
    """CSV or TSV with a header of the first row's columns, which all rows have."""

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
    """Parquet with the columns ``keep`` of ``source``, in their types, and the ``added`` ones."""

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
    """A writer of rows of ``source``'s columns ``keep`` and the columns ``added``."""
    if kind not in KINDS:
        raise UnknownKeyError("a format of rows", kind, KINDS)
    if kind == "jsonl":
        return JsonWriter(file)
    return ParquetWriter(file, source, keep, added) if kind == "parquet" else DelimitedWriter(file, kind)
