"""Texts before they are passages: cleaning, sentences, and long documents cut into passages of whole sentences."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping

import numpy as np

from turborank.errors import UnknownKeyError

MIN_WORDS, MAX_WORDS = 40, 240  # of a passage cut from a long document
LONGEST_SENTENCE = MAX_WORDS - MIN_WORDS  # longer ones (speech without full stops) are cut

# The Penn treebank's spellings of brackets and quotation marks; an opening mark takes the blank after it along.
_TREEBANK = {"-lrb-": "(", "-rrb-": ")", "-lsb-": "[", "-rsb-": "]", "-lcb-": "{", "-rcb-": "}"}
_TREEBANK_TOKEN = re.compile("|".join(_TREEBANK), flags=re.IGNORECASE)
_SENTENCE_END = re.compile(r"(?<=[.?!]) (?=[A-Z\"(])")


def spaces(text: str) -> str:
    """White space of any kind and length as one blank."""
    return " ".join(text.split())


def treebank(text: str) -> str:
    """Tokens of the Penn treebank as written text: brackets, quotation marks, no blank before a comma or an n't."""
    text = _TREEBANK_TOKEN.sub(lambda found: _TREEBANK[found[0].lower()], spaces(text))
    text = re.sub(r"`` ?| ?''", '"', text)
    text = re.sub(r" ([.,;:?!%)\]])", r"\1", text)
    text = re.sub(r"([(\[]) ", r"\1", text)
    return re.sub(r" ('s|n't|'re|'ve|'ll|'d|'m)\b", r"\1", text, flags=re.IGNORECASE)


def transcript(text: str) -> str:
    """Without a transcriber's marks in braces, as ``{disfmarker}`` and ``{vocalsound}``."""
    return spaces(re.sub(r"\{[a-z]+\}", " ", text))


def alternatives(text: str) -> str:
    """Without bracketed alternatives, as in ``What is (are) …`` and ``symptom(s)``."""
    return spaces(re.sub(r"\((?:are|is|was|were|s|es)\)", "", text))


CLEANERS: Mapping[str, Callable[[str], str]] = {
    "spaces": spaces,
    "treebank": treebank,
    "transcript": transcript,
    "alternatives": alternatives,
}


def cleaner(names: Iterable[str]) -> Callable[[str], str]:
    """The rules of CLEANERS named, one after the other; white space is always made even, at the end."""
    chosen = list(names)
    for name in chosen:
        if name not in CLEANERS:
            raise UnknownKeyError("a cleaning rule", name, CLEANERS)
    rules = [CLEANERS[name] for name in dict.fromkeys([*chosen, "spaces"])]

    def clean(text: str) -> str:
        for rule in rules:
            text = rule(text)
        return text

    return clean


def sentences(text: str) -> list[str]:
    """Sentences of a text of one line: a full stop, then a capital letter, a quotation mark or a bracket."""
    return _SENTENCE_END.split(text)


def cut(text: str, rng: np.random.Generator) -> Iterator[str]:
    """A long text as passages of whole sentences, each of a random length of MIN_WORDS to MAX_WORDS words.

    What is left at the end is a passage, too, if it has MIN_WORDS; a sentence of more than LONGEST_SENTENCE is cut.
    """
    wanted = int(rng.integers(MIN_WORDS, MAX_WORDS))
    words: list[str] = []
    for piece in _pieces(text):
        if len(words) >= wanted or (len(words) >= MIN_WORDS and len(words) + len(piece) > MAX_WORDS):
            yield " ".join(words)
            wanted, words = int(rng.integers(MIN_WORDS, MAX_WORDS)), []
        words += piece
    if len(words) >= MIN_WORDS:
        yield " ".join(words)


def _pieces(text: str) -> Iterator[list[str]]:
    for sentence in sentences(text):
        words = sentence.split()
        for start in range(0, len(words), LONGEST_SENTENCE):
            yield words[start : start + LONGEST_SENTENCE]
