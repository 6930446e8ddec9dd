"""The array operations in which every forward pass is written.

``reference`` (numpy) is the reference implementation: plain and slow. ``torch`` implements the same operations
differentiably, ``triton`` in Triton kernels for GPUs, ``torch_padded`` over padded batches for export, and
``torch_training`` faster for training on CPUs. A forward receives one of these modules as its ``ops`` argument.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

Array = Any  # numpy.ndarray under ops.reference, torch.Tensor under ops.torch


class Ops(Protocol):
    """The operations a forward may call. Shapes use the dimension letters of :mod:`turborank.types`."""

    def take(self, table: Array, ids: Array, /) -> Array:
        """Rows of ``table`` (V, C) at ``ids`` (T,) -> (T, C)."""

    def linear(self, x: Array, weight: Array, bias: Array | None = None, /) -> Array:
        """Product x (T, in) · weight (out, in)ᵀ + bias (out,) -> (T, out)."""

    def layer_norm(self, x: Array, weight: Array, bias: Array | None, eps: float, /) -> Array:
        """LayerNorm over the last axis with biased variance; ``bias`` None means scale only."""

    def add_norm(self, x: Array, residual: Array, weight: Array, bias: Array, eps: float, /) -> Array:
        """``layer_norm`` of x + residual, both (T, C)."""

    def gelu(self, x: Array, /) -> Array:
        """Exact GELU, ½·x·(1 + erf(x/√2)); not the tanh approximation."""

    def tanh(self, x: Array, /) -> Array:
        """Hyperbolic tangent."""

    def geglu(self, x: Array, weight: Array, /) -> Array:
        """GEGLU, gelu(x·Gᵀ)·(x·Uᵀ), where weight (2F, C) is G over U: (T, C) -> (T, F)."""

    def rotate(self, x: Array, cu_seqlens: Array, heads: int, theta: float, /) -> Array:
        """Rotary position embedding (RoPE, arXiv 2104.09864) of queries or keys: (T, C) -> (T, C).

        Channels i and i + D/2 of each head are rotated by position·theta^(-2i/D); positions count from 0 in each pair,
        angles are float32.
        """

    def attention(
        self,
        q: Array,
        k: Array,
        v: Array,
        cu_seqlens: Array,
        heads: int,
        slopes: Sequence[float],
        first_only: bool,
        window: int = 0,
        /,
    ) -> Array:
        """Softmax attention inside each pair, optionally with symmetric ALiBi or a sliding window.

        q and the result are (T, C), or (P, C), each pair's first token, when ``first_only``; k, v are (T, C).
        The score of query i and key j in head h is q_i·k_j / √D - slopes[h]·|i-j|; empty slopes mean no bias.
        A window > 0 restricts attention to keys with |i-j| ≤ window.
        """

    def disentangled_attention(
        self,
        q: Array,
        k: Array,
        v: Array,
        pos_q: Array,
        pos_k: Array,
        rows: Sequence[int],
        cu_seqlens: Array,
        heads: int,
        first_only: bool,
        /,
    ) -> Array:
        """Softmax attention inside each pair with DeBERTa's relative positions (docs/model.md §5.3).

        q, k, v and ``first_only`` are as for ``attention``. pos_q and pos_k (R, C) are the relative position table
        projected to queries and keys; rows (2N-1,) maps the distance i-j = 1-N … N-1 to one of their R rows. With
        r = rows[i-j + N-1] the score of query i and key j is (q_i·k_j + q_i·pos_k_r + pos_q_r·k_j) / √(3·D).
        """

    def layer(self, function: Callable[..., Array], /, *arguments: Any) -> Array:
        """``function(*arguments)``, one layer. Training may discard its activations and recompute them in backward."""

    def positions(self, cu_seqlens: Array, /) -> Array:
        """Position of each token in its pair, from 0: (P+1,) -> (T,)."""

    def first_tokens(self, x: Array, cu_seqlens: Array, /) -> Array:
        """The first row of each pair: (T, C) -> (P, C)."""

    def means(self, x: Array, cu_seqlens: Array, /) -> Array:
        """Mean over the tokens of each pair: (T, C) -> (P, C)."""

    def segment_means(self, x: Array, type_ids: Array, cu_seqlens: Array, /) -> tuple[Array, Array]:
        """Means over each pair's tokens of type 0 and of type 1: (T, C) -> (P, C), (P, C)."""

    def focused_means(
        self, x: Array, query: Array, focus: Array, type_ids: Array, cu_seqlens: Array, passage: int, /
    ) -> Array:
        """Weighted mean over each pair's tokens of type 1: (T, C) -> (P, C) (docs/model.md §3.5).

        The tokens are divided into passages of ``passage`` tokens (the last may be shorter). Each token has the weight
        e^(focus·cos(query, sum of its passage)); query is (P, C), focus (1,). A focus of 0 gives the plain mean.
        """

    def cosine(self, a: Array, b: Array, /) -> Array:
        """Row-wise cosine similarity: (P, C), (P, C) -> (P,)."""
