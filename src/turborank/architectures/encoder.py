"""The post-norm transformer layer shared by BERT (arXiv 1810.04805), JinaBERT, XLM-RoBERTa, DeBERTa and ELECTRA.

Tensor names are those of the published checkpoints without the encoder's prefix (``bert.``, ``roberta.`` …), which
:func:`turborank.checkpoint.verify.canonical` removes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, MutableSequence, Sequence
from typing import Any

from turborank.ops import Array, Ops
from turborank.types import ModelConfig, PackedBatch

Shapes = Iterator[tuple[str, tuple[int, ...]]]
Weights = Mapping[str, Array]
# One layer's attention without its output projection: weights, config, the layer's name, query tokens (T, C) or
# (P, C), key tokens (T, C), cu_seqlens, ops, first_only -> context, of the shape of the query tokens.
Attend = Callable[[Weights, ModelConfig, str, Array, Array, Array, Ops, bool], Array]
PROJECTIONS = ("query", "key", "value")
TABLES = "embeddings.word_embeddings", "embeddings.position_embeddings", "embeddings.token_type_embeddings"


def config(raw: Mapping[str, Any], architecture: str, *, max_length: int) -> ModelConfig:
    """A ModelConfig with the sizes that these families' ``config.json`` all state under the same keys."""
    return ModelConfig(
        architecture=architecture,
        vocab_size=int(raw["vocab_size"]),
        hidden_size=int(raw["hidden_size"]),
        num_hidden_layers=int(raw["num_hidden_layers"]),
        num_attention_heads=int(raw["num_attention_heads"]),
        intermediate_size=int(raw["intermediate_size"]),
        max_length=max_length,
        type_vocab_size=int(raw["type_vocab_size"]),
        layer_norm_eps=float(raw["layer_norm_eps"]),
    )


def linear_shapes(name: str, out: int, into: int, *, bias: bool = True) -> Shapes:
    yield f"{name}.weight", (out, into)
    if bias:
        yield f"{name}.bias", (out,)


def norm_shapes(name: str, size: int) -> Shapes:
    yield f"{name}.weight", (size,)
    yield f"{name}.bias", (size,)


def layer_shapes(config: ModelConfig, layer: int, projections: Sequence[str] = PROJECTIONS) -> Shapes:
    """Names and shapes of one encoder layer's tensors."""
    c, f, name = config.hidden_size, config.intermediate_size, f"encoder.layer.{layer}"
    for part in projections:
        yield from linear_shapes(f"{name}.attention.self.{part}", c, c)
    yield from linear_shapes(f"{name}.attention.output.dense", c, c)
    yield from norm_shapes(f"{name}.attention.output.LayerNorm", c)
    if config.feed_forward == "geglu":
        yield from linear_shapes(f"{name}.mlp.gated_layers", 2 * f, c, bias=False)
        yield from linear_shapes(f"{name}.mlp.wo", c, f)
        yield from norm_shapes(f"{name}.mlp.layernorm", c)
    else:
        yield from linear_shapes(f"{name}.intermediate.dense", f, c)
        yield from linear_shapes(f"{name}.output.dense", c, f)
        yield from norm_shapes(f"{name}.output.LayerNorm", c)


def body_shapes(config: ModelConfig) -> Shapes:
    """Names and shapes of embeddings and layers with learned positions (BERT, XLM-RoBERTa, ELECTRA), without a head."""
    rows = config.vocab_size, config.max_length + config.position_offset, config.type_vocab_size
    for table, count in zip(TABLES, rows, strict=True):
        yield f"{table}.weight", (count, config.hidden_size)
    yield from norm_shapes("embeddings.LayerNorm", config.hidden_size)
    for layer in range(config.num_hidden_layers):
        yield from layer_shapes(config, layer)


def dense(weights: Weights, name: str, x: Array, ops: Ops) -> Array:
    return ops.linear(x, weights[f"{name}.weight"], weights.get(f"{name}.bias"))


