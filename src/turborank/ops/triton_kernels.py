"""Triton kernels of :mod:`turborank.ops.triton`, which explains their algorithms and the skip bound.

Matrices are row-major and packed: head h of token t in (T, C) is at t·C + h·D. A block is a row of an int32 table:
first token, start and end of its pair, number of its pair's first block.
"""

from __future__ import annotations

import math

import triton
import triton.language as tl

FIXED_RANGE = tl.constexpr(100.0)  # log2 of the largest ratio of any key's weight to that at distance 0, for FIXED
LOG2E = tl.constexpr(math.log2(math.e))


@triton.jit
def key_norms(k_at, norms_at, blocks_at, C, D: tl.constexpr, BLOCK: tl.constexpr):
    """Largest |k| of each block of keys in each head: (B, H)."""
    block, head = tl.program_id(0), tl.program_id(1)
    place = tl.load(blocks_at + block * 4) + tl.arange(0, BLOCK)
    real = place < tl.load(blocks_at + block * 4 + 2)
    at = place.to(tl.int64)[:, None] * C + head * D + tl.arange(0, D)[None, :]
    k = tl.load(k_at + at, mask=real[:, None], other=0.0).to(tl.float32)
    tl.store(norms_at + block * tl.num_programs(1) + head, tl.sqrt(tl.max(tl.sum(k * k, axis=1), axis=0)))


@triton.jit
def _tile(
    q, row, top, total, acc, j, high, first, k_at, v_at, C, scale, slope,
    D: tl.constexpr, KEYS: tl.constexpr, FIXED: tl.constexpr, RAGGED: tl.constexpr,
):  # fmt: skip
    """Add the tile of keys from j to each query's maximum score, sum of weights and sum of weighted values."""
    place, column = j + tl.arange(0, KEYS), tl.arange(0, D)
    at = place.to(tl.int64)[:, None] * C + column[None, :]
    real = place < high
    k = tl.load(k_at + at, mask=real[:, None], other=0.0) if RAGGED else tl.load(k_at + at)
    s = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
    s -= tl.abs(row[:, None] - slope * (place - first).to(tl.float32)[None, :])
    if RAGGED:
        s = tl.where(real[None, :], s, float("-inf"))
    if not FIXED:
        higher = tl.maximum(top, tl.max(s, axis=1))
        shrink = tl.exp2(top - higher)
        total, acc, top = total * shrink, acc * shrink[:, None], higher
    p = tl.exp2(s - top[:, None])
    v = tl.load(v_at + at, mask=real[:, None], other=0.0) if RAGGED else tl.load(v_at + at)
    acc = tl.dot(p.to(v.dtype), v, acc, input_precision="ieee")
    return top, total + tl.sum(p, axis=1), acc


@triton.jit
def _walk(
    q, row, top, low, high, first, k_at, v_at, C, scale, slope,
    D: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr, FIXED: tl.constexpr,
):  # fmt: skip
    """Attention over keys low … high-1: context (QUERIES, D). FIXED: subtract ``top`` instead of a running maximum."""
    total = tl.zeros((QUERIES,), tl.float32)
    acc = tl.zeros((QUERIES, D), tl.float32)
    whole = low + (high - low) // KEYS * KEYS
    for j in range(low, whole, KEYS):
        top, total, acc = _tile(
            q, row, top, total, acc, j, high, first, k_at, v_at, C, scale, slope, D, KEYS, FIXED, False
        )
    if whole < high:
        top, total, acc = _tile(
            q, row, top, total, acc, whole, high, first, k_at, v_at, C, scale, slope, D, KEYS, FIXED, True
        )
    return acc / total[:, None]


@triton.jit
def _bounds(q, k, real, norms_at, own_block, blocks, heads, scale, slope, tail, SPAN: tl.constexpr):
    """For a block's queries: scores o_i at distance 0, the largest S_i - o_i, and the largest reach r_i in keys."""
    q, each = q.to(tl.float32), tl.arange(0, SPAN)
    own = tl.sum(q * k.to(tl.float32), axis=1) * scale
    norms = tl.load(norms_at + (own_block + each) * heads, mask=each < blocks, other=0.0)
    bound = tl.sqrt(tl.sum(q * q, axis=1)) * tl.max(norms, axis=0) * scale
    spread = tl.max(tl.where(real, bound - own, 0.0), axis=0)
    return own, spread, tl.minimum((spread + tail) / slope, 1e9).to(tl.int32) + 1


