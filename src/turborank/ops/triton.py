"""The ops in Triton kernels, for inference on GPUs (docs/gpu.md): no padding, no n×n tensors.

The forward receives a :class:`Layout` in place of ``cu_seqlens``. Ops that are not defined here are those of
:mod:`turborank.ops.torch`. Training on GPUs uses :mod:`turborank.ops.torch_flex`.

**Attention** is FlashAttention-2 (arXiv 2307.08691) over packed pairs. A program takes 64 queries of one pair and one
head and iterates over the pair's keys in tiles. Scores and probabilities stay in registers; the ALiBi bias is computed
from positions. In long pairs the skip bound limits the keys that are read. For query i, in natural logarithms:

    A key at distance d has at most the weight exp(S_i - slope·d), where S_i = |q_i|·max|k|/√D over the pair's keys
    (Cauchy-Schwarz). The row's softmax sum is at least exp(o_i), where o_i = q_i·k_i/√D is its score at distance 0.
    All keys at distances ≥ r, on both sides, have at most the weight 2·exp(S_i - slope·r)/(1 - exp(-slope)), which is
    ≤ eps times the softmax sum for every r ≥ r_i = (S_i - o_i + ln 2/(eps·(1 - exp(-slope))))/slope.

The bound holds for any weights. The program reads the keys within the largest r_i of its queries. If S_i - o_i is
small (``triton_kernels.FIXED_RANGE``), o_i is subtracted in the softmax in place of a running maximum, which saves the
rescaling.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
import triton
from torch import Tensor

from turborank.ops import torch as torch_ops
from turborank.ops import triton_kernels
from turborank.types import Int32, ModelConfig

take, linear, gelu, tanh, layer, cosine = (
    torch_ops.take, torch_ops.linear, torch_ops.gelu, torch_ops.tanh, torch_ops.layer, torch_ops.cosine,
)  # fmt: skip

QUERIES, KEYS = 64, 64  # queries and keys of a tile of attention
GEGLU_TILE = {"ROWS": 128, "COLUMNS": 128, "DEPTH": 64, "num_warps": 8, "num_stages": 3}
NORM_ROWS = 4
SKIP_FROM = 512  # tokens of a pair above which the skip bound saves more than it costs
USUAL = 8192  # tokens of a pair up to which the same compiled kernel is used; longer pairs compile another
EPS = 1e-6  # largest share of a row's softmax sum that skipped keys may have


def supports(config: ModelConfig) -> bool:
    """Whether the kernels' tiles fit the model's sizes; they fit those of the published families without a window."""
    if config.half_window:  # RoPE and windows are not implemented here; ops.torch uses FlexAttention for them
        return False
    fits = config.head_size >= 16 and config.head_size & (config.head_size - 1) == 0
    if config.feed_forward == "geglu":
        wide, deep = config.intermediate_size, config.hidden_size
        fits = fits and wide % GEGLU_TILE["COLUMNS"] == 0 and deep % GEGLU_TILE["DEPTH"] == 0
    return fits


class Layout(NamedTuple):
    """Device tables of the pairs of a packed batch. Takes the place of ``cu_seqlens`` in every op of this module."""

    cu_seqlens: Tensor  # (P+1,) int32
    positions: Tensor  # (T,) int32: position of each token in its pair
    blocks: Tensor  # (B, 4) int32: first token, start and end of its pair, number of the pair's first block
    firsts: Tensor  # (P, 4) int32: the row of ``blocks`` for each pair's first block
    max_seqlen: int


def tables(cu_seqlens: Int32) -> list[Int32]:
    """The four tables of a Layout, in order, as numpy arrays."""
    starts, ends = cu_seqlens[:-1], cu_seqlens[1:]
    positions = np.arange(cu_seqlens[-1]) - np.repeat(starts, ends - starts)
    counts = (ends - starts + QUERIES - 1) // QUERIES
    first_block = np.cumsum(counts) - counts
    pair = np.repeat(np.arange(len(starts)), counts)  # pair of each block
    at = starts[pair] + (np.arange(len(pair)) - first_block[pair]) * QUERIES
    blocks = np.stack([at, starts[pair], ends[pair], first_block[pair]], axis=1)
    firsts = np.stack([starts, starts, ends, first_block], axis=1)
    return [table.astype(np.int32) for table in (cu_seqlens, positions, blocks, firsts)]


@functools.cache  # without a limit, because captured graphs keep reading these tensors
def _heads(slopes: tuple[float, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """Heads by rising slope, which is falling reach, (H,) int32; and for each its slope and bound term, (H, 2)."""
    tails = [math.log(2 / EPS) - math.log(-math.expm1(-slope)) if slope > 0 else math.inf for slope in slopes]
    order = sorted(range(len(slopes)), key=lambda head: slopes[head])
    table = torch.tensor(list(zip(slopes, tails, strict=True)), dtype=torch.float32, device=device)
    return torch.tensor(order, dtype=torch.int32, device=device), table


def attention(
    q: Tensor, k: Tensor, v: Tensor, where: Layout, heads: int, slopes: Sequence[float], first_only: bool
) -> Tensor:
    out, width = torch.empty_like(q), k.shape[1]
    order, table = _heads(tuple(slopes) or (0.0,) * heads, q.device)
    blocks = where.firsts if first_only else where.blocks
    skip = where.max_seqlen > SKIP_FROM and any(slopes)
    norms = torch.empty((where.blocks.shape[0], heads) if skip else 0, dtype=torch.float32, device=q.device)
    if skip:
        triton_kernels.key_norms[norms.shape](k, norms, where.blocks, width, D=width // heads, BLOCK=QUERIES)
    triton_kernels.attend[(blocks.shape[0], heads)](
        q, k, v, out, blocks, norms, order, table, width, 1 / math.sqrt(width // heads),
        D=width // heads, QUERIES=16 if first_only else QUERIES, KEYS=KEYS, BLOCK=QUERIES, FIRST=first_only, SKIP=skip,
        FIXABLE=q.dtype != torch.float16,
        SPAN=triton.next_power_of_2(triton.cdiv(max(where.max_seqlen, USUAL), QUERIES)),
    )  # fmt: skip
    return out


def add_norm(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    return _norm(x, residual, weight, bias, eps, add=True)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    return _norm(x, x, weight, bias, eps, add=False)


def _norm(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float, *, add: bool) -> Tensor:
    out, (rows, width) = torch.empty_like(x), x.shape
    triton_kernels.norm[(triton.cdiv(rows, NORM_ROWS),)](
        x, residual, weight, bias, out, rows, width, eps, ADD=add, ROWS=NORM_ROWS, WIDE=triton.next_power_of_2(width)
    )
    return out


def geglu(x: Tensor, weight: Tensor) -> Tensor:
    (tokens, depth), width = x.shape, weight.shape[0] // 2
    out = torch.empty((tokens, width), dtype=x.dtype, device=x.device)
    grid = width // GEGLU_TILE["COLUMNS"], triton.cdiv(tokens, GEGLU_TILE["ROWS"])
    triton_kernels.geglu[grid](x, weight, out, tokens, width, depth, **GEGLU_TILE)
    return out


def positions(where: Layout) -> Tensor:
    return where.positions


def first_tokens(x: Tensor, where: Layout) -> Tensor:
    return torch_ops.take(x, where.firsts[:, 0])


def segment_means(x: Tensor, type_ids: Tensor, where: Layout) -> tuple[Tensor, Tensor]:
    return torch_ops.segment_means(x, type_ids, where.cu_seqlens)


def focused_means(x: Tensor, query: Tensor, focus: Tensor, type_ids: Tensor, where: Layout, passage: int) -> Tensor:
    return torch_ops.focused_means(x, query, focus, type_ids, where.cu_seqlens, passage)


def disentangled_attention(
    q: Tensor, k: Tensor, v: Tensor, pos_q: Tensor, pos_k: Tensor, rows: Sequence[int], where: Layout, heads: int,
    first_only: bool,
) -> Tensor:  # fmt: skip
    return torch_ops.disentangled_attention(q, k, v, pos_q, pos_k, rows, where.cu_seqlens, heads, first_only)
