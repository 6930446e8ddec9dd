"""LAYOUTS: file layouts of collections, each read into queries, documents and judgements."""

from __future__ import annotations

import csv
import io
import json
import tarfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from turborank.data.corpus import Corpus, JsonlCorpus, MemoryCorpus, beir_text
from turborank.data.files import (
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
