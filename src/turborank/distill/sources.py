"""Sources merged into one collection, and candidate pools mined from it.

Equal texts are kept once, labels are merged, and samples are chosen by hash, so that they are stable. The pool of a
query has its labelled documents, samples of BM25's and a bi-encoder's best, and random documents.
"""

from __future__ import annotations

import hashlib
import heapq
import re
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

from turborank.data.bm25 import BM25, best
from turborank.data.corpus import MemoryCorpus
from turborank.distill import formats
from turborank.errors import InputError
from turborank.text import cleaner, cut, sentences
from turborank.types import Float32, Int32, Progress

MAX_SCORES = 1 << 23  # cosines in memory at once: 32 MiB
REPORT_EVERY = 200  # queries between two reports of progress


@dataclass(frozen=True)
class PoolPlan:
    """How many documents of each kind a pool gets; ``…_depth`` is how many of the best they are sampled from.

    Raises InputError for a negative number, and for a depth smaller than its number.
    """

    bm25: int = 20
    bm25_depth: int = 50
    dense: int = 12
    dense_depth: int = 30
    random: int = 6

    def __post_init__(self) -> None:
        for kind in ("bm25", "dense", "random"):
            size = getattr(self, kind)
            if size < 0:
                raise InputError(f"expected {kind} documents of a pool to be 0 or more, got {size}")
            if getattr(self, f"{kind}_depth", size) < size:
                raise InputError(f"expected {kind} depth to be at least {size}, got {getattr(self, kind + '_depth')}")

    @property
    def mines(self) -> bool:
        """Whether pools get other documents than those their queries came with."""
        return bool(self.bm25 or self.dense or self.random)


class Pools(NamedTuple):
    """``doc_index[bounds[q]:bounds[q + 1]]`` are the documents of query q; ``scores`` are BM25's."""

    bounds: npt.NDArray[np.int64]
    doc_index: Int32
    scores: Float32


def text_hash(text: str, seed: int = 0) -> int:
    """A 64-bit hash of text and seed; sampling by it stays the same when data are added."""
    digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8, salt=seed.to_bytes(16, "little"))
    return int.from_bytes(digest.digest(), "little")


def index(texts: Sequence[str], *, progress: Progress | None = None) -> BM25:
    """A BM25 index of texts (N,), with the parameters of :mod:`turborank.data.bm25`."""
    return BM25(MemoryCorpus({str(i): text for i, text in enumerate(texts)}), progress=progress)


