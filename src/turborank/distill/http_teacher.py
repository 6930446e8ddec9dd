"""An HTTP rerank endpoint as a teacher: jina, Cohere, Voyage, text-embeddings-inference, vLLM, or turborank itself.

CLIENTS says how each dialect is asked and how its answer is read. What an endpoint cannot answer now (429, 5xx, a
timeout, fewer scores than documents) is asked again, after as long as it says or twice as long as the last time; what
it will never answer (401, 422, …) ends the run with its own words. Scores that are probabilities become logits, so
that differences between them mean the same at both ends of the scale.
"""

from __future__ import annotations

import email.utils
import http.client
import json
import math
import os
import random
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from turborank.distill.scores import Question
from turborank.errors import InputError, UnknownKeyError
from turborank.types import Float32

KEY_VARIABLE = "TURBORANK_TEACHER_KEY"
AGAIN = frozenset({408, 409, 424, 425, 429, 498, 500, 502, 503, 504, 520, 522, 524, 529})  # 424: TEI's backend failed
LONGEST_WAIT = 600.0  # seconds an endpoint may ask us to wait
MAX_BYTES = 64 << 20  # of an answer
LEAST = 1e-7  # probabilities are kept this far from 0 and 1: float32 holds no more
SHOWN = 300  # characters of an endpoint's message


