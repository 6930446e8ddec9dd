"""Random checkpoints and batches for the native tests; no engine computes them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from turborank.architectures import ARCHITECTURES, jinabert
from turborank.ops import reference
from turborank.types import Float32, ModelConfig, PackedBatch

Weights = dict[str, Float32]


def config(
    *,
    hidden: int = 384,
    layers: int = 6,
    heads: int = 12,
    inner: int = 1536,
    vocab: int = 500,
    feed_forward: str = "geglu",
    head: str = "classifier",
    max_length: int = 8192,
    alibi: bool = True,
) -> ModelConfig:
    """The turbo shape with a small vocabulary, unless told otherwise."""
    slopes = jinabert.halved_tail_slopes(heads) if alibi else ()
    return ModelConfig(
        architecture="jinabert",
        vocab_size=vocab,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=inner,
        max_length=max_length,
        type_vocab_size=2,
        layer_norm_eps=1e-12,
        feed_forward=feed_forward,
        slopes=slopes,
        head=head,
    )


def deberta(
    *,
    hidden: int = 128,
    heads: int = 2,
    layers: int = 2,
    inner: int = 64,
    vocab: int = 500,
    max_length: int = 512,
    buckets: int = 256,
    furthest: int = 512,
) -> ModelConfig:
    """A small DeBERTa with the published tables of relative positions, unless told otherwise."""
    return ModelConfig(
        architecture="deberta",
        vocab_size=vocab,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=inner,
        max_length=max_length,
        type_vocab_size=0,
        layer_norm_eps=1e-7,
        position_buckets=buckets,
        max_relative_positions=furthest,
    )


def modernbert(
    *,
    hidden: int = 128,
    heads: int = 2,
    layers: int = 4,
    inner: int = 96,
    vocab: int = 500,
    max_length: int = 1000,
    half_window: int = 64,
    pooling: str = "cls",
    head_bias: bool = False,
) -> ModelConfig:
    """A small ModernBERT: every third layer attends to all keys, the others to 129, unless told otherwise."""
    return ModelConfig(
        architecture="modernbert",
        vocab_size=vocab,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=inner,
        max_length=max_length,
        type_vocab_size=0,
        layer_norm_eps=1e-5,
        feed_forward="geglu",
        half_window=half_window,
        global_layers=tuple(range(0, layers, 3)),
        global_theta=160_000.0,
        local_theta=10_000.0,
        pooling=pooling,
        head_bias=head_bias,
    )


def weights(model: ModelConfig, seed: int = 0) -> Weights:
    """Normal(0, 0.02) matrices as the published initialiser has them, wider embeddings, gains around 1."""
    rng = np.random.default_rng(seed)
    tensors: Weights = {}
    for name, shape in ARCHITECTURES[model.architecture].parameters(model).items():
        wide = name.startswith(("embeddings", "classifier", "encoder.rel_embeddings"))
        spread = 0.1 if wide else 0.02
        value = rng.normal(0.0, spread, shape)
        if "norm" in name.lower() and name.endswith("weight"):
            value = 1.0 + value
        tensors[name] = value.astype(np.float32)
    cosine = {"head.scale": 10.0, "head.bias": -1.0, "head.focus": 15.0}
    return tensors | {name: np.array([value], np.float32) for name, value in cosine.items() if name in tensors}


def batch(lengths: Sequence[int], vocab: int = 500, seed: int = 0) -> PackedBatch:
    """Random ids; the first third of each pair (at least one token) is the query, type 0, the rest type 1."""
    rng = np.random.default_rng(seed)
    offsets = np.cumsum([0, *lengths]).astype(np.int32)
    ids = rng.integers(0, vocab, offsets[-1]).astype(np.int32)
    types = np.concatenate([np.arange(n) >= max(1, n // 3) for n in lengths]).astype(np.int32)
    return PackedBatch(ids, types, offsets, max(lengths))


def reference_logits(
    tensors: Weights, model: ModelConfig, tokens: PackedBatch, trace: list[Float32] | None = None
) -> Float32:
    """Logits by the numpy engine."""
    forward = ARCHITECTURES[model.architecture].forward
    return np.asarray(forward(tensors, model, tokens, reference, trace=trace))


def single(tokens: PackedBatch, pair: int) -> PackedBatch:
    """One pair of a batch as a batch of its own."""
    start, end = int(tokens.cu_seqlens[pair]), int(tokens.cu_seqlens[pair + 1])
    offsets = np.array([0, end - start], np.int32)
    return PackedBatch(tokens.input_ids[start:end], tokens.type_ids[start:end], offsets, end - start)
