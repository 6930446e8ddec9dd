"""FORMATS: the input formats of training data. Each is read into examples: a query with its documents.

Most are JSON lines (``.gz`` too), recognised by the fields of the first record; two are folders, recognised by their
files. File names are not considered.

    pairs           query, passage, optional label or score        sentence-transformers' pairs, labelled or not
    triplets        query, positive, negative or negative_1 …      sentence-transformers' triplets and n-tuples
    lists           query, documents, labels and/or scores         sentence-transformers' labelled lists
    flagembedding   query, pos, neg, optional pos_scores, neg_scores   FlagEmbedding's fine-tuning data
    pylate          train.jsonl (query_id, document_ids, scores), queries.jsonl (query_id, text) and
                    documents.jsonl (document_id, text)            PyLate's knowledge distillation
    beir            corpus.jsonl, queries.jsonl, optional qrels/train.tsv; a TREC run can supply candidates
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from turborank.data.corpus import JsonlCorpus
from turborank.data.files import NOT_JSON, Place, identity, read_records, string_field
from turborank.data.trec import Qrels, Run, line_of, read_qrels, read_run
from turborank.errors import InputError

QUERY_FIELDS = ("query", "anchor")
PASSAGE_FIELDS = ("passage", "positive", "document", "text")
LIST_FIELDS = ("documents", "docs", "passages")
TRAIN = "train"  # the split whose labels are read


class JudgedDocument(NamedTuple):
    """A document of an example, with its label and a teacher's score where the source has them."""

    text: str
    label: int | None = None
    score: float | None = None
    id: str | None = None  # None where the source has no ids


class Example(NamedTuple):
    """A query and its documents."""

    query: str
    documents: tuple[JudgedDocument, ...]
    id: str | None = None


Record = Mapping[str, Any]


class Format(NamedTuple):
    """One input format. ``recognise`` takes the field names of a record, or the file names of a folder."""

    fields: str  # as shown in error messages
    recognise: Callable[[Collection[str]], bool]
    read: Callable[[Path], Iterator[Example]]
    folder: bool = False


def _first(names: Sequence[str], record: Collection[str]) -> str | None:
    return next((name for name in names if name in record), None)


def _text(record: dict[str, Any], names: Sequence[str], at: Place) -> str:
    return string_field(record, _first(names, record) or names[0], at.path, at.number)


def _label(value: Any, at: Place, field: str = "label") -> int:
    if not (isinstance(value, int) or (isinstance(value, float) and value.is_integer())):
        raise InputError(
            f"expected a whole number in the field {field!r}, got {value!r} at {at}",
            hint="put a teacher's judgement into scores",
        )
    return max(int(value), 0)


def _score(value: Any, at: Place, field: str = "score") -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= sys.float_info.max:
        raise InputError(f"expected a finite number in the field {field!r}, got {value!r} at {at}")
    return float(value)


def _listed(record: Record, field: str, at: Place, *, size: int | None = None) -> list[Any]:
    """A list in a field, or one encoded as a JSON string; InputError where it has not ``size`` values."""
    value = record.get(field)
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except NOT_JSON:
            value = None
    if not isinstance(value, list):
        raise InputError(f"expected a list in the field {field!r}, got {type(record.get(field)).__name__} at {at}")
    if size is not None and len(value) != size:
        raise InputError(f"expected {size} values in the field {field!r}, got {len(value)} at {at}")
    return value


def _strings(record: Record, field: str, at: Place) -> list[str]:
    values = _listed(record, field, at)
    wrong = [type(value).__name__ for value in values if not isinstance(value, str)]
    if wrong:
        raise InputError(f"expected strings in the field {field!r}, got {wrong[0]} at {at}")
    return values


def _optional(record: Record, field: str, at: Place, size: int) -> list[Any]:
    """A list of ``size`` values; Nones where the field is missing or null."""
    return [None] * size if record.get(field) is None else _listed(record, field, at, size=size)


