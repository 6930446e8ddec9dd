"""ELECTRA as a cross-encoder (arXiv 2003.10555; docs/model.md §5.5): ms-marco-electra-base.

BERT's embeddings and layers without a pooler. The head has the names and shapes of XLM-RoBERTa's, with GELU in place of
tanh: logit = w·gelu(D·h₀ + d) + b, with h₀ the first token's last state.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from turborank.architectures import encoder
from turborank.architectures.encoder import Weights
from turborank.errors import CheckpointError
from turborank.ops import Array, Ops
from turborank.types import ModelConfig, PackedBatch


def recognise(raw: Mapping[str, Any], names: Mapping[str, tuple[int, ...]]) -> ModelConfig | None:
    """The ModelConfig if ``config.json`` describes an ELECTRA with learned positions, else None.

    Raises CheckpointError if ``embedding_size`` differs from ``hidden_size``, as in ELECTRA-small.
    """
    if raw.get("model_type") != "electra" or raw.get("position_embedding_type", "absolute") != "absolute":
        return None
    width = raw["hidden_size"]
    if raw.get("embedding_size", width) != width:
        raise CheckpointError(f"expected an ELECTRA with embedding_size {width}, got {raw['embedding_size']!r}")
    return encoder.config(raw, "electra", max_length=int(raw["max_position_embeddings"]))


def parameters(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor of the checkpoint with its shape."""
    return dict([*encoder.body_shapes(config), *encoder.dense_head_shapes(config)])


def forward(
    weights: Weights, config: ModelConfig, batch: PackedBatch, ops: Ops, trace: list[Array] | None = None
) -> Array:
    """Logits (P,) of a packed batch. Appends the embeddings and each layer's output to ``trace``, if given."""
    x = encoder.embed(weights, config, batch, ops)  # (T, C)
    x = encoder.encode(weights, config, x, batch.cu_seqlens, ops, first_only=True, trace=trace)  # (P, C)
    return encoder.dense_head(weights, x, ops.gelu, ops)
