"""The student before it has learnt anything: six layers of ms-marco-MiniLM-L-12, positions replaced by ALiBi.

The mean of the learned positions and the first type embedding go into the word embeddings; the second type stays,
as its difference to the first. Heads are permuted, layer by layer, so that each slope is served by the head it
hurts least (Hungarian algorithm on the cross entropy of attention). Pooler and classifier are kept."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from common import IdPair, pack
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from turborank.architectures import encoder
from turborank.distill.biencoder import BiEncoder
from turborank.distill.students import ALIBI, WORDS, Student, gentle_slopes, keep_layers
from turborank.distill.trainer import tensors
from turborank.ops import torch_training as training

KEPT = (0, 3, 5, 7, 9, 11)  # the teacher's layers, from 0, whose weights the student begins with
TARGETS = (2, 4, 6, 8, 10, 12)  # the teacher's layers, from 1, whose output the student's layers learn
TYPICAL = 200  # positions whose mean is kept: most pairs are shorter
TYPES = "embeddings.token_type_embeddings.weight"


def make(teacher: Path, probes: Sequence[IdPair], out: Path) -> None:
    """Write the student's folder. ``probes``: some pairs on which heads are matched to slopes."""
    source = BiEncoder.load(teacher)
    config = source.config
    parts = ("embeddings", "encoder", "pooler", "classifier")
    weights = {name: w.clone() for name, w in source.weights.items() if name.startswith(parts)}
    positions = weights.pop("embeddings.position_embeddings.weight")
    types = weights[TYPES]
    weights[WORDS] += positions[:TYPICAL].mean(0) + types[0]
    weights[TYPES] = torch.stack([torch.zeros_like(types[0]), types[1] - types[0]])
    names = (
        "hidden_size",
        "num_attention_heads",
        "intermediate_size",
        "num_hidden_layers",
        "vocab_size",
        "layer_norm_eps",
    )
    raw = dict(ALIBI) | {name: getattr(config, name) for name in names} | {"type_vocab_size": 2}
    raw |= {"alibi_slopes": list(gentle_slopes(config.num_attention_heads)), "feed_forward_type": "original"}
    student = Student(weights, raw, source.tokenizer)
    match_heads(student, source, probes)
    student.weights = keep_layers(student.weights, KEPT)
    student.raw_config["num_hidden_layers"] = len(KEPT)
    student.save(out)


@torch.no_grad()
def match_heads(student: Student, source: BiEncoder, probes: Sequence[IdPair]) -> None:
    """Permute the heads of every layer in place; each layer sees the states of the layers already permuted."""
    weights, config = student.weights, student.config
    heads, size = config.num_attention_heads, config.head_size
    batches = [tensors(pack([probe])) for probe in probes]
    wanted = []
    for batch in batches:
        trace: list[Tensor] = []
        x = encoder.embed(source.weights, source.config, batch, training)
        encoder.encode(source.weights, source.config, x, batch.cu_seqlens, training, first_only=False, trace=trace)
        wanted.append(trace)

    def states(batch, layer: int) -> Tensor:
        """The student's input of a layer."""
        trace: list[Tensor] = []
        x = training.take(weights[WORDS], batch.input_ids) + training.take(weights[TYPES], batch.type_ids)
        x = encoder.norm(weights, "embeddings.LayerNorm", x, config, training)
        encoder.encode(weights, config, x, batch.cu_seqlens, training, first_only=False, trace=trace)
        return trace[layer]

    def scores(of: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
        q, k = (encoder.dense(of, f"{name}.self.{part}", x, training) for part in ("query", "key"))
        q, k = (y.view(y.shape[0], heads, -1).transpose(0, 1) for y in (q, k))
        return q @ k.transpose(1, 2) / size**0.5

    for layer in range(config.num_hidden_layers):
        name = f"encoder.layer.{layer}.attention"
        cost = torch.zeros(heads, heads)
        for batch, trace in zip(batches, wanted, strict=True):
            probability = torch.softmax(scores(source.weights, name, trace[layer]), dim=-1)
            own = scores(weights, name, states(batch, layer))
            steps = torch.arange(own.shape[-1])
            distance = (steps[:, None] - steps[None]).abs()
            for column, slope in enumerate(config.slopes):
                biased = torch.log_softmax(own - slope * distance, dim=-1)
                cost[:, column] -= (probability * biased).sum(-1).mean(-1)
        chosen, places = linear_sum_assignment(cost.numpy())
        order = torch.empty(heads, dtype=torch.long)
        order[torch.as_tensor(places)] = torch.as_tensor(chosen)
        rows = (order[:, None] * size + torch.arange(size)).flatten()
        for part in encoder.PROJECTIONS:
            for kind in ("weight", "bias"):
                weights[f"{name}.self.{part}.{kind}"] = weights[f"{name}.self.{part}.{kind}"][rows]
        weights[f"{name}.output.dense.weight"] = weights[f"{name}.output.dense.weight"][:, rows]
