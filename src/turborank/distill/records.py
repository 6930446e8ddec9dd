"""Records of JSON lines, each with its place, so that every fault can say where it is."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from turborank.errors import InputError
from turborank.evaluate.files import parse_object, read_lines


class Place(NamedTuple):
    """Where a record stands."""

    path: Path
    number: int

    def __str__(self) -> str:
        return f"{self.path}:{self.number}"


def read_records(path: Path) -> Iterator[tuple[Place, dict[str, Any]]]:
    """Every record of a file of JSON lines (``.gz`` too)."""
    for number, line in read_lines(path):
        yield Place(path, number), parse_object(line, path, number)


def identity(value: Any, field: str, at: object) -> str:
    """An id, which may be a number. Raises InputError for what a TREC run could not hold."""
    name = str(value) if isinstance(value, str | int) and not isinstance(value, bool) else ""
    if not name or name.split() != [name]:
        raise InputError(f"expected an id without white space in the field {field!r}, got {value!r} at {at}")
    return name
