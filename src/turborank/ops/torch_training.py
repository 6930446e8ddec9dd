"""``ops.torch`` for training on a CPU: attention over views of the packed rows, with a backward of its own.

:func:`turborank.ops.torch.attention` pads groups of pairs, and autograd makes a full-size gradient for every gather; on
two cores this was half of a training step. Here each pair is a view of the packed rows, the ALiBi bias initialises the
score product, probabilities are kept for the backward, and each row's gradient is written once. Other devices and
windowed or first-token attention use :mod:`turborank.ops.torch`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise
from types import SimpleNamespace
from typing import Any, cast

import torch
from torch import Tensor

from turborank.ops import Ops
from turborank.ops import torch as torch_ops
from turborank.ops.torch import (
    add_norm,
    cosine,
    disentangled_attention,
    first_tokens,
    focused_means,
    geglu,
    gelu,
    layer,
    layer_norm,
    linear,
    means,
    positions,
    rotate,
    segment_means,
    take,
    tanh,
)

__all__ = [  # all of turborank.ops.Ops: a forward calls every op on this module
    "add_norm",
    "attention",
    "cosine",
    "disentangled_attention",
    "first_tokens",
    "focused_means",
    "geglu",
    "gelu",
    "layer",
    "layer_norm",
    "linear",
    "means",
    "positions",
    "rotate",
    "segment_means",
    "take",
    "tanh",
]

QUERY_BLOCK = 1024  # queries of a pair computed at a time; bounds the score memory of long documents
CACHED_LENGTH = 320  # tokens of a pair up to which bias tables are cached

Kept = tuple[int, int, int, int, Tensor, Tensor, Tensor, Tensor]


@lru_cache(maxsize=512)
def _table(slopes: tuple[float, ...], n: int, dtype: torch.dtype) -> Tensor:
    return _bias(slopes, 0, n, n, dtype)


def _bias(slopes: tuple[float, ...], first: int, rows: int, n: int, dtype: torch.dtype) -> Tensor:
    """-slope·|i-j| for queries i = first … first+rows-1: (H, rows, n)."""
    distance = (torch.arange(first, first + rows)[:, None] - torch.arange(n)[None, :]).abs()
    return (-torch.tensor(slopes)[:, None, None] * distance).to(dtype)


def _heads(x: Tensor, heads: int) -> Tensor:
    """(n, C) -> (H, n, D), a view."""
    return x.view(x.shape[0], heads, -1).transpose(0, 1)


def _probabilities(queries: Tensor, keys: Tensor, slopes: tuple[float, ...], first: int) -> Tensor:
    """Attention probabilities (H, b, n) of scaled queries (H, b, D) and keys (H, n, D)."""
    rows, n = queries.shape[1], keys.shape[1]
    if not any(slopes):
        scores = queries @ keys.transpose(1, 2)
    else:
        short = n <= CACHED_LENGTH and first == 0 and rows == n
        bias = _table(slopes, n, queries.dtype) if short else _bias(slopes, first, rows, n, queries.dtype)
        scores = torch.baddbmm(bias, queries, keys.transpose(1, 2))
    return torch.softmax(scores, dim=-1)


def _forward(
    q: Tensor, k: Tensor, v: Tensor, bounds: Sequence[int], slopes: tuple[float, ...], kept: list[Kept] | None
) -> Tensor:
    heads = len(slopes)
    scale = 1 / math.sqrt(q.shape[1] // heads)
    out = torch.empty_like(q)
    for start, end in pairwise(bounds):
        keys, values = _heads(k[start:end], heads).contiguous(), _heads(v[start:end], heads).contiguous()
        for first in range(start, end, QUERY_BLOCK):
            last = min(first + QUERY_BLOCK, end)
            queries = _heads(q[first:last], heads) * scale
            p = _probabilities(queries, keys, slopes, first - start)
            _heads(out[first:last], heads).copy_(p @ values)
            if kept is not None:
                kept.append((start, end, first, last, p, queries, keys, values))
    return out


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, bounds: list[int], slopes: tuple[float, ...]) -> Tensor:
        ctx.kept, ctx.scale, ctx.heads = [], 1 / math.sqrt(q.shape[1] // len(slopes)), len(slopes)
        return _forward(q, k, v, bounds, slopes, ctx.kept)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = gradients
        dq, dk, dv = torch.empty_like(grad), torch.empty_like(grad), torch.empty_like(grad)
        for start, end, first, last, p, queries, keys, values in ctx.kept:
            do = _heads(grad[first:last], ctx.heads).contiguous()
            ds = torch._softmax_backward_data(do @ values.transpose(1, 2), p, -1, p.dtype)
            _heads(dq[first:last], ctx.heads).copy_((ds @ keys).mul_(ctx.scale))
            for gradient, part in ((dk, ds.transpose(1, 2) @ queries), (dv, p.transpose(1, 2) @ do)):
                rows = _heads(gradient[start:end], ctx.heads)
                if first == start:
                    rows.copy_(part)
                else:
                    rows.add_(part)
        return dq, dk, dv, None, None


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    heads: int,
    slopes: Sequence[float],
    first_only: bool,
    window: int = 0,
) -> Tensor:
    if first_only or window or q.device.type != "cpu":
        return torch_ops.attention(q, k, v, cu_seqlens, heads, slopes, first_only, window)
    bounds = cu_seqlens.tolist()
    table = tuple(slopes) or (0.0,) * heads
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        apply: Any = _Attention.apply
        return cast(Tensor, apply(q, k, v, bounds, table))
    return _forward(q, k, v, bounds, table, None)


def special(*, recompute: bool = False, record: list[tuple[Tensor, ...]] | None = None) -> Ops:
    """These ops with options for one training step.

    ``recompute``: keep only the input of each layer and recompute the layer in the backward (arXiv 1604.06174).
    ``record``: a list to which each layer's queries, keys and values are appended.
    """
    ops: Any = SimpleNamespace(**{name: globals()[name] for name in __all__})
    if recompute:
        ops.layer = _recomputed
    if record is not None:

        def recorded(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> Tensor:
            record.append((q, k, v))
            return attention(q, k, v, *rest)

        ops.attention = recorded
    return cast(Ops, ops)


def _recomputed(function: Any, *arguments: Any) -> Tensor:
    from torch.utils.checkpoint import checkpoint

    out: Tensor = checkpoint(function, *arguments, use_reentrant=False)
    return out