def nearest(queries: Float32, documents: Float32, depth: int) -> Iterator[npt.NDArray[np.intp]]:
    """Per query (Q, C): indices of the ``depth`` documents (N, C) with the highest dot products, best first."""
    depth = min(depth, len(documents))
    step = max(1, MAX_SCORES // len(documents))
    for start in range(0, len(queries), step):
        cosines = queries[start : start + step] @ documents.T
        top = np.argpartition(-cosines, depth - 1, axis=1)[:, :depth]
        order = np.argsort(-np.take_along_axis(cosines, top, axis=1), axis=1, kind="stable")
        yield from np.take_along_axis(top, order, axis=1)


def draw(
    rng: np.random.Generator,
    known: Sequence[int],
    lexical: npt.NDArray[np.intp],
    dense: npt.NDArray[np.intp],
    documents: int,
    plan: PoolPlan,
) -> list[int]:
    """The document indices of one pool, without repeats: ``known``, then samples of BM25's, the bi-encoder's, all."""
    pool = dict.fromkeys(int(document) for document in known)
    for ranking, size in ((lexical, plan.bm25), (dense, plan.dense)):
        fresh = [int(document) for document in ranking if int(document) not in pool]
        pool.update(dict.fromkeys(int(document) for document in rng.permutation(fresh)[:size]))
    wanted = min(len(pool) + plan.random, documents)
    while len(pool) < wanted:
        pool[int(rng.integers(documents))] = None
    return list(pool)


def mine(
    queries: Sequence[str],
    known: Sequence[Sequence[int]],
    held_out: Sequence[bool],
    bm25: BM25,
    plan: PoolPlan,
    *,
    vectors: tuple[Float32, Float32] | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> Pools:
    """The pools of Q queries over N documents.

    Args:
        queries: (Q,) texts.
        known: (Q,) per query, indices of documents that must be in its pool.
        held_out: (Q,) per query, whether it is held out. Its pool is then what a first stage retrieves: BM25's best
            ``bm25_depth``, which may lack the labelled document (``known``, where the plan has no BM25 documents).
        bm25: an index of the documents.
        plan: composition of a pool.
        vectors: unit vectors of queries (Q, C) and documents (N, C), for dense candidates.
        seed: of the samples; a query's sample depends on it and on the query's text.
        progress: called with (queries done, Q).

    """
    bounds, doc_index, scores = [0], array("i"), array("f")
    nothing: npt.NDArray[np.intp] = np.zeros(0, dtype=np.intp)
    near = nearest(*vectors, plan.dense_depth) if vectors is not None and plan.dense else None
    for at, query in enumerate(queries):
        dense = next(near) if near is not None else nothing
        all_scores = bm25.scores(query)
        lexical = best(all_scores, plan.bm25_depth)
        if held_out[at]:
            pool = lexical.tolist() if plan.bm25 else list(known[at])
        else:
            rng = np.random.default_rng(text_hash(query, seed))
            pool = draw(rng, known[at], lexical, dense, len(all_scores), plan)
        doc_index.extend(pool)
        scores.extend(all_scores[pool].tolist())
        bounds.append(len(doc_index))
        if progress is not None and ((at + 1) % REPORT_EVERY == 0 or at + 1 == len(queries)):
            progress(at + 1, len(queries))
    return Pools(
        np.array(bounds, dtype=np.int64),
        np.frombuffer(doc_index, dtype=np.int32),
        np.frombuffer(scores, dtype=np.float32),
    )


T = TypeVar("T")
LONG_WEIGHT = 0.5  # of passages cut from long documents: transcripts and fiction make poor queries


class TrainingSource(NamedTuple):
    """A file or folder of training data, and the name that options and queries refer to it by."""

    name: str
    path: Path
    long: bool = False  # its documents are cut into passages, its queries are ignored
    run: Path | None = None  # candidates for a BEIR folder's queries


@dataclass(frozen=True)
class ListOptions:
    """What a training folder is made from.

    Raises InputError for missing or repeated names, names of no source, and numbers out of range.
    """

    sources: tuple[TrainingSource, ...]
    caps: Mapping[str, int] = field(default_factory=dict)  # source -> examples (long: passages)
    clean: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # source or "" (all) -> text.CLEANERS
    words: int | None = None  # maximum words of a passage; the rest is cut
    min_words: int = 1  # passages with fewer words are left out
    depth: int | None = None  # candidates read per query of a source's run
    pseudo: Mapping[str, int] = field(default_factory=dict)  # kind of PSEUDO -> number of queries
    held_out: float = 0.0  # fraction of the labelled queries
    seed: int = 0

    def __post_init__(self) -> None:
        names = [source.name for source in self.sources]
        repeated = [name for name, count in Counter(names).items() if count > 1]
        if not names or repeated:
            raise InputError(f"expected sources with a name each, got {', '.join(repeated) or 'none'}")
        for name in names:
            if name.split() != [name]:  # part of ids
                raise InputError(f"expected a source's name without white space, got {name!r}")
        for name in (*self.caps, *(name for name in self.clean if name)):
            if name not in names:
                raise InputError(f"expected the name of a source ({', '.join(names)}), got {name!r}")
        for source in self.sources:
            if source.run is not None and (source.long or not source.path.is_dir()):
                raise InputError(f"expected a BEIR folder for the candidates {source.run}, got {source.path}")
        if not 0 <= self.held_out < 1:
            raise InputError(f"expected a share of 0 to 1 to be held out, got {self.held_out}")
        made = {f"{kind} queries": count for kind, count in self.pseudo.items()}
        for minimum, counts in ((0, {"seed": self.seed, **made}), (1, {"words": self.words, "depth": self.depth})):
            for what, count in counts.items():
                if count is not None and count < minimum:
                    raise InputError(f"expected {what} to be {minimum} or more, got {count}")

    def cleaner(self, source: TrainingSource) -> Callable[[str], str]:
        """The text normaliser of a source: its own rules, or the general ones."""
        return cleaner(self.clean.get(source.name, self.clean.get("", ())))


class Collection:
    """Queries and passages by index. Texts without ids are merged when equal."""

    def __init__(self) -> None:
        self.texts: list[str] = []
        self.doc_ids: list[str | None] = []  # ids of the source
        self.long: list[bool] = []  # per text: whether it was cut from a long document
        self.queries: list[str] = []
        self.query_ids: list[str | None] = []
        self.sources: list[str] = []  # source of each query
        self.labels: list[dict[int, int]] = []  # per query: text index -> graded relevance
        self.known: list[dict[int, None]] = []  # per query: indices of the texts it came with (ordered)
        self.made_from: list[int | None] = []  # per query: index of the text it was generated from
        self.held_out: list[bool] = []
        self.scores: dict[tuple[int, int], float] = {}  # (query index, text index) -> score of the source
        self.left_out: Counter[str] = Counter()  # reason -> number of passages or queries
        self._text_index: dict[str, int] = {}  # text, or "\0" + id -> index
        self._query_index: dict[str, int] = {}

    def add_text(self, text: str, name: str | None = None, *, long: bool = False) -> int:
        """Add a text, unless it (or, given an id, a document of that id) is known; its index."""
        index = _index_of(self._text_index, len(self.texts), text, name)
        if index == len(self.texts):
            self.texts.append(text)
            self.doc_ids.append(name)
            self.long.append(long)
        return index

    def add_query(self, text: str, source: str, name: str | None = None) -> int:
        """Add a query, unless known; its index. Queries that differ only by case are one, spelt as the first."""
        index = _index_of(self._query_index, len(self.queries), text.casefold(), name)
        if index == len(self.queries):
            self.queries.append(text)
            self.query_ids.append(name)
            self.sources.append(source)
            self.labels.append({})
            self.known.append({})
            self.made_from.append(None)
            self.held_out.append(False)
        return index

    def add_example(self, example: formats.Example, source: str, prefix: str = "") -> None:
        """Add a query with its documents. Of repeated labels the highest is kept, of repeated scores the last."""
        query = self.add_query(example.query, source, _prefixed(prefix, example.id))
        for document in example.documents:
            index = self.add_text(document.text, _prefixed(prefix, document.id))
            self.known[query][index] = None
            if document.label is not None:
                self.labels[query][index] = max(document.label, self.labels[query].get(index, 0))
            if document.score is not None:
                self.scores[query, index] = document.score


def _index_of(known: dict[str, int], end: int, text: str, name: str | None) -> int:
    if name is None:
        return known.setdefault(text, end)
    index = known.setdefault(f"\0{name}", end)
    if index == end:
        known.setdefault(text, end)  # so that an equal text without an id is the same document
    return index


def _prefixed(prefix: str, name: str | None) -> str | None:
    return None if name is None else prefix + name


def smallest(items: Iterable[T], cap: int | None, key: Callable[[T], int]) -> list[T]:
    """The ``cap`` items with the smallest keys, in their order, in O(cap) memory; all items without a cap."""
    if cap is None:
        return list(items)
    chosen = heapq.nsmallest(cap, enumerate(items), key=lambda item: (key(item[1]), item[0]))
    return [item for _, item in sorted(chosen, key=lambda item: item[0])]


def collect(options: ListOptions, *, whole: bool = True) -> Collection:
    """Read, clean, cap and merge all sources, then generate the requested queries.

    ``whole`` reads all documents of BEIR folders, for mining; otherwise only those of a query. Ids of the sources are
    kept, prefixed with ``NAME:`` where there are several sources.
    Raises InputError, with file and line, for malformed input.
    """
    made = Collection()
    for source in options.sources:
        prefix = f"{source.name}:" if len(options.sources) > 1 else ""
        if source.long:
            _add_passages(options, source, made)
            continue
        if source.path.is_dir() and whole and formats.recognise(source.path) == "beir":
            _add_corpus(options, source, made, prefix)
        _add_examples(options, source, made, prefix)
    if not made.texts:
        raise InputError(f"expected passages, got none in {', '.join(str(source.path) for source in options.sources)}")
    for index, query in enumerate(made.queries):
        # a query without a relevant document cannot be evaluated
        judged = any(made.labels[index].values())
        made.held_out[index] = judged and text_hash(query.casefold()) < options.held_out * 2**64
    _make_queries(options, made)
    if not made.queries:
        raise InputError("expected queries, got none", hint="give pairs, or ask for --sentences, --spans or --keywords")
    return made


def _add_corpus(options: ListOptions, source: TrainingSource, made: Collection, prefix: str) -> None:
    clean = options.cleaner(source)
    for name, raw in formats.passages(source.path):
        text = _limited(clean(raw), options, made)
        if text is not None:
            made.add_text(text, _prefixed(prefix, name))


def _add_examples(options: ListOptions, source: TrainingSource, made: Collection, prefix: str) -> None:
    clean = options.cleaner(source)

    def cleaned() -> Iterator[formats.Example]:
        given = formats.beir(source.path, source.run, options.depth) if source.run else formats.examples(source.path)
        for example in given:
            query = clean(example.query)
            documents = tuple(
                document._replace(text=text)
                for document in example.documents
                if (text := _limited(clean(document.text), options, made)) is not None
            )
            if not query:
                made.left_out["empty queries"] += 1
            elif documents or not example.documents:
                yield formats.Example(query, documents, example.id)

    def key(example: formats.Example) -> int:
        first = example.documents[0].text if example.documents else ""
        return text_hash(f"{example.query}\0{first}", options.seed)

    for example in smallest(cleaned(), options.caps.get(source.name), key):
        made.add_example(example, source.name, prefix)


def _limited(text: str, options: ListOptions, made: Collection) -> str | None:
    """The first ``words`` words of a passage; None where it is too short."""
    words = text.split()
    if len(words) < max(options.min_words, 1):
        made.left_out["passages that are too short"] += 1
        return None
    return text if options.words is None else " ".join(words[: options.words])


def _add_passages(options: ListOptions, source: TrainingSource, made: Collection) -> None:
    clean = options.cleaner(source)

    def parts() -> Iterator[str]:
        seen: set[int] = set()
        for _, document in formats.passages(source.path):
            text = clean(document)
            seed = text_hash(text, options.seed)
            if seed in seen:
                continue
            seen.add(seed)
            for part in cut(text, np.random.default_rng(seed)):
                if (limited := _limited(part, options, made)) is not None:
                    yield limited

    for text in smallest(parts(), options.caps.get(source.name), lambda text: text_hash(text, options.seed)):
        made.add_text(text, long=True)


def _make_queries(options: ListOptions, made: Collection) -> None:
    weights = np.where(np.array(made.long), LONG_WEIGHT, 1.0)
    for query in make(made.texts, weights, options.pseudo, options.seed):
        count = len(made.queries)
        index = made.add_query(query.text, query.kind)
        if index < count:
            made.left_out["made queries that were there already"] += 1
            continue
        made.made_from[index] = query.passage


# Pseudo-queries, generated from passages. They have no labels; teachers score them.
#
# PSEUDO is the table of kinds: a sentence (like claims and long questions), two or three consecutive sentences (like
# descriptions of an information need), and the rarest words of a sentence (like keyword queries).

SENTENCE_WORDS = range(6, 41)
SPAN_WORDS = range(15, 91)
KEYWORDS = range(2, 6)
_WORD = re.compile(r"[^\W\d_]+(?:['-][^\W\d_]+)*")

Maker = Callable[[str, np.random.Generator, Mapping[str, int]], str | None]


class MadeQuery(NamedTuple):
    """A query generated from the passage of index ``passage``."""

    kind: str
    text: str
    passage: int


def _pick(options: Sequence[str], rng: np.random.Generator) -> str | None:
    return options[int(rng.integers(len(options)))] if options else None


def _sentence(text: str, rng: np.random.Generator, counts: Mapping[str, int]) -> str | None:
    return _pick([one for one in sentences(text, strict=True) if len(one.split()) in SENTENCE_WORDS], rng)


def _span(text: str, rng: np.random.Generator, counts: Mapping[str, int]) -> str | None:
    parts = sentences(text, strict=True)
    spans = [" ".join(parts[at : at + size]) for size in (2, 3) for at in range(len(parts) - size + 1)]
    return _pick([span for span in spans if len(span.split()) in SPAN_WORDS], rng)


def _keywords(text: str, rng: np.random.Generator, counts: Mapping[str, int]) -> str | None:
    sentence = _sentence(text, rng, counts)
    if sentence is None:
        return None
    words = dict.fromkeys(_WORD.findall(sentence.lower()))
    rare = sorted(words, key=lambda word: counts.get(word, 0))[: int(rng.integers(KEYWORDS.start, KEYWORDS.stop))]
    chosen = [word for word in words if word in rare]  # in sentence order
    return " ".join(chosen) if len(chosen) >= KEYWORDS.start else None


PSEUDO: Mapping[str, Maker] = {"sentence": _sentence, "span": _span, "keywords": _keywords}


def word_counts(texts: Sequence[str]) -> Counter[str]:
    """Document frequency of each word."""
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(set(_WORD.findall(text.lower())))
    return counts


def make(
    texts: Sequence[str], weights: npt.NDArray[np.float64], wanted: Mapping[str, int], seed: int
) -> Iterator[MadeQuery]:
    """``wanted`` queries of each kind of PSEUDO, or as many as the texts yield.

    Passages are sampled with ``weights`` (N,), without replacement per kind.
    """
    counts = word_counts(texts) if wanted.get("keywords") else {}
    for number, (kind, maker) in enumerate(PSEUDO.items()):
        rng = np.random.default_rng((seed, number))
        missing = wanted.get(kind, 0)
        # exponential races: weighted sampling without replacement
        for index in np.argsort(rng.exponential(size=len(texts)) / weights) if missing else ():
            query = maker(texts[index], rng, counts)
            if query is not None:
                yield MadeQuery(kind, query, int(index))
                missing -= 1
            if missing == 0:
                break
