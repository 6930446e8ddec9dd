"""Score the pairs of a file into a folder of shards, with bounded memory; restartable, and usable from job arrays.

A shard is a run of consecutive rows with about ``shard_pairs`` pairs, so shard boundaries depend on the input alone.
Each shard is written atomically and then listed in the manifest of its part, ``manifest.K-of-N.json``. A restarted run
computes only the shards that no manifest lists. ``manifest.json`` is written when all shards exist (docs/scale.md).
"""

from __future__ import annotations

import hashlib
import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from turborank.calibration import sigmoid
from turborank.data.corpus import JsonlCorpus
from turborank.data.files import (
    NOT_JSON,
    Columns,
    Record,
    RowReader,
    RowWriter,
    check_folder,
    check_inputs,
    file_hash,
    identity,
    replacing,
    write_json,
    writer,
)
from turborank.errors import InputError, TooLongError
from turborank.reranker import Reranker
from turborank.text import DEFAULT_FIELDS, document_text
from turborank.types import Pair

FORMAT = 1
DOCUMENT, CANDIDATES, DOCUMENT_ID = "document", "candidates", "document_id"
SCORES: Columns = {"logit": float, "score": float, "tokens": int, "truncated": int}  # columns that the output adds
BLOCK_CHARACTERS = 1_000_000  # document characters scored at a time: bounds memory, and still fills batches
ENDS = 1 << 20  # bytes at the beginning and at the end of the input that its hash covers
SAMPLE_ROWS, SAMPLE_PAIRS = 2_000, 4_000  # maximum sample of an estimate
SAMPLE_SECONDS = 20.0
_CHARACTERS, _TEMPLATE = 4, 16  # approximate characters of a token, and of the special tokens of a pair


@dataclass(frozen=True)
class BulkOptions:
    """Columns to read of each row, and how the output is divided into shards."""

    query: str = "query"  # column of the query text
    fields: Sequence[str] = ()  # columns of the document text; by default "document", else title and text
    corpus: Path | None = None  # corpus.jsonl, if the rows list candidates by id
    shard_pairs: int = 20_000  # pairs of a shard, approximately: a row is never split
    part: tuple[int, int] = (1, 1)  # (K, N): compute the shards K-1, K-1+N, K-1+2N, …
    texts: bool = True  # copy the texts to the output


class Written(NamedTuple):
    """A complete shard, as the manifest lists it."""

    number: int
    file: str
    rows: int
    pairs: int
    tokens: int
    truncated: int  # pairs that were cut
    bytes: int
    sha256: str
    isa: str


class Progress(NamedTuple):
    """State of a run, passed to the ``progress`` callback."""

    shard: int
    pairs: int  # scored by this run
    tokens: int  # read by this run
    fraction: float  # share of the input file that was read, 0 to 1
    seconds: float  # since the start of the run


class BulkSummary(NamedTuple):
    """Totals of a run."""

    shards: int  # written by this run
    found: int  # shards of this part that existed already
    pairs: int
    tokens: int
    truncated: int  # pairs that were cut
    seconds: float
    complete: bool  # all shards of the input exist, those of other parts included


class Estimate(NamedTuple):
    """Expected cost of scoring the whole input on this machine, extrapolated from a sample."""

    rows: int
    pairs: int
    tokens: int
    truncated: float  # share of pairs that will be cut
    seconds: float
    tokens_per_second: float
    memory: int  # bytes: peak resident size of the process
    sampled: int  # pairs


class _Row(NamedTuple):
    """One row of the input with its pairs."""

    at: str  # file and line, for error messages
    record: Record
    pairs: list[Pair]
    ids: list[str]  # ids of the candidates; [] if the row is a pair itself


