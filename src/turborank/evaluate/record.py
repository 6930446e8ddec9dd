"""What an evaluation found, as plain values."""

from __future__ import annotations

import contextlib
import datetime
import importlib.metadata
import json
import os
import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from turborank.data.dataset_table import PUBLISHED
from turborank.data.datasets import Dataset
from turborank.data.files import parse_object, read_lines
from turborank.data.trec import Qrels, Run
from turborank.errors import InputError
from turborank.evaluate.measures import Comparison, PerQuery


@dataclass(frozen=True)
class System:
    """A first stage or a model, on one dataset."""

    name: str
    model: Any  # the Reranker; None: the first stage
    run: Run
    values: PerQuery
    means: Mapping[str, float]
    manifest: Mapping[str, Any]
    seconds: Mapping[str, float]  # query id -> seconds, of every query scored
    curve: Mapping[int, float]  # depth reranked -> the compared measure; depth 0 is the first stage
    comparisons: Mapping[str, Comparison]  # system -> how this one differs from it


@dataclass(frozen=True)
class Result:
    """All systems on one dataset, the first stage first."""

    dataset: Dataset
    systems: tuple[System, ...]
    qrels: Qrels  # of the queries evaluated
    measure: str  # the one compared
    depth: int
    sampled: bool
    notes: tuple[str, ...] = ()

    @property
    def remarks(self) -> tuple[str, ...]:
        """What has to be said beside the numbers."""
        sample = (f"a sample of {len(self.qrels)} of {len(self.dataset.qrels)} queries",) if self.sampled else ()
        return (*sample, *self.dataset.notes, *self.notes)


class TableLine(NamedTuple):
    """A row of the summary: a system with a value for every dataset, or none."""

    system: str
    values: tuple[float | None, ...]
    source: str = ""  # of published figures; empty for ours


def published_lines(result: Result, measures: Sequence[str]) -> list[TableLine]:
    """What others have printed for this dataset under these measures; systems without any of them are left out."""
    figures = PUBLISHED.get(result.dataset.name, ())
    lines = []
    for system in dict.fromkeys(figure.system for figure in figures):
        own = {figure.measure: figure for figure in figures if figure.system == system}
        if own.keys() & set(measures):
            values = tuple(own[measure].value if measure in own else None for measure in measures)
            lines.append(TableLine(system, values, next(iter(own.values())).source))
    return lines


@dataclass(frozen=True)
class Evaluation:
    """Everything, and the software and machine it was found with."""

    results: tuple[Result, ...]
    system: Mapping[str, Any]


# What a number depends on, written beside it.

LIBRARIES = ("turborank", "numpy", "tokenizers", "ir-measures", "pytrec-eval-terrier", "bm25s", "PyStemmer")
TIE_RULE = "measures break ties as trec_eval does: by document id, descending"


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "a source tree" if name == "turborank" else "not installed"


def cpu_name() -> str:
    """The processor, as it calls itself."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def about_system() -> dict[str, Any]:
    """Software and machine."""
    return {
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "platform": platform.platform(terse=True),
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "versions": {name: _version(name) for name in LIBRARIES},
    }


def about_dataset(dataset: Dataset) -> dict[str, Any]:
    """The collection, with its counts, its licence and what was noticed about it."""
    return {
        "name": dataset.name,
        "split": dataset.split,
        "queries": len(dataset.qrels),
        "documents": len(dataset.corpus),
        "judgements": sum(map(len, dataset.qrels.values())),
        "fingerprint": dataset.fingerprint,
        "licence": dataset.row.licence if dataset.row else "the owner's",
        "relevant_from": dataset.relevant_from,
        "notes": list(dataset.notes),
    }


def about_scores(scored: Sequence[QueryScores]) -> dict[str, Any]:
    """What a model read, and in what time."""
    tokens = np.asarray([count for scores in scored for count in scores.tokens], dtype=np.int64)
    truncated = np.asarray([count for scores in scored for count in scores.truncated], dtype=np.int64)
    seconds = np.asarray([scores.seconds for scores in scored], dtype=np.float64)
    total = float(seconds.sum())
    tied = sum(len(set(scores.logits)) < len(scores.logits) for scores in scored)
    facts: Mapping[str, Any] = {
        "queries_scored": len(scored),
        "pairs": int(tokens.size),
        "tokens": int(tokens.sum()),
        "longest_pair": int(tokens.max(initial=0)),
        "pairs_truncated": int(np.count_nonzero(truncated)),
        "tokens_truncated": int(truncated.sum()),
        "seconds": round(total, 3),
        "tokens_per_second": round(float(tokens.sum()) / total, 1) if total else None,
        "seconds_per_query": {
            "median": round(float(np.median(seconds)), 4) if seconds.size else None,
            "p95": round(float(np.percentile(seconds, 95)), 4) if seconds.size else None,
        },
        "queries_with_ties": tied,
        "tie_rule": TIE_RULE,
    }
    return dict(facts)


# Scores appended to a file as they come, so that a kill loses one query and never a number.
#
# A file is JSON lines: a header that says what the scores depend on, then a line a query. A line without its end (the
# kill came while it was written) is dropped. Files of shards lie beside each other and are read together.


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
