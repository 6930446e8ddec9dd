"""Several teachers as one: each teacher's scores brought to a common footing, then summed with weights."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from turborank.errors import InputError, UnknownKeyError
from turborank.types import Float32

NORMS = ("raw", "z", "minmax")
_LEAST_SPREAD = 1e-3  # of a pool's scores: what is flatter than that stays flat


class TeacherSpec(NamedTuple):
    """One teacher of an ensemble, as NAME[:WEIGHT[:NORM]] says it."""

    name: str
    weight: float = 1.0
    norm: str = "raw"


def parse(text: str) -> TeacherSpec:
    """``minilm:20:raw`` -> TeacherSpec. Raises InputError for anything else."""
    name, *rest = text.split(":")
    try:
        weight = float(rest[0]) if rest else 1.0
    except ValueError:
        weight = math.nan
    if not name or len(rest) > 2 or not math.isfinite(weight):
        raise InputError(f"expected NAME[:WEIGHT[:NORM]], say minilm:20:raw, got {text!r}")
    norm = rest[1] if len(rest) > 1 else "raw"
    if norm not in NORMS:
        raise UnknownKeyError("norm", norm, NORMS)
    return TeacherSpec(name, weight, norm)


def normalise(scores: Float32, bounds: npt.NDArray[np.int64], norm: str) -> Float32:
    """Scores (N,) of pools ``bounds`` (Q+1,); each pool to mean 0 and deviation 1 (``z``), or to 0 … 1 (``minmax``)."""
    if norm == "raw":
        return scores.astype(np.float32)
    if norm not in NORMS:
        raise UnknownKeyError("norm", norm, NORMS)
    starts, sizes = bounds[:-1], np.diff(bounds)
    filled = sizes > 0
    starts, sizes = starts[filled], sizes[filled]
    wide = scores.astype(np.float64)
    if not len(starts):
        return scores.astype(np.float32)
    if norm == "minmax":
        low, high = np.minimum.reduceat(wide, starts), np.maximum.reduceat(wide, starts)
        spread = high - low
    else:
        low = np.add.reduceat(wide, starts) / sizes
        spread = np.sqrt(np.add.reduceat((wide - np.repeat(low, sizes)) ** 2, starts) / sizes)
    out: Float32 = ((wide - np.repeat(low, sizes)) / np.repeat(np.maximum(spread, _LEAST_SPREAD), sizes)).astype(
        np.float32
    )
    return out


def fuse(teachers: Sequence[TeacherSpec], scores: Mapping[str, Float32], bounds: npt.NDArray[np.int64]) -> Float32:
    """Weighted sum (N,) of the teachers' scores, each normalised within its pool."""
    if not teachers:
        raise InputError("expected at least one teacher, got none")
    total = np.zeros(len(scores[teachers[0].name]), dtype=np.float32)
    for teacher in teachers:
        total += np.float32(teacher.weight) * normalise(scores[teacher.name], bounds, teacher.norm)
    return total