class PairSource:
    """Iterate over the rows of the input as pairs.

    Raises InputError, with file and line, for a row without query or document.
    """

    def __init__(self, path: Path, options: BulkOptions) -> None:
        self.reader = RowReader(path)
        self.options = options
        self.corpus = None if options.corpus is None else JsonlCorpus(options.corpus)

    def __iter__(self) -> Iterator[_Row]:
        for at, record in self.reader:
            yield self._row(at, record)

    def _row(self, at: str, record: Record) -> _Row:
        if taken := [name for name in (*SCORES, *([DOCUMENT_ID] if self.corpus else [])) if name in record]:
            raise InputError(f"expected no column that the output adds, got {', '.join(taken)} at {at}")
        query = record.get(self.options.query)
        if not isinstance(query, str):
            raise InputError(
                f"expected a string in the column {self.options.query!r}, got {type(query).__name__} at {at}",
                hint="choose another column with --query",
            )
        if self.corpus is None:
            return _Row(at, record, [Pair(query, self._text(at, record))], [])
        ids = self._candidates(at, record)
        return _Row(at, record, [Pair(query, self._document(at, one)) for one in ids], ids)

    def _text(self, at: str, record: Record) -> str:
        fields = self.options.fields or ((DOCUMENT,) if DOCUMENT in record else DEFAULT_FIELDS)
        document = record.get(DOCUMENT)
        try:
            if tuple(fields) == (DOCUMENT,) and isinstance(document, Mapping):
                return document_text(document)
            return document_text(record, fields)
        except InputError as error:
            raise InputError(f"{error.message} at {at}", hint="choose columns with --field") from None

    def _candidates(self, at: str, record: Record) -> list[str]:
        given = record.get(CANDIDATES)
        given = given.split() if isinstance(given, str) else given
        if not isinstance(given, list):
            raise InputError(
                f"expected a list of document ids in the column {CANDIDATES!r}, got {type(given).__name__} at {at}"
            )
        return [identity(one, CANDIDATES, at) for one in given]

    def _document(self, at: str, doc_id: str) -> str:
        assert self.corpus is not None
        try:
            return self.corpus.text(doc_id)
        except KeyError:
            raise InputError(f"expected the id of a document in the corpus, got {doc_id!r} at {at}") from None

    def made_of(self) -> dict[str, Any]:
        """Identity of the input: name, size, hash of its first and last ENDS bytes, fingerprint of the corpus."""
        path = self.reader.path
        digest = hashlib.sha256()
        if not path.is_file():
            raise InputError(f"expected a readable file, got no such file at {path}")
        with path.open("rb") as file:
            digest.update(file.read(ENDS))
            file.seek(max(0, self.reader.size - ENDS))
            digest.update(file.read(ENDS))
        corpus = None if self.corpus is None else self.corpus.fingerprint
        return {"name": path.name, "bytes": self.reader.size, "ends": digest.hexdigest(), "corpus": corpus}

    def columns(self, record: Record) -> list[str]:
        """Columns of the input that the output keeps."""
        left = {CANDIDATES} if self.corpus else set()
        if not self.options.texts:
            left |= {self.options.query, *(self.options.fields or (DOCUMENT, *DEFAULT_FIELDS))}
        return [name for name in record if name not in left]

    def added(self) -> Columns:
        """Columns that the output adds."""
        return {DOCUMENT_ID: str, **SCORES} if self.corpus else SCORES


@dataclass
class _Shard:
    """A shard that is being written."""

    number: int
    rows: int = 0
    pairs: int = 0
    tokens: int = 0
    truncated: int = 0
    waiting: list[_Row] = field(default_factory=list)  # rows read and not scored yet
    characters: int = 0  # of the documents in ``waiting``


def run(
    reranker: Reranker,
    path: Path,
    out: Path,
    options: BulkOptions | None = None,
    *,
    progress: Callable[[Progress], None] | None = None,
) -> BulkSummary:
    """Score the shards of ``options.part`` that no manifest in ``out`` lists.

    ``progress`` is called after each block of text. Raises InputError for an unusable row (complete shards stay), for
    an option out of range, and for an ``out`` whose manifest names another input, model or options; TooLongError, with
    file and line, under the length policy ``error``.
    """
    return _Run(reranker, PairSource(path, options or BulkOptions()), out, progress).all()


