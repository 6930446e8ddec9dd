"""LOSSES: training losses on lists of documents, one function per paper; and losses on a teacher's inner states.

Every list loss takes the logits (Q, K) of Q lists of up to K documents and the :class:`Targets` of the same positions.
It is the mean over the lists that have what it needs: a loss on labels skips lists without labels, one on teacher
scores lists without scores. Lists may be ragged: a position without a document has no weight and gets no gradient. If
no list has what a loss needs, the loss is 0.

Arithmetic is in float32 or better, whatever the dtype of the logits. No loss squashes the logits, so the scale of the
student's logits is learnt.
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
MU = 10.0  # weight of NDCG-Loss2 relative to LambdaRank, as in allRank and sentence-transformers
_MASKED = -1e30  # logit of a masked position in a softmax; finite, so that gradients are


class Targets(NamedTuple):
    """Supervision of Q lists of K positions.

    ``trusted`` is False for unlabelled documents suspected to be relevant. Losses on labels leave these out and treat
    every other unlabelled document as irrelevant.
    """

    teacher: Tensor | None  # (Q, K) float32 logits of the (fused) teacher; NaN where there is no score
    labels: Tensor | None  # (Q, K) float32 graded relevance; -1 without a judgement
    real: Tensor  # (Q, K) bool: whether the position holds a document
    trusted: Tensor  # (Q, K) bool


LossFunction = Callable[..., Tensor]  # (logits (Q, K), Targets, parameter) -> scalar


class LossRow(NamedTuple):
    """One loss: the function, its paper, and what a list must have."""

    function: LossFunction
    paper: str
    needs: str  # "teacher" or "labels"
    parameter: str | None = None  # the argument that NAME@NUMBER sets


def _float(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _mean(losses: Tensor, has: Tensor) -> Tensor:
    """Mean of ``losses`` (Q,) over the lists where ``has`` (Q,) is True; 0, with zero gradient, if there are none."""
    return torch.where(has, losses, 0.0).sum() / has.sum().clamp(min=1)


def _taught(logits: Tensor, targets: Targets) -> tuple[Tensor, Tensor, Tensor]:
    """(logits, teacher scores, mask of scored positions), all (Q, K); values are 0 elsewhere."""
    teacher = torch.full_like(_float(logits), torch.nan) if targets.teacher is None else _float(targets.teacher)
    mask = targets.real & torch.isfinite(teacher)
    return torch.where(mask, _float(logits), 0.0), torch.where(mask, teacher, 0.0), mask


def _labelled(logits: Tensor, targets: Targets) -> tuple[Tensor, Tensor, Tensor]:
    """(logits, grades, mask of positions that count), all (Q, K); values are 0 elsewhere.

    No position of a list without labels counts.
    """
    labels = torch.full_like(_float(logits), -1.0) if targets.labels is None else _float(targets.labels)
    known = targets.real & (labels >= 0)
    mask = (known | (targets.real & targets.trusted)) & known.any(dim=1, keepdim=True)
    return torch.where(mask, _float(logits), 0.0), torch.where(known, labels, 0.0), mask


def _pairs(mask: Tensor) -> Tensor:
    """(Q, K) -> (Q, K, K): whether both positions count."""
    return mask[:, :, None] & mask[:, None, :]


def _differences(x: Tensor) -> Tensor:
    """X (Q, K) -> x_i - x_j (Q, K, K)."""
    return x[:, :, None] - x[:, None, :]


def _log_softmax(x: Tensor, mask: Tensor) -> Tensor:
    return torch.log_softmax(x.masked_fill(~mask, _MASKED), dim=1)


# ---------------------------------------------------------------- on teacher scores


def margin_mse(logits: Tensor, targets: Targets) -> Tensor:
    """MarginMSE (arXiv 2010.02666): mean over pairs i < j of ((s_i - s_j) - (t_i - t_j))².

    The paper pairs one positive with one negative; teacher scores order every pair, so all are used. Their mean is
    computed as twice the unbiased variance of s - t over the list.
    """
    s, t, mask = _taught(logits, targets)
    count = mask.sum(dim=1)
    error = s - t
    centre = error.sum(dim=1, keepdim=True) / count[:, None].clamp(min=1)
    spread = torch.where(mask, error - centre, 0.0).square().sum(dim=1)
    return _mean(2.0 * spread / (count - 1).clamp(min=1), count > 1)


def kl(logits: Tensor, targets: Targets, temperature: float = 1.0) -> Tensor:
    """Listwise distillation: T²·KL(softmax(t / T) ‖ softmax(s / T)) over the list.

    Knowledge distillation (arXiv 1503.02531), which also gives the T²; over lists of documents: arXiv 2110.07367.
    """
    s, t, mask = _taught(logits, targets)
    wanted, given = _log_softmax(t / temperature, mask), _log_softmax(s / temperature, mask)
    divergence = (wanted.exp() * (wanted - given)).sum(dim=1)
    return _mean(temperature**2 * divergence, mask.sum(dim=1) > 1)


def ranknet(logits: Tensor, targets: Targets) -> Tensor:
    """RankNet (Burges et al., ICML 2005) on the teacher's order, as arXiv 2304.09542 distils permutations.

    The mean over pairs with t_i > t_j of log(1 + exp(s_j - s_i)).
    """
    s, t, mask = _taught(logits, targets)
    above = _pairs(mask) & (_differences(t) > 0)
    costs = torch.where(above, F.softplus(-_differences(s)), 0.0).sum(dim=(1, 2))
    count = above.sum(dim=(1, 2))
    return _mean(costs / count.clamp(min=1), count > 0)


def _ranks(x: Tensor, mask: Tensor, above: Callable[[Tensor], Tensor]) -> Tensor:
    """1 + Σ_{j≠i} above(x_j - x_i) (Q, K): ranks from 1, exact or approximate."""
    others = _pairs(mask) & ~torch.eye(x.shape[1], dtype=torch.bool, device=x.device)
    return 1.0 + torch.where(others, above(-_differences(x)), 0.0).sum(dim=2)


def adr_mse(logits: Tensor, targets: Targets, temperature: float = 1.0) -> Tensor:
    """ADR-MSE, approximate discounted rank MSE (arXiv 2405.07920): mean over documents of (π - π̂)² / log₂(π + 1).

    π is the teacher's rank (ties share their mean rank), π̂_i = 1 + Σ_{j≠i} σ((s_j - s_i) / T) the
    student's approximate one.
    """
    s, t, mask = _taught(logits, targets)
    wanted = _ranks(t, mask, lambda d: (d.sign() + 1.0) / 2.0)
    given = _ranks(s, mask, lambda d: torch.sigmoid(d / temperature))
    errors = torch.where(mask, (wanted - given).square() / torch.log2(wanted + 1.0), 0.0)
    count = mask.sum(dim=1)
    return _mean(errors.sum(dim=1) / count.clamp(min=1), count > 1)


# ---------------------------------------------------------------- on labels


def lambda_loss(logits: Tensor, targets: Targets, mu: float = MU) -> Tensor:
    """LambdaLoss, NDCG-Loss2++ (Wang et al., CIKM 2018): a bound of nDCG's loss, with the paper's letters

        Σ_{y_i > y_j} (ρ_ij + μ·δ_ij)·|G_i - G_j|·log₂(1 + exp(s_j - s_i))

    where G_i = (2^y_i - 1) / maxDCG, D_i = log₂(1 + rank of i by s), ρ_ij = |1/D_i - 1/D_j| and
    δ_ij = |1/D(|i-j|) - 1/D(|i-j| + 1)|, in which |i-j| is the distance of the two ranks. Ranks carry no gradient.
    """
    s, y, mask = _labelled(logits, targets)
    k = s.shape[1]
    steps = torch.arange(1, k + 2, device=s.device, dtype=s.dtype)
    inverse = 1.0 / torch.log2(1.0 + steps)  # of ranks 1 … K + 1
    order = torch.argsort(s.detach().masked_fill(~mask, _MASKED), dim=1, descending=True, stable=True)
    rank = torch.argsort(order, dim=1)  # (Q, K) from 0
    gain = torch.where(mask, 2.0**y - 1.0, 0.0)
    best = (gain.sort(dim=1, descending=True).values * inverse[:k]).sum(dim=1)  # (Q,) maxDCG
    gain = gain / torch.where(best > 0, best, 1.0)[:, None]
    rho = _differences(inverse[rank]).abs()
    apart = _differences(rank).abs().clamp(min=1)
    delta = inverse[apart - 1] - inverse[apart]
    weight = (rho + mu * delta) * _differences(gain).abs()
    above = _pairs(mask) & (_differences(y) > 0)
    cost = F.softplus(-_differences(s)) / torch.log(torch.tensor(2.0, dtype=s.dtype, device=s.device))
    return _mean(torch.where(above, weight * cost, 0.0).sum(dim=(1, 2)), above.any(dim=2).any(dim=1))


def infonce(logits: Tensor, targets: Targets) -> Tensor:
    """InfoNCE (arXiv 1807.03748): -log of a positive's share of exp(s) among itself and the negatives.

    The mean over the list's positives (grade above 0); positives are not contrasted with one another. Negatives are the
    other judged and trusted documents. A list without both is skipped.
    """
    s, y, mask = _labelled(logits, targets)
    positive, negative = mask & (y > 0), mask & (y == 0)
    against = torch.logsumexp(s.masked_fill(~negative, _MASKED), dim=1, keepdim=True)  # (Q, 1)
    costs = torch.where(positive, F.softplus(against - s), 0.0).sum(dim=1)
    count = positive.sum(dim=1)
    return _mean(costs / count.clamp(min=1), (count > 0) & negative.any(dim=1))


def softmax(logits: Tensor, targets: Targets) -> Tensor:
    """Softmax cross entropy of a list (ListNet, Cao et al., ICML 2007; for rerankers: arXiv 2210.10634).

    -Σ_i p_i·log softmax(s)_i, where p_i are the grades divided by their sum.
    """
    s, y, mask = _labelled(logits, targets)
    total = torch.where(mask, y, 0.0).sum(dim=1)
    share = torch.where(mask, y, 0.0) / torch.where(total > 0, total, 1.0)[:, None]
    return _mean(-(share * _log_softmax(s, mask)).sum(dim=1), total > 0)


def bce(logits: Tensor, targets: Targets) -> Tensor:
    """Binary cross entropy of each document (monoBERT, arXiv 1901.04085): relevant is a grade above 0.

    The mean over a list's documents.
    """
    s, y, mask = _labelled(logits, targets)
    costs = F.binary_cross_entropy_with_logits(s, (y > 0).to(s.dtype), reduction="none")
    count = mask.sum(dim=1)
    return _mean(torch.where(mask, costs, 0.0).sum(dim=1) / count.clamp(min=1), count > 0)


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

    name: str  # as written: "kl", "kl@2"
    row: LossRow
    weight: float
    parameter: float | None


class Mix(NamedTuple):
    """A weighted sum of losses."""

    parts: tuple[Part, ...]

    @property
    def needs(self) -> frozenset[str]:
        """What training data must have: "teacher", "labels" or both."""
        return frozenset(part.row.needs for part in self.parts)

    def __call__(self, logits: Tensor, targets: Targets) -> tuple[Tensor, dict[str, float]]:
        """The weighted sum, and each unweighted loss by name."""
        values = torch.stack([_value(part, logits, targets) for part in self.parts])
        weights = torch.tensor([part.weight for part in self.parts], dtype=values.dtype, device=values.device)
        names = (part.name for part in self.parts)
        return (weights * values).sum(), dict(zip(names, values.detach().tolist(), strict=True))


def _value(part: Part, logits: Tensor, targets: Targets) -> Tensor:
    if part.parameter is None or part.row.parameter is None:
        return part.row.function(logits, targets)
    return part.row.function(logits, targets, **{part.row.parameter: part.parameter})


def mix(spec: str) -> Mix:
    """Parse NAME[@PARAMETER][:WEIGHT], separated by commas, as in "kl@2:1,infonce:0.5".

    Raises UnknownKeyError for a name that is not in LOSSES, InputError for anything else malformed.
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


