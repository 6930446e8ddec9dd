"""Sources into one collection: each text once, labels merged, choices by hashes so that they do not move."""

from __future__ import annotations

import heapq
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

from turborank.distill import formats
from turborank.distill.pools import text_hash
from turborank.errors import InputError
from turborank.text import cleaner, cut, sentences

T = TypeVar("T")
LONG_WEIGHT = 0.5  # of passages cut from long documents when queries are made: transcripts and fiction make poor ones


class Source(NamedTuple):
    """A file or folder of training data under the name that queries and caps go by."""

    name: str
    path: Path
    long: bool = False  # its documents are cut into passages, and its queries not read
    run: Path | None = None  # candidates for a BEIR folder's queries


@dataclass(frozen=True)
class Recipe:
    """What a collection is made of."""

    sources: tuple[Source, ...]
    caps: Mapping[str, int] = field(default_factory=dict)  # source -> examples, or passages of a long one
    clean: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # source, or "" for all -> rules of CLEANERS
    words: int | None = None  # of a passage; what follows is left out
    min_words: int = 1  # shorter passages are left out
    depth: int | None = None  # of a source's run
    pseudo: Mapping[str, int] = field(default_factory=dict)  # kind of PSEUDO -> queries
    held_out: float = 0.0  # share of the labelled queries
    seed: int = 0

    def __post_init__(self) -> None:
        names = [source.name for source in self.sources]
        repeated = [name for name, count in Counter(names).items() if count > 1]
        if not names or repeated:
            raise InputError(f"expected sources with a name each, got {', '.join(repeated) or 'none'}")
        for name in names:
            if name.split() != [name]:  # it becomes part of ids
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
        for least, counts in ((0, {"seed": self.seed, **made}), (1, {"words": self.words, "depth": self.depth})):
            for what, count in counts.items():
                if count is not None and count < least:
                    raise InputError(f"expected {what} to be {least} or more, got {count}")

    def cleaner(self, source: Source) -> Callable[[str], str]:
        """What makes a source's texts even: its own rules, or those for all."""
        return cleaner(self.clean.get(source.name, self.clean.get("", ())))


class Collection:
    """Queries and passages by place. Without ids of their own, equal texts are one."""

    def __init__(self) -> None:
        self.texts: list[str] = []
        self.doc_ids: list[str | None] = []  # those that came with the data
        self.long: list[bool] = []  # of each text: cut from a long document
        self.queries: list[str] = []
        self.query_ids: list[str | None] = []
        self.sources: list[str] = []  # of each query
        self.labels: list[dict[int, int]] = []  # of each query: place of the text -> relevance
        self.known: list[dict[int, None]] = []  # of each query: places of the texts that came with it
        self.made_from: list[int | None] = []  # of each query: place of the text it was made from
        self.held_out: list[bool] = []
        self.scores: dict[tuple[int, int], float] = {}  # (query, text) -> score that came with them
        self.left_out: Counter[str] = Counter()  # why -> passages or queries
        self._text_places: dict[str, int] = {}  # text, or "\0" and an id -> place
        self._query_places: dict[str, int] = {}

    def add_text(self, text: str, name: str | None = None, *, long: bool = False) -> int:
        """The place of a text, or of the document of that id."""
        place = _place(self._text_places, len(self.texts), text, name)
        if place == len(self.texts):
            self.texts.append(text)
            self.doc_ids.append(name)
            self.long.append(long)
        return place

    def add_query(self, text: str, source: str, name: str | None = None) -> int:
        """The place of a query. Those that differ by capital letters alone are one, spelt as the first."""
        place = _place(self._query_places, len(self.queries), text.casefold(), name)
        if place == len(self.queries):
            self.queries.append(text)
            self.query_ids.append(name)
            self.sources.append(source)
            self.labels.append({})
            self.known.append({})
            self.made_from.append(None)
            self.held_out.append(False)
        return place

    def add_example(self, example: formats.Example, source: str, prefix: str = "") -> None:
        """A query with its documents; of two grades of one document the higher one counts, of two scores the last."""
        query = self.add_query(example.query, source, _prefixed(prefix, example.id))
        for document in example.documents:
            place = self.add_text(document.text, _prefixed(prefix, document.id))
            self.known[query][place] = None
            if document.label is not None:
                self.labels[query][place] = max(document.label, self.labels[query].get(place, 0))
            if document.score is not None:
                self.scores[query, place] = document.score


