"""Int8 tensors as turborank stores them: int8 under ``name``, one float32 scale a row under ``name_scale``."""

from __future__ import annotations

from collections.abc import Container, Mapping
from typing import Any

import numpy as np

from turborank.types import Float32

SCALE = "_scale"


def quantise(weight: Float32) -> tuple[np.ndarray[Any, np.dtype[np.int8]], Float32]:
    """Symmetric, to ±127: (rows, columns) float32 -> int8 of the same shape and scales (rows,)."""
    scale = np.abs(weight).max(axis=1) / np.float32(127.0)
    scale = np.where(scale == 0, np.float32(1.0), scale).astype(np.float32)
    return np.rint(weight / scale[:, None]).astype(np.int8), scale


def dense(weights: Mapping[str, Any], without: Container[str] = ()) -> dict[str, Float32]:
    """Every tensor but those of ``without`` as float32, quantised ones multiplied out, without their scales."""
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
