"""Learning from inside a teacher: :mod:`turborank.distill.terms`, for a teacher that reads the same tokens."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from turborank.architectures.jinabert import COSINES
from turborank.distill.model import Model
from turborank.distill.students import Student
from turborank.distill.terms import attention_relations, hidden_states, layer_map, projection
from turborank.errors import InputError
from turborank.tokens import read_template
from turborank.types import ModelConfig, PackedBatch

KINDS = ("hidden", "relations")


class InnerSpec(NamedTuple):
    """One term, as KIND:MODEL[:WEIGHT] says it."""

    kind: str
    model: str
    weight: float = 1.0


def parse(text: str) -> InnerSpec:
    """``hidden:teacher-folder:0.5`` -> InnerSpec. Raises InputError for anything else."""
    kind, _, rest = text.partition(":")
    model, colon, number = rest.rpartition(":")
    try:
        weight = float(number) if colon else 1.0
    except ValueError:
        model, weight = rest, 1.0  # a colon that belongs to the model's name
    if not colon:
        model = rest
    if kind not in KINDS or not model or not math.isfinite(weight):
        raise InputError(f"expected hidden:MODEL[:WEIGHT] or relations:MODEL[:WEIGHT], got {text!r}")
    return InnerSpec(kind, model, weight)


class Inner:
    """A teacher's hidden states or attention relations as one more loss on a step's batch.

    Raises InputError where teacher and student do not read a pair as the same tokens.
    """

    def __init__(self, spec: InnerSpec, student: Student, dtype: torch.dtype) -> None:
        self.spec = spec
        teacher = Student.load(spec.model)
        if _reading(teacher) != _reading(student):
            raise InputError(
                f"expected a teacher that reads the student's tokens, got another vocabulary in {spec.model}",
                hint="a student of recipe layers or alibi has its source's; scores (--teacher) need no shared tokens",
            )
        self.teacher = Model(teacher, dtype=dtype, freeze_words=True).requires_grad_(False)
        ours, theirs = student.config, teacher.config
        self.layers = layer_map(ours.num_hidden_layers, theirs.num_hidden_layers)
        if not (ours.head in COSINES and theirs.head in COSINES):
            self.layers = self.layers[:-1]  # a classifier computes its last layer for first tokens only
        self.heads = math.gcd(ours.num_attention_heads, theirs.num_attention_heads)
        self.places = _last_whole(ours), _last_whole(theirs)
        self.projections: list[torch.nn.Parameter | None] = [None] * len(self.layers)
        if spec.kind == "hidden" and ours.hidden_size != theirs.hidden_size:
            matrices = [projection(ours.hidden_size, theirs.hidden_size, seed) for seed in range(len(self.layers))]
            self.projections = [torch.nn.Parameter(matrix) for matrix in matrices]

    def __call__(self, batch: PackedBatch, trace: list[Tensor], record: list[tuple[Tensor, ...]]) -> Tensor:
        """The term, weighted; ``trace`` and ``record`` are the student's, of the same batch."""
        wanted: list[Tensor] = []
        kept: list[tuple[Tensor, ...]] = []
        with torch.no_grad():
            self.teacher(batch, wanted, kept)
        if self.spec.kind == "hidden":
            return self.spec.weight * hidden_states(trace, wanted, self.layers, self.projections)
        ours, theirs = record[self.places[0]], kept[self.places[1]]
        bounds = torch.as_tensor(batch.cu_seqlens)
        return self.spec.weight * attention_relations(ours, theirs, bounds, self.heads)


def _reading(student: Student) -> tuple[object, ...]:
    return student.tokenizer.get_vocab(), read_template(student.tokenizer)


def _last_whole(config: ModelConfig) -> int:
    """The last layer whose queries are computed for all tokens."""
    last = config.num_hidden_layers - 1
    return last if config.head in COSINES else max(0, last - 1)
