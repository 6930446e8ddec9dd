"""Corpora that need not fit into memory.

A BEIR ``corpus.jsonl`` is read once: every line is validated, and 16 bytes per document are kept, a 64-bit hash of the
id and the byte offset. Texts are read on access. Each look-up compares the full id, so a hash collision only costs an
additional read.
"""

from __future__ import annotations

import hashlib
import mmap
from array import array
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt

from turborank.data.files import MARK, checked_id, decode, open_binary, parse_object, string_field
from turborank.errors import InputError
from turborank.types import Progress

REPORT_EVERY = 1 << 22  # bytes between two progress reports


class Corpus(Protocol):
    """Documents by id, in a fixed order. ``fingerprint`` changes whenever a document does."""

    fingerprint: str

    def __len__(self) -> int: ...

    def __contains__(self, doc_id: object) -> bool: ...

    def text(self, doc_id: str) -> str: ...

    def id_at(self, position: int) -> str: ...

    def texts(self) -> Iterator[str]: ...


def beir_text(title: str, text: str) -> str:
    """The text that is searched and reranked: title and text joined by a space, as in BEIR."""
    return f"{title} {text}".strip()


def _hash(doc_id: str) -> int:
    return int.from_bytes(hashlib.blake2b(doc_id.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")


def _blank(raw: bytes, number: int) -> bool:
    return not (raw.removeprefix(MARK) if number == 1 else raw).strip()


class JsonlCorpus:
    """A ``corpus.jsonl`` of ``{"_id", "title", "text"}`` on disk.

    Raises InputError, with file and line, for a malformed line, a missing or repeated id, and non-UTF-8.
    """

    def __init__(self, path: Path, *, progress: Progress | None = None) -> None:
        self.path = path
        offsets, hashes = array("q"), array("Q")
        digest = hashlib.sha256()
        size, offset, reported = path.stat().st_size if path.exists() else 0, 0, 0
        if path.suffix == ".gz":
            raise InputError(f"expected an unpacked corpus, of which any document can be read, got {path}")
        with open_binary(path) as file:
            for number, raw in enumerate(file, 1):
                digest.update(raw)
                if not _blank(raw, number):
                    doc_id, _ = self._parse(raw, number)
                    offsets.append(offset)
                    hashes.append(_hash(doc_id))
                offset += len(raw)
                if progress is not None and offset - reported >= REPORT_EVERY:
                    progress(offset, size)
                    reported = offset
        if progress is not None:
            progress(size, size)
        self.fingerprint = digest.hexdigest()
        self._offsets: npt.NDArray[np.int64] = np.frombuffer(offsets, dtype=np.int64)
        keys: npt.NDArray[np.uint64] = np.frombuffer(hashes, dtype=np.uint64)
        self._order = np.argsort(keys, kind="stable")
        self._keys = keys[self._order]
        if not len(keys):
            raise InputError(f"expected documents, got none at {path}")
        with path.open("rb") as file:
            self._bytes = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self._refuse_duplicates()

    def _parse(self, raw: bytes, number: int) -> tuple[str, str]:
        record = parse_object(decode(raw, self.path, number), self.path, number)
        doc_id = checked_id(string_field(record, "_id", self.path, number), f"{self.path}:{number}")
        title = string_field(record, "title", self.path, number, default="")
        return doc_id, beir_text(title, string_field(record, "text", self.path, number))

    def _refuse_duplicates(self) -> None:
        repeated = self._keys[1:][self._keys[1:] == self._keys[:-1]]
        known: dict[str, int] = {}
        for place in np.flatnonzero(np.isin(self._keys, repeated)):
            position = int(self._order[place])
            doc_id = self.id_at(position)
            if (first := known.setdefault(doc_id, position)) != position:
                lines = [f"{self.path}:{self._line_number(one)}" for one in (first, position)]
                raise InputError(f"expected each document id once, got {doc_id!r} at {' and again at '.join(lines)}")

    def _line_number(self, position: int) -> int:
        return self._bytes[: int(self._offsets[position])].count(b"\n") + 1

    def _read(self, position: int) -> tuple[str, str]:
        start = int(self._offsets[position])
        end = self._bytes.find(b"\n", start)
        return self._parse(self._bytes[start : len(self._bytes) if end < 0 else end], 1 if position == 0 else 0)

    def _find(self, doc_id: str) -> str | None:
        """The text of a document, or None."""
        key = np.uint64(_hash(doc_id))
        start, end = np.searchsorted(self._keys, key, "left"), np.searchsorted(self._keys, key, "right")
        for place in range(int(start), int(end)):
            found, text = self._read(int(self._order[place]))
            if found == doc_id:
                return text
        return None

    def __len__(self) -> int:
        return len(self._offsets)

    def __contains__(self, doc_id: object) -> bool:
        return isinstance(doc_id, str) and self._find(doc_id) is not None

    def text(self, doc_id: str) -> str:
        """The text of a document. Raises KeyError for an unknown id."""
        text = self._find(doc_id)
        if text is None:
            raise KeyError(doc_id)
        return text

    def id_at(self, position: int) -> str:
        """The id of the document with this index (from 0) in the file."""
        return self._read(position)[0]

    def texts(self) -> Iterator[str]:
        """All texts in the order of the file, streamed."""
        with open_binary(self.path) as file:
            for number, raw in enumerate(file, 1):
                if not _blank(raw, number):
                    yield self._parse(raw, number)[1]


class MemoryCorpus:
    """Documents held as a mapping from id to text."""

    def __init__(self, documents: Mapping[str, str]) -> None:
        self._documents = dict(documents)
        self._ids = list(self._documents)
        digest = hashlib.sha256()
        for doc_id, text in self._documents.items():
            digest.update(f"{doc_id}\0{text}\0".encode("utf-8", "surrogatepass"))
        self.fingerprint = digest.hexdigest()

    def __len__(self) -> int:
        return len(self._ids)

    def __contains__(self, doc_id: object) -> bool:
        return doc_id in self._documents

    def text(self, doc_id: str) -> str:
        """The text of a document. Raises KeyError for an unknown id."""
        return self._documents[doc_id]

    def id_at(self, position: int) -> str:
        """The id of the document with this index (from 0)."""
        return self._ids[position]

    def texts(self) -> Iterator[str]:
        """All texts, in order."""
        return iter(self._documents.values())