@triton.jit
def attend(
    q_at, k_at, v_at, out_at, blocks_at, norms_at, heads_at, slopes_at, C, scale,
    D: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr, BLOCK: tl.constexpr, FIRST: tl.constexpr,
    SKIP: tl.constexpr, FIXABLE: tl.constexpr, SPAN: tl.constexpr,
):  # fmt: skip
    """Context of one block's queries in one head. FIRST: q and out are (P, C), each pair's first token.

    SKIP: apply the skip bound with ``norms`` of blocks of BLOCK keys, at most SPAN blocks a pair.
    FIXABLE: the type of the weights has the exponent range that FIXED needs; fp16 has not.
    """
    block = tl.program_id(0)
    head = tl.load(heads_at + tl.program_id(1))
    slope, tail = tl.load(slopes_at + head * 2), tl.load(slopes_at + head * 2 + 1)
    first, low = tl.load(blocks_at + block * 4), tl.load(blocks_at + block * 4 + 1)
    high, own_block = tl.load(blocks_at + block * 4 + 2), tl.load(blocks_at + block * 4 + 3)
    step, column = tl.arange(0, QUERIES), tl.arange(0, D)
    real = step < 1 if FIRST else first + step < high
    rows = (block if FIRST else first) + step
    at = rows.to(tl.int64)[:, None] * C + head * D + column[None, :]
    q = tl.load(q_at + at, mask=real[:, None], other=0.0)
    k_at += head * D
    v_at += head * D
    top = tl.full((QUERIES,), float("-inf"), tl.float32)
    fixed = False
    if SKIP:
        own_at = (first + step).to(tl.int64)[:, None] * C + column[None, :]
        k = tl.load(k_at + own_at, mask=real[:, None], other=0.0)
        blocks = (high - low + BLOCK - 1) // BLOCK
        heads = tl.num_programs(1)
        own, spread, reach = _bounds(q, k, real, norms_at + head, own_block, blocks, heads, scale, slope, tail, SPAN)
        low = tl.maximum(low, first - reach)
        high = tl.minimum(high, first + (1 if FIRST else QUERIES) + reach)
        top = own * LOG2E
        fixed = spread * LOG2E < FIXED_RANGE
    scale *= LOG2E
    slope *= LOG2E
    row = slope * step.to(tl.float32)
    if SKIP and FIXABLE:
        if fixed:
            out = _walk(q, row, top, low, high, first, k_at, v_at, C, scale, slope, D, QUERIES, KEYS, True)
        else:
            out = _walk(q, row, top, low, high, first, k_at, v_at, C, scale, slope, D, QUERIES, KEYS, False)
    else:
        out = _walk(q, row, top, low, high, first, k_at, v_at, C, scale, slope, D, QUERIES, KEYS, False)
    tl.store(out_at + at, out.to(q.dtype), mask=real[:, None])


@triton.jit(do_not_specialize=["T"])
def norm(
    x_at, residual_at, weight_at, bias_at, out_at, T, C, eps,
    ADD: tl.constexpr, ROWS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """LayerNorm of ROWS rows of x (T, C), or of x + residual with ADD; WIDE is a power of two ≥ C."""
    row, column = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, WIDE)
    inside = column < C
    real = (row < T)[:, None] & inside[None, :]
    at = row.to(tl.int64)[:, None] * C + column[None, :]
    x = tl.load(x_at + at, mask=real, other=0.0).to(tl.float32)
    if ADD:
        x += tl.load(residual_at + at, mask=real, other=0.0).to(tl.float32)
    centred = tl.where(inside[None, :], x - tl.sum(x, axis=1)[:, None] / C, 0.0)
    variance = tl.sum(centred * centred, axis=1) / C
    weight = tl.load(weight_at + column, mask=inside, other=0.0).to(tl.float32)
    bias = tl.load(bias_at + column, mask=inside, other=0.0).to(tl.float32)
    y = centred * tl.rsqrt(variance + eps)[:, None] * weight[None, :] + bias[None, :]
    tl.store(out_at + at, y.to(out_at.dtype.element_ty), mask=real)


@triton.jit
def _gelu(x):
    """x·Φ(x) with Φ by Abramowitz and Stegun 7.1.26: error below 1e-7·|x|, a third of the instructions of erf."""
    size = tl.abs(x)
    t = 1.0 / (1.0 + 0.2316418882 * size)
    tail = t * (0.127414796 + t * (-0.142248368 + t * (0.7107068705 + t * (-0.7265760135 + t * 0.5307027145))))
    return tl.maximum(x, 0.0) - size * tail * tl.exp2(x * x * (-0.5 * LOG2E))


@triton.jit(do_not_specialize=["T"])
def geglu(x_at, weight_at, out_at, T, F, C, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr):
    """One tile (ROWS, COLUMNS) of gelu(x·Gᵀ)·(x·Uᵀ); x (T, C), weight (2F, C) is G over U."""
    row, column = tl.program_id(1) * ROWS + tl.arange(0, ROWS), tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    depth = tl.arange(0, DEPTH)
    x_at += row.to(tl.int64)[:, None] * C + depth[None, :]
    weight_at += column[None, :] * C + depth[:, None]
    gate = tl.zeros((ROWS, COLUMNS), tl.float32)
    value = tl.zeros((ROWS, COLUMNS), tl.float32)
    for at in range(0, C, DEPTH):
        x = tl.load(x_at + at, mask=(row < T)[:, None], other=0.0)
        gate = tl.dot(x, tl.load(weight_at + at), gate, input_precision="ieee")
        value = tl.dot(x, tl.load(weight_at + F * C + at), value, input_precision="ieee")
    at = row.to(tl.int64)[:, None] * F + column[None, :]
    tl.store(out_at + at, (_gelu(gate) * value).to(out_at.dtype.element_ty), mask=(row < T)[:, None])
