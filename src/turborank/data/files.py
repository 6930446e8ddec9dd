"""Files: text read line by line with errors that name file and line, atomic writes, hashes and manifests, and rows.

Rows of JSON lines, CSV, TSV and Parquet are streamed, so memory does not grow with the file. JSON lines, CSV and TSV
may be gzipped (``.gz``). Parquet needs pyarrow (the extra ``parquet``).
"""

from __future__ import annotations

import contextlib
import csv
import ctypes
import gzip
import hashlib
import io
import json
import math
import os
import re
import secrets
import shutil
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, cast

from safetensors import SafetensorError

from turborank.errors import InputError, UnknownKeyError
from turborank.text import plain

MARK = "\ufeff".encode()  # a byte-order mark; it is skipped at the beginning of every file
_DAMAGED = (gzip.BadGzipFile, zlib.error, EOFError)


@contextlib.contextmanager
def open_binary(path: Path) -> Iterator[BinaryIO]:
    """Open a file for reading bytes; a name that ends in ``.gz`` is decompressed.

    Raises InputError if the file cannot be opened and, during reading, if the gzip data is damaged or incomplete.
    """
    opened = gzip.open if path.suffix == ".gz" else open
    try:
        file = cast(BinaryIO, opened(path, "rb"))
    except OSError as error:
        raise InputError(f"expected a readable file, got {error.strerror or error} at {path}") from error
    try:
        with file:
            yield file
    except _DAMAGED as error:
        raise InputError(f"expected a complete gzip file, got {error} at {path}") from error


def numbered(file: BinaryIO, path: Path) -> Iterator[tuple[int, bytes]]:
    """(line number from 1, the line with its end) of a file of open_binary. Raises InputError where it is damaged."""
    number = 0
    try:
        for number, raw in enumerate(file, 1):
            yield number, raw
    except _DAMAGED as error:
        raise InputError(f"expected a complete gzip file, got {error} at {path}:{number + 1}") from error


def decode(raw: bytes, path: Path, number: int) -> str:
    """One line as text, without its line end and, on line 1, without a byte-order mark.

    Raises InputError, with file and line, for bytes that are not UTF-8.
    """
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        byte = raw[error.start]
        raise InputError(
            f"expected UTF-8, got byte 0x{byte:02x} at {path}:{number}",
            hint="convert the file to UTF-8, for example with iconv",
        ) from error
    return text.removeprefix("\ufeff").rstrip("\r\n") if number == 1 else text.rstrip("\r\n")


def read_lines(path: Path) -> Iterator[tuple[int, str]]:
    """(line number from 1, text) of every line that is not blank."""
    with open_binary(path) as file:
        for number, raw in numbered(file, path):
            text = decode(raw, path, number)
            if text.strip():
                yield number, text


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name}, which is not a JSON number")


def _finite(digits: str) -> float:
    value = float(digits)
    return value if math.isfinite(value) else _no_constant(digits)


NOT_JSON = (ValueError, RecursionError)  # of json.loads: syntax, numbers of more than 4,300 digits, deep nesting


def json_fault(error: Exception) -> str:
    """The message for an error of NOT_JSON that json.loads raised."""
    if isinstance(error, RecursionError):
        return "one nested too deeply"
    return error.msg if isinstance(error, json.JSONDecodeError) else str(error).partition(":")[0].partition(";")[0]


def parse_object(text: str, path: Path, number: int) -> dict[str, Any]:
    """Parse a line that must be a JSON object of finite numbers. Raises InputError, with file and line, otherwise."""
    try:
        value = json.loads(text, parse_constant=_no_constant, parse_float=_finite)
    except NOT_JSON as error:
        raise InputError(f"expected one JSON object on the line, got {json_fault(error)} at {path}:{number}") from error
    if not isinstance(value, dict):
        raise InputError(f"expected a JSON object, got {type(value).__name__} at {path}:{number}")
    return value


def string_field(record: dict[str, Any], field: str, path: Path, number: int, *, default: str | None = None) -> str:
    """A string field of a record; ``default`` replaces a missing or null value. Raises InputError for another type."""
    value = record.get(field, default)
    value = default if value is None else value
    if not isinstance(value, str):
        got = "nothing" if value is None else type(value).__name__
        raise InputError(f"expected a string in the field {field!r}, got {got} at {path}:{number}")
    return value


def checked_id(name: str, at: object) -> str:
    """The id, unchanged. Raises InputError for a lone surrogate, which UTF-8 and so a TREC run cannot represent."""
    if plain(name) != name:
        raise InputError(f"expected an id without lone surrogates, got {name!r} at {at}")
    return name


def check_folder(path: Path) -> None:
    """Raise InputError if ``path`` or one of its parents is a file, so that no folder can be created there."""
    there = next(one for one in (path.absolute(), *path.absolute().parents) if one.exists())
    if not there.is_dir():
        raise InputError(f"expected a folder to write to, got a file at {there}")


