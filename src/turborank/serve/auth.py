"""API keys, rate limits and size limits.

The key file stores only SHA-256 hashes and is read again when it changes. A key has 256 random bits, so it cannot be
guessed from its hash; a slow password hash would add time to each request and no security.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import re
import secrets
import stat
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Annotated

import msgspec

from turborank.errors import InputError
from turborank.serve.config import Settings
from turborank.serve.wire import Problem
from turborank.types import Pair

SECRET_PREFIX = "tr-"
ANY_MODEL = "*"
CHECK_EVERY = 1.0  # minimum seconds between checks for a changed key file
_NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}\Z"
_Rate = Annotated[int, msgspec.Meta(ge=0)]


class Key(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One API key: its name, hash, allowed models and rate limits. The fields of a [[keys]] table of the key file."""

    name: Annotated[str, msgspec.Meta(pattern=_NAME)]
    sha256: Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{64}\Z")]
    models: tuple[str, ...] = (ANY_MODEL,)
    requests_per_minute: _Rate = 0  # 0: the limit of the settings
    tokens_per_minute: _Rate = 0

    def allows(self, model: str) -> bool:
        return ANY_MODEL in self.models or model in self.models


class _KeyFile(msgspec.Struct, forbid_unknown_fields=True):
    keys: tuple[Key, ...] = ()


ANONYMOUS = Key("anonymous", "")


def digest(secret: str) -> str:
    """SHA-256 of a key as 64 hexadecimal digits, the form in which the key file stores it."""
    return hashlib.sha256(secret.encode("utf-8", "surrogateescape")).hexdigest()


