"""The teacher and the student before training, both made from ms-marco-MiniLM-L-12 (:func:`make`).

The teacher, WORK/teacher, has the twelve layers, its positions kept, ALiBi added, and a share of the weights of
turborank-embedded-v1. The student, WORK/student, is ten of its layers.

    python runs/embedded/student.py WORK V1

ALiBi: the 512 learned positions stay, and rows 64 … 511 repeat for the tokens after them (docs/model.md §3.1), so that
pairs of up to 512 tokens are read as before. Slopes are assigned to heads, layer by layer, so that each is served by
the head whose attention it changes least (least total cross entropy). Segments, pooler and classifier are kept. Without
positions the ranking is lost: runs/results/students.md.

Average of weights (:func:`mix`): v1 was trained from all-MiniLM-L6-v2, a bi-encoder, which was fine-tuned from
microsoft/MiniLM-L12-H384-uncased, as ms-marco-MiniLM-L-12 was. They are close enough for a mean of their weights to
rank web questions as well, and scientific ones better (model soups, arXiv 2203.05482, here of models trained for
different tasks; runs/results/students.md).
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from common import Corpus, IdPair, pack
from torch import Tensor

from turborank.architectures import encoder
from turborank.distill.biencoder import BiEncoder
from turborank.distill.students import ALIBI, Student, assign_heads, keep_layers
from turborank.distill.trainer import tensors
from turborank.ops import torch_training as training

KEPT = (0, 1, 2, 4, 5, 6, 7, 8, 10, 11)  # the teacher's layers, from 0, that the student begins with
# The teacher's states that the student's layers learn: the input of the next kept layer; the last one.
TARGETS = (*KEPT[1:], 12)
L12, BGE = "ms-marco-MiniLM-L-12-v2", "bge-small-en-v1.5"  # folders in WORK/teachers
SHARE = 0.25  # of v1, before training; chosen on the development sets
SLOPES = (*(2.0 ** -(4 + h / 2) for h in range(5)), *(2.0**-h for h in range(7, 13)), 0.0)
REPEAT_FROM = 64  # positions before it belong to the query
STATED = ("hidden_size", "num_attention_heads", "intermediate_size", "vocab_size", "layer_norm_eps")


def make(l12: Path, v1: Path, probes: Sequence[IdPair], work: Path) -> None:
    """Write WORK/teacher and WORK/student. ``probes``: some pairs on which heads are matched to slopes."""
    source = BiEncoder.load(l12)
    parts = ("embeddings", "encoder", "pooler", "classifier")
    weights = {name: w.clone() for name, w in source.weights.items() if name.startswith(parts)}
    match_heads(weights, source, probes)
    mix(weights, Student.load(v1).weights, SHARE)
    raw = dict(ALIBI) | {name: getattr(source.config, name) for name in STATED}
    raw |= {"type_vocab_size": 2, "feed_forward_type": "original"}
    raw |= {"alibi_slopes": list(SLOPES), "repeat_positions_from": REPEAT_FROM}
    for name, kept in (("teacher", tuple(range(source.config.num_hidden_layers))), ("student", KEPT)):
        shape = raw | {"num_hidden_layers": len(kept)}
        Student(keep_layers(weights, kept), shape, source.tokenizer).save(work / name)


@torch.no_grad()
def mix(
    weights: dict[str, Tensor],
    v1: Mapping[str, Tensor],
    share: float,
    *,
    kept: Sequence[int] = range(12),
    embeddings: bool = True,
) -> None:
    """Replace ``weights``, in place, by (1 - share) · weights + share · v1: embeddings, and the layers both have.

    v1's layer i is layer 2 i of the twelve, of which ``weights`` have ``kept``. Its heads are first permuted to the
    order of ``weights``: each to the head whose value projection is most similar (cosine, Hungarian algorithm). It has
    no positions (its words hold their mean), so those of ``weights`` become (1 - share) of what they were.
    """
    twins = dict(v1)
    layers = sorted({int(name.split(".")[2]) for name in twins if name.startswith("encoder.layer.")})
    partner = {name: name for name in weights if embeddings and name.startswith("embeddings.")}
    for layer in layers:
        mine, its = f"encoder.layer.{kept.index(2 * layer)}.", f"encoder.layer.{layer}."
        value = "attention.self.value.weight"
        have, found = (F.normalize(w.reshape(len(SLOPES), -1)) for w in (weights[mine + value], twins[its + value]))
        assign_heads(twins, f"{its}attention", -(found @ have.T))
        partner |= {name: its + name.removeprefix(mine) for name in weights if name.startswith(mine)}
    for name, its in partner.items():
        weights[name] = torch.lerp(weights[name], twins.get(its, torch.zeros_like(weights[name])), share)


@torch.no_grad()
def match_heads(weights: dict[str, Tensor], source: BiEncoder, probes: Sequence[IdPair]) -> None:
    """Permute the heads of every layer of ``weights`` in place; costs are read on the teacher's states."""
    config = source.config
    heads, size = config.num_attention_heads, config.head_size
    cost = torch.zeros(config.num_hidden_layers, heads, len(SLOPES))
    for probe in probes:
        batch, trace = tensors(pack([probe])), list[Tensor]()
        x = encoder.embed(source.weights, config, batch, training)
        encoder.encode(source.weights, config, x, batch.cu_seqlens, training, first_only=False, trace=trace)
        steps = torch.arange(batch.tokens)
        distance = (steps[:, None] - steps[None]).abs()
        for layer in range(config.num_hidden_layers):
            name = f"encoder.layer.{layer}.attention.self"
            q, k = (
                encoder.dense(source.weights, f"{name}.{part}", trace[layer], training) for part in ("query", "key")
            )
            q, k = (y.view(batch.tokens, heads, size).transpose(0, 1) for y in (q, k))
            scores = q @ k.transpose(1, 2) / size**0.5
            attention = scores.softmax(-1)
            for column, slope in enumerate(SLOPES):
                biased = torch.log_softmax(scores - slope * distance, dim=-1)
                cost[layer, :, column] -= (attention * biased).sum(-1).mean(-1)
    for layer in range(config.num_hidden_layers):
        assign_heads(weights, f"encoder.layer.{layer}.attention", cost[layer])


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    if not (folder / "student").is_dir():
        teacher = folder / "teachers" / L12
        make(teacher, Path(sys.argv[2]), Corpus(folder, teacher).probes(), folder)
