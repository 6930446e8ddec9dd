"""ModernBERT as a cross-encoder (arXiv 2412.13663; docs/model.md §5.6): the Ettin, gte and granite rerankers.

Pre-norm layers without biases. Positions enter as a rotation of queries and keys (RoPE, arXiv 2104.09864). In the
published models every third layer attends to the whole pair and the others to keys at a distance of at most
``half_window``, which is 64:

    x = LN(word)                                          no positions, no segments
    x = x + Wo·attention(rotate(q), rotate(k), v)         q, k, v = Wqkv·LN(x); layer 0 has no norm here
    x = x + Wo·(gelu(u) ⊙ g)                              u, g = Wi·LN(x); GEGLU, arXiv 2002.05202
    h = LN(x),  p = h₀ or the mean of h over the pair
    logit = w·LN(gelu(D·p)) + b

Full and sliding layers have a RoPE base (theta) each, and both differ between checkpoints. With first-token pooling
the last layer is computed for that token only.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from turborank.architectures.encoder import Shapes, Weights, dense, norm
from turborank.errors import CheckpointError
from turborank.ops import Array, Ops
from turborank.types import ModelConfig, PackedBatch

WORDS = "embeddings.tok_embeddings.weight"
HEAD_BIAS = "head.norm.bias"  # only sentence-transformers' module layout has it
FULL, SLIDING = "full_attention", "sliding_attention"
THETAS = {FULL: 160_000.0, SLIDING: 10_000.0}  # defaults if the config has none: those of ModernBERT-base
_FLAT = {FULL: "global_rope_theta", SLIDING: "local_rope_theta"}
POOLINGS = ("cls", "mean")

# Values of config.json that the forward implements, those of the published rerankers. Other values are refused.
_EXPECTED: dict[str, object] = {
    "hidden_activation": "gelu",
    "classifier_activation": "gelu",
    "norm_bias": False,
    "attention_bias": False,
    "mlp_bias": False,
    "classifier_bias": False,
    "rope_scaling": None,
}


def recognise(raw: Mapping[str, Any], names: Mapping[str, tuple[int, ...]]) -> ModelConfig | None:
    """The ModelConfig if ``config.json`` describes a ModernBERT, in the keys of transformers 4 or 5, else None.

    ``position_embedding_type`` is ignored: published configs have three different values, and all of them mean RoPE.
    Raises CheckpointError for a variant that the forward does not implement, naming every unsupported value.
    """
    if raw.get("model_type") != "modernbert":
        return None
    layers = int(raw["num_hidden_layers"])
    faults = [f"{key} {value!r}, got {raw[key]!r}" for key, value in _EXPECTED.items() if raw.get(key, value) != value]
    kinds = _layer_kinds(raw, layers, faults)
    full, sliding = (_theta(raw, kind, faults) for kind in (FULL, SLIDING))
    window = _number(raw, "local_attention", 128, 2, faults)
    eps = raw.get("norm_eps", raw.get("layer_norm_eps", 1e-5))
    if isinstance(eps, bool) or not isinstance(eps, int | float) or not 0 < eps < 1:
        faults.append(f"norm_eps between 0 and 1, got {eps!r}")
    pooling = raw.get("classifier_pooling", "cls")
    if pooling not in POOLINGS:
        faults.append(f"classifier_pooling 'cls' or 'mean', got {pooling!r}")
    heads, width = int(raw["num_attention_heads"]), int(raw["hidden_size"])
    if width // heads % 2:
        faults.append(f"an even head size, got {width // heads}")
    if faults:
        raise CheckpointError("expected a ModernBERT like the published rerankers, with " + "; ".join(faults))
    return ModelConfig(
        architecture="modernbert",
        vocab_size=int(raw["vocab_size"]),
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=int(raw["intermediate_size"]),
        max_length=int(raw["max_position_embeddings"]),
        type_vocab_size=0,
        layer_norm_eps=float(eps),
        feed_forward="geglu",
        half_window=int(window) // 2,
        global_layers=tuple(layer for layer, kind in enumerate(kinds) if kind == FULL),
        global_theta=full,
        local_theta=sliding,
        pooling=str(pooling),
        head_bias=HEAD_BIAS in names,
    )


def _number(raw: Mapping[str, Any], key: str, default: Any, minimum: float, faults: list[str]) -> float:
    value = raw.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not minimum <= value < 2**31:
        faults.append(f"{key} a number of at least {minimum}, got {value!r}")
        return 1.0
    return value


def _layer_kinds(raw: Mapping[str, Any], layers: int, faults: list[str]) -> list[str]:
    """FULL or SLIDING for each layer: ``layer_types`` (transformers 5) if present, else every n-th layer is full."""
    kinds = raw.get("layer_types")
    if kinds is None:
        every = int(_number(raw, "global_attn_every_n_layers", 3, 1, faults))
        return [SLIDING if layer % every else FULL for layer in range(layers)]
    if not isinstance(kinds, list) or len(kinds) != layers or not set(kinds) <= set(THETAS):
        faults.append(f"layer_types {layers} of {', '.join(THETAS)}, got {kinds!r:.120}")
        return []
    return kinds


def _theta(raw: Mapping[str, Any], kind: str, faults: list[str]) -> float:
    """RoPE's base of one kind of layer: the nested key of transformers 5, else the flat key of 4, else the default.

    In transformers 4 a ``local_rope_theta`` of null means the global theta.
    """
    nested = raw.get("rope_parameters")
    mine = nested.get(kind) if isinstance(nested, Mapping) else None
    if nested is not None and not isinstance(mine, Mapping):
        faults.append(f"rope_parameters with {kind} {{'rope_theta', 'rope_type'}}, got {nested!r:.120}")
        return 1.0
    if isinstance(mine, Mapping):
        if mine.get("rope_type", "default") != "default":
            faults.append(f"rope_type 'default' for {kind}, got {mine['rope_type']!r}")
        if "rope_theta" in mine:
            return float(_number(mine, "rope_theta", None, 1, faults))
    flat = _FLAT[kind]
    if kind == SLIDING and flat in raw and raw[flat] is None:
        return _theta(raw, FULL, faults)
    return float(_number(raw, flat, THETAS[kind], 1, faults))


def parameters(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor of the checkpoint with its shape."""
    c = config.hidden_size
    shapes: dict[str, tuple[int, ...]] = {WORDS: (config.vocab_size, c), "embeddings.norm.weight": (c,)}
    for layer in range(config.num_hidden_layers):
        shapes.update(_layer_shapes(config, layer))
    shapes |= {"final_norm.weight": (c,), "head.dense.weight": (c, c), "head.norm.weight": (c,)}
    shapes |= {HEAD_BIAS: (c,)} if config.head_bias else {}
    return shapes | {"classifier.weight": (1, c), "classifier.bias": (1,)}


