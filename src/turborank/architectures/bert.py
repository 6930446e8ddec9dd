"""BERT as a cross-encoder (arXiv 1810.04805, arXiv 1901.04085; docs/model.md §5.1): the ms-marco-MiniLM family.

x = LayerNorm(word + position + segment), post-norm layers, logit = w·tanh(P·h₀ + p) + b, with h₀ the first token's
last state. The last layer is computed for that token only (docs/model.md §3.7).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from turborank.architectures import encoder
from turborank.architectures.encoder import Weights, dense, linear_shapes
from turborank.ops import Array, Ops
from turborank.types import ModelConfig, PackedBatch


def recognise(raw: Mapping[str, Any], names: Mapping[str, tuple[int, ...]]) -> ModelConfig | None:
    """The ModelConfig if ``config.json`` describes a BERT with learned positions, else None."""
    if raw.get("model_type") != "bert" or raw.get("position_embedding_type", "absolute") != "absolute":
        return None
    return encoder.config(raw, "bert", max_length=int(raw["max_position_embeddings"]))


def parameters(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor of the checkpoint with its shape."""
    c = config.hidden_size
    head = [*linear_shapes("pooler.dense", c, c), *linear_shapes("classifier", 1, c)]
    return dict([*encoder.body_shapes(config), *head])


def forward(
    weights: Weights, config: ModelConfig, batch: PackedBatch, ops: Ops, trace: list[Array] | None = None
) -> Array:
    """Logits (P,) of a packed batch. Appends the embeddings and each layer's output to ``trace``, if given."""
    x = encoder.embed(weights, config, batch, ops)  # (T, C)
    x = encoder.encode(weights, config, x, batch.cu_seqlens, ops, first_only=True, trace=trace)  # (P, C)
    pooled = ops.tanh(dense(weights, "pooler.dense", x, ops))
    return dense(weights, "classifier", pooled, ops)[:, 0]
