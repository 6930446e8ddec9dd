"""Who may ask how much: bearer keys, rates per key, sizes per request. Every refusal names the setting behind it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence

from turborank.serve.config import Settings
from turborank.serve.keys import ANONYMOUS, Key, KeyRing
from turborank.serve.problems import Problem
from turborank.types import Pair

MINUTE = 60.0


def authorise(ring: KeyRing, headers: Iterable[tuple[bytes, bytes]]) -> Key:
    """The caller's key, from exactly one Authorization header. Raises Problem 401."""
    if not ring.required:
        return ANONYMOUS
    given = [value for name, value in headers if name.lower() == b"authorization"]
    if len(given) != 1:
        got = "none" if not given else f"{len(given)}"
        raise Problem(401, "missing_api_key", f"expected one header 'Authorization: Bearer KEY', got {got}")
    scheme, _, secret = given[0].decode("latin-1").strip().partition(" ")
    if scheme.lower() != "bearer" or not secret.strip():
        raise Problem(401, "missing_api_key", "expected 'Authorization: Bearer KEY', got another form of that header")
    key = ring.find(secret.strip())
    if key is None:
        raise Problem(401, "invalid_api_key", "expected a valid API key, got one this server does not know")
    return key


class Bucket:
    """A rate per minute that may be used in bursts: full at first, refilled steadily.

    What a request costs is known only when it has been tokenised, so ``take`` may overdraw; the next caller waits.
    """

    def __init__(self, per_minute: int, clock: Callable[[], float]) -> None:
        self.per_minute = per_minute
        self._clock = clock
        self._level = float(per_minute)
        self._when = clock()

    def level(self) -> float:
        """What may be taken now."""
        now = self._clock()
        self._level = min(float(self.per_minute), self._level + (now - self._when) * self.per_minute / MINUTE)
        self._when = now
        return self._level

    def wait(self, need: float = 1.0) -> float:
        """Seconds until ``need`` may be taken; 0 when it may be now."""
        return max(0.0, (min(need, self.per_minute) - self.level()) * MINUTE / self.per_minute)

    def take(self, amount: float) -> None:
        self._level = self.level() - amount


class Rates:
    """Requests and tokens per minute, for each key by itself."""

    def __init__(self, settings: Settings, clock: Callable[[], float] = time.monotonic) -> None:
        self._default = {"requests": settings.requests_per_minute, "tokens": settings.tokens_per_minute}
        self._clock = clock
        self._buckets: dict[tuple[str, str], Bucket] = {}

    def _bucket(self, key: Key, kind: str) -> Bucket | None:
        own = key.requests_per_minute if kind == "requests" else key.tokens_per_minute
        per_minute = own or self._default[kind]
        if not per_minute:
            return None
        bucket = self._buckets.get((key.name, kind))
        if bucket is None or bucket.per_minute != per_minute:  # new, or changed in the key file
            bucket = self._buckets[key.name, kind] = Bucket(per_minute, self._clock)
        return bucket

    def enter(self, key: Key) -> None:
        """Count a request. Raises Problem 429 when the key's requests or tokens are used up."""
        requests, tokens = self._bucket(key, "requests"), self._bucket(key, "tokens")
        for kind, bucket in (("requests", requests), ("tokens", tokens)):
            wait = bucket.wait() if bucket else 0.0
            if bucket and wait > 0:
                raise Problem(
                    429,
                    "rate_limit_exceeded",
                    f"expected at most {bucket.per_minute} {kind} per minute for the key {key.name!r} "
                    f"({kind}_per_minute), got more; try again in {wait:.1f} s",
                    retry_after=wait,
                )
        if requests:
            requests.take(1)

    def spend(self, key: Key, tokens: int) -> None:
        """Count the tokens of a request, once they are known."""
        bucket = self._bucket(key, "tokens")
        if bucket:
            bucket.take(tokens)

    def headers(self, key: Key) -> dict[str, str]:
        """The x-ratelimit headers that OpenAI clients read; none where there is no limit."""
        headers = {}
        for kind in ("requests", "tokens"):
            bucket = self._bucket(key, kind)
            if bucket:
                headers[f"x-ratelimit-limit-{kind}"] = str(bucket.per_minute)
                headers[f"x-ratelimit-remaining-{kind}"] = str(max(0, int(bucket.level())))
                headers[f"x-ratelimit-reset-{kind}"] = f"{bucket.wait(bucket.per_minute):.3f}s"
        return headers


def check_sizes(settings: Settings, pairs: Sequence[Pair], *, field: str = "documents") -> None:
    """Raises Problem 413 when a request has too many documents or characters, naming the setting and the place."""
    if len(pairs) > settings.max_documents:
        raise _too_large("max_documents", settings.max_documents, f"{len(pairs)} documents", field)
    most = settings.max_document_characters
    queries = dict.fromkeys(pair.query for pair in pairs)
    for query in queries:
        if len(query) > most:
            raise _too_large("max_document_characters", most, f"a query of {len(query)} characters", "query")
    total = sum(map(len, queries))
    for place, (_, document) in enumerate(pairs):
        if len(document) > most:
            what = f"{len(document)} characters"
            raise _too_large("max_document_characters", most, what, f"{field}[{place}]")
        total += len(document)
    if total > settings.max_characters:
        raise _too_large("max_characters", settings.max_characters, f"{total} characters", field)


def _too_large(setting: str, limit: int, got: str, param: str) -> Problem:
    message = f"expected at most {limit} ({setting}), got {got} at {param}; send less, or raise the server's setting"
    return Problem(413, "too_large", message, param=param)


def check_tokens(settings: Settings, tokens: int) -> None:
    """Raises Problem 413 when a request needs more computing than the setting allows."""
    if tokens > settings.max_tokens:
        raise _too_large("max_tokens", settings.max_tokens, f"{tokens} tokens or more", "documents")
