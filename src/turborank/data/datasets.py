"""A dataset, ready to be evaluated: checked queries, judgements and documents, and what had to be said about them."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from turborank.data.corpus import Corpus
from turborank.data.dataset_table import DATASETS, GROUPS, DatasetRow
from turborank.data.download import obtain
from turborank.data.layouts import LAYOUTS, Parts
from turborank.data.trec import Qrels, line_of
from turborank.errors import InputError, UnknownKeyError
from turborank.types import StartProgress, no_progress

SHOWN = 3  # examples in a message


@dataclass(frozen=True)
class Dataset:
    """Queries with judgements, over a corpus."""

    name: str
    split: str
    queries: dict[str, str]  # the judged ones, in the order of the judgements
    qrels: Qrels
    corpus: Corpus
    fingerprint: str  # changes whenever a query or a document does
    row: DatasetRow | None = None  # None: the user's own data
    notes: tuple[str, ...] = ()  # what was found, and how it is counted
    queries_are_documents: bool = False
    relevant_from: int = 1


def expand(names: Sequence[str]) -> list[str]:
    """Names with every group (``beir``, ``loco``, …) replaced by its datasets, each once."""
    spread = [member for name in names for member in GROUPS.get(name, (name,))]
    return list(dict.fromkeys(spread))


def default_data_dir() -> Path:
    """Where datasets are kept: ``TURBORANK_DATA``, or the user's cache."""
    named = os.environ.get("TURBORANK_DATA")
    base = os.environ.get("XDG_CACHE_HOME")
    return Path(named) if named else (Path(base) if base else Path.home() / ".cache") / "turborank" / "datasets"


def called(name: str) -> str:
    """What the dataset of that name, or at that path, is called in results."""
    path = Path(name)
    if name in DATASETS:
        return name
    return path.resolve().name if path.is_dir() else path.stem


def load(
    name: str,
    *,
    data_dir: Path | None = None,
    split: str | None = None,
    offline: bool = False,
    keep_unknown: bool = False,
    progress: StartProgress = no_progress,
) -> Dataset:
    """A dataset by name (a row of DATASETS), or the user's own: a folder in BEIR layout, or a LlamaIndex JSON file.

    ``keep_unknown`` keeps judgements of documents that are not in the corpus, as trec_eval would: they count as
    not found. Otherwise they are an error. Raises InputError for anything malformed, with file and line.
    """
    row = DATASETS.get(name)
    if row is not None:
        folder = obtain(row, data_dir or default_data_dir(), offline=offline, progress=progress)
        parts = LAYOUTS[row.layout](folder, split or row.split, progress(f"read {name}"))
        keep_unknown = keep_unknown or bool(row.files)
        return _checked(name, split or row.split, parts, row, keep_unknown)
    path = Path(name)
    if not path.exists():
        raise UnknownKeyError("dataset", name, (*DATASETS, *GROUPS), hint="or give a folder in BEIR layout")
    if path.is_dir():
        split = split or "test"
        return _checked(called(name), split, _folder(path, split, progress), None, keep_unknown)
    if split is not None:
        raise InputError(f"expected no split of a LlamaIndex file, which has none, got {split!r} for {path}")
    return _checked(called(name), "all", LAYOUTS["llamaindex"](path, "", None), None, keep_unknown)


def _folder(path: Path, split: str, progress: StartProgress) -> Parts:
    if (path / "questions_df.csv").exists():
        return LAYOUTS["chunks"](path, split, None)
    missing = [name for name in ("corpus.jsonl", "queries.jsonl", "qrels") if not (path / name).exists()]
    if missing:
        raise InputError(f"expected corpus.jsonl, queries.jsonl and qrels/ in {path}, got no {', '.join(missing)}")
    return LAYOUTS["beir"](path, split, progress(f"read {path.name}"))


def _examples(values: Sequence[str]) -> str:
    more = f" and {len(values) - SHOWN} more" if len(values) > SHOWN else ""
    return ", ".join(map(repr, values[:SHOWN])) + more


def _checked(name: str, split: str, parts: Parts, row: DatasetRow | None, keep_unknown: bool) -> Dataset:
    """A dataset from its parts, once they have been compared with each other and with the row's counts."""
    if not parts.qrels:
        raise InputError(f"expected judged queries in {name}, got none")
    unknown = [query_id for query_id in parts.qrels if query_id not in parts.queries]
    if unknown:
        raise InputError(
            f"expected every judged query among the queries of {name}, got {_examples(unknown)} without text"
            + (f" at {line_of(parts.judged_in, unknown[0])}" if parts.judged_in else "")
        )
    notes = [row.note] if row and row.note else []
    notes += _unknown_documents(name, parts, keep_unknown)
    if parts.repeated:
        notes.append(f"judgements that only repeat another: {parts.repeated}; each counts once")
    queries = {query_id: parts.queries[query_id] for query_id in parts.qrels}
    empty = [query_id for query_id, text in queries.items() if not text.strip()]
    if empty:
        notes.append(f"empty queries: {len(empty)} ({_examples(empty)}); they retrieve nothing and count as zero")
    relevant_from = row.relevant_from if row else 1
    hopeless = sum(max(judged.values(), default=0) < relevant_from for judged in parts.qrels.values())
    if hopeless:
        notes.append(
            f"queries without a relevant document (grade {relevant_from} or more): {hopeless}; they count as zero"
        )
    if row is not None and split == row.split:
        _assert_counts(row, parts)
    digest = hashlib.sha256(parts.corpus.fingerprint.encode())
    digest.update(
        json.dumps([queries, bool(row and row.queries_are_documents)], ensure_ascii=False).encode("utf-8", "replace")
    )
    return Dataset(
        name, split, queries, parts.qrels, parts.corpus, digest.hexdigest(), row, tuple(notes),
        queries_are_documents=bool(row and row.queries_are_documents), relevant_from=relevant_from,
    )  # fmt: skip


def _unknown_documents(name: str, parts: Parts, keep: bool) -> list[str]:
    judged = dict.fromkeys(doc_id for documents in parts.qrels.values() for doc_id in documents)
    unknown = [doc_id for doc_id in judged if doc_id not in parts.corpus]
    if unknown and not keep:
        query_id = next(one for one, documents in parts.qrels.items() if unknown[0] in documents)
        raise InputError(
            f"expected every judged document in the corpus of {name}, got {_examples(unknown)} missing"
            + (f" at {line_of(parts.judged_in, query_id, unknown[0])}" if parts.judged_in else ""),
            hint="complete the corpus, or keep them (--keep-unknown): they will count as not found",
        )
    if not unknown:
        return []
    return [f"judged documents not in the corpus: {len(unknown)} ({_examples(unknown)}); they count as not found"]


def _assert_counts(row: DatasetRow, parts: Parts) -> None:
    """The numbers of the table, so that another collection under the same name never passes for this one."""
    got = {
        "queries": len(parts.qrels),
        "documents": len(parts.corpus),
        "judgements": sum(map(len, parts.qrels.values())) + parts.repeated,
    }
    expected = {"queries": row.queries, "documents": row.documents, "judgements": row.judgements}
    wrong = [
        f"{expected[what]} {what}, got {count}" for what, count in got.items() if expected[what] not in (None, count)
    ]
    if wrong:
        raise InputError(
            f"expected {row.name} with {'; '.join(wrong)}", hint="the files are not the published collection"
        )
