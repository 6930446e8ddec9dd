"""The student before each stage of training.

    python runs/embedded/student.py WORK      before the second stage: WORK/second-student and WORK/second-teacher

First (:func:`make`): nine layers of ms-marco-MiniLM-L-12, its positions kept, ALiBi added. The 512 learned positions
stay, and rows 64 … 511 repeat for the tokens after them (docs/model.md §3.1), so that pairs of up to 512 tokens are
read as the teacher reads them. ALiBi's slopes are assigned to heads, layer by layer, so that each is served by the
head whose attention it changes least (least total cross entropy). Segments, pooler and classifier are kept. Without
positions the teacher's ranking is lost: runs/results/students.md.

Second (:func:`mix`): a weighted mean of the first stage's weights and those of the bi-encoder all-MiniLM-L6-v2; the
teacher, ms-marco-MiniLM-L-12, is mixed with it, too. Both were fine-tuned from microsoft/MiniLM-L12-H384-uncased, and
are close enough for a mean of their weights to rank web questions as well, and scientific ones better (model soups,
arXiv 2203.05482, here of models trained for different tasks; runs/results/students.md).
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from common import IdPair, pack
from torch import Tensor

from turborank.architectures import encoder
from turborank.distill.biencoder import BiEncoder
from turborank.distill.students import ALIBI, Student, assign_heads, keep_layers
from turborank.distill.trainer import tensors
from turborank.ops import torch_training as training

KEPT = (0, 1, 3, 4, 6, 7, 9, 10, 11)  # the teacher's layers, from 0, whose weights the student begins with
# The teacher's states that the student's layers learn: the input of the next kept layer; the last one.
TARGETS = (1, 3, 4, 6, 7, 9, 10, 11, 12)
L12, MINILM = "ms-marco-MiniLM-L-12-v2", "all-MiniLM-L6-v2"  # folders in WORK/teachers
SHARES = {"student": 0.4, "teacher": 0.25}  # of all-MiniLM-L6-v2; chosen on the development sets
SLOPES = (*(2.0 ** -(4 + h / 2) for h in range(5)), *(2.0**-h for h in range(7, 13)), 0.0)
REPEAT_FROM = 64  # positions before it belong to the query
STATED = ("hidden_size", "num_attention_heads", "intermediate_size", "vocab_size", "layer_norm_eps")


def make(teacher: Path, probes: Sequence[IdPair], out: Path) -> None:
    """Write the student's folder. ``probes``: some pairs on which heads are matched to slopes."""
    source = BiEncoder.load(teacher)
    parts = ("embeddings", "encoder", "pooler", "classifier")
    weights = {name: w.clone() for name, w in source.weights.items() if name.startswith(parts)}
    match_heads(weights, source, probes)
    raw = dict(ALIBI) | {name: getattr(source.config, name) for name in STATED}
    raw |= {"type_vocab_size": 2, "num_hidden_layers": len(KEPT), "feed_forward_type": "original"}
    raw |= {"alibi_slopes": list(SLOPES), "repeat_positions_from": REPEAT_FROM}
    Student(keep_layers(weights, KEPT), raw, source.tokenizer).save(out)


@torch.no_grad()
def mix(weights: dict[str, Tensor], kept: Sequence[int], other: Mapping[str, Tensor], share: float) -> None:
    """Replace ``weights``, in place, by (1 - share) · weights + share · other: embeddings and the layers both have.

    ``other``: all-MiniLM-L6-v2, whose layer i is layer 2 i of the twelve-layer model. ``kept``: for each layer of
    ``weights``, its index in the twelve-layer model. The heads of ``other`` are first permuted to the order of
    ``weights``: each to the head whose value projection is most similar (cosine, Hungarian algorithm).
    """
    twins = dict(other)
    partner = {name: name for name in weights if name.startswith("embeddings.")}
    for layer, number in enumerate(kept):
        if number % 2 == 0:
            mine, its = f"encoder.layer.{layer}.", f"encoder.layer.{number // 2}."
            value = "attention.self.value.weight"
            have, found = (F.normalize(w.reshape(len(SLOPES), -1)) for w in (weights[mine + value], twins[its + value]))
            assign_heads(twins, f"{its}attention", -(found @ have.T))
            partner |= {name: its + name.removeprefix(mine) for name in weights if name.startswith(mine)}
    for name, its in partner.items():
        weights[name] = torch.lerp(weights[name], twins[its], share)


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


def main() -> None:
    work = Path(sys.argv[1])
    other = BiEncoder.load(work / "teachers" / MINILM).weights
    sources = {"student": (work / "first" / "final", KEPT), "teacher": (work / "teachers" / L12, range(12))}
    for name, (folder, kept) in sources.items():
        model = Student.load(folder)
        mix(model.weights, kept, other, SHARES[name])
        model.save(work / f"second-{name}")


if __name__ == "__main__":
    main()
