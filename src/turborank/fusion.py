"""Reciprocal rank fusion of the lists of several first stages."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import TypeVar

from turborank.errors import InputError

K = 60  # the paper's value; a larger one reduces the difference between ranks
Key = TypeVar("Key", bound=Hashable)


def reciprocal_rank_fusion(
    rankings: Sequence[Sequence[Key]], *, k: float = K, weights: Sequence[float] | None = None
) -> list[tuple[Key, float]]:
    """Fuse rankings: (document, score) of every document, best first; score = Σ over rankings of weight / (k + rank).

    Ranks start at 1. ``weights`` has one weight for each ranking, by default 1. Equal scores keep the order of first
    appearance. The scores of the first stages are not used, so their scales may differ.
    Cormack, Clarke and Büttcher, SIGIR 2009.

    Raises InputError for a document that occurs twice in one ranking, a negative k, and a wrong number of weights or
    a negative one.
    """
    if isinstance(rankings, str) or any(isinstance(ranking, str) for ranking in rankings):
        raise InputError("expected lists of document ids, got a string")
    shares = [1.0] * len(rankings) if weights is None else list(weights)
    if len(shares) != len(rankings) or any(not share >= 0 for share in shares):
        raise InputError(f"expected {len(rankings)} weights of at least 0, got {shares!r:.80}")
    if not k >= 0:
        raise InputError(f"expected k to be at least 0, got {k!r:.80}")
    scores: dict[Key, float] = {}
    for number, (ranking, share) in enumerate(zip(rankings, shares, strict=True)):
        if len(set(ranking)) != len(ranking):
            raise InputError(f"expected each document once in a ranking, got one twice in rankings[{number}]")
        for rank, document in enumerate(ranking, 1):
            scores[document] = scores.get(document, 0.0) + share / (k + rank)
    return sorted(scores.items(), key=lambda item: -item[1])