def file_hash(path: Path, algorithm: str = "sha256") -> str:
    """Checksum of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, algorithm).hexdigest()


@contextlib.contextmanager
def replacing_path(path: Path) -> Iterator[Path]:
    """A temporary file beside ``path`` that replaces it on success, for libraries that write to a path themselves."""
    path.parent.mkdir(parents=True, exist_ok=True)
    name = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    try:  # the name is known before the file is there: Ctrl-C may come anywhere
        os.close(os.open(name, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
        yield name
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(name)
        raise


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file to write that replaces ``path`` only once it is complete."""
    with replacing_path(path) as temporary, temporary.open("wb") as file:
        yield file


@contextlib.contextmanager
def replacing_folder(path: Path) -> Iterator[Path]:
    """A new folder beside ``path`` that replaces it on success; on failure, or a kill, the old folder stays."""
    temporary = path.with_name(f".{path.name}.partial")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        yield temporary
        if not path.exists():
            temporary.rename(path)
        elif not _exchanged(temporary, path):
            shutil.rmtree(path)
            temporary.rename(path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextlib.contextmanager
def replacing_together(folder: Path) -> Iterator[Path]:
    """A hidden folder; on success its files replace those of the same names in ``folder``, other files stay.

    All are replaced or, after an exception or Ctrl-C, none; only a kill between two renames leaves a mixture.
    """
    if not folder.exists():
        with replacing_folder(folder) as new:
            yield new
            _readable(new)
        return
    temporary = folder / ".partial"
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir()
        yield temporary
        files = _readable(temporary)
        try:
            _move(files, folder)
        except KeyboardInterrupt:
            _move([path for path in files if path.exists()], folder)
            raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextlib.contextmanager
def os_errors(path: Path) -> Iterator[None]:
    """Raise what safetensors says of a file that cannot be written as the OSError that it was."""
    try:
        yield
    except SafetensorError as error:
        if number := re.search(r"os error (\d+)", str(error)):
            raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from error
        raise


def _readable(folder: Path) -> list[Path]:
    """The files of a folder, which others may read from now on; safetensors gives its own to the owner alone."""
    files = sorted(folder.iterdir())
    for path in files:
        path.chmod(0o644)
    return files


def _move(files: Iterable[Path], folder: Path) -> None:
    for path in files:
        os.replace(path, folder / path.name)


def _exchanged(one: Path, other: Path) -> bool:
    """Exchange two paths atomically; False if the system has no such call (Linux has renameat2)."""
    exchange, here = 2, -100  # RENAME_EXCHANGE, AT_FDCWD
    try:
        rename = ctypes.CDLL(None).renameat2
    except (AttributeError, OSError, TypeError):  # no such function; Windows has no library without a name
        return False
    return bool(rename(here, os.fsencode(one), here, os.fsencode(other), exchange) == 0)


def write_text(path: Path, text: str) -> None:
    """Write ``text`` to ``path`` atomically, as UTF-8; a lone surrogate becomes U+FFFD."""
    with replacing(path) as file:
        file.write(plain(text).encode())


def write_json(path: Path, value: object) -> None:
    """Write ``value`` to ``path`` atomically, as indented JSON."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


SHORT = 80  # characters of values shown in a message


def read_manifest(path: Path, inputs: Mapping[str, Any]) -> dict[str, Any] | None:
    """The manifest at ``path`` if it records the same ``inputs`` (values as JSON stores them); None if there is none.

    Raises InputError, naming the inputs that differ, if the output was made from others.
    """
    if not path.is_file():
        return None
    try:
        manifest = json.loads(path.read_bytes())
    except NOT_JSON as error:
        raise InputError(f"expected JSON, got {json_fault(error)} at {path}") from error
    if not isinstance(manifest, dict):
        raise InputError(f"expected a JSON object, got {type(manifest).__name__} at {path}")
    check_inputs(manifest, inputs, path)
    return manifest


def check_inputs(found: Mapping[str, Any], inputs: Mapping[str, Any], path: object) -> None:
    """Raise InputError, naming the differences, unless the output at ``path`` was made from the same ``inputs``."""
    differing = [name for name in inputs if found.get(name) != inputs[name]]
    if differing:
        what = ", ".join(differing)
        values = f" ({found.get(what)!r}, not {inputs.get(what)!r})"  # of one difference, where it is short
        raise InputError(
            f"expected an output made from the same inputs, got another {what}"
            f"{values if what in inputs and len(values) < SHORT else ''} at {path}",
            hint="choose another --out, or delete that one to start again",
        )


# Records of JSON lines, each with file and line for error messages.


class Place(NamedTuple):
    """File and line of a record."""

    path: Path
    number: int

    def __str__(self) -> str:
        return f"{self.path}:{self.number}"


def read_records(path: Path) -> Iterator[tuple[Place, dict[str, Any]]]:
    """(place, record) for each line of a JSON-lines file, plain or ``.gz``."""
    for number, line in read_lines(path):
        yield Place(path, number), parse_object(line, path, number)


def identity(value: Any, field: str, at: object) -> str:
    """An id, a string or an integer, as a string. Raises InputError if it is empty or has white space (TREC runs)."""
    name = str(value) if isinstance(value, str | int) and not isinstance(value, bool) else ""
    if not name or name.split() != [name]:
        raise InputError(f"expected an id without white space in the field {field!r}, got {value!r} at {at}")
    return name


# ---------------------------------------------------------------- rows

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
