"""LOSSES: what a student's logits over lists of documents should be, one function a paper.

Every loss takes the logits of Q lists of K places and the :class:`Targets` of the same places, and is the mean over
the lists that have what it needs: a loss on labels skips lists without labels, one on teacher scores lists without a
teacher. Lists may be ragged: a place that holds no document weighs nothing and gets no gradient. If no list has what a
loss needs, the loss is 0.

Arithmetic is in float32 or better, whatever the logits come in. No loss squashes the logits: the student's scale is
its own to learn.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from turborank.errors import InputError, UnknownKeyError

TEACHER, LABELS = "teacher", "labels"
MU = 10.0  # weight of NDCG-Loss2 beside LambdaRank, as allRank and sentence-transformers have it
_NOWHERE = -1e30  # the logit of a place that takes no part in a softmax; finite, so that gradients stay so


class Targets(NamedTuple):
    """What is known about Q lists of K places.

    ``trusted`` is False for unlabelled documents that are suspected to be relevant. Losses on labels take every other
    unlabelled document for irrelevant and leave these out.
    """

    teacher: Tensor | None  # (Q, K) float32 logits of the (fused) teacher; NaN where it has said nothing
    labels: Tensor | None  # (Q, K) float32 graded relevance; -1 where nobody has judged
    real: Tensor  # (Q, K) bool: this place holds a document
    trusted: Tensor  # (Q, K) bool


Loss = Callable[..., Tensor]  # (logits (Q, K), Targets, parameter) -> scalar


class LossRow(NamedTuple):
    """One loss: the function, where it comes from, and what a list must have for it."""

    function: Loss
    paper: str
    needs: str  # "teacher" or "labels"
    parameter: str | None = None  # what NAME@NUMBER sets


def _float(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _mean(losses: Tensor, has: Tensor) -> Tensor:
    """The mean of ``losses`` (Q,) over the lists that ``has`` (Q,); 0, with a gradient of 0, if there are none."""
    return torch.where(has, losses, 0.0).sum() / has.sum().clamp(min=1)


def _taught(logits: Tensor, targets: Targets) -> tuple[Tensor, Tensor, Tensor]:
    """(logits, teacher scores, places the teacher has scored), all (Q, K), with 0 at other places."""
    teacher = torch.full_like(_float(logits), torch.nan) if targets.teacher is None else _float(targets.teacher)
    places = targets.real & torch.isfinite(teacher)
    return torch.where(places, _float(logits), 0.0), torch.where(places, teacher, 0.0), places


def _labelled(logits: Tensor, targets: Targets) -> tuple[Tensor, Tensor, Tensor]:
    """(logits, grades, places that count), all (Q, K), with 0 at other places.

    The places of a list without any label do not count.
    """
    labels = torch.full_like(_float(logits), -1.0) if targets.labels is None else _float(targets.labels)
    known = targets.real & (labels >= 0)
    places = (known | (targets.real & targets.trusted)) & known.any(dim=1, keepdim=True)
    return torch.where(places, _float(logits), 0.0), torch.where(known, labels, 0.0), places


def _pairs(places: Tensor) -> Tensor:
    """(Q, K) -> (Q, K, K): both places count."""
    return places[:, :, None] & places[:, None, :]


def _differences(x: Tensor) -> Tensor:
    """X (Q, K) -> x_i - x_j (Q, K, K)."""
    return x[:, :, None] - x[:, None, :]


def _log_softmax(x: Tensor, places: Tensor) -> Tensor:
    return torch.log_softmax(x.masked_fill(~places, _NOWHERE), dim=1)


# ---------------------------------------------------------------- on teacher scores


def margin_mse(logits: Tensor, targets: Targets) -> Tensor:
    """MarginMSE (arXiv 2010.02666): mean over pairs i < j of ((s_i - s_j) - (t_i - t_j))².

    The paper pairs one positive with one negative; a teacher has an opinion of every pair, so here all count.
    The pairs need not be formed: their mean is twice the unbiased variance of s - t over the list.
    """
    s, t, places = _taught(logits, targets)
    count = places.sum(dim=1)
    error = s - t
    centre = error.sum(dim=1, keepdim=True) / count[:, None].clamp(min=1)
    spread = torch.where(places, error - centre, 0.0).square().sum(dim=1)
    return _mean(2.0 * spread / (count - 1).clamp(min=1), count > 1)


def kl(logits: Tensor, targets: Targets, temperature: float = 1.0) -> Tensor:
    """Listwise distillation: T²·KL(softmax(t / T) ‖ softmax(s / T)) over the list.

    Knowledge distillation (arXiv 1503.02531), which also gives the T²; over lists of documents: arXiv 2110.07367.
    """
    s, t, places = _taught(logits, targets)
    wanted, given = _log_softmax(t / temperature, places), _log_softmax(s / temperature, places)
    divergence = (wanted.exp() * (wanted - given)).sum(dim=1)
    return _mean(temperature**2 * divergence, places.sum(dim=1) > 1)


def ranknet(logits: Tensor, targets: Targets) -> Tensor:
    """RankNet (Burges et al., ICML 2005) on the teacher's order, as arXiv 2304.09542 distils permutations.

    The mean over pairs with t_i > t_j of log(1 + exp(s_j - s_i)).
    """
    s, t, places = _taught(logits, targets)
    above = _pairs(places) & (_differences(t) > 0)
    costs = torch.where(above, F.softplus(-_differences(s)), 0.0).sum(dim=(1, 2))
    count = above.sum(dim=(1, 2))
    return _mean(costs / count.clamp(min=1), count > 0)


def _ranks(x: Tensor, places: Tensor, above: Callable[[Tensor], Tensor]) -> Tensor:
    """1 + Σ_{j≠i} above(x_j - x_i) (Q, K): ranks from 1, exact or approximate."""
    others = _pairs(places) & ~torch.eye(x.shape[1], dtype=torch.bool, device=x.device)
    return 1.0 + torch.where(others, above(-_differences(x)), 0.0).sum(dim=2)


def adr_mse(logits: Tensor, targets: Targets, temperature: float = 1.0) -> Tensor:
    """ADR-MSE, approximate discounted rank MSE (arXiv 2405.07920): mean over places of (π - π̂)² / log₂(π + 1).

    π is the teacher's rank (equal scores share the middle of their ranks), π̂_i = 1 + Σ_{j≠i} σ((s_j - s_i) / T) the
    student's approximate one.
    """
    s, t, places = _taught(logits, targets)
    wanted = _ranks(t, places, lambda d: (d.sign() + 1.0) / 2.0)
    given = _ranks(s, places, lambda d: torch.sigmoid(d / temperature))
    errors = torch.where(places, (wanted - given).square() / torch.log2(wanted + 1.0), 0.0)
    count = places.sum(dim=1)
    return _mean(errors.sum(dim=1) / count.clamp(min=1), count > 1)


# ---------------------------------------------------------------- on labels


def lambda_loss(logits: Tensor, targets: Targets, mu: float = MU) -> Tensor:
    """LambdaLoss, NDCG-Loss2++ (Wang et al., CIKM 2018): a bound of nDCG's loss, with the paper's letters

        Σ_{y_i > y_j} (ρ_ij + μ·δ_ij)·|G_i - G_j|·log₂(1 + exp(s_j - s_i))

    where G_i = (2^y_i - 1) / maxDCG, D_i = log₂(1 + rank of i by s), ρ_ij = |1/D_i - 1/D_j| and
    δ_ij = |1/D(|i-j|) - 1/D(|i-j| + 1)|, in which |i-j| is the distance of the two ranks. Ranks carry no gradient.
    """
    s, y, places = _labelled(logits, targets)
    k = s.shape[1]
    steps = torch.arange(1, k + 2, device=s.device, dtype=s.dtype)
    inverse = 1.0 / torch.log2(1.0 + steps)  # of ranks 1 … K + 1
    order = torch.argsort(s.detach().masked_fill(~places, _NOWHERE), dim=1, descending=True, stable=True)
    rank = torch.argsort(order, dim=1)  # (Q, K) from 0
    gain = torch.where(places, 2.0**y - 1.0, 0.0)
    best = (gain.sort(dim=1, descending=True).values * inverse[:k]).sum(dim=1)  # (Q,) maxDCG
    gain = gain / torch.where(best > 0, best, 1.0)[:, None]
    rho = _differences(inverse[rank]).abs()
    apart = _differences(rank).abs().clamp(min=1)
    delta = inverse[apart - 1] - inverse[apart]
    weight = (rho + mu * delta) * _differences(gain).abs()
    above = _pairs(places) & (_differences(y) > 0)
    cost = F.softplus(-_differences(s)) / torch.log(torch.tensor(2.0, dtype=s.dtype, device=s.device))
    return _mean(torch.where(above, weight * cost, 0.0).sum(dim=(1, 2)), above.any(dim=2).any(dim=1))


def infonce(logits: Tensor, targets: Targets) -> Tensor:
    """InfoNCE (arXiv 1807.03748): -log of a positive's share of exp(s) among itself and the negatives.

    The mean over the list's positives (grade above 0); positives do not compete with one another. Negatives are the
    judged and the trusted unjudged rest. A list without both has nothing to say.
    """
    s, y, places = _labelled(logits, targets)
    positive, negative = places & (y > 0), places & (y == 0)
    against = torch.logsumexp(s.masked_fill(~negative, _NOWHERE), dim=1, keepdim=True)  # (Q, 1)
    costs = torch.where(positive, F.softplus(against - s), 0.0).sum(dim=1)
    count = positive.sum(dim=1)
    return _mean(costs / count.clamp(min=1), (count > 0) & negative.any(dim=1))


def softmax(logits: Tensor, targets: Targets) -> Tensor:
    """Softmax cross entropy of a list (ListNet, Cao et al., ICML 2007; for rerankers: arXiv 2210.10634).

    -Σ_i p_i·log softmax(s)_i, where the grades divided by their sum are p.
    """
    s, y, places = _labelled(logits, targets)
    total = torch.where(places, y, 0.0).sum(dim=1)
    share = torch.where(places, y, 0.0) / torch.where(total > 0, total, 1.0)[:, None]
    return _mean(-(share * _log_softmax(s, places)).sum(dim=1), total > 0)


def bce(logits: Tensor, targets: Targets) -> Tensor:
    """Binary cross entropy of each place (monoBERT, arXiv 1901.04085): relevant is a grade above 0.

    The mean over a list's places.
    """
    s, y, places = _labelled(logits, targets)
    costs = F.binary_cross_entropy_with_logits(s, (y > 0).to(s.dtype), reduction="none")
    count = places.sum(dim=1)
    return _mean(torch.where(places, costs, 0.0).sum(dim=1) / count.clamp(min=1), count > 0)


LOSSES: dict[str, LossRow] = {
    "margin_mse": LossRow(margin_mse, "arXiv 2010.02666", TEACHER),
    "kl": LossRow(kl, "arXiv 1503.02531, arXiv 2110.07367", TEACHER, "temperature"),
    "ranknet": LossRow(ranknet, "Burges et al., ICML 2005; arXiv 2304.09542", TEACHER),
    "adr_mse": LossRow(adr_mse, "arXiv 2405.07920", TEACHER, "temperature"),
    "lambda": LossRow(lambda_loss, "Wang et al., CIKM 2018", LABELS, "mu"),
    "infonce": LossRow(infonce, "arXiv 1807.03748", LABELS),
    "softmax": LossRow(softmax, "Cao et al., ICML 2007; arXiv 2210.10634", LABELS),
    "bce": LossRow(bce, "arXiv 1901.04085", LABELS),
}


# ---------------------------------------------------------------- several at once


class Part(NamedTuple):
    """One loss of a mix."""

    name: str  # as it was written: "kl", "kl@2"
    row: LossRow
    weight: float
    parameter: float | None


class Mix(NamedTuple):
    """A weighted sum of losses."""

    parts: tuple[Part, ...]

    @property
    def needs(self) -> frozenset[str]:
        """What the data must have somewhere: "teacher", "labels" or both."""
        return frozenset(part.row.needs for part in self.parts)

    def __call__(self, logits: Tensor, targets: Targets) -> tuple[Tensor, dict[str, float]]:
        """The weighted sum, and each loss by name before it is weighted."""
        values = torch.stack([_value(part, logits, targets) for part in self.parts])
        weights = torch.tensor([part.weight for part in self.parts], dtype=values.dtype, device=values.device)
        names = (part.name for part in self.parts)
        return (weights * values).sum(), dict(zip(names, values.detach().tolist(), strict=True))


def _value(part: Part, logits: Tensor, targets: Targets) -> Tensor:
    if part.parameter is None or part.row.parameter is None:
        return part.row.function(logits, targets)
    return part.row.function(logits, targets, **{part.row.parameter: part.parameter})


def mix(spec: str) -> Mix:
    """Losses as written on the command line: NAME[@PARAMETER][:WEIGHT], separated by commas; "kl@2:1,infonce:0.5".

    Raises UnknownKeyError for a name that is not in LOSSES, and InputError for anything else that cannot be read.
    """
    parts = tuple(_part(text.strip(), spec) for text in spec.split(","))
    doubles = {part.name for part in parts if [other.name for other in parts].count(part.name) > 1}
    if doubles:
        raise InputError(f"expected each loss once, got {', '.join(sorted(doubles))} more than once in {spec!r}")
    return Mix(parts)


def _part(text: str, spec: str) -> Part:
    name, _, weight = text.partition(":")
    key, _, parameter = name.partition("@")
    if key not in LOSSES:
        raise UnknownKeyError("a loss", key, LOSSES)
    row = LOSSES[key]
    if parameter and row.parameter is None:
        raise InputError(f"expected {key} without a parameter, got {name!r} in {spec!r}", hint="it has none")
    return Part(
        name,
        row,
        _number(weight or "1", f"the weight of {name}", spec),
        _number(parameter, f"the {row.parameter} of {key}", spec) if parameter else None,
    )


def _number(text: str, what: str, spec: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not 0 < value < float("inf"):
        raise InputError(f"expected {what} to be a number above 0, got {text!r} in {spec!r}")
    return value


# What a student may learn from inside its teacher, besides scores: hidden states and relations of attention.
#
# Plain functions on tensors of packed batches, which teacher and student must share: the same tokens in the same
# places.


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
