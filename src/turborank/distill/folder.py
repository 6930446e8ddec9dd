"""A training folder: BEIR's layout and TREC runs, so that everything in it can also be evaluated.

    corpus.jsonl            {"_id", "text"}                       passages ("title" is read too)
    queries.jsonl           {"_id", "text", "source"?}
    qrels/train.tsv         graded labels of the queries to learn from; may be absent (then only teachers speak)
    qrels/dev.tsv           those of the held-out queries; may be absent
    candidates.trec         of each query the pool of documents that its lists are drawn from
    scores/<teacher>.trec   a teacher's scores of exactly those pools; scores/<teacher>.json says whose they are
    manifest.json           where it all came from
    cache/                  what teachers remember; can be deleted

Texts are held once and everything else in arrays: a pool place costs 14 bytes, and 4 more for each teacher.
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
from turborank.types import Float32

CORPUS, QUERIES, CANDIDATES, MANIFEST = "corpus.jsonl", "queries.jsonl", "candidates.trec", "manifest.json"
SCORES, CACHE = "scores", "cache"
TRAIN, DEV = "train", "dev"
UNKNOWN = -1  # the label of a document nobody judged
MAX_LABEL = (1 << 15) - 1
_NAME = re.compile(r"[\w.+-]+")  # of a teacher: it becomes a file's name

Places = npt.NDArray[np.int32]


class Ids:
    """Ids in their order, and the place of each."""

    def __init__(self, names: Iterable[str]) -> None:
        self.names = list(names)
        self.places = {name: place for place, name in enumerate(self.names)}

    def __len__(self) -> int:
        return len(self.names)

    def at(self, name: str, what: str, where: str) -> int:
        """The place of an id. Raises InputError where there is none."""
        try:
            return self.places[name]
        except KeyError:
            raise InputError(f"expected a known {what}, got {name!r} at {where}") from None


@dataclass(frozen=True, eq=False)
class TrainingFolder:
    """Queries, documents and pools. The pool of query q is ``places[bounds[q]:bounds[q + 1]]``."""

    path: Path
    query_ids: list[str]
    queries: list[str]
    sources: list[str]  # of each query; "" where the folder does not say
    doc_ids: list[str]
    texts: list[str]
    held_out: npt.NDArray[np.bool_]  # (Q,) judged in qrels/dev.tsv: to measure with, never to train on
    bounds: npt.NDArray[np.int64]  # (Q+1,)
    places: Places  # (N,) 0-based places in ``texts``, pool after pool
    first_stage: Float32  # (N,) the scores in candidates.trec
    labels: npt.NDArray[np.int16]  # (N,) graded relevance, UNKNOWN where nobody judged
    labelled: int  # judgements, in a pool or not

    @classmethod
    def load(cls, path: str | Path) -> TrainingFolder:
        """Raises InputError, with file and line, for whatever in the folder is malformed or contradicts the rest."""
        folder = Path(path).expanduser()
        missing = [name for name in (CORPUS, QUERIES, CANDIDATES) if not (folder / name).is_file()]
        if missing:
            raise InputError(
                f"expected a training folder, got no {', '.join(missing)} in {folder}",
                hint="make one with turborank distill lists",
            )
        documents, texts, _ = _read_texts(folder / CORPUS, "document")
        queries, questions, sources = _read_texts(folder / QUERIES, "query")
        which, places, scores = read_pairs(folder / CANDIDATES, queries, documents)
        order = np.argsort(which, kind="stable")  # a file may come back to a query
        bounds = np.searchsorted(which[order], np.arange(len(queries) + 1))
        judged = {split: _read_labels(folder, split, queries, documents) for split in (TRAIN, DEV)}
        held_out = np.zeros(len(queries), dtype=np.bool_)
        held_out[judged[DEV][0]] = True
        _refuse_overlap(folder, judged, queries)
        keys = _keys(which[order], places[order], len(documents))
        labels = np.full(len(keys), UNKNOWN, dtype=np.int16)
        for asked, judged_places, grades in judged.values():
            found, at = _find(keys, _keys(asked, judged_places, len(documents)))
            labels[at[found]] = grades[found]
        return cls(
            folder, queries.names, questions, sources, documents.names, texts, held_out, bounds.astype(np.int64),
            places[order], scores[order], labels, sum(len(grades) for *_, grades in judged.values()),
        )  # fmt: skip

    def __len__(self) -> int:
        return len(self.queries)

    def pool(self, query: int) -> slice:
        """Where the pool of a query (its place) lies in ``places``, ``labels`` and every teacher's scores."""
        return slice(int(self.bounds[query]), int(self.bounds[query + 1]))

    @functools.cached_property
    def query_of(self) -> Places:
        """(N,) the query of every pool place."""
        return np.repeat(np.arange(len(self), dtype=np.int32), np.diff(self.bounds))

    def teachers(self) -> list[str]:
        """The names of the teachers whose scores are here."""
        return sorted(path.stem for path in (self.path / SCORES).glob("*.trec"))

    def scores(self, teacher: str) -> Float32:
        """(N,) a teacher's scores of all pool places.

        Raises InputError where it has not scored them all, or scored other texts or pools.
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

    def align(self, run: tuple[Places, Places, Float32], path: Path) -> Float32:
        """(N,) the scores of a run, as :func:`read_pairs` reads it, for all pool places; it may hold others, too.

        Raises InputError where a pool place has no score.
        """
        which, places, scores = run
        found, at = _find(self.pool_keys, _keys(which, places, len(self.doc_ids)))
        values = np.full(len(self.places), np.nan, dtype=np.float32)
        values[at[found]] = scores[found]
        if absent := int(np.isnan(values).sum()):
            raise InputError(f"expected scores of all {len(values)} pool places, got {absent} without at {path}")
        return values

    @functools.cached_property
    def pool_keys(self) -> npt.NDArray[np.int64]:
        """(N,) one number for each (query, document) of the pools."""
        return _keys(self.query_of, self.places, len(self.doc_ids))

    @functools.cached_property
    def fingerprint(self) -> dict[str, str]:
        """sha256 of the files that scores depend on."""
        return {name: file_hash(self.path / name) for name in (CORPUS, QUERIES, CANDIDATES)}

    def write_scores(self, teacher: str, scores: Float32, about: Mapping[str, Any]) -> Path:
        """A teacher's (N,) scores as a run with a manifest; the run's path. Raises InputError for a bad name or NaN."""
        check_name(teacher)
        if scores.shape != self.places.shape or not np.isfinite(scores).all():
            bad = int((~np.isfinite(scores)).sum())
            raise InputError(f"expected {len(self.places)} finite scores of {teacher}, got {len(scores)}, {bad} not")
        path = run_path(self.path, teacher)
        write_pools(path, self.query_ids, self.doc_ids, self.bounds, self.places, scores, teacher)
        facts = {"teacher": teacher, **about, "pairs": len(scores), "made_from": self.fingerprint}
        write_json(about_path(self.path, teacher), {**facts, "sha256": file_hash(path)})
        return path


def check_name(teacher: str) -> str:
    """The name of a teacher. Raises InputError for one that cannot be a file's."""
    if not _NAME.fullmatch(teacher) or teacher.startswith("."):
        raise InputError(f"expected a teacher's name of letters, digits, . _ + and -, got {teacher!r}")
    return teacher


