"""Scores appended to a file as they come, so that a kill loses one query and never a number.

A file is JSON lines: a header that says what the scores depend on, then a line a query. A line without its end (the
kill came while it was written) is dropped. Files of shards lie beside each other and are read together.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from turborank.errors import InputError
from turborank.evaluate.files import parse_object, read_lines


class QueryScores(NamedTuple):
    """What a model said about one query's candidates, in the order of the first stage."""

    query_id: str
    logits: Sequence[float]
    tokens: Sequence[int]  # read, of each pair
    truncated: Sequence[int]  # not read, of each pair
    seconds: float


Header = Mapping[str, Any]


def _cut_unfinished(path: Path) -> None:
    """Drop what follows the last line end."""
    with path.open("r+b") as file:
        data = file.read()
        file.truncate(data.rfind(b"\n") + 1)


def read(path: Path, header: Header) -> dict[str, QueryScores]:
    """The scores in one file. Raises InputError when they are scores of something else."""
    known: dict[str, QueryScores] = {}
    found: dict[str, Any] | None = None
    for number, line in read_lines(path):
        record = parse_object(line, path, number)
        if found is None:
            found = record
            _compare(found, header, path)
            continue
        try:
            scores = QueryScores(**record)
        except TypeError as error:
            raise InputError(f"expected the scores of a query, got {', '.join(record)} at {path}:{number}") from error
        known[scores.query_id] = scores
    return known


def _compare(found: Mapping[str, Any], header: Header, path: Path) -> None:
    differing = [key for key in header if found.get(key) != header[key]]
    if differing:
        key = differing[0]
        raise InputError(
            f"expected scores with {key} {header[key]!r}, got {found.get(key)!r} at {path}:1",
            hint="choose another --out, or delete the file to start again",
        )


def read_all(folder: Path, header: Header) -> dict[str, QueryScores]:
    """The scores of every shard in ``folder``."""
    known: dict[str, QueryScores] = {}
    for path in sorted(folder.glob("scores*.jsonl")):
        _cut_unfinished(path)
        known.update(read(path, header))
    return known


@contextlib.contextmanager
def appending(path: Path, header: Header) -> Iterator[Callable[[QueryScores], None]]:
    """A function that adds one query's scores to the file, at once and whole.

    Raises InputError when another process is writing to the file.
    """
    import fcntl

    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise InputError(
                f"expected to write alone, got another process at {path}", hint="use another --out"
            ) from error

        def add(scores: QueryScores) -> None:
            file.write(json.dumps(scores._asdict()) + "\n")
            file.flush()

        if file.tell() == 0:
            file.write(json.dumps(dict(header)) + "\n")
            file.flush()
        yield add
