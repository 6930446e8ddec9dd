"""The training folder: BEIR's layout plus TREC runs, so that everything in it can also be evaluated.

    corpus.jsonl            {"_id", "text"}                       passages ("title" is read, too)
    queries.jsonl           {"_id", "text", "source"?}
    qrels/train.tsv         graded labels of the training queries; optional (then only teachers supervise)
    qrels/dev.tsv           graded labels of the held-out queries; optional
    candidates.trec         the pool of each query: the documents its training lists are sampled from
    scores/<teacher>.trec   a teacher's scores of exactly those pools; scores/<teacher>.json describes the teacher
    manifest.json           what the folder was made from
    cache/                  cached teacher scores and vectors; can be deleted

Texts are held once, everything else in arrays: a pool entry takes 14 bytes, and 4 more per teacher.
"""

from __future__ import annotations

import functools
import re
from array import array
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from turborank.data.corpus import beir_text
from turborank.data.files import (
    file_hash,
    identity,
    parse_object,
    read_records,
    replacing,
    string_field,
    write_json,
)
from turborank.data.trec import Scored, format_run, read_qrels, read_run_lines
from turborank.errors import InputError
from turborank.types import Float32, Int32

CORPUS, QUERIES, CANDIDATES, MANIFEST = "corpus.jsonl", "queries.jsonl", "candidates.trec", "manifest.json"
SCORES, CACHE = "scores", "cache"
TRAIN, DEV = "train", "dev"
UNKNOWN = -1  # label of a document without a judgement
MAX_LABEL = (1 << 15) - 1
_NAME = re.compile(r"[\w.+-]+")  # of a teacher; used as a file name


class Ids:
    """Ids in order, and the index of each."""

    def __init__(self, names: Iterable[str]) -> None:
        self.names = list(names)
        self.index = {name: index for index, name in enumerate(self.names)}

    def __len__(self) -> int:
        return len(self.names)

    def lookup(self, name: str, what: str, where: str) -> int:
        """The index of an id. Raises InputError for an unknown one."""
        try:
            return self.index[name]
        except KeyError:
            raise InputError(f"expected a known {what}, got {name!r} at {where}") from None