@dataclass(frozen=True)
class Settings:
    """How an endpoint is asked. None of it changes a score but ``model`` and ``scale``."""

    model: str | None = None  # its name at the endpoint
    key_variable: str = KEY_VARIABLE  # the environment variable that holds the key, if one is needed
    scale: str = "auto"  # logit: make logits of probabilities; raw: take scores as they come; auto: by the dialect
    documents: int = 32  # in a request
    parallel: int = 4  # requests under way
    rate: float | None = None  # requests a second
    timeout: float = 60.0  # seconds without an answer
    attempts: int = 6

    def __post_init__(self) -> None:
        if self.scale not in SCALES:
            raise UnknownKeyError("scale", self.scale, SCALES)
        for name in ("documents", "parallel", "attempts", "timeout", "rate"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise InputError(f"expected {name} of an HTTP teacher to be positive, got {value}")


SCALES = ("auto", "logit", "raw")
Places = Iterable[tuple[Any, Any]]  # (place, score)


class Client(NamedTuple):
    """A dialect, from the asking side."""

    body: Callable[[str | None, str, Sequence[str]], dict[str, Any]]  # (model, query, documents)
    read: Callable[[Any, int], Places]  # (answer, documents asked about)
    probabilities: bool  # what it answers, asked in this way


def _rerank(**fixed: Any) -> Callable[[str | None, str, Sequence[str]], dict[str, Any]]:
    """The shape that most dialects share, with what else to say every time."""

    def body(model: str | None, query: str, documents: Sequence[str]) -> dict[str, Any]:
        named = {} if model is None else {"model": model}
        return {**named, "query": query, "documents": list(documents), **fixed}

    return body


def _tei(model: str | None, query: str, documents: Sequence[str]) -> dict[str, Any]:
    return {"query": query, "texts": list(documents), "raw_scores": True, "truncate": True}


def _pairs(model: str | None, query: str, documents: Sequence[str]) -> dict[str, Any]:
    named = {} if model is None else {"model": model}
    return {**named, "text_1": query, "text_2": list(documents), "use_activation": False}


def _read(field: str | None, score: str) -> Callable[[Any, int], Places]:
    """Objects with ``index`` and ``score``, in ``field`` of the answer."""
    return lambda answer, count: ((one["index"], one[score]) for one in (answer[field] if field else answer))


def _in_order(answer: Any, count: int) -> Places:
    return ((place, one["score"]) for place, one in enumerate(answer["scores"]))


# The rows of turborank.serve.dialects.DIALECTS, and turborank's own way, which asks for logits.
CLIENTS: Mapping[str, Client] = {
    "turborank": Client(_rerank(raw_scores=True), _read("results", "relevance_score"), False),
    "jina": Client(_rerank(return_documents=False), _read("results", "relevance_score"), True),
    "cohere-v1": Client(_rerank(return_documents=False), _read("results", "relevance_score"), True),
    "cohere-v2": Client(_rerank(), _read("results", "relevance_score"), True),
    "voyage": Client(_rerank(top_k=None, truncation=True), _read("data", "relevance_score"), True),
    "infinity": Client(_rerank(raw_scores=True), _read("results", "relevance_score"), False),
    "vllm": Client(_rerank(use_activation=False), _read("results", "relevance_score"), False),
    "vllm-score": Client(_pairs, _read("data", "score"), False),
    "tei": Client(_tei, _read(None, "score"), False),
    "weaviate": Client(_rerank(property=""), _in_order, True),
}


class _AgainError(Exception):
    """A request that may succeed later; with the seconds its endpoint asked us to wait."""

    def __init__(self, what: str, after: float | None = None) -> None:
        super().__init__(what)
        self.after = after


class _StoppedError(Exception):
    """A request that was not made, because another one ended the run."""


class Pacer:
    """When the next request may go: all threads share the rate and the waits an endpoint asks for."""

    def __init__(self, rate: float | None) -> None:
        self._gap = 1 / rate if rate else 0.0
        self._next = 0.0
        self._lock = threading.Lock()
        self._stopped = threading.Event()

    def turn(self) -> None:
        """Return when a request may go. Raises _StoppedError when none is to go any more."""
        while True:
            self.sleep(0)
            with self._lock:
                now = time.monotonic()
                if now >= self._next:
                    self._next = now + self._gap
                    return
                left = self._next - now
            self.sleep(left)

    def hold(self, seconds: float) -> None:
        """No request goes for so long."""
        with self._lock:
            self._next = max(self._next, time.monotonic() + seconds)

    def sleep(self, seconds: float) -> None:
        """Raises _StoppedError when everything is to stop."""
        if self._stopped.wait(seconds):
            raise _StoppedError

    def stop(self) -> None:
        """Wake and end whoever waits."""
        self._stopped.set()


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirected POST becomes a GET, and takes the key along to wherever it leads."""

    def redirect_request(self, *arguments: Any) -> None:
        return None


class HttpTeacher:
    """A dialect's endpoint. ``where`` is ``DIALECT:URL``, the whole URL that is posted to."""

    def __init__(self, where: str, settings: Settings) -> None:
        dialect, _, url = where.partition(":")
        if dialect not in CLIENTS:
            raise UnknownKeyError("a dialect", dialect, CLIENTS, hint="write http:DIALECT:URL")
        if not url.startswith(("http://", "https://")):
            raise InputError(f"expected a URL of http or https after {dialect}:, got {url!r}")
        self.url, self.dialect, self.settings = url, dialect, settings
        self.client = CLIENTS[dialect]
        self.at_once = settings.documents
        self.logits_wanted = settings.scale == "logit" or (settings.scale == "auto" and self.client.probabilities)
        self._opener = urllib.request.build_opener(_NoRedirect)

    def about(self) -> dict[str, Any]:
        """What a score depends on, as far as can be known from here: never the key."""
        scale = "logit" if self.logits_wanted else "as it came"
        return {"kind": "http", "dialect": self.dialect, "url": self.url, "model": self.settings.model, "scale": scale}

    def answer(self, questions: Iterable[Question]) -> Iterator[tuple[Question, Float32]]:
        """Answers as they come; a few requests are under way at a time."""
        pacer = Pacer(self.settings.rate)
        waiting: dict[Future[Float32], Question] = {}
        coming = iter(questions)
        faults: list[Exception] = []
        with ThreadPoolExecutor(self.settings.parallel) as threads:
            try:
                while True:
                    while not faults and len(waiting) < 2 * self.settings.parallel:
                        question = next(coming, None)
                        if question is None:
                            break
                        waiting[threads.submit(self._persist, question, pacer)] = question
                    if not waiting:
                        break
                    for future in wait(waiting, return_when=FIRST_COMPLETED).done:
                        question = waiting.pop(future)
                        if future.cancelled():
                            continue
                        try:
                            answer = future.result()
                        except Exception as error:  # what is under way is still waited for: it may have been paid for
                            faults.append(error)
                            pacer.stop()
                            for other in waiting:
                                other.cancel()
                        else:
                            yield question, answer
            finally:
                pacer.stop()
                threads.shutdown(wait=False, cancel_futures=True)
        if faults:
            raise next((fault for fault in faults if not isinstance(fault, _StoppedError)), faults[0])

    def _persist(self, question: Question, pacer: Pacer) -> Float32:
        """Ask until there is an answer."""
        for attempt in range(1, self.settings.attempts + 1):
            pacer.turn()
            try:
                return self._ask(question)
            except _AgainError as error:
                if attempt == self.settings.attempts:
                    pacer.stop()
                    raise InputError(
                        f"expected {self.url} to answer, got {error} {attempt} times",
                        hint="run the command again to go on: what it answered is kept",
                    ) from error
                if error.after is not None:
                    pacer.hold(error.after)
                else:  # half of it by chance, so that many do not come back at once
                    pacer.sleep(min(60.0, 0.5 * 2 ** (attempt - 1)) * random.uniform(0.5, 1.0))
            except InputError:
                pacer.stop()  # before another request can go
                raise
        raise AssertionError("the last attempt returns or raises")

    def _ask(self, question: Question) -> Float32:
        """One request. Raises _AgainError for what may pass, InputError for what will not."""
        body = json.dumps(self.client.body(self.settings.model, question.query, question.documents)).encode()
        request = urllib.request.Request(self.url, body, self._headers(), method="POST")
        try:
            with self._opener.open(request, timeout=self.settings.timeout) as response:
                raw = response.read(MAX_BYTES + 1)
        except urllib.error.HTTPError as error:
            with error:
                raise self._refusal(error) from None
        except (OSError, http.client.HTTPException) as error:
            raise _AgainError(str(getattr(error, "reason", error)) or type(error).__name__) from error
        if len(raw) > MAX_BYTES:
            raise InputError(f"expected an answer of at most {MAX_BYTES} bytes, got more from {self.url}")
        return self._scores(raw, len(question.documents))

    def _headers(self) -> dict[str, str]:
        headers = {"Content-Type": "application/json", "Accept": "application/json", "User-Agent": "turborank"}
        key = os.environ.get(self.settings.key_variable)
        return {**headers, "Authorization": f"Bearer {key}"} if key else headers

    def _refusal(self, error: urllib.error.HTTPError) -> Exception:
        try:
            said = " ".join(error.read(MAX_BYTES).decode("utf-8", "replace").split())[:SHOWN]
        except (OSError, http.client.HTTPException):
            said = ""
        what = f"HTTP {error.code} {error.reason}" + (f" ({said})" if said else "")
        if error.code not in AGAIN:
            known = bool(os.environ.get(self.settings.key_variable))
            hint = None if known or error.code not in (401, 403) else f"put the key into {self.settings.key_variable}"
            return InputError(f"expected scores from {self.url}, got {what}", hint=hint)
        after = retry_after(error.headers.get("Retry-After"))
        if after is not None and after > LONGEST_WAIT:
            return InputError(
                f"expected {self.url} to answer within {LONGEST_WAIT:.0f} s, got {what}, to wait {after:.0f} s",
                hint="run the command again then: what it answered is kept",
            )
        return _AgainError(what, after)

    def _scores(self, raw: bytes, count: int) -> Float32:
        """The scores of an answer, in the order asked. Raises _AgainError where it is not one score for each."""
        scores = np.full(count, np.nan)
        try:
            for place, score in self.client.read(json.loads(raw), count):
                if not (isinstance(place, int) and 0 <= place < count and np.isnan(scores[place])):
                    raise _AgainError(f"index {place!r} of {count} documents")
                scores[place] = float(score)
        except (ValueError, TypeError, KeyError, IndexError) as error:
            raise _AgainError(f"an answer that is none of {self.dialect}'s ({raw[:SHOWN]!r})") from error
        if not np.isfinite(scores).all():
            raise _AgainError(f"{int(np.isfinite(scores).sum())} scores of {count} documents")
        return (self._logits(scores) if self.logits_wanted else scores).astype(np.float32)

    def _logits(self, scores: Any) -> Any:
        if scores.min() < 0 or scores.max() > 1:
            outside = scores[(scores < 0) | (scores > 1)][0]
            raise InputError(
                f"expected scores between 0 and 1 from {self.url}, got {outside:.6g}",
                hint="take them as they come: raw",
            )
        kept = np.clip(scores, LEAST, 1 - LEAST)
        return np.log(kept) - np.log1p(-kept)


def retry_after(value: str | None) -> float | None:
    """Seconds to wait, of a Retry-After header: a number of them, or a date. None where it says neither."""
    if value is None:
        return None
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(value).timestamp() - time.time()
        except ValueError:
            return None
    return max(seconds, 0.0) if math.isfinite(seconds) else None
