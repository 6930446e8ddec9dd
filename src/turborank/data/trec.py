"""TREC runs and judgements (qrels).

A run line is ``query Q0 document rank score tag``. The scores decide the order; the rank column is ignored. Ties are
ordered as in trec_eval: by document id, descending. trec_eval stores scores in 32 bits, so scores are compared as
float32. :func:`ranked` implements this rule for the whole package.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from turborank.data.files import read_lines, replacing
from turborank.errors import InputError

GRADES = range(-1000, 1001)  # accepted grades; trec_eval allocates a table as long as the highest one
_GRADE = re.compile(r"[+-]?[0-9]{1,99}(\.0*)?")  # also 1.0, as tools write it that hold grades in floats
_SPACE = re.compile(r"[ \t\r\f\v]+")  # ASCII white space only: ids may contain any other character


class Scored(NamedTuple):
    """A document of a run, with its score."""

    doc_id: str
    score: float


Run = dict[str, list[Scored]]  # query id -> its documents, best first
Qrels = dict[str, dict[str, int]]  # query id -> document id -> graded relevance


def ranked(documents: Iterable[Scored]) -> list[Scored]:
    """Sort by float32 score, ties by document id, both descending."""
    return sorted(documents, key=lambda scored: (np.float32(scored.score), scored.doc_id), reverse=True)


class RunLine(NamedTuple):
    """One line of a run file."""

    number: int  # from 1
    query_id: str
    doc_id: str
    score: float


def read_run_lines(path: Path) -> Iterator[RunLine]:
    """The lines of a TREC run file, plain or ``.gz``, in the order of the file; blank lines are skipped.

    Raises InputError, with file and line, for anything but UTF-8 text of six columns with a finite score.
    """
    for number, line in read_lines(path):
        columns = _SPACE.split(line.strip(" \t\r\f\v"))
        if len(columns) != 6:
            raise InputError(
                f"expected six columns (query Q0 document rank score tag), got {len(columns)} at {path}:{number}"
            )
        query_id, _, doc_id, _, text, _ = columns
        try:
            score = float(text) if text.isascii() and "_" not in text else math.nan  # as other readers of runs do
        except ValueError:
            score = math.nan
        if not math.isfinite(score):
            raise InputError(f"expected a finite score in column five, got {text!r} at {path}:{number}")
        yield RunLine(number, query_id, doc_id, score)


def read_run(path: Path) -> Run:
    """Read a TREC run file, plain or ``.gz``.

    Raises InputError, with file and line, as :func:`read_run_lines` does, and for a document that is listed twice for
    one query.
    """
    rows: dict[str, dict[str, float]] = {}
    for number, query_id, doc_id, score in read_run_lines(path):
        documents = rows.setdefault(query_id, {})
        if doc_id in documents:
            raise InputError(f"expected each document once per query, got {doc_id!r} again at {path}:{number}")
        documents[doc_id] = score
    return {query_id: ranked(Scored(*pair) for pair in documents.items()) for query_id, documents in rows.items()}


def format_run(query_id: str, documents: Iterable[Scored], tag: str) -> str:
    """The run lines of one query, ranks from 1; nine digits represent a float32 exactly."""
    tag = _SPACE.sub("_", tag)
    return "".join(
        f"{query_id} Q0 {scored.doc_id} {rank} {scored.score:.9g} {tag}\n" for rank, scored in enumerate(documents, 1)
    )


def write_run(path: Path, run: Mapping[str, Iterable[Scored]], tag: str) -> None:
    """Write a run as a TREC file, atomically, queries in the given order.

    Raises InputError for an id with white space, which the format cannot represent.
    """
    for query_id, documents in run.items():
        for name in (query_id, *(scored.doc_id for scored in documents)):
            if not name or _SPACE.search(name) or "\n" in name:
                raise InputError(f"expected an id without white space, got {name!r}, which a TREC run cannot represent")
    with replacing(path) as file:
        for query_id, documents in run.items():
            file.write(format_run(query_id, documents, tag).encode())


def _columns(line: str) -> list[str]:
    """The columns of a line of judgements: between tabs where there are any, else between blanks."""
    return [column.strip(" ") for column in line.split("\t")] if "\t" in line else _SPACE.split(line.strip(" "))


def read_qrels(path: Path) -> tuple[Qrels, int]:
    """Read judgements; return them and the number of lines that repeat one.

    Reads BEIR's three columns (query, document, score; with or without a header line) and TREC's four (query,
    iteration, document, relevance). A grade is a whole number, which may be written 1.0. Raises InputError, with file
    and line, for anything else, for a grade outside GRADES and for two different grades of one document.
    """
    qrels: Qrels = {}
    repeated = 0
    for number, line in read_lines(path):
        columns = _columns(line)
        if number == 1 and columns[-1] in ("score", "relevance", "rel"):
            continue
        if len(columns) not in (3, 4) or not all(columns):
            raise InputError(f"expected three columns (query, document, score), got {line!r:.80} at {path}:{number}")
        query_id, doc_id = columns[0], columns[-2]
        if not _GRADE.fullmatch(columns[-1]):
            raise InputError(
                f"expected a whole number as relevance in the last column, got {columns[-1]!r} at {path}:{number}"
            )
        relevance = int(columns[-1].partition(".")[0])
        if relevance not in GRADES:
            raise InputError(
                f"expected a relevance between {GRADES[0]} and {GRADES[-1]}, got {relevance} at {path}:{number}"
            )
        judged = qrels.setdefault(query_id, {})
        if judged.setdefault(doc_id, relevance) != relevance:
            raise InputError(
                f"expected one relevance of {doc_id!r} for {query_id!r}, got {judged[doc_id]} and {relevance} "
                f"at {path}:{number}"
            )
        repeated += 1
    repeated -= sum(len(judged) for judged in qrels.values())
    if not qrels:
        raise InputError(f"expected judgements, got none at {path}")
    return qrels, repeated


def line_of(path: Path, query_id: str, doc_id: str | None = None) -> str:
    """``path:line`` of the first judgement of a query, or of one document, for the error that says what it lacks."""
    for number, line in read_lines(path):
        columns = _columns(line)
        if columns[0] == query_id and doc_id in (None, columns[-2]):
            return f"{path}:{number}"
    return str(path)
