"""Queries made from passages, for which no label is known and only teachers speak.

PSEUDO is the table of kinds: a sentence (as claims and long questions are), two or three consecutive sentences (as
descriptions of a need are), and a sentence's rarest words (as keyword queries are).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from turborank.distill.passages import sentences

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