def _pairs(path: Path) -> Iterator[Example]:
    for at, record in read_records(path):
        label, score = record.get("label"), record.get("score")
        relevance = _label(label, at) if label is not None else None if score is not None else 1
        judged = JudgedDocument(
            _text(record, PASSAGE_FIELDS, at), relevance, None if score is None else _score(score, at), None
        )
        yield Example(_text(record, QUERY_FIELDS, at), (judged,))


def _negatives(record: Collection[str]) -> list[str]:
    return sorted((name for name in record if name == "negative" or name.startswith("negative_")), key=_number_in)


def _number_in(name: str) -> tuple[int, str]:
    last = name.rpartition("_")[2]
    return (int(last) if last.isdecimal() else 0, name)


def _triplets(path: Path) -> Iterator[Example]:
    for at, record in read_records(path):
        negatives = [string_field(record, name, path, at.number) for name in _negatives(record)]
        documents = (
            JudgedDocument(_text(record, PASSAGE_FIELDS, at), 1),
            *(JudgedDocument(text, 0) for text in negatives),
        )
        yield Example(_text(record, QUERY_FIELDS, at), documents)


def _lists(path: Path) -> Iterator[Example]:
    for at, record in read_records(path):
        texts = _strings(record, _first(LIST_FIELDS, record) or LIST_FIELDS[0], at)
        labels = [
            None if one is None else _label(one, at, "labels") for one in _optional(record, "labels", at, len(texts))
        ]
        scores = [
            None if one is None else _score(one, at, "scores") for one in _optional(record, "scores", at, len(texts))
        ]
        yield Example(_text(record, QUERY_FIELDS, at), tuple(map(JudgedDocument, texts, labels, scores)))  # fmt: skip


def _flagembedding(path: Path) -> Iterator[Example]:
    for at, record in read_records(path):
        documents: list[JudgedDocument] = []
        for side, label in (("pos", 1), ("neg", 0)):
            texts = _strings(record, side, at)
            scores = _optional(record, f"{side}_scores", at, len(texts))
            documents += [
                JudgedDocument(text, label, None if score is None else _score(score, at, f"{side}_scores"))
                for text, score in zip(texts, scores, strict=True)
            ]
        yield Example(_text(record, QUERY_FIELDS, at), tuple(documents))


def _file(folder: Path, stem: str) -> Path:
    return next((path for path in (folder / f"{stem}.jsonl", folder / f"{stem}.jsonl.gz") if path.is_file()), folder)


def _named(path: Path, field: str) -> dict[str, str]:
    """Texts by id."""
    texts: dict[str, str] = {}
    for at, record in read_records(path):
        name = identity(record.get(field), field, at)
        if name in texts:
            raise InputError(f"expected each {field} once, got {name!r} again at {at}")
        texts[name] = string_field(record, "text", path, at.number)
    return texts


def _pylate(folder: Path) -> Iterator[Example]:
    queries, documents = _named(_file(folder, "queries"), "query_id"), _named(_file(folder, "documents"), "document_id")
    for at, record in read_records(_file(folder, "train")):
        query = identity(record.get("query_id"), "query_id", at)
        names = [identity(one, "document_ids", at) for one in _listed(record, "document_ids", at)]
        scores = [_score(one, at, "scores") for one in _listed(record, "scores", at, size=len(names))]
        unknown = [name for name in (query,) if name not in queries] + [one for one in names if one not in documents]
        if unknown:
            raise InputError(f"expected the text of every id, got {unknown[0]!r} without at {at}")
        judged = (JudgedDocument(documents[name], None, score, name) for name, score in zip(names, scores, strict=True))
        yield Example(queries[query], tuple(judged), query)


def _beir(folder: Path) -> Iterator[Example]:
    return beir(folder, None)


