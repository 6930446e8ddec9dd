"""A forward over :mod:`turborank.ops.triton`, captured as a CUDA graph for each batch size that occurs twice.

A forward launches some eighty kernels of 10 to 100 µs each; launching them one by one from Python takes longer than
running them. A graph launches them at once but has fixed shapes. Batches are therefore padded to one of a few sizes (at
most a sixteenth more tokens) with unused tokens and empty pairs. No op of a classifier mixes rows of different pairs,
so padding does not change the logits of the real pairs (docs/gpu.md).
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from turborank.ops import triton as triton_ops
from turborank.types import Float32, Int32, PackedBatch

MOST_TOKENS = 32_768  # largest batch to capture: above, the kernels take longer than Python takes to launch them
KEPT = 256  # sizes with a graph; batches of further sizes run kernel by kernel, which costs less than recapturing
FEWEST_TOKENS, FEWEST_PAIRS = 256, 8

Forward = Callable[[PackedBatch], Tensor]  # a batch on the device, with a RowLayout for its cu_seqlens -> logits (P,)


def rounded(tokens: int, pairs: int, longest: int) -> tuple[int, int, int]:
    """The padded size of a batch: tokens, pairs, and the pair length that selects the attention kernel."""
    step = max(FEWEST_TOKENS, 1 << max(0, tokens.bit_length() - 5))
    some = max(FEWEST_PAIRS, 1 << (pairs - 1).bit_length())
    usual = (
        triton_ops.SKIP_FROM
        if longest <= triton_ops.SKIP_FROM
        else max(triton_ops.USUAL, 1 << (longest - 1).bit_length())
    )
    return -(-tokens // step) * step, some, usual


class Size:
    """Input buffers for batches of one size, on host and device, and the graph that reads them."""

    def __init__(self, tokens: int, pairs: int, longest: int, device: torch.device) -> None:
        blocks = tokens // triton_ops.QUERIES + pairs  # upper bound for batches of this size
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
        where: Any = triton_ops.RowLayout(cu_seqlens, positions, blocks, firsts, longest)
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
        arrays = [batch.input_ids, batch.type_ids, *triton_ops.tables(batch.cu_seqlens)]
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
        if not self.fill or batch.tokens > MOST_TOKENS or len(self.sizes) == KEPT:
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
