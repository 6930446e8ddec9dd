"""Token-budget batching: score any number of pairs in bounded memory, in the caller's order.

A background thread tokenises one chunk of pairs while the engine computes the previous one. Each chunk is
sorted by length and cut into batches of at most ``token_budget`` tokens; the logits return to the caller's
order. A pair's logit does not depend on the other pairs of its batch (docs/architecture.md).

:class:`Pace` predicts the seconds of a batch from those of earlier ones; the server bounds its batches by it.
:func:`deep_enough` decides when to stop reading a first stage's list.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np

from turborank.calibration import sigmoid
from turborank.errors import EngineError, InputError, TooLongError
from turborank.tokens import PairEncoder, pack
from turborank.types import Encoding, Engine, Float32, Pair, Progress, Scores

TOKEN_BUDGET = 16_384  # tokens in one batch; a single longer pair is a batch of its own
CHUNK_CHARACTERS = 200_000  # characters tokenised at a time: bounds memory, and lets tokenisation overlap computation
QUERY_CHARACTERS = 2_000  # maximum characters of a query counted for each pair: it is tokenised once per chunk
FIRST_CHUNK_CHARACTERS = 20_000  # small, because no computation overlaps the first chunk's tokenisation

# The fit of Pace:
PACE_MEMORY = 2.0  # seconds of computing after which an earlier batch counts 1/e
PACE_KEPT = 0.7  # minimum share that an earlier batch keeps after the next one, however long that takes
PACE_OUTLIER = 4.0  # ratio of measured to predicted seconds at which a batch is clipped: the process was paused
PACE_RATIO = (
    1 / 2000
)  # per_square / per_token if all batches have pairs of one length: int8, embedded model (docs/serving.md)
PACE_SPREAD = 64.0  # standard deviation of the lengths, in tokens, at which measurements and PACE_RATIO count equally


class Work(NamedTuple):
    """What a batch or a request costs: tokens, and the sum of its pairs' squared lengths, for attention."""

    tokens: float
    squares: float

    def plus(self, length: float) -> Work:
        """With one more pair."""
        return Work(self.tokens + length, self.squares + length * length)


class Pace:
    """Seconds that an engine takes for a batch: ``per_token`` x tokens + ``per_square`` x squares.

    The two terms are fitted to the engine's recent batches: a line through (squares / tokens, seconds / tokens),
    weighted by tokens, in which older batches count less. Batches of one length do not determine both terms; then their
    ratio is regularised towards PACE_RATIO. A prediction chooses the size of a batch and never changes a score.
    """

    def __init__(self) -> None:
        # Decayed sums over batches, x = squares / tokens: of tokens, squares, squares * x, seconds, seconds * x
        self._sums = (0.0, 0.0, 0.0, 0.0, 0.0)
        self.per_token = self.per_square = 0.0

    @property
    def known(self) -> bool:
        """Whether a batch has been measured."""
        return self._sums[0] > 0

    @property
    def speed(self) -> float | None:
        """Tokens per second of recent batches; None before the first."""
        return self._sums[0] / self._sums[3] if self.known else None

    def seconds(self, work: Work) -> float:
        """Predicted seconds; 0 before the first batch was measured."""
        return self.per_token * work.tokens + self.per_square * work.squares

    def measure(self, work: Work, seconds: float) -> None:
        """Take a computed batch into account."""
        seconds = max(seconds, 1e-9)
        if self.known:
            seconds = min(seconds, PACE_OUTLIER * self.seconds(work))
        x = work.squares / work.tokens
        new = (work.tokens, work.squares, work.squares * x, seconds, seconds * x)
        decay = max(math.exp(-seconds / PACE_MEMORY), PACE_KEPT)
        self._sums = tokens, squares, squares_x, total, total_x = tuple(  # type: ignore[assignment]
            decay * before + one for before, one in zip(self._sums, new, strict=True)
        )
        mean_x, mean_y, spread = squares / tokens, total / tokens, PACE_SPREAD**2
        prior = PACE_RATIO * mean_y / (1 + PACE_RATIO * mean_x)
        slope = (total_x / tokens - mean_x * mean_y + spread * prior) / (squares_x / tokens - mean_x**2 + spread)
        self.per_square = min(max(slope, 0.0), mean_y / mean_x)
        self.per_token = mean_y - self.per_square * mean_x


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


# ---------------------------------------------------------------- adaptive depth

# After each block of DEPTH_BLOCK documents of a first stage's list, estimate the share of the final top n that is still
# unread, from the share of the list that is left and from the distance of the n-th best logit to the last logits, in
# their standard deviations:
#
#     sigmoid(INTERCEPT + LEFT · ln(left / total) + GAP · (n-th best - mean(last 2 blocks)) / std(last 2 blocks))
#
# Scoring stops when the estimate falls below STOP_SHARE. The logits are standardised, so one rule serves all models.
# The coefficients were fitted by logistic regression on 535 queries of six collections (n = 10, BM25 lists of 100);
# docs/depth.md reports what is kept and saved on collections that the fit had not seen, and where the rule fails.
AUTO_DEPTH = "auto"
DEPTH_BLOCK = 10  # documents between two decisions
STOP_INTERCEPT, STOP_LEFT, STOP_GAP = -0.251, 1.106, -0.2949
STOP_SHARE = 0.06  # share of the top n; of ten documents 0.6 are still expected, most of them at low ranks
_MINIMUM_STD = 1e-6  # avoids dividing by zero when all logits are equal


def checked_depth(depth: int | str | None, top_n: int | None) -> int | str | None:
    """Validate ``depth`` and return it. Raises InputError unless it is None, an int from 1, or "auto" with a top_n."""
    if isinstance(depth, str) and depth == AUTO_DEPTH and top_n is None:
        raise InputError("expected top_n with depth='auto', got none", hint="give the number of documents you need")
    if depth is None or (isinstance(depth, str) and depth == AUTO_DEPTH):
        return depth
    if isinstance(depth, bool) or not isinstance(depth, int) or depth < 1:
        raise InputError(f"expected depth to be a positive whole number or 'auto', got {depth!r:.80}")
    return depth


def expected_share(logits: Float32, top_n: int, total: int) -> float:
    """Expected share (0 to 1) of the final top n among the documents that are not scored yet.

    ``logits`` (d,): logits of the first d of ``total`` documents, in the order of the first stage.
    """
    read = len(logits)
    if read >= total:
        return 0.0
    if read < top_n:
        return 1.0
    nth = float(np.partition(logits, read - top_n)[read - top_n])
    last = np.asarray(logits[-2 * DEPTH_BLOCK :], dtype=np.float64)
    gap = (nth - float(last.mean())) / max(float(last.std()), _MINIMUM_STD)
    return sigmoid(STOP_INTERCEPT + STOP_LEFT * math.log((total - read) / total) + STOP_GAP * gap)


def deep_enough(logits: Float32, top_n: int, total: int) -> bool:
    """Whether to stop scoring: less than STOP_SHARE of the top n is expected among the documents that are left."""
    return expected_share(logits, top_n, total) < STOP_SHARE