@dataclass(frozen=True, eq=False)
class TrainingFolder:
    """Q queries, documents and N pool entries. The pool of query q is ``doc_index[bounds[q]:bounds[q + 1]]``."""

    path: Path
    query_ids: list[str]
    queries: list[str]
    sources: list[str]  # (Q,) source of each query; "" where the folder has none
    doc_ids: list[str]
    texts: list[str]
    held_out: npt.NDArray[np.bool_]  # (Q,) judged in qrels/dev.tsv: for evaluation, never for training
    bounds: npt.NDArray[np.int64]  # (Q+1,)
    doc_index: Int32  # (N,) 0-based indices into ``texts``, pool after pool
    first_stage: Float32  # (N,) the scores in candidates.trec
    labels: npt.NDArray[np.int16]  # (N,) graded relevance; UNKNOWN without a judgement
    labelled: int  # number of judgements, inside and outside pools

    @classmethod
    def load(cls, path: str | Path) -> TrainingFolder:
        """Read a folder. Raises InputError, with file and line, for malformed or contradictory contents."""
        folder = Path(path).expanduser()
        missing = [name for name in (CORPUS, QUERIES, CANDIDATES) if not (folder / name).is_file()]
        if missing:
            raise InputError(
                f"expected a training folder, got no {', '.join(missing)} in {folder}",
                hint="make one with turborank distill lists",
            )
        documents, texts, _ = _read_texts(folder / CORPUS, "document")
        queries, questions, sources = _read_texts(folder / QUERIES, "query")
        query_index, doc_index, scores = read_pairs(folder / CANDIDATES, queries, documents)
        order = np.argsort(query_index, kind="stable")  # a query's lines need not be adjacent
        bounds = np.searchsorted(query_index[order], np.arange(len(queries) + 1))
        judged = {split: _read_labels(folder, split, queries, documents) for split in (TRAIN, DEV)}
        held_out = np.zeros(len(queries), dtype=np.bool_)
        held_out[judged[DEV][0]] = True
        _refuse_overlap(folder, judged, queries)
        keys = _keys(query_index[order], doc_index[order], len(documents))
        labels = np.full(len(keys), UNKNOWN, dtype=np.int16)
        for judged_queries, judged_documents, grades in judged.values():
            found, at = _find(keys, _keys(judged_queries, judged_documents, len(documents)))
            labels[at[found]] = grades[found]
        return cls(
            folder, queries.names, questions, sources, documents.names, texts, held_out, bounds.astype(np.int64),
            doc_index[order], scores[order], labels, sum(len(grades) for *_, grades in judged.values()),
        )  # fmt: skip

    def __len__(self) -> int:
        return len(self.queries)

    def pool(self, query: int) -> slice:
        """The slice of a query in every (N,) array."""
        return slice(int(self.bounds[query]), int(self.bounds[query + 1]))

    @functools.cached_property
    def query_index(self) -> Int32:
        """(N,) index of the query of each pool entry."""
        return np.repeat(np.arange(len(self), dtype=np.int32), np.diff(self.bounds))

    def teachers(self) -> list[str]:
        """Names of the teachers with scores in the folder."""
        return sorted(path.stem for path in (self.path / SCORES).glob("*.trec"))

    def scores(self, teacher: str) -> Float32:
        """(N,) a teacher's scores of all pool entries.

        Raises InputError where scores are missing, or are of other texts or pools.
        """
        run, about = run_path(self.path, teacher), about_path(self.path, teacher)
        if not run.is_file():
            had = ", ".join(self.teachers()) or "none"
            raise InputError(
                f"expected the scores of {teacher!r} at {run}, got those of {had}", hint="see turborank distill score"
            )
        if about.is_file():
            made_from = parse_object(about.read_text(encoding="utf-8"), about, 1).get("made_from")
            if made_from != self.fingerprint:
                raise InputError(f"expected scores of this folder, got those of other texts or pools at {about}")
        return self.align(read_pairs(run, Ids(self.query_ids), Ids(self.doc_ids)), run)

    def align(self, run: tuple[Int32, Int32, Float32], path: Path) -> Float32:
        """(N,) the scores of a run, as :func:`read_pairs` reads it, for all pool entries; it may hold others, too.

        Raises InputError where a pool entry has no score.
        """
        query_index, doc_index, scores = run
        found, at = _find(self.pool_keys, _keys(query_index, doc_index, len(self.doc_ids)))
        values = np.full(len(self.doc_index), np.nan, dtype=np.float32)
        values[at[found]] = scores[found]
        if absent := int(np.isnan(values).sum()):
            raise InputError(f"expected scores of all {len(values)} pool entries, got {absent} without at {path}")
        return values

    @functools.cached_property
    def pool_keys(self) -> npt.NDArray[np.int64]:
        """(N,) one number per (query, document) pair of the pools."""
        return _keys(self.query_index, self.doc_index, len(self.doc_ids))

    @functools.cached_property
    def fingerprint(self) -> dict[str, str]:
        """SHA-256 of the files that scores depend on, by name."""
        return {name: file_hash(self.path / name) for name in (CORPUS, QUERIES, CANDIDATES)}

    def write_scores(self, teacher: str, scores: Float32, about: Mapping[str, Any]) -> Path:
        """Write a teacher's scores (N,) as a TREC run with a manifest; the path of the run.

        Raises InputError for an invalid name or a score that is not finite.
        """
        check_name(teacher)
        if scores.shape != self.doc_index.shape or not np.isfinite(scores).all():
            bad = int((~np.isfinite(scores)).sum())
            raise InputError(f"expected {len(self.doc_index)} finite scores of {teacher}, got {len(scores)}, {bad} not")
        path = run_path(self.path, teacher)
        write_pools(path, self.query_ids, self.doc_ids, self.bounds, self.doc_index, scores, teacher)
        facts = {"teacher": teacher, **about, "pairs": len(scores), "made_from": self.fingerprint}
        write_json(about_path(self.path, teacher), {**facts, "sha256": file_hash(path)})
        return path


def check_name(teacher: str) -> str:
    """A teacher's name. Raises InputError for one that cannot be a file name."""
    if not _NAME.fullmatch(teacher) or teacher.startswith("."):
        raise InputError(f"expected a teacher's name of letters, digits, . _ + and -, got {teacher!r}")
    return teacher


def run_path(folder: Path, teacher: str) -> Path:
    """The file of a teacher's scores."""
    return folder / SCORES / f"{teacher}.trec"


def about_path(folder: Path, teacher: str) -> Path:
    """The file that describes a teacher's scores."""
    return folder / SCORES / f"{teacher}.json"


def _keys(queries: Int32, documents: Int32, count: int) -> npt.NDArray[np.int64]:
    keys: npt.NDArray[np.int64] = queries.astype(np.int64) * count + documents
    return keys


