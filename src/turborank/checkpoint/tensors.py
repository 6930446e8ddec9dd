"""Safetensors files as one lazy mapping: memory-mapped, validated, converted one tensor at a time.

Format: https://github.com/huggingface/safetensors (8 bytes of header length, JSON header, data). The safetensors
library validates the header. The data are read here, because numpy has no bfloat16 and to avoid a second copy.
"""

from __future__ import annotations

import json
import math
import mmap
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
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
_PIECE = 1 << 24  # elements checked at a time
_LARGE = 1 << 20  # elements of a tensor from which its pages are released after the check
_GIT_LFS = b"version https://git-lfs"


class Stored(NamedTuple):
    """Location, type and shape of one tensor in its file."""

    name: str  # as stored, prefix included
    dtype: str  # safetensors' name: F32, F16, BF16, I8, …
    shape: tuple[int, ...]
    offset: int  # bytes from the start of the file
    file: Path | None = None  # None: set by TensorFile.derive


class TensorFile(Mapping[str, npt.NDArray[Any]]):
    """Mapping of canonical name -> array. Each access of a floating-point tensor (F32, F16, BF16) makes a new float32
    array; an I8 tensor is a read-only view of the file. Nothing is cached.

    Args:
        path: the file, or with several files the one to name in error messages (the index).
        names: stored name -> canonical name, as one function for ``path`` or a function for each of several files.

    Raises:
        CheckpointError: a file is truncated or not a safetensors file, or two tensors have the same canonical name.

    """

    def __init__(self, path: Path, names: Callable[[str], str] | Mapping[Path, Callable[[str], str]]) -> None:
        self.path = path
        self.table: dict[str, Stored] = {}
        self._derived: dict[str, Float32] = {}
        self._maps: dict[Path, mmap.mmap] = {}
        doubles: list[str] = []
        for source, canonical in ({path: names} if callable(names) else names).items():
            for entry in _read_header(source):
                first = self.table.setdefault(canonical(entry.name), entry)
                if first is not entry:
                    doubles.append(f"{first.name} and {entry.name}")
            with source.open("rb") as file:
                self._maps[source] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        if doubles:
            raise CheckpointError(f"expected each tensor once, got {', '.join(doubles)}, the same one twice, in {path}")

    def __getitem__(self, name: str) -> npt.NDArray[Any]:
        raw, dtype = self._raw(name), self.table[name].dtype
        if dtype == "BF16":  # the upper half of a float32
            wide = raw.astype(np.uint32)
            wide <<= 16
            return wide.view(np.float32)
        return raw if dtype == "I8" else raw.astype(np.float32)

    def stored(self, name: str) -> npt.NDArray[Any]:
        """A read-only view of the tensor in the file, in its stored type; bfloat16, which numpy lacks, as uint16."""
        return self._raw(name)

    def release(self) -> None:
        """Release the resident pages of the mapped files; the next access reads them again."""
        if hasattr(mmap, "MADV_DONTNEED"):
            for mapped in self._maps.values():
                mapped.madvise(mmap.MADV_DONTNEED)

    def __iter__(self) -> Iterator[str]:
        return iter(self.table)

    def __len__(self) -> int:
        return len(self.table)

    def __contains__(self, name: object) -> bool:
        return name in self.table  # Mapping.__contains__ would convert the tensor

    def _raw(self, name: str) -> npt.NDArray[Any]:
        entry = self.table[name]
        if entry.file is None:
            return self._derived[name]
        dtype: np.dtype[Any] = np.dtype(_NUMPY[entry.dtype])
        return np.frombuffer(self._maps[entry.file], dtype, math.prod(entry.shape), entry.offset).reshape(entry.shape)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: entry.shape for name, entry in self.table.items()}

    def drop(self, names: Iterable[str]) -> None:
        """Remove these tensors from the mapping; the file is unchanged."""
        gone = frozenset(names)
        self.table = {name: entry for name, entry in self.table.items() if name not in gone}

    def split(self, name: str, parts: Sequence[str]) -> None:
        """Replace a tensor by equal blocks of its rows, named ``parts`` in order; nothing is copied.

        Raises CheckpointError if the number of rows is not a multiple of the number of parts.
        """
        entry = self.table.pop(name)
        rows, rest = divmod(entry.shape[0] if entry.shape else 0, len(parts))
        if rest or not rows or entry.dtype not in _NUMPY:
            got = f"{entry.dtype} {list(entry.shape)}"
            raise CheckpointError(f"expected {len(parts)} blocks of rows in {entry.name}, got {got} in {self.path}")
        shape = (rows, *entry.shape[1:])
        size = math.prod(shape) * np.dtype(_NUMPY[entry.dtype]).itemsize
        for number, part in enumerate(parts):
            self.table[part] = entry._replace(shape=shape, offset=entry.offset + number * size)

    def derive(self, name: str, value: Float32) -> None:
        """Set or replace the tensor ``name`` by ``value`` in the mapping; the file is unchanged."""
        self.table[name] = Stored(name, "F32", value.shape, 0)
        self._derived[name] = value

    def finite(self, name: str) -> bool:
        """Whether a tensor has neither NaN nor infinity, by its stored bits, without conversion to float32."""
        raw, entry = self._raw(name), self.table[name]
        if entry.dtype not in _INFINITIES or raw.size == 0:
            return True
        plus, minus = _INFINITIES[entry.dtype]
        bits, flat = raw.dtype.itemsize, raw.reshape(-1)
        for start in range(0, flat.size, _PIECE):
            piece = flat[start : start + _PIECE]
            if int(piece.view(f"<i{bits}").max()) >= plus or int(piece.view(f"<u{bits}").max()) >= minus:
                return False
            if flat.size >= _LARGE:
                self.release()
        return True

    def rows(self, name: str) -> TableRows:
        """A view of a table (V, C) that converts rows to float32 when they are read, without a copy of the table."""
        return TableRows(self, name)

    def data(self) -> dict[Path, memoryview]:
        """File -> all of its bytes."""
        return {path: memoryview(mapped) for path, mapped in self._maps.items()}


