"""HTTP rerank endpoints as teachers: jina, Cohere, Voyage, text-embeddings-inference, vLLM, turborank and others.

CLIENTS defines each dialect's request and response. Requests are sent by httpx. Transient failures (429, 5xx, timeouts,
incomplete responses) are retried by tenacity with exponential back-off, or after the delay in ``Retry-After``.
Permanent failures (401, 422, …) end the run with the endpoint's message. Probabilities are converted to logits, so that
equal differences mean the same over the whole scale.
"""

from __future__ import annotations

import email.utils
import json
import math
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass
from typing import Any, NamedTuple

import httpx
import numpy as np
import tenacity

from turborank.distill.scores import Question
from turborank.errors import InputError, UnknownKeyError
from turborank.types import Float32

KEY_VARIABLE = "TURBORANK_TEACHER_KEY"
# Status codes worth a retry; 424: the backend of text-embeddings-inference failed.
TRANSIENT = frozenset({408, 409, 424, 425, 429, 498, 500, 502, 503, 504, 520, 522, 524, 529})
MAX_RETRY_AFTER = 600.0  # seconds; an endpoint that asks for more ends the run
MAX_BYTES = 64 << 20  # of a response
CLIP = 1e-7  # probabilities are kept this far from 0 and 1: the resolution of float32 near 1
LAST_WAIT = 3.0  # seconds for which Ctrl-C waits for the responses to requests under way
SHOWN = 300  # characters of an endpoint's message in an error
BACK_OFF = tenacity.wait_random_exponential(multiplier=0.5, min=0.25, max=60)  # seconds, random against bursts


