"""What a student may learn from inside its teacher, besides scores: hidden states and relations of attention.

Plain functions on tensors of packed batches, which teacher and student must share: the same tokens in the same places.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from turborank.errors import InputError


def layer_map(student_layers: int, teacher_layers: int) -> tuple[tuple[int, int], ...]:
    """Which state of the teacher each state of the student follows, evenly spread (TinyBERT, arXiv 1909.10351).

    States are numbered as a forward's ``trace`` holds them: 0 is the embeddings, l the output of layer l. The last
    follows the last.
    """
    if not 1 <= student_layers <= teacher_layers:
        raise InputError(f"expected a student of 1 to {teacher_layers} layers, got {student_layers}")
    return tuple((layer, round(layer * teacher_layers / student_layers)) for layer in range(student_layers + 1))


def projection(student_size: int, teacher_size: int, seed: int = 0) -> Tensor:
    """A matrix (C of the teacher, C of the student) to be learnt beside the student, which takes its states to theirs.

    Random rows of length near 1, so that a projected state starts as large as the state.
    """
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(teacher_size, student_size, generator=generator) / math.sqrt(student_size)


def hidden_states(
    student: Sequence[Tensor],
    teacher: Sequence[Tensor],
    layers: Sequence[tuple[int, int]],
    projections: Sequence[Tensor | None] | None = None,
) -> Tensor:
    """Mean over ``layers`` of the squared error of states (T, C), divided by the target's variance; a scalar.

    The variance is that about each feature's mean over the batch's tokens, so 1 is what a student reaches that knows
    nothing but those means, whatever the size of a layer's activations (layer-wise distillation: arXiv 1910.01108,
    1909.10351). ``projections`` has a matrix or None for each of ``layers``; see :func:`projection`. The teacher's
    states get no gradient.

    Raises InputError where shapes differ, say because a forward computed its last layer for first tokens only.
    """
    matrices = projections or [None] * len(layers)
    errors = []
    for (ours, theirs), matrix in zip(layers, matrices, strict=True):
        state, target = student[ours].float(), teacher[theirs].detach().float()
        if matrix is not None:
            state = state @ matrix.T
        if state.shape != target.shape:
            raise InputError(
                f"expected states of one shape, got {tuple(state.shape)} of the student's {ours} and "
                f"{tuple(target.shape)} of the teacher's {theirs}; use a projection where sizes differ"
            )
        variance = (target - target.mean(dim=0)).square().mean()
        errors.append((state - target).square().mean() / variance.clamp(min=torch.finfo(torch.float32).tiny))
    return torch.stack(errors).mean()


def _relation(x: Tensor, heads: int) -> Tensor:
    """The log softmax of x·xᵀ / √d in each head: states (n, C) of one pair -> (heads, n, n)."""
    split = x.float().view(x.shape[0], heads, -1).transpose(0, 1)  # (heads, n, d)
    return torch.log_softmax(split @ split.transpose(1, 2) / math.sqrt(split.shape[2]), dim=-1)


def relations(student: Tensor, teacher: Tensor, cu_seqlens: Tensor, heads: int) -> Tensor:
    """One relation's part of MiniLMv2 (arXiv 2012.15828): KL from the teacher's relations to the student's.

    ``student`` (T, C) and ``teacher`` (T, C'), of sizes that ``heads`` divides, are the queries (or the keys, or the
    values) of one layer. Each is cut into ``heads`` relation heads, however many attention heads its model has; within
    a pair, token i's relation is the softmax over j of x_i·x_j / √(head size). The mean over tokens and heads.

    A pair of n tokens takes memory of heads·n² for the backward pass.
    """
    for whose, x in (("student", student), ("teacher", teacher)):
        if x.shape[1] % heads:
            raise InputError(f"expected relation heads that divide the {whose}'s size {x.shape[1]}, got {heads}")
    total = student.new_zeros((), dtype=torch.float32)
    for start, end in itertools.pairwise(cu_seqlens.tolist()):
        wanted = _relation(teacher[start:end].detach(), heads)
        given = _relation(student[start:end], heads)
        total = total + (wanted.exp() * (wanted - given)).sum()
    return total / (heads * student.shape[0])


def attention_relations(student: Sequence[Tensor], teacher: Sequence[Tensor], cu_seqlens: Tensor, heads: int) -> Tensor:
    """MiniLMv2's loss: the sum of :func:`relations` over (queries, keys, values), as the paper weighs them alike."""
    return torch.stack(
        [relations(ours, theirs, cu_seqlens, heads) for ours, theirs in zip(student, teacher, strict=True)]
    ).sum()
