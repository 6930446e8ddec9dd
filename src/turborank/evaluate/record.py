"""Results of an evaluation as plain values, their manifests, and the file of scores that makes it restartable."""

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

from turborank.data.corpus import Dataset
from turborank.data.dataset_table import PUBLISHED
from turborank.data.files import check_inputs, parse_object, read_lines
from turborank.data.trec import Qrels, Run
from turborank.errors import InputError
from turborank.evaluate.measures import Comparison, PerQuery


@dataclass(frozen=True)
class System:
    """Results of a first stage or a model on one dataset."""

    name: str
    model: Any  # the Reranker; None for the first stage
    run: Run
    values: PerQuery
    means: Mapping[str, float]
    manifest: Mapping[str, Any]
    seconds: Mapping[str, float]  # query id -> seconds to score its candidates
    curve: Mapping[int, float]  # depth reranked -> the compared measure; depth 0 is the first stage
    comparisons: Mapping[str, Comparison]  # name of another system -> this system's difference from it


@dataclass(frozen=True)
class Result:
    """All systems on one dataset, the first stage first."""

    dataset: Dataset
    systems: tuple[System, ...]
    qrels: Qrels  # of the queries evaluated
    measure: str  # the measure that is compared
    depth: int
    sampled: bool
    notes: tuple[str, ...] = ()

    @property
    def remarks(self) -> tuple[str, ...]:
        """Remarks that reports print with the numbers: sampling, and notes on the dataset and the run."""
        sample = (f"a sample of {len(self.qrels)} of {len(self.dataset.qrels)} queries",) if self.sampled else ()
        return (*sample, *self.dataset.notes, *self.notes)


class TableLine(NamedTuple):
    """A row of the summary: a system and its value on each dataset, None where there is none."""

    system: str
    values: tuple[float | None, ...]
    source: str = ""  # source of published figures; empty for figures of this evaluation


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
    """All results, with the software and the machine that produced them."""

    results: tuple[Result, ...]
    system: Mapping[str, Any]


# Manifests: what the numbers depend on.

LIBRARIES = ("turborank", "numpy", "tokenizers", "ir-measures", "pytrec-eval-terrier", "bm25s", "PyStemmer")
TIE_RULE = "measures break ties as trec_eval does: by document id, descending"


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "a source tree" if name == "turborank" else "not installed"


def cpu_name() -> str:
    """Model name of the processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def about_system() -> dict[str, Any]:
    """Versions of the software, and the machine."""
    return {
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "platform": platform.platform(terse=True),
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "versions": {name: _version(name) for name in LIBRARIES},
    }


def about_dataset(dataset: Dataset) -> dict[str, Any]:
    """The collection: counts, fingerprint, licence and notes."""
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
    """Totals of a model's scores: pairs, tokens, truncation, time."""
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


# Scores are appended to a file query by query, so that an interruption loses at most one query.
#
# The file is JSON lines: a header with everything the scores depend on, then one line per query. An incomplete last
# line (the process was killed while writing it) is dropped. The files of all shards in a folder are read together.


class QueryScores(NamedTuple):
    """A model's scores of one query's candidates, in the order of the first stage."""

    query_id: str
    logits: Sequence[float]
    tokens: Sequence[int]  # tokens read of each pair
    truncated: Sequence[int]  # tokens not read of each pair
    seconds: float


Header = Mapping[str, Any]


def _cut_unfinished(path: Path) -> None:
    """Truncate the file after its last line end."""
    with path.open("r+b") as file:
        data = file.read()
        file.truncate(data.rfind(b"\n") + 1)


def read(path: Path, header: Header) -> dict[str, QueryScores]:
    """Query id -> scores, from one file. Raises InputError if its header differs from ``header``."""
    known: dict[str, QueryScores] = {}
    found: dict[str, Any] | None = None
    for number, line in read_lines(path):
        record = parse_object(line, path, number)
        if found is None:
            found = record
            check_inputs(found, header, f"{path}:1")
            continue
        try:
            scores = QueryScores(**record)
        except TypeError as error:
            raise InputError(f"expected the scores of a query, got {', '.join(record)} at {path}:{number}") from error
        known[scores.query_id] = scores
    return known


def read_all(folder: Path, header: Header) -> dict[str, QueryScores]:
    """Query id -> scores, from the files of all shards in ``folder``. Raises as :func:`read`."""
    known: dict[str, QueryScores] = {}
    for path in sorted(folder.glob("scores*.jsonl")):
        _cut_unfinished(path)
        known.update(read(path, header))
    return known


@contextlib.contextmanager
def appending(path: Path, header: Header) -> Iterator[Callable[[QueryScores], None]]:
    """A function that appends one query's scores to the file and flushes it.

    Raises InputError if another process is writing to the file.
    """
    import fcntl

    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise InputError(
                f"expected no other process writing the scores, got one at {path}", hint="use another --out"
            ) from error

        def add(scores: QueryScores) -> None:
            file.write(json.dumps(scores._asdict()) + "\n")
            file.flush()

        if file.tell() == 0:
            file.write(json.dumps(dict(header)) + "\n")
            file.flush()
        yield add
