"""The reference implementation of the ops: plain numpy, float32, attention one pair and head at a time.

All engines are tested against these functions (:class:`turborank.ops.Ops` documents them). They also run models on
machines where no faster engine is available.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from turborank.types import Float32, Int32

# Queries of attention computed at a time. Bounds memory: with 8,192 keys the scores of one head take 12 MB.
QUERY_BLOCK = 384

# erf by rational Chebyshev approximation: W. J. Cody, Math. Comp. 23 (1969) 631-637, two of its three intervals, error
# below 1e-15 there. numpy has no erf, and scipy would double the size of the installation.
_ERF_NUM = (
    1.85777706184603153e-1, 3.16112374387056560e0, 1.13864154151050156e2, 3.77485237685302021e2,
    3.20937758913846947e3,
)  # fmt: skip
_ERF_DEN = (1.0, 2.36012909523441209e1, 2.44024637934444173e2, 1.28261652607737228e3, 2.84423683343917062e3)
_ERFC_NUM = (
    2.15311535474403846e-8, 5.64188496988670089e-1, 8.88314979438837594e0, 6.61191906371416295e1,
    2.98635138197400131e2, 8.81952221241769090e2, 1.71204761263407058e3, 2.05107837782607147e3, 1.23033935479799725e3,
)  # fmt: skip
_ERFC_DEN = (
    1.0, 1.57449261107098347e1, 1.17693950891312499e2, 5.37181101862009858e2, 1.62138957456669019e3,
    3.29079923573345963e3, 4.36261909014324716e3, 3.43936767414372164e3, 1.23033935480374942e3,
)  # fmt: skip


def erf(x: npt.NDArray[np.floating]) -> npt.NDArray[np.float64]:
    """The error function in float64; absolute error below 2e-8 everywhere, 1e-15 for |x| ≤ 4."""
    z = np.abs(x).astype(np.float64)
    small = np.minimum(z, 0.46875)
    large = np.clip(z, 0.46875, 4.0)
    centre = small * np.polyval(_ERF_NUM, small**2) / np.polyval(_ERF_DEN, small**2)
    tail = 1.0 - np.exp(-(large**2)) * np.polyval(_ERFC_NUM, large) / np.polyval(_ERFC_DEN, large)
    out: npt.NDArray[np.float64] = np.copysign(np.where(z <= 0.46875, centre, tail), x)
    return out


def take(table: Float32, ids: Int32) -> Float32:
    return np.asarray(table[ids])


def linear(x: Float32, weight: Float32, bias: Float32 | None = None) -> Float32:
    y = x @ weight.T
    return y if bias is None else y + bias


def layer_norm(x: Float32, weight: Float32, bias: Float32 | None, eps: float) -> Float32:
    centred = x - x.mean(axis=-1, keepdims=True)
    variance = np.square(centred).mean(axis=-1, keepdims=True)
    scaled = np.asarray(centred / np.sqrt(variance + np.float32(eps)) * weight)
    return scaled if bias is None else scaled + bias


def add_norm(x: Float32, residual: Float32, weight: Float32, bias: Float32, eps: float) -> Float32:
    return layer_norm(x + residual, weight, bias, eps)


def gelu(x: Float32) -> Float32:
    return np.asarray(0.5 * x * (1.0 + erf(x / math.sqrt(2.0))), dtype=np.float32)


def tanh(x: Float32) -> Float32:
    return np.asarray(np.tanh(x))


def geglu(x: Float32, weight: Float32) -> Float32:
    gate, value = np.split(linear(x, weight), 2, axis=-1)
    return gelu(gate) * value


def softmax(scores: Float32) -> Float32:
    shifted = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return np.asarray(shifted / shifted.sum(axis=-1, keepdims=True))


def angles(positions: Int32, size: int, theta: float) -> Float32:
    """RoPE's angles (T, D/2) for positions (T,) and head size D = ``size``, in float32 as in the published code."""
    frequencies = 1 / np.power(theta, np.arange(0, size, 2) / size).astype(np.float32)  # (D/2,)
    return np.asarray(positions.astype(np.float32)[:, None] * frequencies)


def rotate(x: Float32, cu_seqlens: Int32, heads: int, theta: float) -> Float32:
    size = x.shape[1] // heads
    turned = angles(positions(cu_seqlens), size, theta)
    cos, sin = np.cos(turned)[:, None], np.sin(turned)[:, None]
    low, high = np.split(x.reshape(len(x), heads, size), 2, axis=-1)  # 2 × (T, H, D/2)
    return np.concatenate([low * cos - high * sin, high * cos + low * sin], axis=-1).reshape(x.shape)


