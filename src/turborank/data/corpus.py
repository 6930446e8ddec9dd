"""Corpora that need not fit into memory, and LAYOUTS, the file layouts of collections.

A BEIR ``corpus.jsonl`` is read once: every line is validated, and 16 bytes per document are kept, a 64-bit hash of the
id and the byte offset. Texts are read on access. Each look-up compares the full id, so a hash collision only costs an
additional read.

Each layout is read into queries, documents and judgements.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import mmap
import tarfile
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from turborank.data.dataset_table import DatasetRow
from turborank.data.files import (
    MARK,
    NOT_JSON,
    checked_id,
    decode,
    json_fault,
    numbered,
    open_binary,
    parse_object,
    read_lines,
    string_field,
)
from turborank.data.trec import Qrels, read_qrels
from turborank.errors import InputError
from turborank.types import Progress

REPORT_EVERY = 1 << 22  # bytes between two progress reports


class Corpus(Protocol):
    """Documents by id, in a fixed order. ``fingerprint`` changes whenever a document does."""

    fingerprint: str

    def __len__(self) -> int: ...

    def __contains__(self, doc_id: object) -> bool: ...

    def text(self, doc_id: str) -> str: ...

    def id_at(self, position: int) -> str: ...

    def texts(self) -> Iterator[str]: ...


def beir_text(title: str, text: str) -> str:
    """The text that is searched and reranked: title and text joined by a space, as in BEIR."""
    return f"{title} {text}".strip()


def _hash(doc_id: str) -> int:
    return int.from_bytes(hashlib.blake2b(doc_id.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")


def _blank(raw: bytes, number: int) -> bool:
    return not (raw.removeprefix(MARK) if number == 1 else raw).strip()


class JsonlCorpus:
    """A ``corpus.jsonl`` of ``{"_id", "title", "text"}`` on disk.

    Raises InputError, with file and line, for a malformed line, a missing or repeated id, and non-UTF-8.
    """

    def __init__(self, path: Path, *, progress: Progress | None = None) -> None:
        self.path = path
        offsets, hashes = array("q"), array("Q")
        digest = hashlib.sha256()
        size, offset, reported = path.stat().st_size if path.exists() else 0, 0, 0
        if path.suffix == ".gz":
            raise InputError(f"expected an unpacked corpus, of which any document can be read, got {path}")
        with open_binary(path) as file:
            for number, raw in enumerate(file, 1):
                digest.update(raw)
                if not _blank(raw, number):
                    doc_id, _ = self._parse(raw, number)
                    offsets.append(offset)
                    hashes.append(_hash(doc_id))
                offset += len(raw)
                if progress is not None and offset - reported >= REPORT_EVERY:
                    progress(offset, size)
                    reported = offset
        if progress is not None:
            progress(size, size)
        self.fingerprint = digest.hexdigest()
        self._offsets: npt.NDArray[np.int64] = np.frombuffer(offsets, dtype=np.int64)
        keys: npt.NDArray[np.uint64] = np.frombuffer(hashes, dtype=np.uint64)
        self._order = np.argsort(keys, kind="stable")
        self._keys = keys[self._order]
        if not len(keys):
            raise InputError(f"expected documents, got none at {path}")
        with path.open("rb") as file:
            self._bytes = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self._refuse_duplicates()

    def _parse(self, raw: bytes, number: int) -> tuple[str, str]:
        record = parse_object(decode(raw, self.path, number), self.path, number)
        doc_id = checked_id(string_field(record, "_id", self.path, number), f"{self.path}:{number}")
        title = string_field(record, "title", self.path, number, default="")
        return doc_id, beir_text(title, string_field(record, "text", self.path, number))

    def _refuse_duplicates(self) -> None:
        repeated = self._keys[1:][self._keys[1:] == self._keys[:-1]]
        known: dict[str, int] = {}
        for place in np.flatnonzero(np.isin(self._keys, repeated)):
            position = int(self._order[place])
            doc_id = self.id_at(position)
            if (first := known.setdefault(doc_id, position)) != position:
                lines = [f"{self.path}:{self._line_number(one)}" for one in (first, position)]
                raise InputError(f"expected each document id once, got {doc_id!r} at {' and again at '.join(lines)}")

    def _line_number(self, position: int) -> int:
        return self._bytes[: int(self._offsets[position])].count(b"\n") + 1

    def _read(self, position: int) -> tuple[str, str]:
        start = int(self._offsets[position])
        end = self._bytes.find(b"\n", start)
        return self._parse(self._bytes[start : len(self._bytes) if end < 0 else end], 1 if position == 0 else 0)

    def _find(self, doc_id: str) -> str | None:
        """The text of a document, or None."""
        key = np.uint64(_hash(doc_id))
        start, end = np.searchsorted(self._keys, key, "left"), np.searchsorted(self._keys, key, "right")
        for place in range(int(start), int(end)):
            found, text = self._read(int(self._order[place]))
            if found == doc_id:
                return text
        return None

    def __len__(self) -> int:
        return len(self._offsets)

    def __contains__(self, doc_id: object) -> bool:
        return isinstance(doc_id, str) and self._find(doc_id) is not None

    def text(self, doc_id: str) -> str:
        """The text of a document. Raises KeyError for an unknown id."""
        text = self._find(doc_id)
        if text is None:
            raise KeyError(doc_id)
        return text

    def id_at(self, position: int) -> str:
        """The id of the document with this index (from 0) in the file."""
        return self._read(position)[0]

    def texts(self) -> Iterator[str]:
        """All texts in the order of the file, streamed."""
        with open_binary(self.path) as file:
            for number, raw in enumerate(file, 1):
                if not _blank(raw, number):
                    yield self._parse(raw, number)[1]


class MemoryCorpus:
    """Documents held as a mapping from id to text."""

    def __init__(self, documents: Mapping[str, str]) -> None:
        self._documents = dict(documents)
        self._ids = list(self._documents)
        digest = hashlib.sha256()
        for doc_id, text in self._documents.items():
            digest.update(f"{doc_id}\0{text}\0".encode("utf-8", "surrogatepass"))
        self.fingerprint = digest.hexdigest()

    def __len__(self) -> int:
        return len(self._ids)

    def __contains__(self, doc_id: object) -> bool:
        return doc_id in self._documents

    def text(self, doc_id: str) -> str:
        """The text of a document. Raises KeyError for an unknown id."""
        return self._documents[doc_id]

    def id_at(self, position: int) -> str:
        """The id of the document with this index (from 0)."""
        return self._ids[position]

    def texts(self) -> Iterator[str]:
        """All texts, in order."""
        return iter(self._documents.values())


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


# ---------------------------------------------------------------- layouts of collections

MAX_FIELD = 1 << 24  # maximum characters of a CSV field: references may quote pages
CHUNK_WORDS = 200  # words of a chunk, for collections of whole texts


class Parts(NamedTuple):
    """A collection as read, before validation."""

    queries: dict[str, str]
    corpus: Corpus
    qrels: Qrels
    repeated: int = 0  # number of judgements that repeat one
    judged_in: Path | None = None  # the file of the judgements, if it has one a line


Layout = Callable[[Path, str, Progress | None], Parts]  # (folder or file, split, progress)


def _unique(pairs: Iterable[tuple[str, str, int]], what: str, path: Path) -> dict[str, str]:
    """Convert (id, text, line) to a mapping. Raises InputError, with file and line, for a repeated id."""
    known: dict[str, str] = {}
    for name, text, number in pairs:
        if name in known:
            raise InputError(f"expected each {what} id once, got {name!r} again at {path}:{number}")
        known[checked_id(name, f"{path}:{number}")] = text
    return known


def _whole_text(path: Path) -> str:
    with open_binary(path) as file:
        return "".join(decode(raw, path, number) + "\n" for number, raw in numbered(file, path))


def _json_file(path: Path) -> Any:
    text = _whole_text(path)

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        value = dict(pairs)
        if len(value) < len(pairs):
            twice = next(name for i, (name, _) in enumerate(pairs) if name in dict(pairs[:i]))
            raise InputError(f"expected each key once in a JSON object, got {twice!r} again in {path}")
        return value

    try:
        return json.loads(text, object_pairs_hook=once)
    except InputError:  # a ValueError, too
        raise
    except NOT_JSON as error:
        line = f":{error.lineno}" if isinstance(error, json.JSONDecodeError) else ""
        raise InputError(f"expected JSON, got {json_fault(error)} at {path}{line}") from error


def beir(folder: Path, split: str, progress: Progress | None) -> Parts:
    """``corpus.jsonl``, ``queries.jsonl`` and ``qrels/<split>.tsv``."""
    qrels_path, queries_path = folder / "qrels" / f"{split}.tsv", folder / "queries.jsonl"
    if not qrels_path.exists():
        splits = sorted(path.stem for path in (folder / "qrels").glob("*.tsv")) or ["none"]
        raise InputError(f"expected the split {split!r} at {qrels_path}, got {', '.join(splits)}")
    qrels, repeated = read_qrels(qrels_path)
    records = ((parse_object(line, queries_path, number), number) for number, line in read_lines(queries_path))
    queries = _unique(
        (
            (
                string_field(record, "_id", queries_path, number),
                string_field(record, "text", queries_path, number),
                number,
            )
            for record, number in records
        ),
        "query",
        queries_path,
    )
    return Parts(queries, JsonlCorpus(folder / "corpus.jsonl", progress=progress), qrels, repeated, qrels_path)


def _text_mapping(value: object, field: str, path: Path) -> dict[str, str]:
    if not isinstance(value, dict) or not all(isinstance(text, str) for text in value.values()):
        raise InputError(f"expected {field!r} to map ids to strings, got {type(value).__name__} in {path}")
    return {checked_id(name, path): text for name, text in value.items()}


def llamaindex(path: Path, split: str, progress: Progress | None) -> Parts:
    """LlamaIndex's ``EmbeddingQAFinetuneDataset`` as JSON: queries, corpus, relevant_docs."""
    value = _json_file(path)
    found = value if isinstance(value, dict) else {}
    missing = [field for field in ("queries", "corpus", "relevant_docs") if field not in found]
    if missing:
        raise InputError(f"expected an EmbeddingQAFinetuneDataset, got no {', '.join(missing)} in {path}")
    relevant = value["relevant_docs"]
    if not isinstance(relevant, dict) or not all(isinstance(docs, list) for docs in relevant.values()):
        raise InputError(f"expected 'relevant_docs' to map query ids to lists of ids in {path}")
    corpus = MemoryCorpus(_text_mapping(value["corpus"], "corpus", path))
    qrels = {query_id: {checked_id(str(doc), path): 1 for doc in docs} for query_id, docs in relevant.items()}
    return Parts(_text_mapping(value["queries"], "queries", path), corpus, qrels)


