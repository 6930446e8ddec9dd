"""Which ALiBi slope suits which attention head of a BERT? An assignment that costs no training."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from turborank.architectures import encoder
from turborank.ops import training
from turborank.types import ModelConfig, PackedBatch

if TYPE_CHECKING:
    from turborank.distill.biencoder import BiEncoder

PROBE_TOKENS = 200  # read of each text


def match_heads(weights: dict[str, Tensor], config: ModelConfig, source: BiEncoder, texts: Sequence[str]) -> None:
    """Permute the heads of ``weights`` in place, layer by layer: each slope is served by the head it hurts least.

    Cost of a head under a slope: cross entropy between the source's attention and the head's own scores with that
    slope's bias, over the source's hidden states and the student's (its lower layers already permuted). The cheapest
    assignment is found by the Hungarian algorithm.
    """
    from scipy.optimize import linear_sum_assignment

    batches = [source.pack([ids]) for ids in source.token_ids(texts, PROBE_TOKENS)]
    size = config.head_size
    for layer in range(config.num_hidden_layers):
        name = f"encoder.layer.{layer}.attention"
        cost = sum(_costs(weights, config, source, name, layer, batch) for batch in batches)
        heads, places = linear_sum_assignment(cost.numpy())  # type: ignore[union-attr]
        order = torch.empty(len(heads), dtype=torch.long)
        order[torch.as_tensor(places)] = torch.as_tensor(heads)  # slope h is served by the old head order[h]
        rows = (order[:, None] * size + torch.arange(size)).flatten()
        for part in encoder.PROJECTIONS:
            for kind in ("weight", "bias"):
                key = f"{name}.self.{part}.{kind}"
                weights[key] = weights[key][rows]
        weights[f"{name}.output.dense.weight"] = weights[f"{name}.output.dense.weight"][:, rows]


def _costs(
    weights: dict[str, Tensor], config: ModelConfig, source: BiEncoder, name: str, layer: int, batch: PackedBatch
) -> Tensor:
    """(H heads, H slopes), of one text."""
    heads = config.num_attention_heads
    want = torch.softmax(_scores(source.weights, name, source.layers(batch)[layer], heads), dim=-1)
    have = _scores(weights, name, _layers(weights, config, batch)[layer], heads)
    steps = torch.arange(have.shape[-1])
    distance = (steps[:, None] - steps[None, :]).abs()
    columns = [-(want * torch.log_softmax(have - slope * distance, dim=-1)).sum(-1).mean(-1) for slope in config.slopes]
    return torch.stack(columns, dim=1)


def _scores(weights: dict[str, Tensor], name: str, x: Tensor, heads: int) -> Tensor:
    """Scaled products of queries and keys of one text: (H, n, n)."""
    q, k = (encoder.dense(weights, f"{name}.self.{part}", x, training) for part in ("query", "key"))
    q, k = (y.view(y.shape[0], heads, -1).transpose(0, 1) for y in (q, k))
    scores: Tensor = q @ k.transpose(1, 2) / q.shape[-1] ** 0.5
    return scores


def _layers(weights: dict[str, Tensor], config: ModelConfig, batch: PackedBatch) -> list[Tensor]:
    """The student's hidden states of a text that is read alone."""
    trace: list[Tensor] = []
    bounds: Any = batch.cu_seqlens
    with torch.no_grad():
        x = training.take(weights["embeddings.word_embeddings.weight"], batch.input_ids)  # type: ignore[arg-type]
        x = encoder.norm(weights, "embeddings.LayerNorm", x, config, training)
        encoder.encode(weights, config, x, bounds, training, first_only=False, trace=trace)
    return trace