class _Run:
    def __init__(
        self, reranker: Reranker, source: PairSource, out: Path, progress: Callable[[Progress], None] | None
    ) -> None:
        self.reranker, self.source, self.out = reranker, source, out
        self.options, self.kind = source.options, source.reader.kind
        self._progress = progress
        check_folder(out)
        part, parts = self.options.part
        if not 1 <= part <= parts:
            raise InputError(f"expected a part K/N with 1 ≤ K ≤ N, got {part}/{parts}")
        if self.options.shard_pairs < 1:
            raise InputError(f"expected shards of at least 1 pair, got {self.options.shard_pairs}")
        self.made_of = _made_of(reranker, source)
        self.manifest = out / f"manifest.{part}-of-{parts}.json"
        self.started = time.monotonic()
        self.pairs = self.tokens = self.truncated = 0

    def all(self) -> BulkSummary:
        self.done = _listed(self.out, self.made_of)
        self.mine = {n: one for n, one in _read(self.manifest, self.made_of).items() if n in self.done}
        part, parts = self.options.part
        rows = iter(self.source)
        number = found = written = 0
        first = next(rows, None)
        while first is not None:
            if number % parts != part - 1 or number in self.done:
                found += number % parts == part - 1
                first = self._skip(first, rows)
            else:
                first = self._write(_Shard(number), first, rows)
                written += 1
            number += 1
        complete = self._finish(number)
        seconds = time.monotonic() - self.started
        return BulkSummary(written, found, self.pairs, self.tokens, self.truncated, seconds, complete)

    def _skip(self, first: _Row, rows: Iterator[_Row]) -> _Row | None:
        pairs = len(first.pairs)
        while pairs < self.options.shard_pairs and (row := next(rows, None)) is not None:
            pairs += len(row.pairs)
        return next(rows, None)

    def _write(self, shard: _Shard, first: _Row, rows: Iterator[_Row]) -> _Row | None:
        """Write the shard that begins with ``first``; return the first row of the next shard."""
        path = self.out / f"part-{shard.number:06d}.{self.kind}"
        for rest in self.out.glob(f".{path.name}.*"):
            rest.unlink(missing_ok=True)  # temporary file of a run that was killed
        with replacing(path) as file:
            keep = self.source.columns(first.record)
            output = writer(self.kind, file, self.source.reader.path, keep, self.source.added())
            row: _Row | None = first
            while row is not None:
                shard.waiting.append(row)
                shard.pairs += len(row.pairs)
                shard.characters += sum(len(document) for _, document in row.pairs)
                if shard.characters >= BLOCK_CHARACTERS or len(shard.waiting) >= self.options.shard_pairs:
                    self._score(shard, output)
                row = next(rows, None) if shard.pairs < self.options.shard_pairs else None
            self._score(shard, output)
            output.close()
        self._list(shard, path)
        return next(rows, None)

    def _score(self, shard: _Shard, output: RowWriter) -> None:
        """Score the waiting rows and write them."""
        waiting, shard.waiting, shard.characters = shard.waiting, [], 0
        pairs = [pair for row in waiting for pair in row.pairs]
        try:
            scores = self.reranker.score_detailed(pairs)
        except TooLongError as error:
            where = [row.at for row in waiting for _ in row.pairs][error.place]
            raise error.at(error.place, where) from None
        columns = (scores.logits.tolist(), scores.tokens.tolist(), scores.truncated.tolist())
        values = iter(zip(*columns, strict=True))
        records = []
        for row in waiting:
            kept = {name: row.record[name] for name in self.source.columns(row.record)}
            for place in range(len(row.pairs)):
                logit, tokens, truncated = next(values)
                named = {DOCUMENT_ID: row.ids[place]} if row.ids else {}
                added = {"logit": logit, "score": sigmoid(logit), "tokens": tokens, "truncated": truncated}
                records.append({**kept, **named, **added})
        output.write(records)
        shard.rows += len(waiting)
        tokens, truncated = int(scores.tokens.sum()), int((scores.truncated > 0).sum())
        shard.tokens, shard.truncated = shard.tokens + tokens, shard.truncated + truncated
        self.pairs, self.tokens = self.pairs + len(pairs), self.tokens + tokens
        self.truncated += truncated
        if self._progress is not None:
            fraction, seconds = self.source.reader.fraction(), time.monotonic() - self.started
            self._progress(Progress(shard.number, self.pairs, self.tokens, fraction, seconds))

    def _list(self, shard: _Shard, path: Path) -> None:
        self.mine[shard.number] = Written(
            shard.number, path.name, shard.rows, shard.pairs, shard.tokens, shard.truncated, path.stat().st_size,
            file_hash(path), self.reranker.engine.isa,
        )  # fmt: skip
        _save(self.manifest, self.made_of, self.mine)

    def _finish(self, shards: int) -> bool:
        """Write manifest.json if all shards exist; return whether they do."""
        there = _listed(self.out, self.made_of)
        complete = len(there) == shards
        if complete and shards:
            _save(self.out / "manifest.json", self.made_of, there)
        return complete


