"""Token-budget batching: score any number of pairs in bounded memory, in the caller's order.

A background thread tokenises one chunk of pairs while the engine computes the previous one. Each chunk is
sorted by length and cut into batches of at most ``token_budget`` tokens; the logits return to the caller's
order. A pair's logit does not depend on the other pairs of its batch (docs/architecture.md).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from turborank.errors import EngineError, TooLongError
from turborank.tokens import PairEncoder, pack
from turborank.types import Encoding, Engine, Float32, Pair, Progress, Scores

TOKEN_BUDGET = 16_384  # tokens in one batch; a single longer pair is a batch of its own
CHUNK_CHARACTERS = 200_000  # characters tokenised at a time: bounds memory, and lets tokenisation overlap computation
QUERY_CHARACTERS = 2_000  # maximum characters of a query counted for each pair: it is tokenised once per chunk
FIRST_CHUNK_CHARACTERS = 20_000  # small, because no computation overlaps the first chunk's tokenisation


def budget(engine: Engine) -> int:
    """Maximum tokens of a batch: the engine's ``token_budget`` if it has one, else TOKEN_BUDGET."""
    return int(getattr(engine, "token_budget", TOKEN_BUDGET))


def plan(lengths: Sequence[int], token_budget: int = TOKEN_BUDGET) -> list[list[int]]:
    """Indices of ``lengths`` in batches, longest first, each of at most ``token_budget`` tokens."""
    batches: list[list[int]] = []
    room = 0
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        if not batches or lengths[index] > room:
            batches.append([])
            room = token_budget
        batches[-1].append(index)
        room -= lengths[index]
    return batches


def chunks(pairs: Sequence[Pair]) -> Iterator[tuple[int, Sequence[Pair]]]:
    """Yield (index of the first pair, chunk of pairs), with about CHUNK_CHARACTERS of text in each chunk."""
    start, size, limit = 0, 0, FIRST_CHUNK_CHARACTERS
    for index, (query, document) in enumerate(pairs):
        size += min(len(query), QUERY_CHARACTERS) + len(document)
        if size >= limit:
            yield start, pairs[start : index + 1]
            start, size, limit = index + 1, 0, CHUNK_CHARACTERS
    if start < len(pairs):
        yield start, pairs[start:]


def _encoded(pairs: Sequence[Pair], encoder: PairEncoder) -> Iterator[tuple[int, list[list[Encoding]]]]:
    """Yield (index of the first pair, encodings) of each chunk; the next chunk is tokenised in the background."""
    pieces = list(chunks(pairs))
    if len(pieces) <= 1:  # nothing to overlap, so starting a thread would only cost time
        yield from ((start, _encode(encoder, start, piece)) for start, piece in pieces)
        return
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="turborank-tokens") as ahead:
        running = ((start, ahead.submit(_encode, encoder, start, piece)) for start, piece in pieces)
        current = next(running, None)
        while current is not None:
            following = next(running, None)  # starts tokenising before the caller computes the current chunk
            yield current[0], current[1].result()
            current = following


def _encode(encoder: PairEncoder, start: int, pairs: Sequence[Pair]) -> list[list[Encoding]]:
    """The encodings of a chunk; a TooLongError gets the pair's index among all pairs."""
    try:
        return encoder.encode(pairs)
    except TooLongError as error:
        place = start + error.place
        raise error.at(place, f"pairs[{place}]") from None


def _chunk_logits(windows: Sequence[Encoding], engine: Engine, token_budget: int) -> Float32:
    logits = np.empty(len(windows), dtype=np.float32)
    for batch in plan([len(window) for window in windows], token_budget):
        logits[batch] = engine.logits(pack([windows[i] for i in batch]))
    return logits


def score(
    pairs: Sequence[Pair],
    encoder: PairEncoder,
    engine: Engine,
    *,
    token_budget: int | None = None,
    progress: Progress | None = None,
) -> Scores:
    """Score all pairs in batches of at most ``token_budget`` tokens (default: the engine's own budget).

    ``progress`` is called in the caller's thread with (pairs done, total pairs).
    Raises EngineError when a logit is not finite, and TooLongError, with the pair's index, when a pair is too long
    under the length policy ``error``.
    """
    size = token_budget or budget(engine)
    total, done, parts = len(pairs), 0, [gather([], np.empty(0, dtype=np.float32))]
    for start, encoded in _encoded(pairs, encoder):
        flat = list(itertools.chain.from_iterable(encoded))
        parts.append(gather(encoded, _chunk_logits(flat, engine, size), first_pair=start))
        done = start + len(encoded)
        if progress is not None:
            progress(done, total)
    return Scores(*(np.concatenate(column) for column in zip(*parts, strict=True)))


def gather(encoded: Sequence[Sequence[Encoding]], logits: Float32, *, first_pair: int = 0) -> Scores:
    """Scores of pairs from the logits (W,) of their W windows in order: a pair's logit is the maximum of its windows.

    ``first_pair`` is the index of the first pair in the caller's list, used in error messages.
    Raises EngineError when a logit is not finite.
    """
    best = Scores(
        np.empty(len(encoded), dtype=np.float32),
        np.empty(len(encoded), dtype=np.int32),
        np.empty(len(encoded), dtype=np.int32),
        np.empty((len(encoded), 2), dtype=np.int64),
    )
    first = 0
    for place, windows in enumerate(encoded):
        winner = int(np.argmax(logits[first : first + len(windows)]))
        best.logits[place], best.spans[place] = logits[first + winner], windows[winner].span
        best.tokens[place], best.truncated[place] = windows[0].read, windows[0].truncated
        first += len(windows)
    _check_finite(best.logits, first_pair)
    return best


def _check_finite(logits: Float32, first_pair: int) -> None:
    bad = np.flatnonzero(~np.isfinite(logits))
    if bad.size:
        where = int(bad[0])
        raise EngineError(
            f"expected a finite logit, got {logits[where]} for pair {first_pair + where} (and {bad.size - 1} more)",
            hint="the model's weights or the engine are at fault; compare with engine='reference' (or, "
            "in fp16, whose range is small, with precision='bf16')",
        )