def run_path(folder: Path, teacher: str) -> Path:
    """Where a teacher's scores are."""
    return folder / SCORES / f"{teacher}.trec"


def about_path(folder: Path, teacher: str) -> Path:
    """Where it is said whose they are."""
    return folder / SCORES / f"{teacher}.json"


def _keys(queries: Places, documents: Places, count: int) -> npt.NDArray[np.int64]:
    keys: npt.NDArray[np.int64] = queries.astype(np.int64) * count + documents
    return keys


def _find(
    keys: npt.NDArray[np.int64], wanted: npt.NDArray[np.int64]
) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.int64]]:
    """Whether each of ``wanted`` is among ``keys``, and where."""
    if not len(keys):
        return np.zeros(len(wanted), dtype=np.bool_), np.zeros(len(wanted), dtype=np.int64)
    order = np.argsort(keys, kind="stable")
    at = order[np.minimum(np.searchsorted(keys, wanted, sorter=order), len(keys) - 1)]
    return keys[at] == wanted, at


def _read_texts(path: Path, what: str) -> tuple[Ids, list[str], list[str]]:
    """Ids, texts and sources of a BEIR file."""
    names: dict[str, None] = {}
    texts: list[str] = []
    sources: list[str] = []
    kept: dict[str, str] = {}  # one string for each source
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


