"""Bounded cache of scores, keyed by the content of the pair (docs/caching.md).

A key is a 256-bit BLAKE2b hash of everything a score depends on: model files, engine, precision, instruction set,
length policy and limits (:meth:`turborank.Reranker.fingerprint`), query and document. The store is one SQLite table, in
memory or in a file that several processes may share. It is bounded by entries and evicts the least recently used. With
the native and the reference engine, a cached score has the same bits as a computed one.
"""

from __future__ import annotations

import hashlib
import os
import sqlite3
import struct
import threading
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from turborank.errors import InputError
from turborank.types import Pair, Scores

_ROW = struct.Struct("<fiiqq")  # logit, tokens, truncated, span
_AT_ONCE = 500  # parameters of one statement; every SQLite version accepts 999
_WAIT = 5.0  # seconds to wait for a lock of another process
_FOREIGN: list[sqlite3.Connection] = []  # connections of parent processes, kept open and unused
_TABLE = "CREATE TABLE IF NOT EXISTS scores (key BLOB PRIMARY KEY, row BLOB NOT NULL, used INTEGER NOT NULL)"


class Found(NamedTuple):
    """Result of a look-up: for each pair its key and its stored row."""

    keys: list[bytes]
    rows: list[bytes | None]  # None: a miss

    @property
    def missing(self) -> list[int]:
        """Indices of the pairs that have to be computed."""
        return [index for index, row in enumerate(self.rows) if row is None]


class ScoreCache:
    """A bounded cache of scores. Threads and rerankers may share it.

    Args:
        entries: maximum number of scores, about 150 bytes each.
        path: an SQLite file, created if it does not exist; None keeps the scores in memory.

    Raises InputError for other ``entries`` than a positive int and for a file that cannot be opened. Later errors of
    the file (disk full, lock timeout) are counted in ``faults``; the scores are then computed.
    """

    def __init__(self, entries: int = 100_000, path: str | os.PathLike[str] | None = None) -> None:
        if isinstance(entries, bool) or not isinstance(entries, int) or entries < 1:
            raise InputError(f"expected entries to be a positive whole number, got {entries!r:.80}")
        self.entries = entries
        self.path = None if path is None else os.fspath(path)
        self.hits = self.misses = self.faults = 0
        self._open()

    def _open(self) -> None:
        """Open a connection for this process; SQLite does not allow using one that was opened before a fork."""
        self._process, self._lock = os.getpid(), threading.Lock()
        try:
            self._database = sqlite3.connect(self.path or ":memory:", timeout=_WAIT, check_same_thread=False)
            if self.path:
                self._database.execute("PRAGMA journal_mode = WAL")
                self._database.execute("PRAGMA synchronous = NORMAL")
            with self._database:
                self._database.execute(_TABLE)
                self._database.execute("CREATE INDEX IF NOT EXISTS by_use ON scores (used)")
            self._size, self._clock = self._database.execute(
                "SELECT count(*), coalesce(max(used), 0) FROM scores"
            ).fetchone()
        except sqlite3.Error as error:
            raise InputError(
                f"expected a score cache, got {error} at {self.path}", hint="choose another file, or delete this one"
            ) from error

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle the path and the bound. A cache in memory arrives empty."""
        return ScoreCache, (self.entries, self.path)

    def _reopen(self) -> None:
        """After a fork, open a new connection in the child. Closing the parent's here would release its locks."""
        if self._process != os.getpid():
            _FOREIGN.append(self._database)
            self._open()

    def __len__(self) -> int:
        return int(self._size)

    def close(self) -> None:
        """Close the database."""
        with self._lock:
            self._database.close()

    def find(self, fingerprint: str, pairs: Sequence[Pair]) -> Found:
        """Look up ``pairs`` under a fingerprint and mark the hits as used."""
        keys = [key(fingerprint, query, document) for query, document in pairs]
        known: dict[bytes, bytes] = {}
        self._reopen()
        with self._lock:
            try:
                self._clock += 1
                with self._database:
                    for start in range(0, len(keys), _AT_ONCE):
                        part = keys[start : start + _AT_ONCE]
                        marks = ",".join("?" * len(part))  # only question marks: no text enters the statement
                        known.update(
                            self._database.execute(f"SELECT key, row FROM scores WHERE key IN ({marks})", part)
                        )
                    self._database.executemany(
                        "UPDATE scores SET used = ? WHERE key = ?", [(self._clock, one) for one in known]
                    )
            except sqlite3.Error:
                self.faults += 1
            rows = [row if row is not None and len(row) == _ROW.size else None for row in map(known.get, keys)]
            self.hits += len(rows) - rows.count(None)
            self.misses += rows.count(None)
        return Found(keys, rows)

    def complete(self, found: Found, computed: Scores) -> Scores:
        """Merge the found rows with the scores ``computed`` for the missing pairs, and store the latter."""
        rows, missing = list(found.rows), found.missing
        for index, *values in zip(
            missing, computed.logits, computed.tokens, computed.truncated, computed.spans, strict=True
        ):
            logit, tokens, truncated, (start, end) = values
            rows[index] = _ROW.pack(logit, tokens, truncated, start, end)
        self._keep([(found.keys[index], rows[index]) for index in missing])
        columns = np.array([_ROW.unpack(row) for row in rows if row is not None], dtype=_COLUMNS)
        return Scores(
            columns["logit"].copy(), columns["tokens"].copy(), columns["truncated"].copy(),
            np.stack([columns["start"], columns["end"]], axis=1),
        )  # fmt: skip

    def _keep(self, rows: Sequence[tuple[bytes, bytes | None]]) -> None:
        if not rows:
            return
        self._reopen()
        with self._lock:
            try:
                self._clock += 1
                with self._database:
                    self._database.executemany(
                        "INSERT OR REPLACE INTO scores VALUES (?, ?, ?)", [(*row, self._clock) for row in rows]
                    )
                    self._size = self._database.execute("SELECT count(*) FROM scores").fetchone()[0]
                    if self._size > self.entries:
                        self._database.execute(
                            "DELETE FROM scores WHERE key IN (SELECT key FROM scores ORDER BY used, key LIMIT ?)",
                            (self._size - self.entries,),
                        )
                        self._size = self.entries
            except sqlite3.Error:
                self.faults += 1


_COLUMNS = np.dtype([("logit", "f4"), ("tokens", "i4"), ("truncated", "i4"), ("start", "i8"), ("end", "i8")])


def key(fingerprint: str, query: str, document: str, size: int = 32) -> bytes:
    """Key of ``size`` bytes for one score. Lengths are hashed too, so that different triples never give equal input."""
    digest = hashlib.blake2b(digest_size=size)
    for text in (fingerprint, query, document):
        raw = text.encode("utf-8", "surrogatepass")
        digest.update(len(raw).to_bytes(8, "little"))
        digest.update(raw)
    return digest.digest()
