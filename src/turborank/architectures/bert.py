"""BERT, XLM-RoBERTa and ELECTRA as cross-encoders: learned positions, post-norm layers, one logit.

x = LayerNorm(word + position + segment), the layers of :mod:`turborank.architectures.encoder`, and a head on h₀, the
first token's last state. The last layer is computed for that token only (docs/model.md §3.7).

* BERT (arXiv 1810.04805, arXiv 1901.04085; docs/model.md §5.1: ms-marco-MiniLM): logit = w·tanh(P·h₀ + p) + b, with
  the pooler P.
* XLM-RoBERTa and RoBERTa (arXiv 1911.02116, arXiv 1907.11692; docs/model.md §5.2: the bge rerankers): positions count
  from 2, because the first rows of the position table are reserved for padding; one segment; the same head under other
  names. Every token advances the position, including a literal ``<pad>`` in a text.
* ELECTRA (arXiv 2003.10555; docs/model.md §5.5: ms-marco-electra-base): XLM-RoBERTa's head with GELU in place of tanh.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from turborank.architectures import encoder
from turborank.architectures.encoder import Weights, dense, linear_shapes
from turborank.errors import CheckpointError
from turborank.ops import Array, Ops
from turborank.types import ModelConfig, PackedBatch

# architecture -> the head's two layers
HEADS = {
    "bert": ("pooler.dense", "classifier"),
    "xlm_roberta": ("classifier.dense", "classifier.out_proj"),
    "electra": ("classifier.dense", "classifier.out_proj"),
}


def recognise(raw: Mapping[str, Any], names: Mapping[str, tuple[int, ...]]) -> ModelConfig | None:
    """The ModelConfig if ``config.json`` describes a BERT with learned positions, else None."""
    if not _absolute(raw, "bert"):
        return None
    return encoder.config(raw, "bert", max_length=int(raw["max_position_embeddings"]))


def recognise_roberta(raw: Mapping[str, Any], names: Mapping[str, tuple[int, ...]]) -> ModelConfig | None:
    """The ModelConfig if ``config.json`` describes a RoBERTa or an XLM-RoBERTa, else None."""
    if not _absolute(raw, "xlm-roberta", "roberta"):
        return None
    offset = int(raw.get("pad_token_id", 1)) + 1
    config = encoder.config(raw, "xlm_roberta", max_length=int(raw["max_position_embeddings"]) - offset)
    return dataclasses.replace(config, position_offset=offset)


def recognise_electra(raw: Mapping[str, Any], names: Mapping[str, tuple[int, ...]]) -> ModelConfig | None:
    """The ModelConfig if ``config.json`` describes an ELECTRA with learned positions, else None.

    Raises CheckpointError if ``embedding_size`` differs from ``hidden_size``, as in ELECTRA-small.
    """
    if not _absolute(raw, "electra"):
        return None
    width = raw["hidden_size"]
    if raw.get("embedding_size", width) != width:
        raise CheckpointError(f"expected an ELECTRA with embedding_size {width}, got {raw['embedding_size']!r}")
    return encoder.config(raw, "electra", max_length=int(raw["max_position_embeddings"]))


def _absolute(raw: Mapping[str, Any], *model_types: str) -> bool:
    return raw.get("model_type") in model_types and raw.get("position_embedding_type", "absolute") == "absolute"


def parameters(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor of the checkpoint with its shape."""
    (hidden, out), c = HEADS[config.architecture], config.hidden_size
    return dict([*encoder.body_shapes(config), *linear_shapes(hidden, c, c), *linear_shapes(out, 1, c)])


def forward(
    weights: Weights, config: ModelConfig, batch: PackedBatch, ops: Ops, trace: list[Array] | None = None
) -> Array:
    """Logits (P,) of a packed batch. Appends the embeddings and each layer's output to ``trace``, if given."""
    x = encoder.embed(weights, config, batch, ops)  # (T, C)
    x = encoder.encode(weights, config, x, batch.cu_seqlens, ops, first_only=True, trace=trace)  # (P, C)
    hidden, out = HEADS[config.architecture]
    activation = ops.gelu if config.architecture == "electra" else ops.tanh
    return dense(weights, out, activation(dense(weights, hidden, x, ops)), ops)[:, 0]
