"""FORMATS: the shapes in which training data comes, each read into examples, one query with its documents.

A format is recognised by the fields of the first record, never by a file's name; files may be ``.gz``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from turborank.distill.folder import read_records
from turborank.errors import InputError
from turborank.evaluate.files import string_field

PASSAGE_FIELDS = ("passage", "positive", "document", "text")


class Judged(NamedTuple):
    """A document of an example, with its relevance and a teacher's score where somebody gave them."""

    text: str
    label: int | None = None
    score: float | None = None


class Example(NamedTuple):
    """A query and the documents known for it."""

    query: str
    documents: tuple[Judged, ...]


class Format(NamedTuple):
    """A shape of files of JSON lines."""

    fields: str  # as messages show them
    recognise: Callable[[Mapping[str, Any]], bool]
    read: Callable[[Path], Iterator[Example]]


def _passage_field(record: Mapping[str, Any]) -> str | None:
    return next((field for field in PASSAGE_FIELDS if field in record), None)


def _pairs(path: Path) -> Iterator[Example]:
    for number, record in read_records(path):
        query = string_field(record, "query", path, number)
        passage = string_field(record, _passage_field(record) or PASSAGE_FIELDS[0], path, number)
        yield Example(query, (Judged(passage, 1),))


FORMATS: Mapping[str, Format] = {
    "pairs": Format("query, passage (or positive)", lambda r: "query" in r and _passage_field(r) is not None, _pairs),
}


def recognise(path: Path) -> str:
    """The format of a file, by its first record. Raises InputError with the table where it is none of them."""
    number, record = next(read_records(path), (1, {}))
    for name, row in FORMATS.items():
        if row.recognise(record):
            return name
    known = "; ".join(f"{name}: {row.fields}" for name, row in FORMATS.items())
    raise InputError(f"expected the fields of a known format ({known}), got {', '.join(record)} at {path}:{number}")


def examples(path: Path) -> Iterator[Example]:
    """The examples of a file in any of FORMATS."""
    return FORMATS[recognise(path)].read(path)


def documents(path: Path) -> Iterator[str]:
    """The passages of a file, whatever else stands beside them; a text may come many times."""
    for number, record in read_records(path):
        yield string_field(record, _passage_field(record) or PASSAGE_FIELDS[0], path, number)
