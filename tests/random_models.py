"""Random weights of any shape, drawn so that activations stay in the range of trained models."""

import math
from typing import Any

import numpy as np

from turborank.architectures import ARCHITECTURES, jinabert
from turborank.types import Float32, ModelConfig, PackedBatch


def model_config(**changes: Any) -> ModelConfig:
    """A small JinaBERT of the turbo width: 12 heads, GEGLU, published slopes; two layers, short vocabulary."""
    base: dict[str, Any] = {
        "architecture": "jinabert", "vocab_size": 500, "hidden_size": 384, "num_hidden_layers": 2,
        "num_attention_heads": 12, "intermediate_size": 1536, "max_length": 8192, "type_vocab_size": 2,
        "layer_norm_eps": 1e-12, "feed_forward": "geglu", "slopes": jinabert.halved_tail_slopes(12),
        "head": "classifier",
    }  # fmt: skip
    return ModelConfig(**{**base, **changes})


def random_weights(config: ModelConfig, seed: int = 0) -> dict[str, Float32]:
    """Every parameter: matrices N(0, 1/in), norms near 1, biases near 0, a head that spreads logits."""
    rng = np.random.default_rng(seed)
    weights: dict[str, Float32] = {}
    for name, shape in ARCHITECTURES[config.architecture].parameters(config).items():
        if len(shape) == 2:
            value = rng.normal(0, 1 / math.sqrt(shape[1]), shape)
        elif name in ("head.scale", "head.focus"):
            value = np.full(shape, 10.0)
        elif name.lower().endswith("norm.weight"):
            value = rng.normal(1, 0.1, shape)
        else:
            value = rng.normal(0, 0.1, shape)
        weights[name] = value.astype(np.float32)
    return weights


def packed(lengths: list[int], vocab_size: int = 500, seed: int = 0) -> PackedBatch:
    """A batch of random tokens; the last two thirds of each pair are its document (type 1)."""
    rng = np.random.default_rng(seed)
    cu = np.cumsum([0, *lengths]).astype(np.int32)
    types = [(np.arange(n) >= max(1, n // 3)).astype(np.int32) for n in lengths]
    ids = rng.integers(0, vocab_size, cu[-1]).astype(np.int32)
    return PackedBatch(ids, np.concatenate(types), cu, max(lengths))
