"""What teachers have said, on disk: nothing is computed, or paid for, twice.

A score is kept under the hash of its query, its document and everything about the teacher it depends on, in one SQLite
file that many folders and processes may share.
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
PATIENCE = 60.0  # seconds to wait for another process that writes
ASKED_AT_ONCE = 500  # SQLite takes 999 parameters everywhere


def key(revision: str, query: str, document: str) -> bytes:
    """16 bytes for one score. Lengths are hashed, too, so that no two triples run together."""
    digest = hashlib.blake2b(digest_size=16)
    for text in (revision, query, document):
        raw = text.encode("utf-8", "surrogatepass")
        digest.update(len(raw).to_bytes(8, "little"))
        digest.update(raw)
    return digest.digest()


class ScoreCache:
    """Scores by key. float32 values come back to the bit."""

    def __init__(self, connection: sqlite3.Connection, path: Path) -> None:
        self._connection = connection
        self._path = path

    def get(self, keys: Sequence[bytes]) -> Float32:
        """The score of every key; NaN where there is none."""
        known: dict[bytes, float] = {}
        for start in range(0, len(keys), ASKED_AT_ONCE):
            part = keys[start : start + ASKED_AT_ONCE]
            marks = ",".join("?" * len(part))
            # the marks are question marks, and nothing else
            known.update(self._connection.execute(f"SELECT key, score FROM scores WHERE key IN ({marks})", part))
        return np.array([known.get(one, np.nan) for one in keys], dtype=np.float32)

    def put(self, keys: Sequence[bytes], scores: Float32) -> None:
        """Keep scores; on disk when this returns."""
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
            hint="make room, or choose another --cache; what was kept stays",
        ) from error


@contextlib.contextmanager
def open_cache(folder: Path) -> Iterator[ScoreCache]:
    """The cache in a folder, made if there is none. Raises InputError where it cannot be read or written."""
    path = folder / FILE
    with _faults(path):
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"expected a folder for the cache, got {error.strerror} at {folder}") from error
        connection = sqlite3.connect(path, timeout=PATIENCE)
    try:
        with _faults(path):
            connection.execute("PRAGMA journal_mode = WAL")
            connection.execute("PRAGMA synchronous = NORMAL")
            connection.execute("CREATE TABLE IF NOT EXISTS scores (key BLOB PRIMARY KEY, score REAL) WITHOUT ROWID")
        yield ScoreCache(connection, path)
    finally:
        connection.close()
