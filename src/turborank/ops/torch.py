"""The ops in torch: differentiable, on any device.

All ops but attention work on packed rows. Attention pads groups of pairs of similar length inside the op, so that its
two batched matrix products are dense; padding keys are masked. On CUDA with Triton, attention is
FlexAttention (torch.nn.attention, compiled on first use), which does not pad.
"""

from __future__ import annotations

import functools
import importlib.util
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

_TRITON = importlib.util.find_spec("triton") is not None  # needed to compile FlexAttention

# Score elements (pairs · heads · queries · keys) computed at once; bounds memory at 8,192 tokens.
SCORE_BUDGET = 1 << 26

# Queries (B, H, b, D), keys (B, H, n, D), position of the first query -> scores (B, H, b, n) in float32.
Score = Callable[[Tensor, Tensor, int], Tensor]


def take(table: Tensor, ids: Tensor) -> Tensor:
    return F.embedding(ids, table)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return F.linear(x, weight, bias)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """LayerNorm computed in the type of ``weight``, which may be wider than x's; returns x's type."""
    return F.layer_norm(x.to(weight.dtype), (x.shape[-1],), weight, bias, eps).to(x.dtype)


def add_norm(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    return layer_norm(x.to(weight.dtype) + residual, weight, bias, eps).to(x.dtype)


def gelu(x: Tensor) -> Tensor:
    return F.gelu(x)


def tanh(x: Tensor) -> Tensor:
    return torch.tanh(x)


def geglu(x: Tensor, weight: Tensor) -> Tensor:
    y, middle = linear(x, weight), weight.shape[0] // 2
    return gelu(y[..., :middle]) * y[..., middle:]


def _groups(lengths: list[int], heads: int) -> Iterator[list[int]]:
    """Groups of pairs of similar length (at most an eighth is padding) whose scores fit SCORE_BUDGET."""
    group: list[int] = []
    for pair in sorted(range(len(lengths)), key=lambda p: -lengths[p]):
        longest = lengths[group[0]] if group else lengths[pair]
        if group and (lengths[pair] * 8 < longest * 7 or (len(group) + 1) * heads * longest**2 > SCORE_BUDGET):
            yield group
            group = []
        group.append(pair)
    if group:
        yield group


def _heads(x: Tensor, heads: int) -> Tensor:
    """(B, n, C) -> (B, H, n, D)."""
    return x.view(x.shape[0], x.shape[1], heads, -1).transpose(1, 2)


def _offsets(q: Tensor, k: Tensor, first: int) -> Tensor:
    """Distances i - j (b, n) of q (B, H, b, D), whose first row is at position ``first``, from k (B, H, n, D)."""
    queries = torch.arange(first, first + q.shape[2], device=q.device)
    return queries[:, None] - torch.arange(k.shape[2], device=q.device)[None, :]


def _softmax_sum(scores: Tensor, v: Tensor, lengths: Tensor) -> Tensor:
    """Softmax of scores (B, H, b, n) times values (B, H, n, D); keys from index ``lengths`` (B,) on are padding.

    Masked scores are finite instead of -inf: a padding row may have no real key, and its NaN would reach the gradient.
    """
    real = torch.arange(v.shape[2], device=v.device)[None, :] < lengths[:, None]
    scores = scores.masked_fill(~real[:, None, None, :], torch.finfo(scores.dtype).min)
    return torch.softmax(scores, dim=-1).to(v.dtype) @ v


def _alibi(slopes: Tensor, window: int, q: Tensor, k: Tensor, first: int) -> Tensor:
    """Scores (B, H, b, n) in float32 with ALiBi or a window; a :data:`Score` once slopes and window are bound."""
    distance = _offsets(q, k, first).abs()
    scores = (q @ k.transpose(-1, -2)).float() / math.sqrt(q.shape[-1]) - slopes[:, None, None] * distance
    return scores.masked_fill(distance > window, torch.finfo(scores.dtype).min) if window else scores


def _disentangled(pos_q: Tensor, pos_k: Tensor, rows: Sequence[int], q: Tensor, k: Tensor, first: int) -> Tensor:
    """DeBERTa's scores (B, H, b, n) in float32. Multiplies only those rows of pos_q and pos_k (H, R, D) that occur."""
    offsets, zero = _offsets(q, k, first), len(rows) // 2
    low, high = rows[zero + first - k.shape[2] + 1], rows[zero + first + q.shape[2] - 1]
    pos_q, pos_k = pos_q[:, low : high + 1], pos_k[:, low : high + 1]
    r = (torch.tensor(rows, device=q.device) - low)[zero + offsets]  # (b, n)
    scores = (q @ k.transpose(-1, -2)).float()
    c2p = (q @ pos_k.transpose(-1, -2)).float()  # (B, H, b, R)
    p2c = (k @ pos_q.transpose(-1, -2)).float()  # (B, H, n, R)
    scores = scores + c2p.gather(-1, r.expand(scores.shape))
    scores = scores + p2c.gather(-1, r.T.expand(*scores.shape[:2], *r.T.shape)).transpose(-1, -2)
    return scores / math.sqrt(3 * q.shape[-1])


def turned(x: Tensor, places: Tensor, heads: int, theta: float) -> Tensor:
    """RoPE of x (…, T, C) at positions ``places`` (T,): the same shape; angles are float32."""
    split = x.reshape(*x.shape[:-1], heads, x.shape[-1] // heads)
    half = split.shape[-1] // 2
    powers = torch.arange(half, dtype=torch.float64, device=x.device) / half
    angles = places.float()[:, None] * (1 / torch.pow(theta, powers).float())  # (T, D/2)
    cos, sin = angles.cos()[:, None], angles.sin()[:, None]
    low, high = split[..., :half].float(), split[..., half:].float()
    return torch.cat([low * cos - high * sin, high * cos + low * sin], dim=-1).to(x.dtype).reshape(x.shape)


def rotate(x: Tensor, cu_seqlens: Tensor, heads: int, theta: float) -> Tensor:
    return turned(x, positions(cu_seqlens), heads, theta)


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
    if q.is_cuda and not first_only and _TRITON:
        return packed_attention(q, k, v, cu_seqlens, heads, slopes, window)
    bias = torch.tensor(list(slopes) or [0.0] * heads, dtype=torch.float32, device=q.device)
    return _attention(q, k, v, cu_seqlens, heads, first_only, functools.partial(_alibi, bias, window), window)


def disentangled_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pos_q: Tensor,
    pos_k: Tensor,
    rows: Sequence[int],
    cu_seqlens: Tensor,
    heads: int,
    first_only: bool,
) -> Tensor:
    pos_q, pos_k = (_heads(x[None], heads)[0] for x in (pos_q, pos_k))  # (H, R, D)
    score = functools.partial(_disentangled, pos_q, pos_k, rows)
    return _attention(q, k, v, cu_seqlens, heads, first_only, score)


def _attention(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, heads: int, first_only: bool, score: Score, window: int = 0
) -> Tensor:
    """Attention over groups of pairs and blocks of queries with the given scores; ``window`` 0: over all keys."""
    bounds = cu_seqlens.tolist()
    lengths = [end - start for start, end in itertools.pairwise(bounds)]
    rows_out: list[Tensor] = []
    parts: list[Tensor] = []
    for group in _groups(lengths, heads):
        n = lengths[group[0]]
        size = torch.tensor([lengths[p] for p in group], device=q.device)
        start = torch.tensor([bounds[p] for p in group], device=q.device)
        steps = torch.arange(n, device=q.device)
        real = steps[None, :] < size[:, None]  # (B, n)
        rows = torch.where(real, start[:, None] + steps[None, :], start[:, None])  # (B, n)
        keys, values = (_heads(x[rows], heads) for x in (k, v))  # (B, H, n, D)
        if first_only:
            wanted = torch.tensor(group, device=q.device)
            queries = _heads(q[wanted][:, None], heads)  # (B, H, 1, D)
            near = slice(0, min(window + 1, n) if window else n)
            parts.append(_softmax_sum(score(queries, keys[:, :, near], 0), values[:, :, near], size).flatten(1))
            rows_out.append(wanted)
            continue
        queries = _heads(q[rows], heads)
        step = max(1, SCORE_BUDGET // (len(group) * heads * n))
        step = min(step, 2 * window) if window else step
        blocks = []
        for i in range(0, n, step):
            low, high = (max(0, i - window), min(n, i + step + window)) if window else (0, n)
            scores = score(queries[:, :, i : i + step], keys[:, :, low:high], i - low)
            blocks.append(_softmax_sum(scores, values[:, :, low:high], size - low))
        context = blocks[0] if len(blocks) == 1 else torch.cat(blocks, dim=2)
        parts.append(context.transpose(1, 2).flatten(2)[real])
        rows_out.append(rows[real])
    order = torch.cat(rows_out)
    return torch.cat(parts)[torch.argsort(order)]


def layer(function: Callable[..., Tensor], *arguments: Any) -> Tensor:
    return function(*arguments)


def positions(cu_seqlens: Tensor) -> Tensor:
    starts, lengths = cu_seqlens[:-1].long(), (cu_seqlens[1:] - cu_seqlens[:-1]).long()
    firsts = torch.repeat_interleave(starts, lengths)
    return torch.arange(firsts.shape[0], device=cu_seqlens.device) - firsts


def first_tokens(x: Tensor, cu_seqlens: Tensor) -> Tensor:
    return x[cu_seqlens[:-1].long()]


def means(x: Tensor, cu_seqlens: Tensor) -> Tensor:
    lengths = (cu_seqlens[1:] - cu_seqlens[:-1]).long()
    pair_of = torch.repeat_interleave(torch.arange(len(lengths), device=x.device), lengths)
    sums = torch.zeros(len(lengths), x.shape[1], dtype=torch.float32, device=x.device).index_add(0, pair_of, x.float())
    return (sums / lengths[:, None]).to(x.dtype)


def segment_means(x: Tensor, type_ids: Tensor, cu_seqlens: Tensor) -> tuple[Tensor, Tensor]:
    pairs = cu_seqlens.shape[0] - 1
    lengths = (cu_seqlens[1:] - cu_seqlens[:-1]).long()
    pair_of = torch.repeat_interleave(torch.arange(pairs, device=x.device), lengths)
    slot = pair_of * 2 + type_ids.long()
    sums = torch.zeros(2 * pairs, x.shape[1], dtype=torch.float32, device=x.device).index_add(0, slot, x.float())
    counts = torch.bincount(slot, minlength=2 * pairs)
    means = (sums / counts[:, None]).view(pairs, 2, -1)
    return means[:, 0], means[:, 1]


def focused_means(
    x: Tensor, query: Tensor, focus: Tensor, type_ids: Tensor, cu_seqlens: Tensor, passage: int
) -> Tensor:
    rows = torch.nonzero(type_ids == 1)[:, 0]
    lengths = (cu_seqlens[1:] - cu_seqlens[:-1]).long()
    pair_of = torch.repeat_interleave(torch.arange(len(lengths), device=x.device), lengths)[rows]
    counts = torch.bincount(pair_of, minlength=len(lengths))  # tokens of each document
    passages = (counts + passage - 1) // passage
    place = torch.arange(len(rows), device=x.device) - (counts.cumsum(0) - counts)[pair_of]
    slot = (passages.cumsum(0) - passages)[pair_of] + place // passage
    owner = torch.repeat_interleave(torch.arange(len(lengths), device=x.device), passages)  # of each passage
    sums = torch.zeros(len(owner), x.shape[1], device=x.device).index_add(0, slot, x[rows].float())
    score = focus.float() * cosine(sums, query.float()[owner])
    top = torch.full((len(lengths),), -torch.inf, device=x.device).scatter_reduce(0, owner, score.detach(), "amax")
    weight = torch.exp(score - top[owner])
    total = torch.zeros(len(lengths), x.shape[1], device=x.device).index_add(0, owner, weight[:, None] * sums)
    mass = torch.zeros(len(lengths), device=x.device).index_add(0, owner, weight * torch.bincount(slot))
    return total / mass[:, None]


def cosine(a: Tensor, b: Tensor) -> Tensor:
    return F.cosine_similarity(a, b, dim=-1, eps=1e-12)


# ---------------------------------------------------------------- FlexAttention over the whole batch, on CUDA

# Training on GPUs: the kernels of ops.triton have no backward, FlexAttention has one. The bias is computed from indices
# inside the kernel and a block mask separates the pairs, so there is no n×n tensor and no padding. The skip bound
# leaves out blocks of keys that are too far from their queries to matter:
#
#     A key at distance d from query i has the weight exp(S - slope·d) at most, where S = max|q|·max|k|/√D bounds every
#     score (Cauchy-Schwarz). A row's softmax sum is at least exp(m), where m = min over rows of q_i·k_i/√D, the score
#     at distance 0. All keys at distances ≥ r, on both sides, have at most the weight 2·exp(S - slope·r)/(1 -
#     exp(-slope)). That is ≤ eps times the softmax sum for every r ≥ (S - m + ln(2/(eps·(1 - exp(-slope)))))/slope.
#
# The bound holds for any weights. The reach r of each head is computed for each layer and batch.
FLEX_BLOCK = 128
FLEX_EPS = 1e-6  # largest share of a row's softmax sum that skipped blocks may have


@functools.cache
def _compiled() -> Callable[..., Any]:
    """The fused kernel, compiled once for all numbers of tokens."""
    from torch.nn.attention.flex_attention import flex_attention

    compiled: Callable[..., Any] = torch.compile(flex_attention, dynamic=True)
    return compiled


def reach(q: Tensor, k: Tensor, slopes: Tensor, eps: float = FLEX_EPS) -> Tensor:
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
    from torch.nn.attention.flex_attention import BlockMask

    tokens, device = int(cu_seqlens[-1]), reaches.device
    pair_of = torch.bucketize(torch.arange(tokens, device=device), cu_seqlens[1:], right=True)  # (T,)
    starts = torch.arange(0, tokens, FLEX_BLOCK, device=device)
    first, last = pair_of[starts], pair_of[(starts + FLEX_BLOCK - 1).clamp(max=tokens - 1)]
    shared = (first[:, None] <= last[None, :]) & (first[None, :] <= last[:, None])
    single = (first == last) & (starts + FLEX_BLOCK <= tokens)
    whole = shared & single[:, None] & single[None, :]
    blocks = torch.arange(starts.shape[0], device=device)
    nearest = ((blocks[:, None] - blocks[None, :]).abs() - 1).clamp(min=0) * FLEX_BLOCK + 1
    near = torch.where(blocks[:, None] == blocks[None, :], 0, nearest) < reaches[:, None, None]
    if window:
        whole = whole & (((blocks[:, None] - blocks[None, :]).abs() + 1) * FLEX_BLOCK <= window)

    def same_pair(_batch: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return pair_of[query] == pair_of[key]

    def same_window(_batch: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (pair_of[query] == pair_of[key]) & ((query - key).abs() <= window)

    partial, full = (_table((shared & ~whole) & near), _table(whole & near))
    return BlockMask.from_kv_blocks(
        *partial,
        *full,
        BLOCK_SIZE=FLEX_BLOCK,
        mask_mod=same_window if window else same_pair,
        seq_lengths=(tokens, tokens),
        compute_q_blocks=backward,
    )


def _table(visit: Tensor) -> tuple[Tensor, Tensor]:
    """Booleans (H, Q, K) as counts (1, H, Q) and key-block indices (1, H, Q, K), blocks to visit first."""
    counts = visit.sum(dim=-1, dtype=torch.int32)
    indices = torch.argsort(visit.to(torch.int8), dim=-1, descending=True, stable=True).to(torch.int32)
    return counts[None], indices[None]


def packed_attention(
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