class TableRows:
    """One table (V, C) of a TensorFile, int8 included: ``rows[ids]`` is a new float32 array (len(ids), C)."""

    def __init__(self, weights: TensorFile, name: str) -> None:
        self._stored = weights.stored(name)
        self._scale = weights[name + SCALE] if self._stored.dtype == np.int8 else None
        self.shape = self._stored.shape

    def __getitem__(self, ids: npt.NDArray[np.int32]) -> Float32:
        taken = self._stored[ids]
        if taken.dtype == np.uint16:
            return (taken.astype(np.uint32) << 16).view(np.float32)
        wide: Float32 = taken.astype(np.float32)
        return wide if self._scale is None else wide * self._scale[ids][..., None]


def _read_header(path: Path) -> list[Stored]:
    try:
        with safe_open(path, framework="numpy"):  # validates lengths, offsets and types
            pass
    except SafetensorError as error:
        raise CheckpointError(*_damage(path, error)) from error
    start, header = _parse(path)
    header.pop("__metadata__", None)
    return [
        Stored(name, entry["dtype"], tuple(entry["shape"]), start + entry["data_offsets"][0], path)
        for name, entry in header.items()
    ]


def _parse(path: Path) -> tuple[int, dict[str, Any]]:
    """Offset of the data in bytes, and the JSON header."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header: dict[str, Any] = json.loads(file.read(min(length, path.stat().st_size)))
    return 8 + length, header


def _damage(path: Path, error: SafetensorError) -> tuple[str]:
    """The error message for a file that the safetensors library refuses."""
    size = path.stat().st_size
    with path.open("rb") as file:
        if file.read(len(_GIT_LFS)) == _GIT_LFS:
            return (f"expected weights, got a Git LFS pointer at {path}; run git lfs pull in its folder",)
    try:
        start, header = _parse(path)
        whole = start + max(entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__")
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return (f"expected a safetensors file, got {size:,} bytes that are none at {path} ({error}); fetch it again",)
    if size < whole:
        return (f"expected {whole:,} bytes, got {size:,}: the file is truncated at {path}; fetch it again",)
    return (f"expected a safetensors file, got a damaged one at {path} ({error}); fetch it again",)


# int8 storage (docs/model.md §2.3): int8 under ``name``, one float32 scale for each row under ``name_scale``.

SCALE = "_scale"


def quantise(weight: Float32) -> tuple[np.ndarray[Any, np.dtype[np.int8]], Float32]:
    """Symmetric quantisation to ±127 by row: (rows, columns) float32 -> int8 of that shape and scales (rows,)."""
    scale = np.abs(weight).max(axis=1) / np.float32(127.0)
    scale = np.where(scale == 0, np.float32(1.0), scale).astype(np.float32)
    return np.rint(weight / scale[:, None]).astype(np.int8), scale


def dense(weights: Mapping[str, Any], without: Container[str] = ()) -> dict[str, Float32]:
    """Every tensor except those in ``without`` as float32; int8 tensors are dequantised and their scales omitted."""
    out: dict[str, Float32] = {}
    for name in weights:
        if name in without or name.removesuffix(SCALE) in without:
            continue
        if name.endswith(SCALE) and name.removesuffix(SCALE) in weights:
            continue
        value = weights[name]
        if value.dtype == np.int8:
            value = value.astype(np.float32) * weights[name + SCALE][:, None]
        out[name] = np.asarray(value, dtype=np.float32)
    return out


def check(weights: TensorFile, expected: Mapping[str, tuple[int, ...]], architecture: str) -> None:
    """Raise CheckpointError naming every tensor that is missing, unknown, of a wrong shape or an unsupported type,
    int8 without scales, or not finite. ``expected``: shapes by name, of this architecture."""
    table = weights.table
    faults = [f"{name}: missing, expected {list(shape)}" for name, shape in expected.items() if name not in table]
    usable = []
    for name, entry in table.items():
        base = name.removesuffix(SCALE)
        scales = base != name and base in table and table[base].dtype == "I8"
        shape = (table[base].shape[0],) if scales else expected.get(name)
        if shape is None:
            faults.append(f"{name}: unknown to a {architecture} model, {entry.dtype} {list(entry.shape)}")
        elif entry.shape != shape:
            faults.append(f"{name}: expected {list(shape)}, got {list(entry.shape)}")
        elif entry.dtype == "I8" and len(shape) == 2 and not scales:
            if name + SCALE not in table:
                faults.append(f"{name}: int8 without its scales, expected {name}{SCALE} [{shape[0]}]")
        elif entry.dtype not in FLOATS:
            faults.append(f"{name}: expected one of {', '.join(FLOATS)} or a matrix of I8, got {entry.dtype}")
        else:
            usable.append(name)
    faults += [f"{name}: contains NaN or infinity" for name in usable if not weights.finite(name)]
    if faults:
        wanted = f"the {len(expected)} tensors of a {architecture} model"
        raise CheckpointError.listing(wanted, faults, weights.path)