def scrolls(folder: Path, split: str, progress: Progress | None) -> Parts:
    """A SCROLLS task as LoCoV0 reads it: in each row, the output is the query and the input its only document."""
    path = folder / f"{split}.jsonl"
    queries, documents = {}, {}
    for number, line in read_lines(path):
        record = parse_object(line, path, number)
        queries[f"Query_{number - 1}"] = string_field(record, "output", path, number)
        documents[f"Passage_{number - 1}"] = string_field(record, "input", path, number)
    qrels = {query: {passage: 1} for query, passage in zip(queries, documents, strict=True)}
    return Parts(queries, MemoryCorpus(documents), qrels)


def qasper(folder: Path, field: str) -> Parts:
    """QASPER's test papers as LoCoV0 reads them: ``field`` is the query, the sections are the document."""
    archive = folder / "qasper-test.tgz"
    with tarfile.open(archive) as tar:
        member = next((name for name in tar.getnames() if name.endswith("qasper-test-v0.3.json")), None)
        file = tar.extractfile(member) if member else None
        if file is None:
            raise InputError(f"expected qasper-test-v0.3.json inside {archive}")
        papers: Mapping[str, Any] = json.load(file)
    queries, documents, qrels = {}, {}, {}
    for paper_id, paper in papers.items():
        sections = ((part["section_name"], "\n".join(part["paragraphs"])) for part in paper["full_text"])
        documents[paper_id] = "\n".join(text for section in sections for text in section if text).strip()
        queries[f"q{paper_id}"] = paper[field]
        qrels[f"q{paper_id}"] = {paper_id: 1}
    return Parts(queries, MemoryCorpus(documents), qrels)


