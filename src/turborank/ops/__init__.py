"""The few array functions every forward pass is written in.

``reference`` (numpy) is the law: slow, plain, obviously correct. ``torch`` is its differentiable twin, ``triton`` the
same in Triton kernels for GPUs. A forward takes one of these modules as its ``ops`` argument and never imports any.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

Array = Any  # numpy.ndarray under ops.reference, torch.Tensor under ops.torch


class Ops(Protocol):
    """What a forward may call. Shapes use the dimension letters of :mod:`turborank.types`."""

    def take(self, table: Array, ids: Array, /) -> Array:
        """Rows of ``table`` (V, C) at ``ids`` (T,) -> (T, C)."""

    def linear(self, x: Array, weight: Array, bias: Array | None = None, /) -> Array:
        """Product x (T, in) · weight (out, in)ᵀ + bias (out,) -> (T, out)."""

    def layer_norm(self, x: Array, weight: Array, bias: Array | None, eps: float, /) -> Array:
        """Normalise the last axis with biased variance, then scale and, with a bias, shift."""

    def add_norm(self, x: Array, residual: Array, weight: Array, bias: Array, eps: float, /) -> Array:
        """``layer_norm`` of x + residual, both (T, C)."""

    def gelu(self, x: Array, /) -> Array:
        """Exact GELU, ½·x·(1 + erf(x/√2)); not the tanh approximation."""

    def tanh(self, x: Array, /) -> Array:
        """Hyperbolic tangent."""

    def geglu(self, x: Array, weight: Array, /) -> Array:
        """GEGLU, gelu(x·Gᵀ)·(x·Uᵀ), where weight (2F, C) is G over U: (T, C) -> (T, F)."""

    def rotate(self, x: Array, cu_seqlens: Array, heads: int, theta: float, /) -> Array:
        """Rotary positions (RoPE, arXiv 2104.09864): (T, C) -> (T, C), each head by its token's place in its pair.

        Channels i and i + D/2 of a head are turned by place·theta^(-2i/D), computed in float32.
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
        """Softmax attention inside each pair, with symmetric ALiBi or in a sliding window, as a rule with neither.

        q is (T, C), or (P, C) holding each pair's first token when ``first_only``; k, v are (T, C).
        Score of query i and key j in head h: q_i·k_j / √D - slopes[h]·|i-j|; empty slopes mean no bias.
        With a window only keys with |i-j| ≤ window are read.
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
        """Softmax attention inside each pair, with DeBERTa's relative positions.

        q, k, v as for ``attention``; pos_q, pos_k (R, C) are the relative positions as queries and as keys;
        rows (2N-1,) says which of their R rows stands for the distance i-j = 1-N … N-1. Score of query i and key j
        in a head, with r = rows[i-j + N-1]: (q_i·k_j + q_i·pos_k_r + pos_q_r·k_j) / √(3·D).
        """

    def layer(self, function: Callable[..., Array], /, *arguments: Any) -> Array:
        """``function(*arguments)``: one layer. Training may forget what it computed inside and compute it again."""

    def positions(self, cu_seqlens: Array, /) -> Array:
        """Each token's place in its pair, from 0: (P+1,) -> (T,)."""

    def first_tokens(self, x: Array, cu_seqlens: Array, /) -> Array:
        """Each pair's first row: (T, C) -> (P, C)."""

    def means(self, x: Array, cu_seqlens: Array, /) -> Array:
        """Mean over each pair's tokens: (T, C) -> (P, C)."""

    def segment_means(self, x: Array, type_ids: Array, cu_seqlens: Array, /) -> tuple[Array, Array]:
        """Mean over each pair's tokens of type 0 and of type 1: (T, C) -> (P, C), (P, C)."""

    def focused_means(
        self, x: Array, query: Array, focus: Array, type_ids: Array, cu_seqlens: Array, passage: int, /
    ) -> Array:
        """Mean over each pair's tokens of type 1, in which what answers the query weighs more: (T, C) -> (P, C).

        Those tokens, in passages of ``passage`` (the last may be shorter), weigh e^(focus·cos(query, sum of the
        passage)) each; query is (P, C), focus (1,). A focus of 0 gives the plain mean.
        """

    def cosine(self, a: Array, b: Array, /) -> Array:
        """Row-wise cosine: (P, C), (P, C) -> (P,)."""