def norm(weights: Weights, name: str, x: Array, config: ModelConfig, ops: Ops) -> Array:
    return ops.layer_norm(x, weights[f"{name}.weight"], weights.get(f"{name}.bias"), config.layer_norm_eps)


def add_norm(weights: Weights, name: str, x: Array, residual: Array, config: ModelConfig, ops: Ops) -> Array:
    return ops.add_norm(x, residual, weights[f"{name}.weight"], weights[f"{name}.bias"], config.layer_norm_eps)


def embed(weights: Weights, config: ModelConfig, batch: PackedBatch, ops: Ops) -> Array:
    """LayerNorm of word + position + segment embeddings: (T, C). Type ids are ignored if there is one segment only."""
    words, positions, types = (weights[f"{table}.weight"] for table in TABLES)
    indices = ops.positions(batch.cu_seqlens) + config.position_offset  # (T,)
    segments = ops.take(types, batch.type_ids) if config.type_vocab_size > 1 else types[0]
    x = ops.take(words, batch.input_ids) + ops.take(positions, indices) + segments
    return norm(weights, "embeddings.LayerNorm", x, config, ops)


def feed_forward(weights: Weights, name: str, x: Array, config: ModelConfig, ops: Ops) -> Array:
    """GEGLU (arXiv 2002.05202, GELU on the first half) or BERT's two linears; then residual and norm: (T, C)."""
    if config.feed_forward == "geglu":
        gated = ops.geglu(x, weights[f"{name}.mlp.gated_layers.weight"])  # (T, F)
        y = dense(weights, f"{name}.mlp.wo", gated, ops)
        return add_norm(weights, f"{name}.mlp.layernorm", y, x, config, ops)
    y = dense(weights, f"{name}.output.dense", ops.gelu(dense(weights, f"{name}.intermediate.dense", x, ops)), ops)
    return add_norm(weights, f"{name}.output.LayerNorm", y, x, config, ops)


def self_attention(
    weights: Weights,
    config: ModelConfig,
    name: str,
    asked: Array,
    x: Array,
    cu_seqlens: Array,
    ops: Ops,
    first_only: bool,
) -> Array:
    """Scaled dot-product attention, with ALiBi if the config has slopes; an :data:`Attend`."""
    q = dense(weights, f"{name}.attention.self.query", asked, ops)
    k = dense(weights, f"{name}.attention.self.key", x, ops)
    v = dense(weights, f"{name}.attention.self.value", x, ops)
    return ops.attention(q, k, v, cu_seqlens, config.num_attention_heads, config.slopes, first_only)


def encoder_layer(
    weights: Weights,
    config: ModelConfig,
    layer: int,
    x: Array,
    cu_seqlens: Array,
    ops: Ops,
    first_only: bool,
    attend: Attend = self_attention,
) -> Array:
    """One layer: (T, C) -> (T, C), or (P, C), the first token of each pair, when ``first_only``."""
    name = f"encoder.layer.{layer}"
    asked = ops.first_tokens(x, cu_seqlens) if first_only else x
    context = attend(weights, config, name, asked, x, cu_seqlens, ops, first_only)
    y = dense(weights, f"{name}.attention.output.dense", context, ops)
    y = add_norm(weights, f"{name}.attention.output.LayerNorm", y, asked, config, ops)
    return feed_forward(weights, name, y, config, ops)


def encode(
    weights: Weights,
    config: ModelConfig,
    x: Array,
    cu_seqlens: Array,
    ops: Ops,
    *,
    first_only: bool,
    trace: MutableSequence[Array] | None = None,
    attend: Attend = self_attention,
) -> Array:
    """All layers over embeddings x (T, C) -> (T, C), or (P, C) when ``first_only``.

    Appends x and each layer's output to ``trace``, if given; tests use it to compare engines layer by layer.
    """
    last = config.num_hidden_layers - 1
    if trace is not None:
        trace.append(x)
    for layer in range(config.num_hidden_layers):
        few = first_only and layer == last
        x = ops.layer(encoder_layer, weights, config, layer, x, cu_seqlens, ops, few, attend)
        if trace is not None:
            trace.append(x)
    return x
