"""Persistent SQLite cache of teacher scores, so that no score is computed, or paid for, twice.

The key of a score is a hash of its query, its document and everything about the teacher that it depends on. One file
may serve several folders and processes. The cache of a serving reranker is :mod:`turborank.score_cache`.
"""

from __future__ import annotations

import contextlib
import hashlib
import sqlite3
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from turborank.errors import InputError
from turborank.types import Float32

FILE = "scores.sqlite3"
LOCK_TIMEOUT = 60.0  # seconds to wait for the lock of another process
MAX_PARAMETERS = 500  # per statement; every build of SQLite takes 999


def key(revision: str, query: str, document: str) -> bytes:
    """The 16-byte key of a score. Lengths are hashed, too, so that different triples never give equal input."""
    digest = hashlib.blake2b(digest_size=16)
    for text in (revision, query, document):
        raw = text.encode("utf-8", "surrogatepass")
        digest.update(len(raw).to_bytes(8, "little"))
        digest.update(raw)
    return digest.digest()


class TeacherScoreCache:
    """Scores by key; float32 values are returned bit for bit."""

    def __init__(self, connection: sqlite3.Connection, path: Path) -> None:
        self._connection = connection
        self._path = path

    def get(self, keys: Sequence[bytes]) -> Float32:
        """(K,) the score of every key; NaN where there is none."""
        known: dict[bytes, float] = {}
        for start in range(0, len(keys), MAX_PARAMETERS):
            part = keys[start : start + MAX_PARAMETERS]
            marks = ",".join("?" * len(part))  # only placeholders
            known.update(self._connection.execute(f"SELECT key, score FROM scores WHERE key IN ({marks})", part))
        return np.array([known.get(one, np.nan) for one in keys], dtype=np.float32)

    def put(self, keys: Sequence[bytes], scores: Float32) -> None:
        """Store scores (K,), durably and all or none. Raises InputError where the file cannot be written."""
        with self._faults(), self._connection:
            self._connection.executemany(
                "INSERT OR REPLACE INTO scores VALUES (?, ?)", zip(keys, scores.tolist(), strict=True)
            )

    @contextlib.contextmanager
    def _faults(self) -> Iterator[None]:
        with _faults(self._path):
            yield


@contextlib.contextmanager
def _faults(path: Path) -> Iterator[None]:
    try:
        yield
    except sqlite3.Error as error:
        raise InputError(
            f"expected to keep scores at {path}, got {error}",
            hint="make room, or choose another --cache; stored scores remain",
        ) from error


@contextlib.contextmanager
def open_cache(folder: Path) -> Iterator[TeacherScoreCache]:
    """The cache in a folder, created if missing. Raises InputError where it cannot be read or written."""
    path = folder / FILE
    with _faults(path):
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"expected a folder for the cache, got {error.strerror} at {folder}") from error
        connection = sqlite3.connect(path, timeout=LOCK_TIMEOUT)
    try:
        with _faults(path):
            connection.execute("PRAGMA journal_mode = WAL")
            connection.execute("PRAGMA synchronous = NORMAL")
            connection.execute("CREATE TABLE IF NOT EXISTS scores (key BLOB PRIMARY KEY, score REAL) WITHOUT ROWID")
        yield TeacherScoreCache(connection, path)
    finally:
        connection.close()
