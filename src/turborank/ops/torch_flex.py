"""Packed ALiBi and windowed attention for training on GPUs: FlexAttention (torch.nn.attention) over the whole batch.

Inference uses the kernels of :mod:`turborank.ops.triton`; FlexAttention also has a backward.

The bias is computed from indices inside the kernel and a block mask separates the pairs, so there is no n×n tensor and
no padding. The skip bound leaves out blocks of keys that are too far from their queries to matter:

    A key at distance d from query i has the weight exp(S - slope·d) at most, where S = max|q|·max|k|/√D bounds every
    score (Cauchy-Schwarz). A row's softmax sum is at least exp(m), where m = min over rows of q_i·k_i/√D, the score at
    distance 0. All keys at distances ≥ r, on both sides, have at most the weight 2·exp(S - slope·r)/(1 - exp(-slope)).
    That is ≤ eps times the softmax sum for every r ≥ (S - m + ln(2/(eps·(1 - exp(-slope)))))/slope.

The bound holds for any weights. The reach r of each head is computed for each layer and batch.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

BLOCK = 128
EPS = 1e-6  # largest share of a row's softmax sum that skipped blocks may have


@functools.cache
def _compiled() -> Callable[..., Any]:
    """The fused kernel, compiled once for all numbers of tokens."""
    compiled: Callable[..., Any] = torch.compile(flex_attention, dynamic=True)
    return compiled


def reach(q: Tensor, k: Tensor, slopes: Tensor, eps: float = EPS) -> Tensor:
    """Distance (H,) from which keys have at most ``eps`` of any row's softmax sum; q, k (H, T, D), slopes (H,)."""
    q, k, root = q.float(), k.float(), math.sqrt(q.shape[-1])
    bound = q.norm(dim=-1).amax(dim=-1) * k.norm(dim=-1).amax(dim=-1) / root  # (H,)
    own = (q * k).sum(dim=-1).amin(dim=-1) / root
    tail = math.log(2 / eps) - torch.log(-torch.expm1(-slopes))
    return torch.where(slopes > 0, (bound - own + tail) / slopes, torch.inf)


def block_mask(cu_seqlens: Tensor, reaches: Tensor, *, window: int = 0, backward: bool = False) -> BlockMask:
    """Block mask (H, T/128, T/128): the blocks that share a pair and are within the head's reach (H,).

    With ``window`` > 0, keys at a larger distance are masked inside the visited blocks as well.
    """
    tokens, device = int(cu_seqlens[-1]), reaches.device
    pair_of = torch.bucketize(torch.arange(tokens, device=device), cu_seqlens[1:], right=True)  # (T,)
    starts = torch.arange(0, tokens, BLOCK, device=device)
    first, last = pair_of[starts], pair_of[(starts + BLOCK - 1).clamp(max=tokens - 1)]
    shared = (first[:, None] <= last[None, :]) & (first[None, :] <= last[:, None])
    single = (first == last) & (starts + BLOCK <= tokens)
    whole = shared & single[:, None] & single[None, :]
    blocks = torch.arange(starts.shape[0], device=device)
    nearest = ((blocks[:, None] - blocks[None, :]).abs() - 1).clamp(min=0) * BLOCK + 1
    near = torch.where(blocks[:, None] == blocks[None, :], 0, nearest) < reaches[:, None, None]
    if window:
        whole = whole & (((blocks[:, None] - blocks[None, :]).abs() + 1) * BLOCK <= window)

    def same_pair(_batch: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return pair_of[query] == pair_of[key]

    def same_window(_batch: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (pair_of[query] == pair_of[key]) & ((query - key).abs() <= window)

    partial, full = (_table((shared & ~whole) & near), _table(whole & near))
    return BlockMask.from_kv_blocks(
        *partial,
        *full,
        BLOCK_SIZE=BLOCK,
        mask_mod=same_window if window else same_pair,
        seq_lengths=(tokens, tokens),
        compute_q_blocks=backward,
    )


def _table(visit: Tensor) -> tuple[Tensor, Tensor]:
    """Booleans (H, Q, K) as counts (1, H, Q) and key-block indices (1, H, Q, K), blocks to visit first."""
    counts = visit.sum(dim=-1, dtype=torch.int32)
    indices = torch.argsort(visit.to(torch.int8), dim=-1, descending=True, stable=True).to(torch.int32)
    return counts[None], indices[None]


def attention(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, heads: int, slopes: Sequence[float], window: int = 0
) -> Tensor:
    """Softmax attention inside each pair with symmetric ALiBi or a window; q, k, v and the result are (T, C)."""
    split = [x.view(x.shape[0], heads, -1).transpose(0, 1) for x in (q, k, v)]  # 3 × (H, T, D)
    bias = torch.tensor(list(slopes) or [0.0] * heads, dtype=torch.float32, device=q.device)

    def alibi(score: Tensor, _batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return score - bias[head] * (query - key).abs()

    with torch.no_grad():
        reaches = torch.full_like(bias, window + 1) if window else reach(split[0], split[1], bias)
        mask = block_mask(cu_seqlens, reaches, window=window, backward=torch.is_grad_enabled())
    out: Tensor = _compiled()(*(x[None].contiguous() for x in split), score_mod=alibi, block_mask=mask)
    return out[0].transpose(0, 1).reshape(q.shape)
