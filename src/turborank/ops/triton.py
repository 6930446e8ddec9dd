"""The ops in Triton kernels, for inference on GPUs (docs/gpu.md): no padding, no n×n tensors.

The forward receives a :class:`RowLayout` in place of ``cu_seqlens``. Ops that are not defined here are those of
:mod:`turborank.ops.torch`. Training on GPUs uses FlexAttention there.

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

:class:`GraphRunner` runs a forward over these ops, captured as a CUDA graph for each batch size that occurs twice.
"""

from __future__ import annotations

import functools
import itertools
import math
import threading
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import triton
from torch import Tensor

from turborank.ops import torch as torch_ops
from turborank.ops import triton_kernels
from turborank.types import Float32, Int32, ModelConfig, PackedBatch

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


class RowLayout(NamedTuple):
    """Device tables of the pairs of a packed batch. Takes the place of ``cu_seqlens`` in every op of this module."""

    cu_seqlens: Tensor  # (P+1,) int32
    positions: Tensor  # (T,) int32: position of each token in its pair
    blocks: Tensor  # (B, 4) int32: first token, start and end of its pair, number of the pair's first block
    firsts: Tensor  # (P, 4) int32: the row of ``blocks`` for each pair's first block
    max_seqlen: int


def tables(cu_seqlens: Int32) -> list[Int32]:
    """The four tables of a RowLayout, in order, as numpy arrays."""
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
    q: Tensor, k: Tensor, v: Tensor, where: RowLayout, heads: int, slopes: Sequence[float], first_only: bool
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


def positions(where: RowLayout) -> Tensor:
    return where.positions


def first_tokens(x: Tensor, where: RowLayout) -> Tensor:
    return torch_ops.take(x, where.firsts[:, 0])


def segment_means(x: Tensor, type_ids: Tensor, where: RowLayout) -> tuple[Tensor, Tensor]:
    return torch_ops.segment_means(x, type_ids, where.cu_seqlens)


def focused_means(x: Tensor, query: Tensor, focus: Tensor, type_ids: Tensor, where: RowLayout, passage: int) -> Tensor:
    return torch_ops.focused_means(x, query, focus, type_ids, where.cu_seqlens, passage)


def disentangled_attention(
    q: Tensor, k: Tensor, v: Tensor, pos_q: Tensor, pos_k: Tensor, rows: Sequence[int], where: RowLayout, heads: int,
    first_only: bool,
) -> Tensor:  # fmt: skip
    return torch_ops.disentangled_attention(q, k, v, pos_q, pos_k, rows, where.cu_seqlens, heads, first_only)


# ---------------------------------------------------------------- CUDA graphs

# A forward launches some eighty kernels of 10 to 100 µs each; launching them one by one from Python takes longer than
# running them. A graph launches them at once but has fixed shapes. Batches are therefore padded to one of a few sizes
# (at most a sixteenth more tokens) with unused tokens and empty pairs. No op of a classifier mixes rows of different
# pairs, so padding does not change the logits of the real pairs (docs/gpu.md).
MAX_GRAPH_TOKENS = 32_768  # largest batch to capture: above, the kernels take longer than Python takes to launch them
MAX_GRAPHS = 256  # sizes with a graph; batches of further sizes run kernel by kernel, which costs less than recapturing
MIN_TOKENS, MIN_PAIRS = 256, 8

Forward = Callable[[PackedBatch], Tensor]  # a batch on the device, with a RowLayout for its cu_seqlens -> logits (P,)


def rounded(tokens: int, pairs: int, longest: int) -> tuple[int, int, int]:
    """The padded size of a batch: tokens, pairs, and the pair length that selects the attention kernel."""
    step = max(MIN_TOKENS, 1 << max(0, tokens.bit_length() - 5))
    some = max(MIN_PAIRS, 1 << (pairs - 1).bit_length())
    usual = SKIP_FROM if longest <= SKIP_FROM else max(USUAL, 1 << (longest - 1).bit_length())
    return -(-tokens // step) * step, some, usual


class Size:
    """Input buffers for batches of one size, on host and device, and the graph that reads them."""

    def __init__(self, tokens: int, pairs: int, longest: int, device: torch.device) -> None:
        blocks = tokens // QUERIES + pairs  # upper bound for batches of this size
        shapes = (tokens,), (tokens,), (pairs + 1,), (tokens,), (blocks, 4), (pairs, 4)
        counts = [int(np.prod(shape)) for shape in shapes]
        starts = [0, *itertools.accumulate(-(-count // 4) * 4 for count in counts)]  # aligned to 16 bytes
        self.host = torch.zeros(starts[-1], dtype=torch.int32, pin_memory=device.type == "cuda")
        self.moved = torch.zeros(starts[-1], dtype=torch.int32, device=device)
        self.parts = [self.host.numpy()[s : s + n] for s, n in zip(starts, counts, strict=False)]
        views: list[Any] = [
            self.moved[s : s + n].view(shape) for s, n, shape in zip(starts, counts, shapes, strict=False)
        ]
        ids, types, cu_seqlens, positions, blocks, firsts = views
        where: Any = RowLayout(cu_seqlens, positions, blocks, firsts, longest)
        self.batch = PackedBatch(ids, types, where, longest)  # on the device
        self.graph: torch.cuda.CUDAGraph | None = None
        self.logits: Tensor | None = None

    def fill(self, arrays: list[Int32]) -> None:
        """Copy a batch's arrays to the device, padded with zeros, which mean an empty pair at token 0."""
        for part, array in zip(self.parts, arrays, strict=True):
            part[: array.size] = array.reshape(-1)
            part[array.size :] = 0
        self.moved.copy_(self.host, non_blocking=True)


class GraphRunner:
    """Runs the forward on batches, with a CUDA graph where one has been captured. Thread-safe: calls are serialised.

    ``fill``: pad batches to common sizes and capture graphs. Otherwise every batch runs unpadded, kernel by kernel.
    """

    def __init__(self, forward: Forward, device: torch.device, *, fill: bool) -> None:
        self.forward, self.device, self.fill = forward, device, fill
        self.sizes: dict[tuple[int, int, int], Size] = {}
        self.lock = threading.Lock()
        self.pool: Any = None  # memory shared by all graphs; the lock lets only one run at a time

    def logits(self, batch: PackedBatch) -> Float32:
        arrays = [batch.input_ids, batch.type_ids, *tables(batch.cu_seqlens)]
        with self.lock, torch.inference_mode():
            size, known = self._size(batch)
            size.fill(arrays)
            if size.graph is not None:
                size.graph.replay()
            elif known and self.device.type == "cuda":
                self._capture(size)
            else:
                size.logits = self.forward(size.batch)
            assert size.logits is not None
            out: Float32 = size.logits[: batch.pairs].float().cpu().numpy()
        return out

    def _size(self, batch: PackedBatch) -> tuple[Size, bool]:
        """Buffers for the batch, and whether a batch of this size was seen before."""
        key = rounded(batch.tokens, batch.pairs, batch.max_seqlen)
        known = self.sizes.get(key)
        if known is not None:
            return known, True
        if not self.fill or batch.tokens > MAX_GRAPH_TOKENS or len(self.sizes) == MAX_GRAPHS:
            return Size(batch.tokens, batch.pairs, batch.max_seqlen, self.device), False
        self.sizes[key] = Size(*key, self.device)
        return self.sizes[key], False

    def _capture(self, size: Size) -> None:
        """Capture the forward as a graph and run it. An earlier call of this size has compiled the kernels."""
        self.pool = self.pool or torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        with torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local"):
            size.logits = self.forward(size.batch)
        graph.replay()
        size.graph = graph