def new(path: Path, name: str, *, models: tuple[str, ...] = (), requests: int = 0, tokens: int = 0) -> str:
    """Create a key, append its hash to the file (created if missing) and return the secret, which is not stored.

    Raises InputError when the name is taken or invalid, and when the file is not a key file or cannot be written.
    """
    if not re.match(_NAME, name):
        raise InputError(f"expected a name of letters, digits, dots, dashes and underscores, got {name!r}")
    present = read(path) if path.exists() else ()
    if name in {key.name for key in present}:
        raise InputError(
            f"expected a new name, got {name!r}, which {path} has already", hint="choose another, or remove its entry"
        )
    secret = SECRET_PREFIX + secrets.token_urlsafe(32)
    lines = ["", "[[keys]]", f"name = {json.dumps(name)}", f"sha256 = {json.dumps(digest(secret))}"]
    if models:
        lines.append(f"models = {json.dumps(list(models))}")
    lines += [f"requests_per_minute = {requests}"] if requests else []
    lines += [f"tokens_per_minute = {tokens}"] if tokens else []
    text = "\n".join(lines) + "\n"
    try:  # make sure that the result can be read
        msgspec.toml.decode((path.read_text("utf-8-sig") if path.exists() else "") + text, type=_KeyFile)
    except msgspec.DecodeError as error:
        raise InputError(
            f"expected a file that [[keys]] can be appended to, got {path}: {error}",
            hint="write its keys as [[keys]] tables, or begin a new file",
        ) from None
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        with os.fdopen(descriptor, "a", encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        raise InputError(f"expected to write the key file {path}, got: {error.strerror}") from None
    return secret


def read(path: Path) -> tuple[Key, ...]:
    """The keys of a file. Raises InputError naming the line, or the entry and field, at fault."""
    try:
        keys = msgspec.toml.decode(path.read_text("utf-8-sig"), type=_KeyFile).keys
    except (OSError, UnicodeDecodeError, msgspec.DecodeError) as error:
        raise InputError(
            f"expected a TOML file of [[keys]] at {path}, got: {error}", hint="make one with: turborank keys new NAME"
        ) from None
    names = [key.name for key in keys]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise InputError(f"expected each name once in {path}, got {', '.join(twice)} more than once")
    return keys


def exposed(path: Path) -> str:
    """How others can read a file of secrets, for a warning; empty if they cannot.

    Reading by a group counts unless the file is another user's, as a Secret of Kubernetes is.
    """
    if os.name == "nt":
        return ""
    status = path.stat()
    owned = status.st_uid == os.geteuid()
    readers = stat.S_IROTH | (stat.S_IRGRP if owned else 0)
    if not status.st_mode & readers:
        return ""
    return f"{path} has mode {stat.S_IMODE(status.st_mode):04o}: others can read it; chmod 600 it"


def _check_writable(path: Path) -> None:
    """Raise InputError if others can write the key file: whoever can write it can add a key."""
    mode = path.stat().st_mode if os.name != "nt" and path.exists() else 0
    if mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise InputError(
            f"expected a key file that only its owner can write, got mode {stat.S_IMODE(mode):04o} at {path}",
            hint=f"chmod 600 {path}",
        )


class KeyRing:
    """The currently valid keys: those of the key file, and the one of the environment variable.

    When the file becomes unreadable while the server runs, the keys read last stay valid and ``complain`` is called:
    neither rejecting nor admitting all callers would be safe.
    """

    def __init__(
        self,
        path: Path | None,
        *,
        secret: str = "",
        complain: Callable[[str], None] = lambda message: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._path = path
        self._fixed = (Key("environment", digest(secret)),) if secret else ()
        self._complain = complain
        self._clock = clock
        self._seen = self._stamp()
        self._checked = clock()
        self._keys = self._fixed
        if path is not None:
            _check_writable(path)
            self._keys = (*self._fixed, *read(path))

    @property
    def required(self) -> bool:
        """Whether callers need a key. With an empty key file every request is rejected."""
        return self._path is not None or bool(self._fixed)

    def find(self, secret: str) -> Key | None:
        """The key with this secret, or None. All keys are compared, each in constant time."""
        self._reload()
        presented, found = digest(secret), None
        for key in self._keys:
            if hmac.compare_digest(presented, key.sha256):
                found = key
        return found

    def _stamp(self) -> tuple[int, int, int] | None:
        if self._path is None:
            return None
        try:
            status = self._path.stat()
        except OSError:
            return None
        return status.st_mtime_ns, status.st_size, status.st_ino

    def _reload(self) -> None:
        now = self._clock()
        if self._path is None or now - self._checked < CHECK_EVERY:
            return
        self._checked = now
        stamp = self._stamp()
        if stamp == self._seen:
            return
        self._seen = stamp
        try:
            _check_writable(self._path)
            self._keys = (*self._fixed, *read(self._path))
        except InputError as error:
            self._complain(f"the keys stay as they were: {error}")


# Bearer authentication, rate limits of each key, size limits of each request. Errors name the setting of the limit.

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
    """A token bucket: starts full, holds one minute's amount and refills continuously.

    A request's tokens are known only after tokenisation, so ``take`` may make the level negative; later requests wait.
    """

    def __init__(self, per_minute: int, clock: Callable[[], float]) -> None:
        self.per_minute = per_minute
        self._clock = clock
        self._level = float(per_minute)
        self._when = clock()

    def level(self) -> float:
        """The amount available now; negative after an overdraft."""
        now = self._clock()
        self._level = min(float(self.per_minute), self._level + (now - self._when) * self.per_minute / MINUTE)
        self._when = now
        return self._level

    def wait(self, need: float = 1.0) -> float:
        """Seconds until ``need`` is available; 0 if it is available now."""
        return max(0.0, (min(need, self.per_minute) - self.level()) * MINUTE / self.per_minute)

    def take(self, amount: float) -> None:
        self._level = self.level() - amount


class Rates:
    """Rate limits in requests and tokens per minute, separate for each key."""

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
        """Count a request. Raises Problem 429 when the key has used up its requests or tokens."""
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
        """Count the tokens of a request after tokenisation."""
        bucket = self._bucket(key, "tokens")
        if bucket:
            bucket.take(tokens)

    def headers(self, key: Key) -> dict[str, str]:
        """The x-ratelimit headers that OpenAI clients read, for the limits that are set."""
        headers = {}
        for kind in ("requests", "tokens"):
            bucket = self._bucket(key, kind)
            if bucket:
                headers[f"x-ratelimit-limit-{kind}"] = str(bucket.per_minute)
                headers[f"x-ratelimit-remaining-{kind}"] = str(max(0, int(bucket.level())))
                headers[f"x-ratelimit-reset-{kind}"] = f"{bucket.wait(bucket.per_minute):.3f}s"
        return headers


def check_sizes(settings: Settings, pairs: Sequence[Pair], *, field: str = "documents") -> None:
    """Raise Problem 413, with the setting and the field, for too many documents or characters."""
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
    """Raise Problem 413 when a request has more than ``max_tokens`` tokens."""
    if tokens > settings.max_tokens:
        raise _too_large("max_tokens", settings.max_tokens, f"{tokens} tokens or more", "documents")