def anthropic_docs(folder: Path, split: str, progress: Progress | None) -> Parts:
    """The dataset of Anthropic's RAG cookbook: documentation chunks, and questions with their correct chunks."""
    if (folder / "corpus.jsonl").exists():
        return beir(folder, split, progress)
    chunks, questions = _json_file(folder / "anthropic_docs.json"), _json_file(folder / "docs_evaluation_dataset.json")
    documents = {chunk["chunk_link"]: beir_text(chunk["chunk_heading"], chunk["text"]) for chunk in chunks}
    queries = {question["id"]: question["question"] for question in questions}
    qrels = {question["id"]: dict.fromkeys(question["correct_chunks"], 1) for question in questions}
    return Parts(queries, MemoryCorpus(documents), qrels)


def cut(text: str, words: int = CHUNK_WORDS) -> list[tuple[int, int]]:
    """Character offsets (start, end) of consecutive chunks of ``words`` words; each character is in one chunk."""
    starts, count, inside = [0], 0, False
    for index, character in enumerate(text):
        if not character.isspace() and not inside:
            if count and count % words == 0:
                starts.append(index)
            count += 1
        inside = not character.isspace()
    return list(zip(starts, [*starts[1:], len(text)], strict=True))


def holder(chunks: list[tuple[int, int]], start: int, end: int) -> int:
    """Index of the chunk with the most characters of start … end; the first one of several."""
    return max(range(len(chunks)), key=lambda i: (min(end, chunks[i][1]) - max(start, chunks[i][0]), -i))


