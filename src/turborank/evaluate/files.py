"""Reading text line by line, with the place of every fault; writing so that a kill leaves the old file or the new."""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, cast

from turborank.errors import InputError


def open_binary(path: Path) -> BinaryIO:
    """The bytes of a file, unpacked when its name ends in ``.gz``. Raises InputError when there is none."""
    try:
        return cast(BinaryIO, gzip.open(path, "rb")) if path.suffix == ".gz" else path.open("rb")
    except OSError as error:
        raise InputError(f"expected a readable file, got {error.strerror or error} at {path}") from error


def decode(raw: bytes, path: Path, number: int) -> str:
    """One line as text, without its line end (and without a byte-order mark on the first line)."""
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        byte = raw[error.start]
        raise InputError(
            f"expected UTF-8, got byte 0x{byte:02x} at {path}:{number}",
            hint="convert the file to UTF-8, with iconv say",
        ) from error
    return text.removeprefix("\ufeff").rstrip("\r\n") if number == 1 else text.rstrip("\r\n")


def read_lines(path: Path) -> Iterator[tuple[int, str]]:
    """(line number from 1, text) of every line that is not blank."""
    with open_binary(path) as file:
        for number, raw in enumerate(file, 1):
            text = decode(raw, path, number)
            if text.strip():
                yield number, text


def parse_object(text: str, path: Path, number: int) -> dict[str, Any]:
    """A line of JSON that must be an object."""
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise InputError(f"expected one JSON object on the line, got {error.msg} at {path}:{number}") from error
    if not isinstance(value, dict):
        raise InputError(f"expected a JSON object, got {type(value).__name__} at {path}:{number}")
    return value


def string_field(record: dict[str, Any], field: str, path: Path, number: int, *, default: str | None = None) -> str:
    """A text field of a record; ``default`` stands for a missing or null one."""
    value = record.get(field, default)
    value = default if value is None else value
    if not isinstance(value, str):
        got = "nothing" if value is None else type(value).__name__
        raise InputError(f"expected a string in the field {field!r}, got {got} at {path}:{number}")
    return value


def file_hash(path: Path, algorithm: str = "sha256") -> str:
    """The file's checksum, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, algorithm).hexdigest()


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file to write that takes ``path``'s place only once it is complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(name)
        raise


def write_text(path: Path, text: str) -> None:
    """``text`` at ``path``, whole or not at all."""
    with replacing(path) as file:
        file.write(text.encode())


def write_json(path: Path, value: object) -> None:
    """``value`` as readable JSON at ``path``, whole or not at all."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")
