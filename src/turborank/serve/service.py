"""From an Ask to an Answer: size checks, tokenisation, queue, ranking. Independent of HTTP except for Problem."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import math
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from turborank.calibration import sigmoid
from turborank.errors import InputError, TooLongError, TurborankError
from turborank.reranker import Reranker, ranking
from turborank.scheduler import Work, chunks, gather
from turborank.score_cache import Found, ScoreCache
from turborank.serve import auth, telemetry
from turborank.serve.auth import Key, KeyRing
from turborank.serve.config import PREFIX, Settings
from turborank.serve.models import Models, ServedModel
from turborank.serve.queue import Batcher, Ticket
from turborank.serve.telemetry import Metrics, Tracer
from turborank.serve.wire import Answer, Ask, Problem, Span, SpanOptions, from_error
from turborank.text import passages
from turborank.tokens import NO_LIMITS, WINDOW_OVERLAP, Limits, PairEncoder
from turborank.types import Encoding, Pair, Scores

API_KEY = PREFIX + "API_KEY"  # environment variable with a single key, for containers
CHARACTERS_PER_TOKEN = 4.0  # initial estimate (English), updated from requests
LEAST_CHARACTERS, MOST_CHARACTERS = 0.5, 8.0  # bounds of the estimate
ENOUGH_CHARACTERS = 200  # minimum characters of a request that updates the estimate
OVERHEAD = 8  # about the special tokens of a pair
MAX_SPAN_DOCUMENTS = 100  # documents whose passages are scored
DEFAULT_SPANS = 3  # passages of each document, unless the request has max_spans
LOADING_RETRY = 2.0  # seconds in Retry-After while the model loads or the server shuts down
STAGES = ("tokenise", "queue", "compute")
NO_SCORES = gather([], np.empty(0, dtype=np.float32))

Named = tuple[str, Sequence[int] | None]  # field of the documents in the request, indices of these pairs (None: all)


class Service:
    """The state of one server process: models, queue, keys, rate limits, score cache, metrics."""

    def __init__(self, settings: Settings, *, api_key: str | None = None) -> None:
        self.settings = settings
        secret = (os.environ.get(API_KEY, "") if api_key is None else api_key).strip()  # files end in a newline
        if not secret.isascii():
            raise InputError(f"expected {API_KEY} to be of ASCII characters, which headers can hold, got others")
        self.ring = KeyRing(
            Path(settings.keys) if settings.keys else None,
            secret=secret,
            complain=lambda message: telemetry.event("keys_unreadable", {"error": message}),
        )
        for path in (settings.keys, settings.tls_key):
            if path and Path(path).exists() and (warning := auth.exposed(Path(path))):
                telemetry.event("readable_by_others", {"warning": warning}, level=logging.WARNING)
        self.rates = auth.Rates(settings)
        self.pool = ThreadPoolExecutor(max_workers=2, thread_name_prefix="turborank-tokens")
        self.loader = ThreadPoolExecutor(
            max_workers=1, thread_name_prefix="turborank-load"
        )  # separate, so that loading does not delay requests
        self.models = Models(settings, self.loader, lambda name, fields: telemetry.event(name, fields))
        self.batcher = Batcher(
            batch_tokens=settings.batch_tokens,
            batch_seconds=settings.batch_seconds or math.inf,
            queue_tokens=settings.queue_tokens,
            queue_seconds=settings.queue_seconds,
            timeout=settings.timeout,
            observe=lambda computed: self.metrics.batch(computed),
        )
        self.metrics = Metrics(self.batcher, lambda: self.models.ready)
        self.tracer = Tracer(settings.otlp_endpoint)
        self.cache = _open_cache(settings)
        self.draining = False  # SIGTERM received: /ready answers 503
        self.closing = False  # the drain time is over: requests are refused
        self._characters_per_token = CHARACTERS_PER_TOKEN

    @property
    def ready(self) -> bool:
        """Whether the default model is loaded and the server is not shutting down."""
        return self.models.ready and not self.draining

    async def start(self) -> None:
        """Load the default model. Raises Problem when it cannot be loaded."""
        await self.models.load(self.models.default)

    def close(self) -> None:
        """Stop the compute thread and the thread pools; close tracer and cache."""
        self.batcher.close()
        for pool in (self.pool, self.loader):
            pool.shutdown(wait=False, cancel_futures=True)
        self.tracer.close()
        if self.cache is not None:
            self.cache.close()

    def admit_request(self, key: Key) -> None:
        """The checks before the body is read. Raises Problem 503 (loading, shutting down) or 429 (rate limit)."""
        if self.closing:
            raise Problem(503, "draining", "the server is shutting down; try another", retry_after=LOADING_RETRY)
        if not self.models.ready:
            raise Problem(503, "loading", "the model is still loading; try again soon", retry_after=LOADING_RETRY)
        self.rates.enter(key)

    async def answer(self, ask: Ask, key: Key, request_id: str) -> Answer:
        """Rank the documents of a request. Raises Problem. Cancellation removes the request from the queue."""
        model = self.models.find(ask.model)
        if not key.allows(model.name):
            message = (
                f"expected a model that the key {key.name!r} may use ({', '.join(key.models)}), got {model.name!r}"
            )
            raise Problem(403, "model_not_allowed", message, param="model")
        auth.check_sizes(self.settings, ask.pairs, field=ask.field)
        seconds = min(ask.timeout or self.settings.timeout, self.settings.timeout)
        try:
            with self.models.using(model):
                async with asyncio.timeout(seconds):
                    return await self._answer(ask, key, request_id, model)
        except TimeoutError:
            message = f"expected an answer within {seconds:g} s (timeout), got none; send less, or try again later"
            raise Problem(504, "deadline_exceeded", message) from None

    async def _answer(self, ask: Ask, key: Key, request_id: str, model: ServedModel) -> Answer:
        timings: dict[str, float] = {}
        reranker = await self.models.load(model)
        least = _least_score(reranker, ask.threshold)
        scores = await self._scores(reranker, ask.pairs, ask.limits, timings, field=ask.field)
        spent = int(scores.tokens.sum())
        self.rates.spend(key, spent)
        ranked = ranking(ask.documents, scores, top_n=ask.top_n, threshold=least)
        warnings = [*ask.warnings, *_cut(scores, ask.field)]
        spans: dict[int, list[Span]] = {}
        if ask.spans is not None:
            explained = [one.index for one in ranked[:MAX_SPAN_DOCUMENTS]]
            spans, extra = await self._spans(reranker, ask, explained, timings)
            self.rates.spend(key, extra)
            if len(ranked) > MAX_SPAN_DOCUMENTS:
                warnings.append(f"relevant_spans: given for the best {MAX_SPAN_DOCUMENTS} documents")
        self._count(scores)
        return Answer(
            id=request_id,
            model=model.name,
            ranking=ranked,
            scores=scores,
            spans=spans,
            timings=timings,
            created=int(time.time()),
            warnings=warnings,
            calibration=reranker.calibration,
        )

    async def _scores(
        self,
        reranker: Reranker,
        pairs: Sequence[Pair],
        length: Limits,
        timings: dict[str, float],
        *,
        field: str,
        held: bool = False,
    ) -> Scores:
        """Scores of pairs, from the cache if there is one, else by the queue.

        ``held``: the request has been admitted before and is not refused.
        """
        if self.cache is None:
            return await self._computed(reranker, pairs, length, timings, named=(field, None), held=held)
        found: Found = await self._off_loop(self.cache.find, reranker.fingerprint(length), pairs)
        missing = found.missing
        if missing:
            asked = [pairs[place] for place in missing]
            computed = await self._computed(reranker, asked, length, timings, named=(field, missing), held=held)
        else:
            timings.update(dict.fromkeys(STAGES, 0.0) | timings)
            computed = NO_SCORES
        complete: Scores = await self._off_loop(self.cache.complete, found, computed)
        return complete

    async def _off_loop(self, run: Callable[..., Any], *given: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self.pool, run, *given)

    async def _computed(
        self,
        reranker: Reranker,
        pairs: Sequence[Pair],
        length: Limits,
        timings: dict[str, float],
        *,
        named: Named,
        held: bool,
    ) -> Scores:
        """Scores of pairs, computed by the queue."""
        expected = expected_work(pairs, reranker.encoder, length, self._characters_per_token)
        ticket = self.batcher.admit(reranker.engine, expected, always=held)
        began = time.monotonic()
        try:
            encoded = await self._tokenise(reranker.encoder, pairs, length, ticket, named)
            tokenised = time.monotonic()
            logits = await ticket.future
        except TurborankError as error:
            raise self._failed(error) from error
        finally:
            self.batcher.drop(ticket)
        ended = time.monotonic()
        started = ticket.started or ended
        for stage, first, last in (
            ("tokenise", began, tokenised),
            ("queue", min(tokenised, started), started),
            ("compute", started, ended),
        ):
            timings[stage] = timings.get(stage, 0.0) + last - first
            self.metrics.seconds.labels(stage).observe(last - first)
            self.tracer.stage(stage, last - first)
        try:
            scores = gather(encoded, logits)
        except TurborankError as error:
            raise self._failed(error) from error
        self._learn(pairs, scores)
        return scores

    def _learn(self, pairs: Sequence[Pair], scores: Scores) -> None:
        """Update the estimate of characters per token from a request without truncation."""
        characters = sum(len(query) + len(document) for query, document in pairs)
        tokens = int(scores.tokens.sum()) - OVERHEAD * len(pairs)
        if characters >= ENOUGH_CHARACTERS and tokens > 0 and not scores.truncated.any():
            seen = min(max(characters / tokens, LEAST_CHARACTERS), MOST_CHARACTERS)
            self._characters_per_token += 0.05 * (seen - self._characters_per_token)

    async def _tokenise(
        self, encoder: PairEncoder, pairs: Sequence[Pair], length: Limits, ticket: Ticket, named: Named
    ) -> list[list[Encoding]]:
        """Encodings of all pairs, made in a worker thread; each chunk is queued while the next one is tokenised."""
        loop = asyncio.get_running_loop()
        encoded: list[list[Encoding]] = []
        for start, chunk in chunks(pairs):
            part = await loop.run_in_executor(self.pool, _encode, encoder, chunk, length, start, named)
            encoded += part
            windows = list(itertools.chain.from_iterable(part))
            auth.check_tokens(self.settings, ticket.known + sum(map(len, windows)))
            self.batcher.add(ticket, windows, last=len(encoded) == len(pairs))
        return encoded

    async def _spans(
        self, reranker: Reranker, ask: Ask, explained: list[int], timings: dict[str, float]
    ) -> tuple[dict[int, list[Span]], int]:
        """(best passages of each document, each scored separately; tokens of scoring them)."""
        options = ask.spans or SpanOptions()
        places = [(index, start, end) for index in explained for start, end in passages(ask.pairs[index].document)]
        pairs = [Pair(ask.pairs[index].query, ask.pairs[index].document[start:end]) for index, start, end in places]
        if not pairs:
            return {index: [] for index in explained}, 0
        explaining: dict[str, float] = {}
        scores = await self._scores(reranker, pairs, NO_LIMITS, explaining, field=ask.field, held=True)
        timings["spans"] = sum(explaining.values())
        spans: dict[int, list[Span]] = {index: [] for index in explained}
        for place in np.argsort(-scores.logits, kind="stable").tolist():
            index, start, end = places[place]
            score = sigmoid(float(scores.logits[place]))
            if len(spans[index]) < (options.max_spans or DEFAULT_SPANS) and score >= (options.threshold or 0.0):
                spans[index].append(Span(start, end, score))
        return spans, int(scores.tokens.sum())

    def _failed(self, error: TurborankError) -> Problem:
        problem = from_error(error)
        if problem.status >= 500:
            telemetry.event("engine_failed", {"error": str(error)}, error=error)
        return problem

    def _count(self, scores: Scores) -> None:
        self.metrics.documents.inc(len(scores.logits))
        self.metrics.tokens.inc(int(scores.tokens.sum()))
        self.metrics.truncated.inc(int(np.count_nonzero(scores.truncated)))
        self.metrics.cut.inc(int(scores.truncated.sum()))


def _open_cache(settings: Settings) -> ScoreCache | None:
    if settings.score_cache and not settings.score_cache_entries:
        raise InputError(
            "expected score_cache_entries with score_cache, got 0", hint="give the maximum number of scores"
        )
    if not settings.score_cache_entries:
        return None
    return ScoreCache(settings.score_cache_entries, settings.score_cache or None)


def expected_work(pairs: Sequence[Pair], encoder: PairEncoder, length: Limits, characters_per_token: float) -> Work:
    """Estimated work of pairs; each pair or window has at most the maximum length."""
    most = min(length.max_length or encoder.max_length, encoder.max_length)
    windows = (length.policy or encoder.policy) == "windows"
    total = squares = 0
    for query, document in pairs:
        tokens, count = int((len(query) + len(document)) / characters_per_token) + OVERHEAD, 1
        if windows and tokens > most:
            count = math.ceil(tokens / (most * (1 - WINDOW_OVERLAP)))
            count = min(count, length.max_windows or count)
        tokens = min(tokens, most)
        total += count * tokens
        squares += count * tokens**2
    return Work(total, squares)


def _least_score(reranker: Reranker, threshold: float | str | None) -> float | None:
    """Minimum relevance score for a request's threshold: a number, also as a string, or a calibration target.

    Raises Problem 422 when it is invalid.
    """
    if isinstance(threshold, str) and "=" not in threshold:
        with contextlib.suppress(ValueError):
            threshold = float(threshold)
    try:
        return reranker.least_score(threshold)
    except InputError as error:
        raise Problem(422, error.code, str(error), param="threshold") from None


def _encode(
    encoder: PairEncoder, pairs: Sequence[Pair], length: Limits, start: int, named: Named
) -> list[list[Encoding]]:
    """Encodings of a chunk. Raises Problem 400, with the document's path, for a pair that is too long."""
    try:
        return encoder.encode(pairs, length)
    except TooLongError:
        for place, pair in enumerate(pairs, start):
            try:
                encoder.encode([pair], length)
            except TooLongError as error:
                field, places = named
                where = f"{field}[{places[place] if places else place}]"
                raise Problem(400, error.code, f"{error.message} at $.{where}; {error.hint}", param=where) from None
        raise


def _cut(scores: Scores, field: str) -> list[str]:
    """The warning of a response with truncated documents; empty if there are none."""
    cut = np.flatnonzero(scores.truncated)
    if not cut.size:
        return []
    first = int(cut[0])
    return [
        f"{cut.size} of {len(scores.truncated)} documents were not read to their end, for example {field}[{first}]: "
        f"{scores.tokens[first]} tokens read, {scores.truncated[first]} cut; length 'windows' reads everything"
    ]
