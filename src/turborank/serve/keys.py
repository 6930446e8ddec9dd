"""API keys: made once, kept only as hashes, read again whenever their file changes.

A key is 256 random bits, so one round of SHA-256 hides it well: there is nothing to guess, and a slow hash would
only make requests slow. Passwords chosen by people would need one; keys are never chosen by people.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import re
import secrets
import time
import tomllib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from turborank.errors import InputError

SECRET_PREFIX = "tr-"
ANY_MODEL = "*"
CHECK_EVERY = 1.0  # seconds between looks at the file
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_FIELDS = {"name", "sha256", "models", "requests_per_minute", "tokens_per_minute"}


@dataclass(frozen=True, slots=True)
class Key:
    """One caller: who it is, what it may use, and how fast."""

    name: str
    sha256: str
    models: tuple[str, ...] = (ANY_MODEL,)
    requests_per_minute: int = 0  # 0: as the settings say
    tokens_per_minute: int = 0

    def allows(self, model: str) -> bool:
        return ANY_MODEL in self.models or model in self.models


ANONYMOUS = Key("anonymous", "")


def digest(secret: str) -> str:
    """What is kept of a key."""
    return hashlib.sha256(secret.encode("utf-8", "surrogateescape")).hexdigest()


def new(path: Path, name: str, *, models: tuple[str, ...] = (), requests: int = 0, tokens: int = 0) -> str:
    """Append a new key to the file, which is made if need be, and return its secret: the only time anyone sees it.

    Raises InputError when the name is taken or unusable, or the file is not a key file.
    """
    if not _NAME.fullmatch(name):
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
    try:
        tomllib.loads((path.read_text("utf-8") if path.exists() else "") + text)  # what we leave, we can read
    except tomllib.TOMLDecodeError as error:
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
    """The keys of a file. Raises InputError naming the entry at fault."""
    try:
        with path.open("rb") as file:
            table = tomllib.load(file)
    except (OSError, ValueError) as error:
        raise InputError(
            f"expected a TOML file of keys at {path}, got: {error}", hint="make one with: turborank keys new NAME"
        ) from None
    entries = table.get("keys", [])
    if set(table) - {"keys"} or not isinstance(entries, list):
        raise InputError(f"expected only [[keys]] entries in {path}, got {', '.join(table)}")
    keys = tuple(_key(entry, f"keys[{place}] in {path}") for place, entry in enumerate(entries))
    names = [key.name for key in keys]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise InputError(f"expected each name once in {path}, got {', '.join(twice)} more than once")
    return keys


def _key(entry: Any, where: str) -> Key:
    if not isinstance(entry, dict) or set(entry) - _FIELDS:
        raise InputError(
            f"expected the fields {', '.join(sorted(_FIELDS))} at {where}, got {', '.join(map(str, entry))}"
        )
    name, sha256 = entry.get("name"), entry.get("sha256")
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise InputError(f"expected a name of letters, digits, dots, dashes and underscores at {where}, got {name!r}")
    if not isinstance(sha256, str) or not re.fullmatch("[0-9a-f]{64}", sha256):
        raise InputError(f"expected sha256 to be 64 hexadecimal digits at {where}, for the key {name!r}")
    models = entry.get("models", [ANY_MODEL])
    if not isinstance(models, list) or not all(isinstance(model, str) for model in models):
        raise InputError(f"expected models to be a list of names at {where}, got {models!r}")
    rates = [entry.get(field, 0) for field in ("requests_per_minute", "tokens_per_minute")]
    if any(type(rate) is not int or rate < 0 for rate in rates):
        raise InputError(f"expected rates of 0 or more at {where}, got {rates}")
    return Key(name, sha256, tuple(models), *rates)


class KeyRing:
    """The keys that are valid now.

    A file that becomes unreadable while the server runs changes nothing but the log (``complain``): locking everyone
    out, or letting everyone in, would both be worse.
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
        self._keys = (*self._fixed, *(read(path) if path else ()))

    @property
    def required(self) -> bool:
        """Whether callers need a key at all. An empty key file needs one that nobody has."""
        return self._path is not None or bool(self._fixed)

    def find(self, secret: str) -> Key | None:
        """The key with this secret. Every key is compared, each in constant time."""
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
            self._keys = (*self._fixed, *read(self._path))
        except InputError as error:
            self._complain(f"the keys stay as they were: {error}")
