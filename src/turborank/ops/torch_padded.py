"""The ops in torch over padded batches, for export to graphs that take padded batches (ONNX).

The forward receives (P, N, C) in place of packed rows (T, C), and the attention mask (P, N), 1 at real tokens, in place
of ``cu_seqlens``. Pairs are padded on the right. Batch sizes enter only through operations that a graph can express,
and attention biases are computed from positions, so the graph has dynamic sizes and no N×N constant.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from turborank.ops import torch as torch_ops

take, linear, gelu, geglu, tanh, layer, cosine = (
    torch_ops.take, torch_ops.linear, torch_ops.gelu, torch_ops.geglu, torch_ops.tanh, torch_ops.layer,
    torch_ops.cosine,
)  # fmt: skip
layer_norm, add_norm = torch_ops.layer_norm, torch_ops.add_norm


def positions(mask: Tensor) -> Tensor:
    """Position of each token in its pair, from 0: (P, N) -> (N,), which broadcasts."""
    return torch.arange(mask.shape[1], device=mask.device)


def first_tokens(x: Tensor, mask: Tensor) -> Tensor:
    return x[:, 0]


def rotate(x: Tensor, mask: Tensor, heads: int, theta: float) -> Tensor:
    return torch_ops.turned(x, positions(mask), heads, theta)


def means(x: Tensor, mask: Tensor) -> Tensor:
    real = (mask > 0).to(x.dtype)[..., None]  # (P, N, 1)
    return (x * real).sum(dim=1) / real.sum(dim=1)


def segment_means(x: Tensor, type_ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    means = []
    for segment in (0, 1):
        chosen = ((type_ids == segment) & (mask > 0)).to(x.dtype)[..., None]  # (P, N, 1)
        means.append((x * chosen).sum(dim=1) / chosen.sum(dim=1))
    return means[0], means[1]


def focused_means(x: Tensor, query: Tensor, focus: Tensor, type_ids: Tensor, mask: Tensor, passage: int) -> Tensor:
    chosen = (type_ids == 1) & (mask > 0)  # (P, N)
    slot = (chosen.long().cumsum(dim=1) - 1) // passage  # the passage of each document token
    slots = torch.arange((x.shape[1] + passage - 1) // passage, device=x.device)  # S passages, some empty
    members = ((slot[:, None, :] == slots[:, None]) & chosen[:, None, :]).to(x.dtype)  # (P, S, N)
    sums, lengths = members @ x, members.sum(dim=2)  # (P, S, C), (P, S)
    score = focus * cosine(sums, query[:, None])
    score = score.masked_fill(lengths == 0, torch.finfo(score.dtype).min)
    weight = torch.exp(score - score.amax(dim=1, keepdim=True))
    return (weight[..., None] * sums).sum(dim=1) / (weight * lengths).sum(dim=1, keepdim=True)


def _heads(x: Tensor, heads: int) -> Tensor:
    """(…, n, C) -> (…, H, n, D)."""
    return x.reshape(*x.shape[:-1], heads, x.shape[-1] // heads).transpose(-3, -2)


def _distances(asked: Tensor, k: Tensor) -> Tensor:
    """Distances i - j (m, n) of the first m tokens, the queries (P, H, m, D), from keys (P, H, n, D)."""
    return torch.arange(asked.shape[2], device=k.device)[:, None] - torch.arange(k.shape[2], device=k.device)[None, :]


def _weigh(scores: Tensor, v: Tensor, mask: Tensor, first_only: bool) -> Tensor:
    """Softmax of scores (P, H, m, n) over real keys, times values (P, H, n, D): (P, m, C), or (P, C)."""
    scores = scores.masked_fill(mask[:, None, None, :] == 0, torch.finfo(scores.dtype).min)
    context = (torch.softmax(scores, dim=-1) @ v).transpose(1, 2).flatten(2)
    return context[:, 0] if first_only else context


def _asked(q: Tensor, heads: int, first_only: bool) -> Tensor:
    """Queries (P, N, C), or (P, C) when ``first_only``, by heads: (P, H, m, D)."""
    return _heads(q[:, None] if first_only else q, heads)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor,
    heads: int,
    slopes: Sequence[float],
    first_only: bool,
    window: int = 0,
) -> Tensor:
    asked, keys, values = _asked(q, heads, first_only), _heads(k, heads), _heads(v, heads)
    scores = asked @ keys.transpose(-1, -2) / math.sqrt(asked.shape[-1])
    if len(slopes):
        bias = torch.tensor(list(slopes), dtype=scores.dtype, device=scores.device)[:, None, None]
        scores = scores - bias * _distances(asked, keys).abs()
    if window:
        scores = scores.masked_fill(_distances(asked, keys).abs() > window, torch.finfo(scores.dtype).min)
    return _weigh(scores, values, mask, first_only)


def disentangled_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pos_q: Tensor,
    pos_k: Tensor,
    rows: Sequence[int],
    mask: Tensor,
    heads: int,
    first_only: bool,
) -> Tensor:
    asked, keys, values = _asked(q, heads, first_only), _heads(k, heads), _heads(v, heads)
    r = torch.tensor(list(rows), device=q.device)[len(rows) // 2 + _distances(asked, keys)]  # (m, n)
    scores = asked @ keys.transpose(-1, -2)
    c2p = asked @ _heads(pos_k, heads).transpose(-1, -2)  # (P, H, m, R)
    p2c = keys @ _heads(pos_q, heads).transpose(-1, -2)  # (P, H, n, R)
    scores = scores + c2p.gather(-1, r.expand(scores.shape))
    scores = scores + p2c.gather(-1, r.T.expand(*scores.shape[:2], *r.T.shape)).transpose(-1, -2)
    return _weigh(scores / math.sqrt(3 * asked.shape[-1]), values, mask, first_only)
