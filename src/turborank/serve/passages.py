"""A document's passages by character offsets: sentences, joined when short and split when long."""

from __future__ import annotations

import itertools
import re

SHORTEST, LONGEST = 40, 600  # characters of a passage
MOST = 64  # passages of a document; longer documents get longer passages
_END = re.compile(r"(?<=[.!?])[\"')\]]*\s+|(?<=[。！？])|\n\s*\n")
_SPACE = re.compile(r"\s+")


def passages(text: str) -> list[tuple[int, int]]:
    """Offsets (start, end) of the passages of ``text`` in reading order, without white space around them.

    Together they hold every character that is not white space.
    """
    shortest = max(SHORTEST, -(-len(text) // MOST))
    longest = max(LONGEST, shortest)
    cuts: list[int] = []
    start = 0
    for match in _END.finditer(text):
        end = match.end()
        if end - start >= shortest:
            cuts += [*_split(text, start, end, longest), end]
            start = end
    cuts += _split(text, start, len(text), longest)
    bounds = [0, *cuts, len(text)]
    trimmed = (_trim(text, first, last) for first, last in itertools.pairwise(bounds))
    return [(first, last) for first, last in trimmed if first < last]


def _split(text: str, start: int, end: int, longest: int) -> list[int]:
    """Where to cut text[start:end] so that no piece is longer than ``longest``: about evenly, at white space if any."""
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