def _read_labels(
    folder: Path, split: str, queries: Ids, documents: Ids
) -> tuple[Places, Places, npt.NDArray[np.int16]]:
    """(query places, document places, grades) of a split, none below 0; empty where there is no such file."""
    path = folder / "qrels" / f"{split}.tsv"
    qrels = read_qrels(path)[0] if path.is_file() else {}
    rows = [
        (
            queries.at(query, "query", str(path)),
            documents.at(document, "document", str(path)),
            min(max(grade, 0), MAX_LABEL),
        )
        for query, judged in qrels.items()
        for document, grade in judged.items()
    ]
    columns = np.array(rows, dtype=np.int32).reshape(-1, 3)
    return columns[:, 0], columns[:, 1], columns[:, 2].astype(np.int16)


def _refuse_overlap(folder: Path, judged: Mapping[str, tuple[Places, Places, Any]], queries: Ids) -> None:
    both = np.intersect1d(judged[TRAIN][0], judged[DEV][0])
    if len(both):
        raise InputError(
            f"expected held-out queries in {folder}/qrels/dev.tsv only, got {queries.names[both[0]]!r} "
            f"and {len(both) - 1} more in train.tsv, too"
        )


def read_pairs(path: Path, queries: Ids, documents: Ids) -> tuple[Places, Places, Float32]:
    """A TREC run as arrays (N,): places of the query and of the document, score; in the order of the file.

    Raises InputError, with file and line, as :func:`turborank.data.trec.read_run_lines` does, and for unknown ids.
    """
    which, places, scores, lines = array("i"), array("i"), array("f"), array("q")
    for number, query_id, doc_id, score in read_run_lines(path):
        where = f"{path}:{number}"
        which.append(queries.at(query_id, "query", where))
        places.append(documents.at(doc_id, "document", where))
        scores.append(score)
        lines.append(number)
    asked, found = np.frombuffer(which, dtype=np.int32), np.frombuffer(places, dtype=np.int32)
    keys = _keys(asked, found, len(documents))
    order = np.argsort(keys, kind="stable")
    again = np.flatnonzero(keys[order][1:] == keys[order][:-1])
    if len(again):
        at = int(order[again[0] + 1])
        raise InputError(
            f"expected each document once a query, got {documents.names[found[at]]!r} again at {path}:{lines[at]}"
        )
    return asked, found, np.frombuffer(scores, dtype=np.float32)


def write_pools(
    path: Path,
    query_ids: Sequence[str],
    doc_ids: Sequence[str],
    bounds: npt.NDArray[np.int64],
    places: Places,
    scores: Float32,
    tag: str,
) -> None:
    """Pools as a TREC run: each query's documents by falling score, equal ones in the order given."""
    with replacing(path) as file:
        for query, name in enumerate(query_ids):
            pool = slice(int(bounds[query]), int(bounds[query + 1]))
            values, members = scores[pool], places[pool]
            ranking = np.argsort(-values, kind="stable")
            found = (Scored(doc_ids[members[at]], float(values[at])) for at in ranking)
            file.write(format_run(name, found, tag).encode())
