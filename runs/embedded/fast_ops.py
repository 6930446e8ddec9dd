"""``turborank.ops.pytorch`` with an attention made for training on a CPU: no padding, no gathers, its own backward.

``ops.pytorch.attention`` pads groups of pairs, and autograd answers every gather with a full-size gradient; on two
cores that was half of a training step. Here each pair is a view of the packed rows, scores are computed with the
ALiBi bias as the start value of the product, and the backward writes every row's gradient once.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from turborank.ops.pytorch import (  # noqa: F401  the forward asks this module for all of its ops
    cosine,
    first_tokens,
    gelu,
    halves,
    layer_norm,
    linear,
    segment_means,
    take,
    tanh,
)

QUERY_BLOCK = 1024  # queries of a pair attended at once: bounds the scores of long documents


@lru_cache(maxsize=512)
def _bias(slopes: tuple[float, ...], n: int, dtype: torch.dtype) -> Tensor:
    """-slope·|i-j|: (H, n, n)."""
    steps = torch.arange(n)
    distance = (steps[:, None] - steps[None, :]).abs()
    return (-torch.tensor(slopes)[:, None, None] * distance).to(dtype)


def _block_bias(slopes: tuple[float, ...], first: int, rows: int, n: int, dtype: torch.dtype) -> Tensor:
    if n <= 288:
        return _bias(slopes, n, dtype)[:, first : first + rows]
    distance = (torch.arange(first, first + rows)[:, None] - torch.arange(n)[None, :]).abs()
    return (-torch.tensor(slopes)[:, None, None] * distance).to(dtype)


def _heads(x: Tensor, heads: int) -> Tensor:
    """(n, C) -> (H, n, D), a view."""
    return x.unflatten(-1, (heads, -1)).transpose(0, 1)


class _Attention(torch.autograd.Function):
    """Softmax attention over each pair; probabilities and head-major q, k, v are kept for the backward."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, bounds: list[int], slopes: tuple[float, ...]) -> Tensor:
        heads = len(slopes)
        scale = 1 / math.sqrt(q.shape[1] // heads)
        out = torch.empty_like(q)
        kept: list[tuple[int, int, int, int, Tensor, Tensor, Tensor, Tensor]] = []
        for start, end in pairwise(bounds):
            keys, values = _heads(k[start:end], heads).contiguous(), _heads(v[start:end], heads).contiguous()
            for first in range(start, end, QUERY_BLOCK):
                last = min(first + QUERY_BLOCK, end)
                bias = _block_bias(slopes, first - start, last - first, end - start, q.dtype)
                queries = _heads(q[first:last], heads).contiguous().mul_(scale)
                p = torch.softmax(torch.baddbmm(bias, queries, keys.transpose(1, 2)), dim=-1)
                _heads(out[first:last], heads).copy_(p @ values)
                if ctx is not None:
                    kept.append((start, end, first, last, p, queries, keys, values))
        if ctx is not None:
            ctx.kept, ctx.scale, ctx.heads = kept, scale, heads
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        heads, scale = ctx.heads, ctx.scale
        dq, dk, dv = torch.empty_like(grad), torch.empty_like(grad), torch.empty_like(grad)
        for start, end, first, last, p, queries, keys, values in ctx.kept:
            do = _heads(grad[first:last], heads).contiguous()
            ds = torch._softmax_backward_data(do @ values.transpose(1, 2), p, -1, p.dtype)
            _heads(dq[first:last], heads).copy_((ds @ keys).mul_(scale))
            for gradient, part in ((dk, ds.transpose(1, 2) @ queries), (dv, p.transpose(1, 2) @ do)):
                rows = _heads(gradient[start:end], heads)
                if first == start:
                    rows.copy_(part)
                else:
                    rows.add_(part)
        return dq, dk, dv, None, None


def attention(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, heads: int, slopes: Sequence[float], first_only: bool
) -> Tensor:
    if first_only:
        raise NotImplementedError("expected first_only=False, got True; the cosine head needs every token")
    bounds = cu_seqlens.tolist()
    table = tuple(slopes) or (0.0,) * heads
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        out: Tensor = _Attention.apply(q, k, v, bounds, table)
        return out
    return _Attention.forward(None, q, k, v, bounds, table)