def _layer_shapes(config: ModelConfig, layer: int) -> Shapes:
    c, f, name = config.hidden_size, config.intermediate_size, f"layers.{layer}"
    if layer:
        yield f"{name}.attn_norm.weight", (c,)
    yield f"{name}.attn.Wqkv.weight", (3 * c, c)
    yield f"{name}.attn.Wo.weight", (c, c)
    yield f"{name}.mlp_norm.weight", (c,)
    yield f"{name}.mlp.Wi.weight", (2 * f, c)
    yield f"{name}.mlp.Wo.weight", (c, f)


def attention(
    weights: Weights, config: ModelConfig, layer: int, x: Array, cu_seqlens: Array, ops: Ops, first_only: bool
) -> Array:
    """RoPE attention in the layer's window: normalised x (T, C) -> context (T, C), or (P, C) when ``first_only``."""
    c, heads, whole = config.hidden_size, config.num_attention_heads, layer in config.global_layers
    theta = config.global_theta if whole else config.local_theta
    packed = weights[f"layers.{layer}.attn.Wqkv.weight"]  # rows of q, then of k, then of v
    q = ops.linear(ops.first_tokens(x, cu_seqlens) if first_only else x, packed[:c])
    k = ops.rotate(ops.linear(x, packed[c : 2 * c]), cu_seqlens, heads, theta)
    v = ops.linear(x, packed[2 * c :])
    if not first_only:  # the rotation of position 0 is the identity
        q = ops.rotate(q, cu_seqlens, heads, theta)
    return ops.attention(q, k, v, cu_seqlens, heads, (), first_only, 0 if whole else config.half_window)


def encoder_layer(
    weights: Weights, config: ModelConfig, layer: int, x: Array, cu_seqlens: Array, ops: Ops, first_only: bool
) -> Array:
    """One layer: (T, C) -> (T, C), or (P, C), the first token of each pair, when ``first_only``."""
    name = f"layers.{layer}"
    normed = norm(weights, f"{name}.attn_norm", x, config, ops) if layer else x
    context = attention(weights, config, layer, normed, cu_seqlens, ops, first_only)
    x = ops.first_tokens(x, cu_seqlens) if first_only else x
    x = x + dense(weights, f"{name}.attn.Wo", context, ops)
    gated = ops.geglu(norm(weights, f"{name}.mlp_norm", x, config, ops), weights[f"{name}.mlp.Wi.weight"])
    return x + dense(weights, f"{name}.mlp.Wo", gated, ops)


def forward(
    weights: Weights, config: ModelConfig, batch: PackedBatch, ops: Ops, trace: list[Array] | None = None
) -> Array:
    """Logits (P,) of a packed batch. Appends the embeddings and each layer's output to ``trace``, if given."""
    x = norm(weights, "embeddings.norm", ops.take(weights[WORDS], batch.input_ids), config, ops)  # (T, C)
    _note(trace, x)
    last, cls = config.num_hidden_layers - 1, config.pooling == "cls"
    for layer in range(config.num_hidden_layers):
        few = cls and layer == last
        x = ops.layer(encoder_layer, weights, config, layer, x, batch.cu_seqlens, ops, few)
        _note(trace, x)
    x = norm(weights, "final_norm", x, config, ops)  # (P, C) or (T, C)
    pooled = x if cls else ops.means(x, batch.cu_seqlens)
    hidden = norm(weights, "head.norm", ops.gelu(dense(weights, "head.dense", pooled, ops)), config, ops)
    return dense(weights, "classifier", hidden, ops)[:, 0]


def _note(trace: list[Array] | None, x: Array) -> None:
    if trace is not None:
        trace.append(x)
