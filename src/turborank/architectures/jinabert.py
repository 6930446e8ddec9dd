"""JinaBERT, BERT with symmetric ALiBi and GEGLU, as a cross-encoder (docs/model.md §3).

Papers: JinaBERT (arXiv 2310.19923), ALiBi (arXiv 2108.12409), GEGLU (arXiv 2002.05202).
There are four heads (docs/model.md §3.5):

``classifier``  of the published models: logit = w·tanh(P·h₀ + p) + b, with h₀ the first token's last state. The last
                layer is computed for that token only.
``cosine``      logit = scale·cos(mean of segment 0, mean of segment 1) + bias, over the last states of the joint
                encoding of query and document.
``focus``       like ``cosine``, but each passage of the document has the weight e^(focus·cos(query mean, passage)) in
                the document's mean, so that a relevant passage counts in a document of thousands of tokens.
``sum``         logit = the classifier's + scale·the cosine of ``focus``, over the states before the last layer.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from typing import Any

from turborank.architectures import encoder
from turborank.architectures.encoder import Weights, dense, linear_shapes, norm, norm_shapes
from turborank.errors import CheckpointError
from turborank.ops import Array, Ops
from turborank.types import ModelConfig, PackedBatch

POSITIONS = "embeddings.position_embeddings.weight"
COSINES = ("cosine", "focus")  # heads that read every token of the last layer
FOCUSED = ("focus", "sum")  # heads with a cosine in which passages have weights
PASSAGE = 16  # tokens of a passage in the "focus" head


def standard_slopes(heads: int) -> tuple[float, ...]:
    """The slopes (H,) of the ALiBi paper: a geometric series if ``heads`` is a power of two; otherwise the series of
    the power below, then every second slope of the power above (docs/model.md §3.3)."""
    power = 2 ** int(math.log2(heads))
    slopes = [2.0 ** (-8.0 * (h + 1) / power) for h in range(power)]
    between = [2.0 ** (-4.0 * (2 * h + 1) / power) for h in range(heads - power)]
    return tuple(slopes + between)


def halved_tail_slopes(heads: int) -> tuple[float, ...]:
    """The slopes (H,) of the published rerankers: those after the last power of two are halved (docs/model.md §3.3)."""
    power = 2 ** int(math.log2(heads))
    slopes = standard_slopes(heads)
    return slopes[:power] + tuple(s / 2 for s in slopes[power:])


SLOPE_RULES = {"standard": standard_slopes, "halved-tail": halved_tail_slopes}


def _slopes(raw: Mapping[str, Any], heads: int) -> tuple[float, ...]:
    """The slopes (H,): ``alibi_slopes`` of the config (a rule's name or H numbers) if present.

    The published checkpoints lack the key. jina-reranker-v1-turbo-en and -tiny-en, identified by vocabulary, width and
    heads, use the halved tail; every other JinaBERT uses the standard rule.
    """
    given = raw.get("alibi_slopes")
    if given is None:
        published = (raw.get("vocab_size"), raw.get("hidden_size"), heads) == (61056, 384, 12)
        given = "halved-tail" if published else "standard"
    if isinstance(given, str):
        if given not in SLOPE_RULES:
            raise CheckpointError(
                f"expected alibi_slopes to be a list or one of {', '.join(SLOPE_RULES)}, got {given!r} in config.json"
            )
        return SLOPE_RULES[given](heads)
    if len(given) != heads:
        raise CheckpointError(f"expected {heads} alibi_slopes, one a head, got {len(given)} in config.json")
    return tuple(float(s) for s in given)


def _repeat_from(raw: Mapping[str, Any], rows: int) -> int:
    """The first row of the position table that repeats; 0 without a table, or with one for every position."""
    given, length = raw.get("repeat_positions_from"), int(raw["max_position_embeddings"])
    if rows in (0, length) and given is None:
        return 0
    if isinstance(given, int) and 0 < given < rows < length:
        return given
    raise CheckpointError(
        f"expected {POSITIONS} to have {length} rows (max_position_embeddings), or fewer and repeat_positions_from, "
        f"a row from 1 to the last, got {rows} rows and repeat_positions_from {given!r} in config.json"
    )


def recognise(raw: Mapping[str, Any], names: Mapping[str, tuple[int, ...]]) -> ModelConfig | None:
    """The ModelConfig if ``config.json`` describes a JinaBERT, else None. Tensor names decide feed-forward and head.

    Raises CheckpointError for ``alibi_slopes`` of an unknown rule or of a wrong length, and for a position table that
    leaves positions without a row.
    """
    if raw.get("position_embedding_type") != "alibi":
        return None
    heads = int(raw["num_attention_heads"])
    learned = names.get(POSITIONS, (0,))[0]
    gated = "encoder.layer.0.mlp.gated_layers.weight" in names
    cosine = "focus" if "head.focus" in names else "cosine" if "head.scale" in names else "classifier"
    return ModelConfig(
        architecture="jinabert",
        vocab_size=int(raw["vocab_size"]),
        hidden_size=int(raw["hidden_size"]),
        num_hidden_layers=int(raw["num_hidden_layers"]),
        num_attention_heads=heads,
        intermediate_size=int(raw["intermediate_size"]),
        max_length=int(raw["max_position_embeddings"]),
        type_vocab_size=int(raw["type_vocab_size"]),
        layer_norm_eps=float(raw["layer_norm_eps"]),
        feed_forward="geglu" if gated else "gelu",
        slopes=_slopes(raw, heads),
        learned_positions=learned,
        repeat_from=_repeat_from(raw, learned),
        head="sum" if cosine == "focus" and "classifier.weight" in names else cosine,
    )


def cosine_parameters(head: str) -> tuple[str, ...]:
    """Names of the parameters of a head's cosine, each of shape (1,); none for the classifier."""
    names = {"head.scale": head != "classifier", "head.bias": head in COSINES, "head.focus": head in FOCUSED}
    return tuple(name for name, present in names.items() if present)


def parameters(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor of the checkpoint with its shape (docs/model.md §2.1)."""
    c = config.hidden_size
    shapes: dict[str, tuple[int, ...]] = {
        "embeddings.word_embeddings.weight": (config.vocab_size, c),
        "embeddings.token_type_embeddings.weight": (config.type_vocab_size, c),
    }
    if config.learned_positions:
        shapes[POSITIONS] = (config.learned_positions, c)
    shapes.update(norm_shapes("embeddings.LayerNorm", c))
    for layer in range(config.num_hidden_layers):
        shapes.update(encoder.layer_shapes(config, layer))
    shapes.update(dict.fromkeys(cosine_parameters(config.head), (1,)))
    if config.head not in COSINES:
        shapes.update(linear_shapes("pooler.dense", c, c))
        shapes.update(linear_shapes("classifier", 1, c))
    return shapes


def position_rows(positions: Array, config: ModelConfig) -> Array:
    """The row of the position table for each position (T,): its own, or one that repeats (docs/model.md §3.1)."""
    if not config.repeat_from:
        return positions
    period = config.learned_positions - config.repeat_from
    return positions - period * ((positions - config.repeat_from) // period).clip(0)


def embed(weights: Weights, config: ModelConfig, batch: PackedBatch, ops: Ops) -> Array:
    """LayerNorm of word + segment (+ position) embeddings: (T, C)."""
    x = ops.take(weights["embeddings.word_embeddings.weight"], batch.input_ids)
    x = x + ops.take(weights["embeddings.token_type_embeddings.weight"], batch.type_ids)
    if config.learned_positions:
        x = x + ops.take(weights[POSITIONS], position_rows(ops.positions(batch.cu_seqlens), config))
    return norm(weights, "embeddings.LayerNorm", x, config, ops)


def forward(
    weights: Weights, config: ModelConfig, batch: PackedBatch, ops: Ops, trace: list[Array] | None = None
) -> Array:
    """Logits (P,) of a packed batch. Appends the embeddings and each layer's output to ``trace``, if given."""
    x = embed(weights, config, batch, ops)
    states = deque[Array](maxlen=2) if trace is None else trace  # keeps what the sum head reads, no more
    cosine = config.head in COSINES
    x = encoder.encode(weights, config, x, batch.cu_seqlens, ops, first_only=not cosine, trace=states)
    if cosine:
        return _cosine(weights, config, x, batch, ops) + weights["head.bias"]
    pooled = ops.tanh(dense(weights, "pooler.dense", x, ops))  # (P, C)
    logits = dense(weights, "classifier", pooled, ops)[:, 0]
    return logits + _cosine(weights, config, states[-2], batch, ops) if config.head == "sum" else logits


def _cosine(weights: Weights, config: ModelConfig, x: Array, batch: PackedBatch, ops: Ops) -> Array:
    """Scale · cosine of the means of both segments' states: (T, C) -> (P,)."""
    query, document = ops.segment_means(x, batch.type_ids, batch.cu_seqlens)  # 2 × (P, C)
    if config.head in FOCUSED:
        document = ops.focused_means(x, query, weights["head.focus"], batch.type_ids, batch.cu_seqlens, PASSAGE)
    return ops.cosine(query, document) * weights["head.scale"]