def attention(
    q: Float32,
    k: Float32,
    v: Float32,
    cu_seqlens: Int32,
    heads: int,
    slopes: Sequence[float],
    first_only: bool,
    window: int = 0,
) -> Float32:
    out = np.empty_like(q)
    size = q.shape[1] // heads
    bias = np.asarray(slopes if len(slopes) else [0.0] * heads, dtype=np.float32)
    for pair, (start, end) in enumerate(itertools.pairwise(cu_seqlens)):
        rows = slice(pair, pair + 1) if first_only else slice(start, end)
        for head in range(heads):
            columns = slice(head * size, (head + 1) * size)
            queries, out_head = q[rows, columns], out[rows, columns]
            for first in range(0, queries.shape[0], QUERY_BLOCK):
                block = queries[first : first + QUERY_BLOCK]  # (b, D)
                last, reach = first + block.shape[0], window or end - start
                near = slice(max(start, start + first - reach), min(end, start + last + reach))
                keys = np.arange(near.start - start, near.stop - start, dtype=np.float32)
                distance = np.abs(np.arange(first, last, dtype=np.float32)[:, None] - keys)
                scores = block @ k[near, columns].T / np.float32(math.sqrt(size)) - bias[head] * distance
                if window:
                    scores[distance > window] = -np.inf
                out_head[first:last] = softmax(scores) @ v[near, columns]
    return out


def disentangled_attention(
    q: Float32,
    k: Float32,
    v: Float32,
    pos_q: Float32,
    pos_k: Float32,
    rows: Sequence[int],
    cu_seqlens: Int32,
    heads: int,
    first_only: bool,
) -> Float32:
    out = np.empty_like(q)
    size = q.shape[1] // heads
    table, zero = np.asarray(rows), len(rows) // 2  # table[zero + i - j]
    for pair, (start, end) in enumerate(itertools.pairwise(cu_seqlens)):
        asked = slice(pair, pair + 1) if first_only else slice(start, end)
        for head in range(heads):
            columns = slice(head * size, (head + 1) * size)
            queries, keys, out_head = q[asked, columns], k[start:end, columns], out[asked, columns]
            position_to_content = keys @ pos_q[:, columns].T  # (n, R)
            for first in range(0, queries.shape[0], QUERY_BLOCK):
                block = queries[first : first + QUERY_BLOCK]  # (b, D)
                i = np.arange(first, first + block.shape[0])[:, None]
                r = table[zero + i - np.arange(end - start)]  # (b, n)
                scores = block @ keys.T
                scores += np.take_along_axis(block @ pos_k[:, columns].T, r, axis=1)
                scores += np.take_along_axis(position_to_content, r.T, axis=1).T
                weights = softmax(scores / np.float32(math.sqrt(3 * size)))
                out_head[first : first + QUERY_BLOCK] = weights @ v[start:end, columns]
    return out


def layer(function: Callable[..., Float32], *arguments: Any) -> Float32:
    return function(*arguments)


def positions(cu_seqlens: Int32) -> Int32:
    return np.concatenate([np.arange(n, dtype=np.int32) for n in np.diff(cu_seqlens)])


def first_tokens(x: Float32, cu_seqlens: Int32) -> Float32:
    return np.asarray(x[cu_seqlens[:-1]])


def means(x: Float32, cu_seqlens: Int32) -> Float32:
    pairs = itertools.pairwise(cu_seqlens)  # float64 below: along axis 0 numpy sums sequentially, not pairwise
    return np.stack([x[start:end].mean(axis=0, dtype=np.float64) for start, end in pairs]).astype(np.float32)


def segment_means(x: Float32, type_ids: Int32, cu_seqlens: Int32) -> tuple[Float32, Float32]:
    means = np.empty((2, cu_seqlens.shape[0] - 1, x.shape[1]), dtype=np.float32)
    for pair, (start, end) in enumerate(itertools.pairwise(cu_seqlens)):
        for segment in (0, 1):
            means[segment, pair] = x[start:end][type_ids[start:end] == segment].mean(axis=0)
    return means[0], means[1]


def focused_means(
    x: Float32, query: Float32, focus: Float32, type_ids: Int32, cu_seqlens: Int32, passage: int
) -> Float32:
    out = np.empty_like(query)
    for pair, (start, end) in enumerate(itertools.pairwise(cu_seqlens)):
        document = x[start:end][type_ids[start:end] == 1]
        firsts = np.arange(0, len(document), passage)
        sums = np.add.reduceat(document, firsts, axis=0)  # (passages, C)
        lengths = np.diff([*firsts, len(document)]).astype(np.float32)
        score = focus * cosine(sums, query[pair])
        weight = np.exp(score - score.max())
        out[pair] = (weight[:, None] * sums).sum(axis=0) / (weight * lengths).sum()
    return out


def cosine(a: Float32, b: Float32) -> Float32:
    norms = np.sqrt(np.square(a).sum(axis=-1) * np.square(b).sum(axis=-1))
    return np.asarray((a * b).sum(axis=-1) / np.maximum(norms, np.float32(1e-12)))