def _find(
    keys: npt.NDArray[np.int64], wanted: npt.NDArray[np.int64]
) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.int64]]:
    """For each of ``wanted`` (M,): whether it is in ``keys`` (N,), and its index there."""
    if not len(keys):
        return np.zeros(len(wanted), dtype=np.bool_), np.zeros(len(wanted), dtype=np.int64)
    order = np.argsort(keys, kind="stable")
    at = order[np.minimum(np.searchsorted(keys, wanted, sorter=order), len(keys) - 1)]
    return keys[at] == wanted, at


def _read_texts(path: Path, what: str) -> tuple[Ids, list[str], list[str]]:
    """Ids, texts and sources of a BEIR JSONL file."""
    names: dict[str, None] = {}
    texts: list[str] = []
    sources: list[str] = []
    kept: dict[str, str] = {}  # one string object per source, to save memory
    for at, record in read_records(path):
        name = identity(record.get("_id"), "_id", at)
        if name in names:
            raise InputError(f"expected each {what} id once, got {name!r} again at {at}")
        names[name] = None
        title = string_field(record, "title", path, at.number, default="")
        texts.append(beir_text(title, string_field(record, "text", path, at.number)))
        source = string_field(record, "source", path, at.number, default="")
        sources.append(kept.setdefault(source, source))
    if not names:
        raise InputError(f"expected at least one {what}, got none at {path}")
    return Ids(names), texts, sources


def _read_labels(folder: Path, split: str, queries: Ids, documents: Ids) -> tuple[Int32, Int32, npt.NDArray[np.int16]]:
    """(query indices, document indices, grades) of a split, (M,) each; empty without a file.

    Negative grades become 0.
    """
    path = folder / "qrels" / f"{split}.tsv"
    qrels = read_qrels(path)[0] if path.is_file() else {}
    rows = [
        (
            queries.lookup(query, "query", str(path)),
            documents.lookup(document, "document", str(path)),
            min(max(grade, 0), MAX_LABEL),
        )
        for query, judged in qrels.items()
        for document, grade in judged.items()
    ]
    columns = np.array(rows, dtype=np.int32).reshape(-1, 3)
    return columns[:, 0], columns[:, 1], columns[:, 2].astype(np.int16)


def _refuse_overlap(folder: Path, judged: Mapping[str, tuple[Int32, Int32, Any]], queries: Ids) -> None:
    both = np.intersect1d(judged[TRAIN][0], judged[DEV][0])
    if len(both):
        raise InputError(
            f"expected held-out queries in {folder}/qrels/dev.tsv only, got {queries.names[both[0]]!r} "
            f"and {len(both) - 1} more in train.tsv, too"
        )


def read_pairs(path: Path, queries: Ids, documents: Ids) -> tuple[Int32, Int32, Float32]:
    """A TREC run as arrays (N,): query indices, document indices and scores, in the order of the file.

    Raises InputError, with file and line, as :func:`turborank.data.trec.read_run_lines` does, and for unknown ids.
    """
    columns, scores, lines = (array("i"), array("i")), array("f"), array("q")
    for number, query_id, doc_id, score in read_run_lines(path):
        where = f"{path}:{number}"
        columns[0].append(queries.lookup(query_id, "query", where))
        columns[1].append(documents.lookup(doc_id, "document", where))
        scores.append(score)
        lines.append(number)
    query_index, doc_index = (np.frombuffer(column, dtype=np.int32) for column in columns)
    keys = _keys(query_index, doc_index, len(documents))
    order = np.argsort(keys, kind="stable")
    again = np.flatnonzero(keys[order][1:] == keys[order][:-1])
    if len(again):
        at = int(order[again[0] + 1])
        raise InputError(
            f"expected each document once per query, got {documents.names[doc_index[at]]!r} again at {path}:{lines[at]}"
        )
    return query_index, doc_index, np.frombuffer(scores, dtype=np.float32)


def write_pools(
    path: Path,
    query_ids: Sequence[str],
    doc_ids: Sequence[str],
    bounds: npt.NDArray[np.int64],
    doc_index: Int32,
    scores: Float32,
    tag: str,
) -> None:
    """Write pools as a TREC run: each query's documents by descending score, ties in the given order."""
    with replacing(path) as file:
        for query, name in enumerate(query_ids):
            pool = slice(int(bounds[query]), int(bounds[query + 1]))
            values, members = scores[pool], doc_index[pool]
            ranking = np.argsort(-values, kind="stable")
            found = (Scored(doc_ids[members[at]], float(values[at])) for at in ranking)
            file.write(format_run(name, found, tag).encode())