def _made_of(reranker: Reranker, source: PairSource) -> dict[str, Any]:
    """Everything the output depends on, except the instruction set: nodes of a cluster may differ in it."""
    files, engine, precision, _, *encoding = json.loads(reranker.fingerprint())
    options = source.options
    return {
        "input": source.made_of(),
        "model": {
            "name": reranker.name,
            "files": files,
            "engine": engine,
            "precision": precision,
            "encoding": encoding,
        },
        "options": {
            "query": options.query,
            "fields": list(options.fields),
            "shard_pairs": options.shard_pairs,
            "texts": options.texts,
        },
    }


def _listed(out: Path, made_of: Mapping[str, Any]) -> dict[int, Written]:
    """Shards that a manifest lists and whose files exist with the listed size."""
    found: dict[int, Written] = {}
    for path in sorted(out.glob("manifest*.json")):
        found |= _read(path, made_of)
    return {
        number: one
        for number, one in sorted(found.items())
        if (out / one.file).is_file() and (out / one.file).stat().st_size == one.bytes
    }


def _read(path: Path, made_of: Mapping[str, Any]) -> dict[int, Written]:
    if not path.is_file():
        return {}
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        shards = {one["number"]: Written(**one) for one in manifest["shards"]}
        made = manifest["made_of"]
    except (KeyError, TypeError, *NOT_JSON) as error:
        raise InputError(f"expected a manifest of turborank score, got {error} at {path}") from error
    check_inputs(made, made_of, path)
    return shards


def _save(path: Path, made_of: Mapping[str, Any], shards: Mapping[int, Written]) -> None:
    listed = [shards[number]._asdict() for number in sorted(shards)]
    totals = {name: sum(one[name] for one in listed) for name in ("rows", "pairs", "tokens", "truncated")}
    write_json(path, {"format": FORMAT, "made_of": made_of, **totals, "shards": listed})


def estimate(reranker: Reranker, path: Path, options: BulkOptions | None = None, *, seed: int = 0) -> Estimate:
    """Read the whole input, score a random sample of it, and extrapolate to the whole on this machine.

    The sample has at most SAMPLE_ROWS rows and SAMPLE_PAIRS pairs and takes about SAMPLE_SECONDS. Nothing is written.
    Raises InputError for an unusable row.
    """
    source = PairSource(path, options or BulkOptions())
    rng = np.random.default_rng(seed)
    kept: list[_Row] = []
    rows = total = size = 0
    for row in source:  # reservoir sampling, Vitter's algorithm R
        rows, total, size = rows + 1, total + len(row.pairs), size + _size(row.pairs, reranker)
        place = rows - 1 if rows <= SAMPLE_ROWS else int(rng.integers(rows))
        if place < SAMPLE_ROWS:
            kept[place : place + 1] = [row]
    pairs = [pair for row in kept for pair in row.pairs]
    sample = [pairs[place] for place in rng.permutation(len(pairs))[:SAMPLE_PAIRS]]
    if not sample:
        return Estimate(rows, total, 0, 0.0, 0.0, 0.0, _peak_memory(), 0)
    reranker.score_detailed(sample[:32])  # warm-up: starts threads, reads the weights
    tokens = truncated = sampled = 0
    started = time.monotonic()
    for block in _blocks(sample):
        scores = reranker.score_detailed(block)
        tokens += int(scores.tokens.sum())
        truncated += int((scores.truncated > 0).sum())
        sampled += len(block)
        if time.monotonic() - started > SAMPLE_SECONDS:
            break
    seconds = time.monotonic() - started
    scale = size / _size(sample[:sampled], reranker)  # ratio estimator: tokens and time are proportional to text read
    return Estimate(
        rows, total, round(tokens * scale), truncated / sampled, seconds * scale, tokens / seconds, _peak_memory(),
        sampled,
    )  # fmt: skip


def _size(pairs: Sequence[Pair], reranker: Reranker) -> int:
    """Approximate number of characters that the model reads of the pairs, special tokens included."""
    maximum = sys.maxsize if reranker.encoder.policy == "windows" else _CHARACTERS * reranker.max_length
    return sum(min(len(query) + len(document) + _TEMPLATE, maximum) for query, document in pairs)


def _blocks(pairs: Sequence[Pair]) -> Iterator[Sequence[Pair]]:
    start = size = 0
    for index, (_, document) in enumerate(pairs):
        size += len(document)
        if size >= BLOCK_CHARACTERS:
            yield pairs[start : index + 1]
            start, size = index + 1, 0
    if start < len(pairs):
        yield pairs[start:]


def _peak_memory() -> int:
    """Peak resident size of this process in bytes; 0 on systems that do not report it."""
    try:
        import resource
    except ImportError:
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
