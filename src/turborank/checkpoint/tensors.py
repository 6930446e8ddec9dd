"""A safetensors file as a lazy mapping: memory-mapped, checked, converted one tensor at a time.

Format: https://github.com/huggingface/safetensors (8 bytes of header length, JSON header, data). The library
checks the header; reading is done here because numpy knows no bfloat16, and so that nothing is ever held twice.
"""

from __future__ import annotations

import json
import math
import mmap
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open

from turborank.errors import CheckpointError
from turborank.types import Float32

FLOATS = ("F32", "F16", "BF16")
_NUMPY = {"F32": "<f4", "F16": "<f2", "BF16": "<u2", "I8": "i1"}
# The bit patterns of +inf and -inf. Read as integers, every NaN lies beyond one of them.
_INFINITIES = {"F32": (0x7F800000, 0xFF800000), "F16": (0x7C00, 0xFC00), "BF16": (0x7F80, 0xFF80)}
_GIT_LFS = b"version https://git-lfs"


class Stored(NamedTuple):
    """Where and how one tensor lies in the file."""

    name: str  # as stored, prefix included
    dtype: str  # safetensors' name: F32, F16, BF16, I8, …
    shape: tuple[int, ...]
    offset: int  # bytes from the start of the file


class TensorFile(Mapping[str, npt.NDArray[Any]]):
    """Name -> array. Each access of a floating-point tensor makes a new float32 array (from F32, F16, BF16);
    an I8 tensor is a read-only view of the file. Nothing is cached.

    ``canonical`` gives the name a stored tensor goes by here. Raises CheckpointError for a file that is truncated
    or no safetensors file, and for two tensors that go by one name.
    """

    def __init__(self, path: Path, canonical: Callable[[str], str]) -> None:
        self.path = path
        stored = _read_header(path)
        self.table = {canonical(entry.name): entry for entry in stored}
        if len(self.table) != len(stored):
            kept = set(self.table.values())
            double = ", ".join(f"{e.name} and {self.table[canonical(e.name)].name}" for e in stored if e not in kept)
            raise CheckpointError(f"expected each tensor once, got {double}, the same one twice, in {path}")
        with path.open("rb") as file:
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)

    def __getitem__(self, name: str) -> npt.NDArray[Any]:
        raw, dtype = self._raw(name), self.table[name].dtype
        if dtype == "BF16":  # the upper half of a float32
            wide = raw.astype(np.uint32)
            wide <<= 16
            return wide.view(np.float32)
        return raw if dtype == "I8" else raw.astype(np.float32)

    def stored(self, name: str) -> npt.NDArray[Any]:
        """The tensor as it lies in the file, read-only and not copied; bfloat16, which numpy lacks, as uint16."""
        return self._raw(name)

    def release(self) -> None:
        """Give the pages that were read back to the system; the next access reads them again."""
        if hasattr(mmap, "MADV_DONTNEED"):
            self._map.madvise(mmap.MADV_DONTNEED)

    def __iter__(self) -> Iterator[str]:
        return iter(self.table)

    def __len__(self) -> int:
        return len(self.table)

    def __contains__(self, name: object) -> bool:
        return name in self.table  # Mapping's own would convert the tensor to find out

    def _raw(self, name: str) -> npt.NDArray[Any]:
        entry = self.table[name]
        dtype: np.dtype[Any] = np.dtype(_NUMPY[entry.dtype])
        return np.frombuffer(self._map, dtype, math.prod(entry.shape), entry.offset).reshape(entry.shape)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: entry.shape for name, entry in self.table.items()}

    def drop(self, names: frozenset[str]) -> None:
        """Leave these tensors out of the mapping; they stay in the file."""
        self.table = {name: entry for name, entry in self.table.items() if name not in names}

    def finite(self, name: str) -> bool:
        """Whether a tensor is free of NaN and infinity, decided on its stored bits without converting it."""
        raw, entry = self._raw(name), self.table[name]
        if entry.dtype not in _INFINITIES or raw.size == 0:
            return True
        plus, minus = _INFINITIES[entry.dtype]
        bits = raw.dtype.itemsize
        return int(raw.view(f"<i{bits}").max()) < plus and int(raw.view(f"<u{bits}").max()) < minus

    def data(self) -> memoryview:
        """The bytes of the whole file."""
        return memoryview(self._map)


def _read_header(path: Path) -> list[Stored]:
    try:
        with safe_open(path, framework="numpy"):  # checks lengths, offsets and types against one another
            pass
    except SafetensorError as error:
        raise CheckpointError(*_damage(path, error)) from error
    start, header = _parse(path)
    header.pop("__metadata__", None)
    return [
        Stored(name, entry["dtype"], tuple(entry["shape"]), start + entry["data_offsets"][0])
        for name, entry in header.items()
    ]


def _parse(path: Path) -> tuple[int, dict[str, Any]]:
    """Where the data begin, and the JSON header."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header: dict[str, Any] = json.loads(file.read(min(length, path.stat().st_size)))
    return 8 + length, header


def _damage(path: Path, error: SafetensorError) -> tuple[str]:
    """What to say about a file that the library refuses."""
    size = path.stat().st_size
    with path.open("rb") as file:
        if file.read(len(_GIT_LFS)) == _GIT_LFS:
            return (f"expected weights, got a Git LFS pointer at {path}; run git lfs pull in its folder",)
    try:
        start, header = _parse(path)
        whole = start + max(entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__")
    except (ValueError, LookupError, TypeError, AttributeError):
        return (f"expected a safetensors file, got {size:,} bytes that are none at {path} ({error}); fetch it again",)
    if size < whole:
        return (f"expected {whole:,} bytes, got {size:,}: the file is truncated at {path}; fetch it again",)
    return (f"expected a safetensors file, got a damaged one at {path} ({error}); fetch it again",)


# Int8 tensors as turborank stores them: int8 under ``name``, one float32 scale a row under ``name_scale``.

SCALE = "_scale"


def quantise(weight: Float32) -> tuple[np.ndarray[Any, np.dtype[np.int8]], Float32]:
    """Symmetric, to ±127: (rows, columns) float32 -> int8 of the same shape and scales (rows,)."""
    scale = np.abs(weight).max(axis=1) / np.float32(127.0)
    scale = np.where(scale == 0, np.float32(1.0), scale).astype(np.float32)
    return np.rint(weight / scale[:, None]).astype(np.int8), scale


def dense(weights: Mapping[str, Any]) -> dict[str, Float32]:
    """Every tensor as float32, quantised ones multiplied out, without their scales."""
    out: dict[str, Float32] = {}
    for name in weights:
        if name.endswith(SCALE) and name.removesuffix(SCALE) in weights:
            continue
        value = weights[name]
        if value.dtype == np.int8:
            value = value.astype(np.float32) * weights[name + SCALE][:, None]
        out[name] = np.asarray(value, dtype=np.float32)
    return out