def beir(folder: Path, run: Path | None, depth: int | None = None) -> Iterator[Example]:
    """The queries of a BEIR folder with the documents in ``qrels/train.tsv`` and the best ``depth`` of a TREC run.

    A query in neither is an example without documents; its pool is mined.
    """
    queries = _named(folder / "queries.jsonl", "_id")
    path = folder / "qrels" / f"{TRAIN}.tsv"
    qrels: Qrels = read_qrels(path)[0] if path.is_file() else {}
    candidates: Run = read_run(run) if run is not None else {}
    for name in (*qrels, *candidates):
        if name not in queries:
            where = line_of(path, name) if name in qrels else run
            raise InputError(f"expected every query in {folder / 'queries.jsonl'}, got {name!r} missing at {where}")
    corpus = JsonlCorpus(folder / "corpus.jsonl")
    for query, text in queries.items():
        judged = qrels.get(query, {})
        names = dict.fromkeys([*judged, *(scored.doc_id for scored in candidates.get(query, [])[:depth])])
        documents = []
        for name in names:
            try:
                found = corpus.text(name)
            except KeyError:
                where = line_of(path, query, name) if name in judged else run
                raise InputError(f"expected every document in {corpus.path}, got {name!r} missing at {where}") from None
            label = max(judged[name], 0) if name in judged else None
            documents.append(JudgedDocument(found, label, None, identity(name, "_id", corpus.path)))
        yield Example(text, tuple(documents), identity(query, "_id", folder / "queries.jsonl"))


def _has(*groups: Sequence[str]) -> Callable[[Collection[str]], bool]:
    """Whether names contain one of every group."""
    return lambda names: all(_first(group, names) is not None for group in groups)


def _has_file(*stems: str) -> Callable[[Collection[str]], bool]:
    return _has(*((f"{stem}.jsonl", f"{stem}.jsonl.gz") for stem in stems))


FORMATS: Mapping[str, Format] = {
    "flagembedding": Format("query, pos, neg", _has(("query",), ("pos",), ("neg",)), _flagembedding),
    "lists": Format("query, documents, labels or scores", _has(QUERY_FIELDS, LIST_FIELDS), _lists),
    "triplets": Format(
        "query (or anchor), positive, negative or negative_1 …",
        lambda names: _has(QUERY_FIELDS, PASSAGE_FIELDS)(names) and bool(_negatives(names)),
        _triplets,
    ),
    "pairs": Format("query, passage (or positive)", _has(QUERY_FIELDS, PASSAGE_FIELDS), _pairs),
    "pylate": Format("train, queries, documents", _has_file("train", "queries", "documents"), _pylate, folder=True),
    "beir": Format("corpus, queries", _has(("corpus.jsonl",), ("queries.jsonl",)), _beir, folder=True),
}


def recognise(path: Path) -> str:
    """The format of a file or folder. Raises InputError, listing FORMATS, where it has none of them."""
    names: list[str]
    if path.is_dir():
        names, where = sorted(one.name for one in path.iterdir()), str(path)
    else:
        at, record = next(read_records(path), (Place(path, 1), {}))
        names, where = list(record), str(at)
    for name, row in FORMATS.items():
        if row.folder == path.is_dir() and row.recognise(names):
            return name
    what = "files" if path.is_dir() else "fields"
    known = "; ".join(f"{name}: {row.fields}" for name, row in FORMATS.items() if row.folder == path.is_dir())
    raise InputError(f"expected the {what} of a known format ({known}), got {', '.join(names) or 'none'} at {where}")


def examples(path: Path) -> Iterator[Example]:
    """The examples of a file or folder in any of FORMATS."""
    return FORMATS[recognise(path)].read(path)


def passages(path: Path) -> Iterator[tuple[str | None, str]]:
    """(id, text) of the documents of a BEIR corpus, or (None, text) of a file of records with a passage.

    A text may repeat in a file.
    """
    if path.is_dir():
        corpus = JsonlCorpus(path / "corpus.jsonl")
        for index, text in enumerate(corpus.texts()):
            yield identity(corpus.id_at(index), "_id", corpus.path), text
        return
    for at, record in read_records(path):
        yield None, _text(record, PASSAGE_FIELDS, at)
