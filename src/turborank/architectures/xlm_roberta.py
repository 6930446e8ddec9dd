"""XLM-RoBERTa as a cross-encoder (arXiv 1911.02116, RoBERTa: arXiv 1907.11692; docs/model.md §5.2): the bge rerankers.

BERT with three differences. Positions count from 2, because the first rows of the position table are reserved for
padding. There is one segment. The head has a dense layer of its own in place of the pooler:
logit = w·tanh(D·h₀ + d) + b. Every token advances the position, including a literal ``<pad>`` in a text.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from turborank.architectures import encoder
from turborank.architectures.encoder import Weights
from turborank.ops import Array, Ops
from turborank.types import ModelConfig, PackedBatch


def recognise(raw: Mapping[str, Any], names: Mapping[str, tuple[int, ...]]) -> ModelConfig | None:
    """The ModelConfig if ``config.json`` describes a RoBERTa or an XLM-RoBERTa, else None."""
    if raw.get("model_type") not in ("xlm-roberta", "roberta"):
        return None
    if raw.get("position_embedding_type", "absolute") != "absolute":
        return None
    offset = int(raw.get("pad_token_id", 1)) + 1
    config = encoder.config(raw, "xlm_roberta", max_length=int(raw["max_position_embeddings"]) - offset)
    return dataclasses.replace(config, position_offset=offset)


def parameters(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor of the checkpoint with its shape."""
    return dict([*encoder.body_shapes(config), *encoder.dense_head_shapes(config)])


def forward(
    weights: Weights, config: ModelConfig, batch: PackedBatch, ops: Ops, trace: list[Array] | None = None
) -> Array:
    """Logits (P,) of a packed batch. Appends the embeddings and each layer's output to ``trace``, if given."""
    x = encoder.embed(weights, config, batch, ops)  # (T, C)
    x = encoder.encode(weights, config, x, batch.cu_seqlens, ops, first_only=True, trace=trace)  # (P, C)
    return encoder.dense_head(weights, x, ops.tanh, ops)
