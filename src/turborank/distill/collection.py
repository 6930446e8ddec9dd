"""Sources into one collection: each text once, labels merged, choices by hashes so that they do not move."""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np

from turborank.distill import formats, passages, pseudo
from turborank.distill.mine import text_hash
from turborank.errors import InputError

T = TypeVar("T")
LONG_WEIGHT = 0.5  # of passages cut from long documents when queries are made: transcripts and fiction make poor ones


class Source(NamedTuple):
    """A file of training data under the name that queries and caps go by."""

    name: str
    path: Path
    long: bool = False  # its documents are cut into passages, and its queries not read


@dataclass(frozen=True)
class Recipe:
    """What a collection is made of."""

    sources: tuple[Source, ...]
    caps: Mapping[str, int] = field(default_factory=dict)  # source -> examples, or passages of a long one
    clean: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # source, or "" for all -> rules of CLEANERS
    words: int | None = None  # of a passage; what follows is left out
    min_words: int = 1  # shorter passages are left out
    pseudo: Mapping[str, int] = field(default_factory=dict)  # kind of PSEUDO -> queries
    held_out: float = 0.0  # share of the labelled queries
    seed: int = 0

    def __post_init__(self) -> None:
        names = [source.name for source in self.sources]
        repeated = [name for name, count in Counter(names).items() if count > 1]
        if not names or repeated:
            raise InputError(f"expected sources with a name each, got {', '.join(repeated) or 'none'}")
        for name in (*self.caps, *(name for name in self.clean if name)):
            if name not in names:
                raise InputError(f"expected the name of a source ({', '.join(names)}), got {name!r}")
        if not 0 <= self.held_out < 1:
            raise InputError(f"expected a share of 0 to 1 to be held out, got {self.held_out}")


class Collection:
    """Queries and passages by place, each text once."""

    def __init__(self) -> None:
        self.texts: dict[str, int] = {}  # text -> place
        self.long: list[bool] = []  # of each text: cut from a long document
        self.queries: dict[str, int] = {}
        self.sources: list[str] = []  # of each query
        self.labels: list[dict[int, int]] = []  # of each query: place of the text -> relevance
        self.known: list[dict[int, None]] = []  # of each query: places of the texts that came with it
        self.made_from: list[int | None] = []  # of each query: place of the text it was made from
        self.scores: dict[str, dict[tuple[int, int], float]] = {}  # source -> (query, text) -> score that came with it
        self.held_out: list[bool] = []
        self.left_out: Counter[str] = Counter()  # why -> passages or queries

    def add_text(self, text: str, *, long: bool = False) -> int:
        """The place of a text."""
        place = self.texts.setdefault(text, len(self.texts))
        if place == len(self.long):
            self.long.append(long)
        return place

    def add_query(self, text: str, source: str) -> int:
        """The place of a query."""
        place = self.queries.setdefault(text, len(self.queries))
        if place == len(self.sources):
            self.sources.append(source)
            self.labels.append({})
            self.known.append({})
            self.made_from.append(None)
            self.held_out.append(False)
        return place

    def add_example(self, example: formats.Example, source: str) -> None:
        """A query with its documents; of two grades of one document the higher one counts."""
        query = self.add_query(example.query, source)
        for document in example.documents:
            place = self.add_text(document.text)
            self.known[query][place] = None
            if document.label is not None:
                self.labels[query][place] = max(document.label, self.labels[query].get(place, 0))
            if document.score is not None:
                self.scores.setdefault(source, {})[query, place] = document.score


def fewest(items: Iterable[T], cap: int | None, key: Callable[[T], int]) -> list[T]:
    """``cap`` of the items in their order: those with the smallest keys; never more of them held than that."""
    if cap is None:
        return list(items)
    chosen = heapq.nsmallest(cap, enumerate(items), key=lambda item: (key(item[1]), item[0]))
    return [item for _, item in sorted(chosen, key=lambda item: item[0])]


def collect(recipe: Recipe) -> Collection:
    """Everything the recipe names, read, cleaned, capped, merged; and the queries made from it.

    Raises InputError, with file and line, for malformed input.
    """
    made = Collection()
    for source in recipe.sources:
        read = _passages(recipe, source, made) if source.long else _examples(recipe, source, made)
        read()
    if not made.texts:
        raise InputError(f"expected passages, got none in {', '.join(str(source.path) for source in recipe.sources)}")
    for query, place in made.queries.items():
        # a query without a relevant document measures nothing
        judged = any(made.labels[place].values())
        made.held_out[place] = judged and text_hash(query.lower()) < recipe.held_out * 2**64
    _make_queries(recipe, made)
    if not made.queries:
        raise InputError("expected queries, got none", hint="give pairs, or ask for --sentences, --spans or --keywords")
    return made


def _examples(recipe: Recipe, source: Source, made: Collection) -> Callable[[], None]:
    clean = passages.cleaner(recipe.clean.get(source.name, recipe.clean.get("", ())))

    def cleaned() -> Iterator[formats.Example]:
        for example in formats.examples(source.path):
            query = clean(example.query)
            documents = tuple(
                document._replace(text=text)
                for document in example.documents
                if (text := _limited(clean(document.text), recipe, made)) is not None
            )
            if query and documents:
                yield formats.Example(query, documents)
            elif not query:
                made.left_out["empty queries"] += 1

    def key(example: formats.Example) -> int:
        return text_hash(f"{example.query}\0{example.documents[0].text}", recipe.seed)

    def read() -> None:
        for example in fewest(cleaned(), recipe.caps.get(source.name), key):
            made.add_example(example, source.name)

    return read


def _limited(text: str, recipe: Recipe, made: Collection) -> str | None:
    """A passage's first words; None where they are too few."""
    words = text.split()
    if len(words) < max(recipe.min_words, 1):
        made.left_out["passages that are too short"] += 1
        return None
    return text if recipe.words is None else " ".join(words[: recipe.words])


def _passages(recipe: Recipe, source: Source, made: Collection) -> Callable[[], None]:
    clean = passages.cleaner(recipe.clean.get(source.name, recipe.clean.get("", ())))

    def parts() -> Iterator[str]:
        seen: set[int] = set()
        for document in formats.documents(source.path):
            text = clean(document)
            seed = text_hash(text, recipe.seed)
            if seed in seen:
                continue
            seen.add(seed)
            for part in passages.cut(text, np.random.default_rng(seed)):
                if (limited := _limited(part, recipe, made)) is not None:
                    yield limited

    def read() -> None:
        for text in fewest(parts(), recipe.caps.get(source.name), lambda text: text_hash(text, recipe.seed)):
            made.add_text(text, long=True)

    return read


def _make_queries(recipe: Recipe, made: Collection) -> None:
    weights = np.where(np.array(made.long), LONG_WEIGHT, 1.0)
    for query in pseudo.make(list(made.texts), weights, recipe.pseudo, recipe.seed):
        if query.text in made.queries:
            made.left_out["made queries that were there already"] += 1
            continue
        made.made_from[made.add_query(query.text, query.kind)] = query.place