@dataclass(frozen=True)
class HttpOptions:
    """How an endpoint is called. Only ``model`` and ``scale`` change scores.

    Raises InputError for a number that is not positive, UnknownKeyError for a scale not in SCALES.
    """

    model: str | None = None  # its name at the endpoint
    key_variable: str = KEY_VARIABLE  # environment variable that holds the API key, if one is needed
    scale: str = "auto"  # logit: convert probabilities; raw: scores as returned; auto: depends on the dialect
    documents: int = 32  # per request
    parallel: int = 4  # concurrent requests
    rate: float | None = None  # requests per second
    timeout: float = 60.0  # seconds to connect, and between two parts of a response
    attempts: int = 6  # of a request

    def __post_init__(self) -> None:
        if self.scale not in SCALES:
            raise UnknownKeyError("scale", self.scale, SCALES)
        for name in ("documents", "parallel", "attempts", "timeout", "rate"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise InputError(f"expected {name} of an HTTP teacher to be positive, got {value}")


SCALES = ("auto", "logit", "raw")
IndexedScores = Iterable[tuple[Any, Any]]  # (index of the document, score), unchecked


class ClientDialect(NamedTuple):
    """The client side of a dialect."""

    body: Callable[[str | None, str, Sequence[str]], dict[str, Any]]  # (model, query, documents) -> request
    read: Callable[[Any, int], IndexedScores]  # (response, number of documents) -> scores
    probabilities: bool  # whether scores are probabilities, for requests of this form


def _rerank(**fixed: Any) -> Callable[[str | None, str, Sequence[str]], dict[str, Any]]:
    """The request most dialects share, with the constant fields of one."""

    def body(model: str | None, query: str, documents: Sequence[str]) -> dict[str, Any]:
        named = {} if model is None else {"model": model}
        return {**named, "query": query, "documents": list(documents), **fixed}

    return body


def _tei(model: str | None, query: str, documents: Sequence[str]) -> dict[str, Any]:
    return {"query": query, "texts": list(documents), "raw_scores": True, "truncate": True}


def _pairs(model: str | None, query: str, documents: Sequence[str]) -> dict[str, Any]:
    named = {} if model is None else {"model": model}
    return {**named, "text_1": query, "text_2": list(documents), "use_activation": False}


def _read(field: str | None, score: str) -> Callable[[Any, int], IndexedScores]:
    """Objects with ``index`` and ``score``, in ``field`` of the response."""
    return lambda answer, count: ((one["index"], one[score]) for one in (answer[field] if field else answer))


def _in_order(answer: Any, count: int) -> IndexedScores:
    return ((index, one["score"]) for index, one in enumerate(answer["scores"]))


# The rows of turborank.serve.dialects.DIALECTS, and turborank's own, which requests logits.
CLIENTS: Mapping[str, ClientDialect] = {
    "turborank": ClientDialect(_rerank(raw_scores=True), _read("results", "relevance_score"), False),
    "jina": ClientDialect(_rerank(return_documents=False), _read("results", "relevance_score"), True),
    "cohere-v1": ClientDialect(_rerank(return_documents=False), _read("results", "relevance_score"), True),
    "cohere-v2": ClientDialect(_rerank(), _read("results", "relevance_score"), True),
    "voyage": ClientDialect(_rerank(top_k=None, truncation=True), _read("data", "relevance_score"), True),
    "infinity": ClientDialect(_rerank(raw_scores=True), _read("results", "relevance_score"), False),
    "vllm": ClientDialect(_rerank(use_activation=False), _read("results", "relevance_score"), False),
    "vllm-score": ClientDialect(_pairs, _read("data", "score"), False),
    "tei": ClientDialect(_tei, _read(None, "score"), False),
    "weaviate": ClientDialect(_rerank(property=""), _in_order, True),
}


class _TransientError(Exception):
    """A request that may succeed later; ``after`` are the seconds of its ``Retry-After``, if it had one."""

    def __init__(self, what: str, after: float | None = None) -> None:
        super().__init__(what)
        self.after = after


class _StoppedError(Exception):
    """A request that was not sent, because another one ended the run."""


class Pacer:
    """When the next request may be sent. All threads share the rate and an endpoint's ``Retry-After``.

    tenacity retries one call at a time and knows neither.
    """

    def __init__(self, rate: float | None) -> None:
        self._gap = 1 / rate if rate else 0.0
        self._next = 0.0
        self._lock = threading.Lock()
        self._stopped = threading.Event()

    def turn(self) -> None:
        """Block until a request may be sent. Raises _StoppedError after :meth:`stop`."""
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
        """Let no thread send a request for ``seconds``."""
        with self._lock:
            self._next = max(self._next, time.monotonic() + seconds)

    def sleep(self, seconds: float) -> None:
        """Sleep. Raises _StoppedError, at once, after :meth:`stop`."""
        if self._stopped.wait(seconds):
            raise _StoppedError

    def stop(self) -> None:
        """Wake all waiting threads; they raise _StoppedError."""
        self._stopped.set()


class HttpTeacher:
    """The endpoint of a dialect. ``where`` is ``DIALECT:URL`` with the whole URL of the POST request.

    Raises UnknownKeyError for an unknown dialect, InputError for a URL that is not http or https.
    """

    def __init__(self, where: str, options: HttpOptions) -> None:
        dialect, _, url = where.partition(":")
        if dialect not in CLIENTS:
            raise UnknownKeyError("a dialect", dialect, CLIENTS, hint="write http:DIALECT:URL")
        if not url.startswith(("http://", "https://")):
            raise InputError(f"expected a URL of http or https after {dialect}:, got {url!r}")
        self.url, self.dialect, self.options = url, dialect, options
        self.client = CLIENTS[dialect]
        self.max_documents = options.documents
        self.to_logits = options.scale == "logit" or (options.scale == "auto" and self.client.probabilities)

    def about(self) -> dict[str, Any]:
        """What scores depend on, as far as a client can know; never the API key."""
        scale = "logit" if self.to_logits else "as it came"
        return {"kind": "http", "dialect": self.dialect, "url": self.url, "model": self.options.model, "scale": scale}

    def answer(self, questions: Iterable[Question]) -> Iterator[tuple[Question, Float32]]:
        """Scores in the order of completion, with up to ``parallel`` concurrent requests.

        Raises InputError for a permanent failure, after the responses to all requests under way were yielded. They may
        have been paid for: Ctrl-C waits for them, too, but at most LAST_WAIT seconds, and a second Ctrl-C ends at once.
        """
        pacer, http = Pacer(self.options.rate), self._open()
        waiting: dict[Future[Float32], Question] = {}
        coming = iter(questions)
        faults: list[BaseException] = []
        ends: float | None = None  # when waiting ends, after Ctrl-C
        try:
            while True:
                while not faults and len(waiting) < self.options.parallel:
                    question = next(coming, None)
                    if question is None:
                        break
                    waiting[_started(self._retry, http, question, pacer)] = question
                try:
                    left = None if ends is None else max(0.0, ends - time.monotonic())
                    done = wait(waiting, left, FIRST_COMPLETED).done
                except KeyboardInterrupt as stop:
                    if faults:
                        raise
                    faults.append(stop)
                    pacer.stop()
                    ends = time.monotonic() + LAST_WAIT
                    continue
                if not done:  # all are answered, or Ctrl-C came LAST_WAIT ago
                    break
                for future in done:
                    question = waiting.pop(future)
                    error = future.exception()
                    if error is None:
                        yield question, future.result()
                    else:
                        faults.append(error)
                        pacer.stop()
        finally:
            pacer.stop()
            if not waiting:  # a thread that still reads would be left with a closed socket
                http.close()
        if faults:
            raise next((fault for fault in faults if not isinstance(fault, _StoppedError)), faults[0])

    def _open(self) -> httpx.Client:
        """A client that follows no redirect: that would send the API key elsewhere."""
        headers = {"Content-Type": "application/json", "Accept": "application/json", "User-Agent": "turborank"}
        key = os.environ.get(self.options.key_variable)
        if key:
            headers["Authorization"] = f"Bearer {key}"
        if not headers.get("Authorization", "").isascii():
            raise InputError(f"expected an API key of ASCII characters in {self.options.key_variable}, got others")
        limits = httpx.Limits(max_connections=self.options.parallel)
        return httpx.Client(headers=headers, timeout=self.options.timeout, limits=limits, follow_redirects=False)

    def _retry(self, http: httpx.Client, question: Question, pacer: Pacer) -> Float32:
        """Send a request until it succeeds. Raises InputError when it failed ``attempts`` times."""
        retrying = tenacity.Retrying(
            stop=tenacity.stop_after_attempt(self.options.attempts), wait=_delay, sleep=pacer.sleep,
            retry=tenacity.retry_if_exception_type(_TransientError), reraise=True,
        )  # fmt: skip
        try:
            return retrying(self._attempt, http, question, pacer)
        except _TransientError as error:
            pacer.stop()
            raise InputError(
                f"expected {self.url} to answer, got {error} {self.options.attempts} times",
                hint="run the command again to go on; scores received so far are cached",
            ) from error

    def _attempt(self, http: httpx.Client, question: Question, pacer: Pacer) -> Float32:
        pacer.turn()
        try:
            return self._request(http, question)
        except _TransientError as error:
            if error.after is not None:
                pacer.hold(error.after)
            raise
        except InputError:
            pacer.stop()  # before another request is sent
            raise

    def _request(self, http: httpx.Client, question: Question) -> Float32:
        """One request. Raises _TransientError or InputError."""
        body = json.dumps(self.client.body(self.options.model, question.query, question.documents))
        raw = bytearray()
        try:
            with http.stream("POST", self.url, content=body) as response:
                for part in response.iter_bytes():
                    raw += part
                    if len(raw) > MAX_BYTES:
                        raise InputError(f"expected a response of at most {MAX_BYTES} bytes, got more from {self.url}")
        except httpx.InvalidURL as error:
            raise InputError(f"expected a URL, got {self.url!r} ({error})") from error
        except httpx.RequestError as error:
            raise _TransientError(str(error) or type(error).__name__) from error
        if not response.is_success:
            raise self._failure(response, bytes(raw))
        return self._scores(bytes(raw), len(question.documents))

    def _failure(self, response: httpx.Response, raw: bytes) -> Exception:
        said = " ".join(raw.decode("utf-8", "replace").split())[:SHOWN]
        code = response.status_code
        what = f"HTTP {code} {response.reason_phrase}" + (f" ({said})" if said else "")
        if code not in TRANSIENT:
            known = bool(os.environ.get(self.options.key_variable))
            hint = None if known or code not in (401, 403) else f"put the key into {self.options.key_variable}"
            return InputError(f"expected scores from {self.url}, got {what}", hint=hint)
        after = retry_after(response.headers.get("Retry-After"))
        if after is not None and after > MAX_RETRY_AFTER:
            return InputError(
                f"expected {self.url} to answer within {MAX_RETRY_AFTER:.0f} s, got {what}, to wait {after:.0f} s",
                hint="run the command again then; scores received so far are cached",
            )
        return _TransientError(what, after)

    def _scores(self, raw: bytes, count: int) -> Float32:
        """(count,) the scores of a response, in the order of the request.

        Raises _TransientError for anything but one finite score per document.
        """
        scores = np.full(count, np.nan)
        try:
            for index, score in self.client.read(json.loads(raw), count):
                if not (isinstance(index, int) and 0 <= index < count and np.isnan(scores[index])):
                    raise _TransientError(f"index {index!r} of {count} documents")
                scores[index] = float(score)
        except (ValueError, TypeError, KeyError, IndexError) as error:
            raise _TransientError(f"a response that is not {self.dialect}'s ({raw[:SHOWN]!r})") from error
        if not np.isfinite(scores).all():
            raise _TransientError(f"{int(np.isfinite(scores).sum())} scores of {count} documents")
        return (self._logits(scores) if self.to_logits else scores).astype(np.float32)

    def _logits(self, scores: Any) -> Any:
        if scores.min() < 0 or scores.max() > 1:
            outside = scores[(scores < 0) | (scores > 1)][0]
            raise InputError(
                f"expected scores between 0 and 1 from {self.url}, got {outside:.6g}",
                hint="take scores as returned: --scale raw",
            )
        kept = np.clip(scores, CLIP, 1 - CLIP)
        return np.log(kept) - np.log1p(-kept)


def _started(ask: Callable[..., Float32], *arguments: Any) -> Future[Float32]:
    """The result of ``ask``, which runs in a thread of its own.

    The thread is a daemon, because the process must be able to end while an endpoint is silent; it would wait for the
    threads of a ThreadPoolExecutor.
    """
    future: Future[Float32] = Future()

    def work() -> None:
        try:
            future.set_result(ask(*arguments))
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=work, name="turborank-teacher", daemon=True).start()
    return future


def _delay(state: tenacity.RetryCallState) -> float:
    """Seconds before the next attempt; 0 after a ``Retry-After``, which the pacer enforces for all threads."""
    error = state.outcome.exception() if state.outcome is not None else None
    return 0.0 if isinstance(error, _TransientError) and error.after is not None else BACK_OFF(state)


def retry_after(value: str | None) -> float | None:
    """Seconds of a ``Retry-After`` header (number or date, RFC 9110 section 10.2.3); None for anything else."""
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