# Losses on a teacher's hidden states and attention relations.
# Teacher and student must read the same packed batch: the same tokens at the same positions.


def layer_map(student_layers: int, teacher_layers: int) -> tuple[tuple[int, int], ...]:
    """(student state, teacher state) pairs, evenly spread (TinyBERT, arXiv 1909.10351).

    States are numbered as in a forward's ``trace``: 0 is the embeddings, l the output of layer l. The last state is
    paired with the last.
    """
    if not 1 <= student_layers <= teacher_layers:
        raise InputError(f"expected a student of 1 to {teacher_layers} layers, got {student_layers}")
    return tuple((layer, round(layer * teacher_layers / student_layers)) for layer in range(student_layers + 1))


def projection(student_size: int, teacher_size: int, seed: int = 0) -> Tensor:
    """A matrix (C of the teacher, C of the student), trained with the student, from student to teacher states.

    Normal with variance 1/C, so that projecting a state preserves its scale.
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

    The variance is about each feature's mean over the batch's tokens, so that predicting these means gives 1 whatever
    the scale of a layer (layer-wise distillation: arXiv 1910.01108, arXiv 1909.10351). ``projections`` has a matrix
    (see :func:`projection`) or None for each of ``layers``. The teacher's states get no gradient.

    Raises InputError where shapes differ, for example where a forward computed its last layer for first tokens only.
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
    """One relation loss of MiniLMv2 (arXiv 2012.15828): KL(teacher ‖ student), the mean over tokens and heads.

    ``student`` (T, C) and ``teacher`` (T, C') are the queries (or the keys, or the values) of one layer, split into
    ``heads`` relation heads, independently of the attention heads. Within a pair, the relation of token i is the
    softmax over j of x_i·x_j / √(head size).

    The backward pass takes heads·n² floats for a pair of n tokens. Raises InputError where ``heads`` does not divide a
    size.
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
    """The loss of MiniLMv2: the sum of :func:`relations` over (queries, keys, values), equally weighted."""
    return torch.stack(
        [relations(ours, theirs, cu_seqlens, heads) for ours, theirs in zip(student, teacher, strict=True)]
    ).sum()
