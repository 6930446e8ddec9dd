"""DeBERTa-v2/v3 as a cross-encoder (arXiv 2006.03654, arXiv 2111.09543; docs/model.md §5.3): mxbai-rerank-v1.

Embeddings have no position term. Attention scores are the sum of content-to-content, content-to-position and
position-to-content terms; with r = bucket(i - j) for query token i and key token j:

    S[i, j] = (q_i·k_j  +  q_i·K_r  +  Q_r·k_j) / √(3·D)

Q and K are the layer's query and key projections (``share_att_key``) of one table of relative positions, which all
layers share and which is layer-normalised once. Short distances have a row each, longer ones share rows on a log scale.
logit = w·gelu(P·h₀ + p) + b, with h₀ the first token's last state; the last layer is computed for that token only.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any

from turborank.architectures import encoder
from turborank.architectures.encoder import Weights, dense, linear_shapes, norm, norm_shapes
from turborank.errors import CheckpointError
from turborank.ops import Array, Ops
from turborank.types import ModelConfig, PackedBatch

WORDS, RELATIVE = "embeddings.word_embeddings.weight", "encoder.rel_embeddings.weight"
PROJECTIONS = "query_proj", "key_proj", "value_proj"

# Values of config.json that the forward implements, those of the published rerankers. Other variants are refused.
_EXPECTED: dict[str, object] = {
    "relative_attention": True,
    "share_att_key": True,
    "norm_rel_ebd": "layer_norm",
    "position_biased_input": False,
    "type_vocab_size": 0,
}
_DEFAULTS: dict[str, object] = {"pooler_hidden_act": "gelu", "conv_kernel_size": 0}


def bucket(distance: int, buckets: int, furthest: int) -> int:
    """The signed bucket of a distance i - j: the distance up to buckets/2, then a log scale up to ``furthest``."""
    middle = buckets // 2
    if abs(distance) <= middle:
        return distance
    share = math.log(abs(distance) / middle) / math.log((furthest - 1) / middle)
    return int(math.copysign(math.ceil(share * (middle - 1)) + middle, distance))


@functools.lru_cache(maxsize=8)
def relative_rows(config: ModelConfig) -> tuple[int, ...]:
    """Rows (2N-1,) of the relative position table for i - j = 1-N … N-1; N is the model's maximum length."""
    size, far, most = config.position_buckets, config.max_relative_positions, config.max_length
    return tuple(min(max(bucket(d, size, far) + size, 0), 2 * size - 1) for d in range(1 - most, most))


def recognise(raw: Mapping[str, Any], names: Mapping[str, tuple[int, ...]]) -> ModelConfig | None:
    """The ModelConfig if ``config.json`` describes a DeBERTa-v2 (v3 has the same model_type), else None.

    Raises CheckpointError for a variant that the forward does not implement.
    """
    if raw.get("model_type") != "deberta-v2":
        return None
    _check(raw)
    longest = int(raw["max_position_embeddings"])
    furthest = int(raw.get("max_relative_positions", -1))
    return dataclasses.replace(
        encoder.config(raw, "deberta", max_length=longest),
        position_buckets=int(raw["position_buckets"]),
        max_relative_positions=furthest if furthest > 0 else longest,
    )


def _check(raw: Mapping[str, Any]) -> None:
    faults = [f"{key} {value!r}, got {raw.get(key)!r}" for key, value in _EXPECTED.items() if raw.get(key) != value]
    faults += [f"{key} {value!r}, got {raw[key]!r}" for key, value in _DEFAULTS.items() if raw.get(key, value) != value]
    terms = raw.get("pos_att_type") or ()
    if set(terms.split("|") if isinstance(terms, str) else terms) != {"c2p", "p2c"}:
        faults.append(f"pos_att_type 'p2c|c2p', got {terms!r}")
    most = int(raw["max_position_embeddings"]) - 1
    if not 2 <= raw.get("position_buckets", -1) <= most:
        faults.append(f"position_buckets from 2 to {most}, got {raw.get('position_buckets')!r}")
    if raw.get("embedding_size", raw["hidden_size"]) != raw["hidden_size"]:
        faults.append(f"embedding_size {raw['hidden_size']}, got {raw['embedding_size']!r}")
    if faults:
        raise CheckpointError("expected a DeBERTa like the published rerankers, with " + "; ".join(faults))


def parameters(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor of the checkpoint with its shape."""
    c = config.hidden_size
    shapes: dict[str, tuple[int, ...]] = {WORDS: (config.vocab_size, c), RELATIVE: (2 * config.position_buckets, c)}
    shapes.update(norm_shapes("embeddings.LayerNorm", c))
    shapes.update(norm_shapes("encoder.LayerNorm", c))
    for layer in range(config.num_hidden_layers):
        shapes.update(encoder.layer_shapes(config, layer, PROJECTIONS))
    return {**shapes, **dict(linear_shapes("pooler.dense", c, c)), **dict(linear_shapes("classifier", 1, c))}


def forward(
    weights: Weights, config: ModelConfig, batch: PackedBatch, ops: Ops, trace: list[Array] | None = None
) -> Array:
    """Logits (P,) of a packed batch. Appends the embeddings and each layer's output to ``trace``, if given."""
    x = norm(weights, "embeddings.LayerNorm", ops.take(weights[WORDS], batch.input_ids), config, ops)  # (T, C)
    relative = norm(weights, "encoder.LayerNorm", weights[RELATIVE], config, ops)  # (2·buckets, C)

    def attend(
        weights: Weights,
        config: ModelConfig,
        name: str,
        asked: Array,
        x: Array,
        cu_seqlens: Array,
        ops: Ops,
        first_only: bool,
    ) -> Array:
        """One layer's disentangled attention: ``relative`` passes through the same projections as the tokens."""
        names = (f"{name}.attention.self.{part}" for part in PROJECTIONS)
        query, key, value = (functools.partial(dense, weights, one, ops=ops) for one in names)
        return ops.disentangled_attention(
            query(asked),
            key(x),
            value(x),
            query(relative),
            key(relative),
            relative_rows(config),
            cu_seqlens,
            config.num_attention_heads,
            first_only,
        )

    x = encoder.encode(weights, config, x, batch.cu_seqlens, ops, first_only=True, trace=trace, attend=attend)
    pooled = ops.gelu(dense(weights, "pooler.dense", x, ops))  # (P, C)
    return dense(weights, "classifier", pooled, ops)[:, 0]