def _place(places: dict[str, int], end: int, text: str, name: str | None) -> int:
    if name is None:
        return places.setdefault(text, end)
    place = places.setdefault(f"\0{name}", end)
    if place == end:
        places.setdefault(text, end)  # for equal texts without an id
    return place


def _prefixed(prefix: str, name: str | None) -> str | None:
    return None if name is None else prefix + name


def fewest(items: Iterable[T], cap: int | None, key: Callable[[T], int]) -> list[T]:
    """``cap`` of the items in their order: those with the smallest keys; never more of them held than that."""
    if cap is None:
        return list(items)
    chosen = heapq.nsmallest(cap, enumerate(items), key=lambda item: (key(item[1]), item[0]))
    return [item for _, item in sorted(chosen, key=lambda item: item[0])]


def collect(recipe: Recipe, *, whole: bool = True) -> Collection:
    """Everything the recipe names, read, cleaned, capped, merged; and the queries made from it.

    ``whole`` reads all documents of BEIR folders, for mining; else only those that come with a query. Ids that came
    with the data are kept; those of several sources get ``NAME:`` before them.
    Raises InputError, with file and line, for malformed input.
    """
    made = Collection()
    for source in recipe.sources:
        prefix = f"{source.name}:" if len(recipe.sources) > 1 else ""
        if source.long:
            _add_passages(recipe, source, made)
            continue
        if source.path.is_dir() and whole and formats.recognise(source.path) == "beir":
            _add_corpus(recipe, source, made, prefix)
        _add_examples(recipe, source, made, prefix)
    if not made.texts:
        raise InputError(f"expected passages, got none in {', '.join(str(source.path) for source in recipe.sources)}")
    for place, query in enumerate(made.queries):
        # a query without a relevant document measures nothing
        judged = any(made.labels[place].values())
        made.held_out[place] = judged and text_hash(query.casefold()) < recipe.held_out * 2**64
    _make_queries(recipe, made)
    if not made.queries:
        raise InputError("expected queries, got none", hint="give pairs, or ask for --sentences, --spans or --keywords")
    return made


def _add_corpus(recipe: Recipe, source: Source, made: Collection, prefix: str) -> None:
    clean = recipe.cleaner(source)
    for name, raw in formats.passages(source.path):
        text = _limited(clean(raw), recipe, made)
        if text is not None:
            made.add_text(text, _prefixed(prefix, name))


def _add_examples(recipe: Recipe, source: Source, made: Collection, prefix: str) -> None:
    clean = recipe.cleaner(source)

    def cleaned() -> Iterator[formats.Example]:
        given = formats.beir(source.path, source.run, recipe.depth) if source.run else formats.examples(source.path)
        for example in given:
            query = clean(example.query)
            documents = tuple(
                document._replace(text=text)
                for document in example.documents
                if (text := _limited(clean(document.text), recipe, made)) is not None
            )
            if not query:
                made.left_out["empty queries"] += 1
            elif documents or not example.documents:
                yield formats.Example(query, documents, example.id)

    def key(example: formats.Example) -> int:
        first = example.documents[0].text if example.documents else ""
        return text_hash(f"{example.query}\0{first}", recipe.seed)

    for example in fewest(cleaned(), recipe.caps.get(source.name), key):
        made.add_example(example, source.name, prefix)


def _limited(text: str, recipe: Recipe, made: Collection) -> str | None:
    """A passage's first words; None where they are too few."""
    words = text.split()
    if len(words) < max(recipe.min_words, 1):
        made.left_out["passages that are too short"] += 1
        return None
    return text if recipe.words is None else " ".join(words[: recipe.words])


