"""Text functions: fields of a document, lone surrogates, cleaning rules, sentence and passage splitting."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from turborank.errors import InputError, UnknownKeyError

if TYPE_CHECKING:
    import numpy as np

DEFAULT_FIELDS = ("title", "text")
_SURROGATE = re.compile("[\ud800-\udfff]")
MIN_WORDS, MAX_WORDS = 40, 240  # words of a passage cut from a long document
LONGEST_SENTENCE = MAX_WORDS - MIN_WORDS  # words; longer sentences (transcripts without full stops) are split

# Brackets as the Penn Treebank spells them, and the written brackets.
_TREEBANK = {"-lrb-": "(", "-rrb-": ")", "-lsb-": "[", "-rsb-": "]", "-lcb-": "{", "-rcb-": "}"}
_TREEBANK_TOKEN = re.compile("|".join(_TREEBANK), flags=re.IGNORECASE)
_END = re.compile(r"(?<=[.!?])[\"')\]]*\s+|(?<=[。！？])|\n\s*\n")
_OPENING = "\"'“‘«¿¡(["  # may begin a sentence


def plain(text: str) -> str:
    """Replace each lone surrogate, which UTF-8 cannot encode, by U+FFFD; character offsets stay the same."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return _SURROGATE.sub("\ufffd", text)
    return text


def document_text(document: object, fields: Sequence[str] = DEFAULT_FIELDS) -> str:
    """The text that the model reads: the string itself, or a mapping's ``fields`` joined by spaces.

    Fields that are absent, None or empty are skipped: a table has no other null. Raises InputError when ``document`` is
    neither a string nor a mapping, when the mapping has none of the fields, and when one is neither text nor a number.
    """
    if isinstance(document, str):
        return document
    if not isinstance(document, Mapping):
        raise InputError(f"expected a string or a mapping, got {type(document).__name__}")
    values = [document[field] for field in fields if document.get(field) is not None]
    if not values:
        found = ", ".join(str(field)[:60] for field in itertools.islice(document, 10)) or "no fields"
        found += f" and {len(document) - 10} more" if len(document) > 10 else ""
        raise InputError(f"expected at least one of the fields {', '.join(fields)}, got {found}")
    wrong = [type(value).__name__ for value in values if not isinstance(value, str | int | float)]
    if wrong:
        raise InputError(f"expected text in the fields {', '.join(fields)}, got {', '.join(wrong)}")
    return " ".join(str(value) for value in values if value != "")


def spaces(text: str) -> str:
    """Replace each run of white space by one space, and strip both ends."""
    return " ".join(text.split())


def treebank(text: str) -> str:
    """Undo Penn Treebank tokenisation: brackets, quotation marks, spaces before punctuation and before ``n't``."""
    text = _TREEBANK_TOKEN.sub(lambda found: _TREEBANK[found[0].lower()], spaces(text))
    text = re.sub(r"`` ?| ?''", '"', text)
    text = re.sub(r" ([.,;:?!%)\]])", r"\1", text)
    text = re.sub(r"([(\[]) ", r"\1", text)
    return re.sub(r" ('s|n't|'re|'ve|'ll|'d|'m)\b", r"\1", text, flags=re.IGNORECASE)


def transcript(text: str) -> str:
    """Remove transcription marks in braces, such as ``{disfmarker}`` and ``{vocalsound}``."""
    return spaces(re.sub(r"\{[a-z]+\}", " ", text))


def alternatives(text: str) -> str:
    """Remove bracketed alternatives, as in ``What is (are) …`` and ``symptom(s)``."""
    return spaces(re.sub(r"\((?:are|is|was|were|s|es)\)", "", text))


CLEANERS: Mapping[str, Callable[[str], str]] = {
    "spaces": spaces,
    "treebank": treebank,
    "transcript": transcript,
    "alternatives": alternatives,
}


def cleaner(names: Iterable[str]) -> Callable[[str], str]:
    """A function that applies the named rules of CLEANERS in order, and ``spaces`` at the end if it is not named.

    Raises UnknownKeyError for an unknown rule.
    """
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


def sentence_ends(text: str, *, strict: bool = False) -> Iterator[int]:
    """Offsets behind each sentence and the white space that follows it.

    A sentence ends with ``.``, ``!`` or ``?``, closing quotation marks or brackets and white space; with ``。``, ``！``
    or ``？``; or with an empty line. ``strict``: only before an upper-case or caseless letter or an opening quotation
    mark or bracket, so that "e.g. this" and "Fig. 3" stay whole.
    """
    # Both modes are needed: queries made from sentences must be whole ones, hence strict. The passages of a document
    # must also be found in text without capitals (chats, transcripts); a false end only makes a passage shorter.
    for match in _END.finditer(text):
        following = text[match.end() : match.end() + 1]
        if not strict or following in _OPENING or (following.isalpha() and not following.islower()):
            yield match.end()


def sentences(text: str, *, strict: bool = False) -> list[str]:
    """The sentences of ``text`` without surrounding white space; ``strict`` as for :func:`sentence_ends`."""
    bounds = [0, *sentence_ends(text, strict=strict), len(text)]
    pieces = (text[start:end].strip() for start, end in itertools.pairwise(bounds))
    return [piece for piece in pieces if piece]


def cut(text: str, rng: np.random.Generator) -> Iterator[str]:
    """Cut a long text into passages of whole sentences, each of a random length of MIN_WORDS to MAX_WORDS words.

    Sentences of more than LONGEST_SENTENCE words are split. The remainder is yielded if it has MIN_WORDS words.
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
    for sentence in sentences(text, strict=True):
        words = sentence.split()
        for start in range(0, len(words), LONGEST_SENTENCE):
            yield words[start : start + LONGEST_SENTENCE]


# Passages of a document by character offsets: sentences, joined when short and split when long.

SHORTEST, LONGEST = 40, 600  # characters of a passage
MOST = 64  # maximum number of passages of a document; longer documents get longer passages
_SPACE = re.compile(r"\s+")


def passages(text: str) -> list[tuple[int, int]]:
    """Character offsets (start, end) of the passages of ``text`` in order, without surrounding white space.

    The passages cover every character that is not white space.
    """
    shortest = max(SHORTEST, -(-len(text) // MOST))
    longest = max(LONGEST, shortest)
    cuts: list[int] = []
    start = 0
    for end in sentence_ends(text):
        if end - start >= shortest:
            cuts += [*_split(text, start, end, longest), end]
            start = end
    cuts += _split(text, start, len(text), longest)
    bounds = [0, *cuts, len(text)]
    trimmed = (_trim(text, first, last) for first, last in itertools.pairwise(bounds))
    return [(first, last) for first, last in trimmed if first < last]


def _split(text: str, start: int, end: int, longest: int) -> list[int]:
    """Offsets that cut text[start:end] into about equal pieces of at most ``longest`` characters, at white space if
    there is any."""
    cuts = []
    while end - start > longest:
        size = end - start
        even = start + -(-size // -(-size // longest))
        spaces = [match.end() for match in _SPACE.finditer(text, start + longest // 2, start + longest)]
        start = min(spaces, key=lambda place: abs(place - even), default=even)
        cuts.append(start)
    return cuts


def _trim(text: str, start: int, end: int) -> tuple[int, int]:
    piece = text[start:end]
    return start + len(piece) - len(piece.lstrip()), start + len(piece.rstrip())