def _rows(path: Path) -> Iterator[dict[str, str]]:
    reader = csv.DictReader(io.StringIO(_whole_text(path)), strict=True)
    csv.field_size_limit(MAX_FIELD)
    try:
        yield from reader
    except csv.Error as error:
        raise InputError(f"expected comma-separated values, got {error} at {path}:{reader.reader.line_num}") from error


def chunks(folder: Path, split: str, progress: Progress | None) -> Parts:
    """chunking_evaluation: ``questions_df.csv`` with the answers' spans in ``corpora/*.md``."""
    texts = {path.stem: _whole_text(path) for path in sorted((folder / "corpora").glob("*.md"))}
    spans = {name: cut(text) for name, text in texts.items()}
    documents = {f"{name}:{a}-{b}": texts[name][a:b].strip() for name, places in spans.items() for a, b in places}
    path = folder / "questions_df.csv"
    queries: dict[str, str] = {}
    qrels: Qrels = {}
    for number, row in enumerate(_rows(path), 1):
        try:
            name, question, references = row["corpus_id"], row["question"], json.loads(row["references"])
            if not isinstance(question, str):
                raise TypeError("question")
            places = [holder(spans[name], int(ref["start_index"]), int(ref["end_index"])) for ref in references]
            for ref in references:
                if texts[name][ref["start_index"] : ref["end_index"]] != ref["content"]:
                    raise InputError(
                        f"expected every reference at its offsets, got another text for question {number} of {path}"
                    )
        except (LookupError, TypeError, OverflowError, *NOT_JSON) as error:
            if isinstance(error, InputError):
                raise
            raise InputError(
                f"expected question, references and corpus_id, got {error!r} in question {number} of {path}"
            ) from error
        queries[f"q{number}"] = question
        qrels[f"q{number}"] = {f"{name}:{a}-{b}": 1 for a, b in (spans[name][place] for place in places)}
    return Parts(queries, MemoryCorpus(documents), qrels)


LAYOUTS: Mapping[str, Layout] = {
    "beir": beir,
    "llamaindex": llamaindex,
    "scrolls": scrolls,
    "qasper-title": lambda folder, split, progress: qasper(folder, "title"),
    "qasper-abstract": lambda folder, split, progress: qasper(folder, "abstract"),
    "anthropic-docs": anthropic_docs,
    "chunks": chunks,
}