def _add_passages(recipe: Recipe, source: Source, made: Collection) -> None:
    clean = recipe.cleaner(source)

    def parts() -> Iterator[str]:
        seen: set[int] = set()
        for _, document in formats.passages(source.path):
            text = clean(document)
            seed = text_hash(text, recipe.seed)
            if seed in seen:
                continue
            seen.add(seed)
            for part in cut(text, np.random.default_rng(seed)):
                if (limited := _limited(part, recipe, made)) is not None:
                    yield limited

    for text in fewest(parts(), recipe.caps.get(source.name), lambda text: text_hash(text, recipe.seed)):
        made.add_text(text, long=True)


def _make_queries(recipe: Recipe, made: Collection) -> None:
    weights = np.where(np.array(made.long), LONG_WEIGHT, 1.0)
    for query in make(made.texts, weights, recipe.pseudo, recipe.seed):
        count = len(made.queries)
        place = made.add_query(query.text, query.kind)
        if place < count:
            made.left_out["made queries that were there already"] += 1
            continue
        made.made_from[place] = query.place


# Queries made from passages, for which no label is known and only teachers speak.
#
# PSEUDO is the table of kinds: a sentence (as claims and long questions are), two or three consecutive sentences (as
# descriptions of a need are), and a sentence's rarest words (as keyword queries are).

SENTENCE_WORDS = range(6, 41)
SPAN_WORDS = range(15, 91)
KEYWORDS = range(2, 6)
_WORD = re.compile(r"[^\W\d_]+(?:['-][^\W\d_]+)*")

Maker = Callable[[str, np.random.Generator, Mapping[str, int]], str | None]


class Made(NamedTuple):
    """A query made from the passage at ``place``."""

    kind: str
    text: str
    place: int


def _pick(options: Sequence[str], rng: np.random.Generator) -> str | None:
    return options[int(rng.integers(len(options)))] if options else None


def _sentence(text: str, rng: np.random.Generator, counts: Mapping[str, int]) -> str | None:
    return _pick([one for one in sentences(text) if len(one.split()) in SENTENCE_WORDS], rng)


def _span(text: str, rng: np.random.Generator, counts: Mapping[str, int]) -> str | None:
    parts = sentences(text)
    spans = [" ".join(parts[at : at + size]) for size in (2, 3) for at in range(len(parts) - size + 1)]
    return _pick([span for span in spans if len(span.split()) in SPAN_WORDS], rng)


def _keywords(text: str, rng: np.random.Generator, counts: Mapping[str, int]) -> str | None:
    sentence = _sentence(text, rng, counts)
    if sentence is None:
        return None
    words = dict.fromkeys(_WORD.findall(sentence.lower()))
    rare = sorted(words, key=lambda word: counts.get(word, 0))[: int(rng.integers(KEYWORDS.start, KEYWORDS.stop))]
    chosen = [word for word in words if word in rare]  # in the order of the sentence
    return " ".join(chosen) if len(chosen) >= KEYWORDS.start else None


PSEUDO: Mapping[str, Maker] = {"sentence": _sentence, "span": _span, "keywords": _keywords}


def word_counts(texts: Sequence[str]) -> Counter[str]:
    """In how many texts each word is."""
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(set(_WORD.findall(text.lower())))
    return counts


def make(
    texts: Sequence[str], weights: npt.NDArray[np.float64], wanted: Mapping[str, int], seed: int
) -> Iterator[Made]:
    """As many queries of each kind of PSEUDO as ``wanted`` says, or as the texts give.

    Passages are drawn with ``weights`` (N,), each at most once a kind.
    """
    counts = word_counts(texts) if wanted.get("keywords") else {}
    for number, (kind, maker) in enumerate(PSEUDO.items()):
        rng = np.random.default_rng((seed, number))
        missing = wanted.get(kind, 0)
        # exponential races: a random order in which a place comes early in proportion to its weight
        for place in np.argsort(rng.exponential(size=len(texts)) / weights) if missing else ():
            query = maker(texts[place], rng, counts)
            if query is not None:
                yield Made(kind, query, int(place))
                missing -= 1
            if missing == 0:
                break
