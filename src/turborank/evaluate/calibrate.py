"""Fit a calibration on judged pairs, and measure it by cross-validation.

The probability scale is Platt's (1999, with his smoothed targets): logistic regression of relevance on the logit. It
has two parameters, so a hundred pairs are enough to fit it. All reported figures are out of fold: the queries are
divided into FOLDS parts, and the probability and the thresholds for a pair come from a fit on the other parts.
Intervals are those of Clopper and Pearson at the effective sample size of Korn and Graubard (1998), because the pairs
of one query are not independent: the number of pairs, divided by the design effect of their clustering in queries,
times the squared ratio of the t quantiles for the number of pairs and the number of queries.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from turborank.calibration import Calibration, sigmoid
from turborank.data.files import RowReader, read_records
from turborank.errors import InputError
from turborank.reranker import Reranker
from turborank.text import document_text
from turborank.types import Pair

FOLDS = 5
BINS = 10  # bins of the reliability plot, each with about the same number of pairs
POINTS = 500  # maximum number of thresholds in a calibration's curve
CONFIDENCE = 0.95
LABELS = ("label", "relevance", "relevant", "score")  # fields that may hold the judgement, in order of preference
_TRUTHS = {"true": 1.0, "false": 0.0, "yes": 1.0, "no": 0.0}

Floats = npt.NDArray[np.float64]


class JudgedPair(NamedTuple):
    """A pair with its judgement."""

    pair: Pair
    relevant: bool


class Share(NamedTuple):
    """A share of pairs with its confidence interval (level CONFIDENCE)."""

    value: float
    low: float
    high: float


class Bin(NamedTuple):
    """A bin of the reliability plot: pairs with similar predicted probabilities."""

    predicted: float  # mean probability, out of fold
    observed: Share  # share of relevant pairs
    pairs: int


@dataclass(frozen=True)
class Target:
    """The threshold for a target, with precision and recall measured on queries it was not chosen on."""

    target: str  # for example "precision=0.9"
    logit: float | None  # threshold chosen on all pairs; None: no logit reaches the target
    precision: Share | None  # out of fold; None if no pair is above the threshold
    recall: Share | None  # out of fold


@dataclass(frozen=True)
class Findings:
    """A calibration with its cross-validated figures."""

    calibration: Calibration
    bins: tuple[Bin, ...]
    brier: float  # mean squared error of the probabilities, out of fold
    brier_uncalibrated: float  # the same for sigmoid(logit)
    error: float  # expected calibration error over the bins
    targets: tuple[Target, ...]
    queries: int


def read_judged(path: Path, relevant_from: float = 1) -> list[JudgedPair]:
    """Read judged pairs from a JSON-lines, CSV or TSV file with the fields ``query``, ``document`` and one of LABELS.

    A document is a string, or an object with ``title`` and ``text``. Judgements of at least ``relevant_from`` count as
    relevant. Raises InputError, with file and line, for a malformed row, and if all pairs have the same judgement.
    """
    judged = []
    for where, row in _rows(path):
        query, label = row.get("query"), next((row[name] for name in LABELS if row.get(name) is not None), None)
        if not isinstance(query, str) or not query.strip():
            raise InputError(f"expected text in the field query, got {query!r:.60} at {where}")
        if label is None:
            raise InputError(f"expected a judgement in one of the fields {', '.join(LABELS)}, got none at {where}")
        try:
            text = document_text(row["document"]) if row.get("document") is not None else document_text(row)
            grade = float(_TRUTHS.get(str(label).strip().lower(), label))
            if not math.isfinite(grade):
                raise ValueError(label)
        except InputError as error:
            raise InputError(f"{error.message} at {where}") from None
        except (TypeError, ValueError):
            raise InputError(f"expected a finite number as the judgement, got {label!r:.60} at {where}") from None
        judged.append(JudgedPair(Pair(query, text), grade >= relevant_from))
    count = sum(one.relevant for one in judged)
    if not 0 < count < len(judged):
        raise InputError(
            f"expected relevant and irrelevant pairs, got {count} relevant of {len(judged)} at {path}",
            hint="judge candidates of the first stage, not only known answers",
        )
    return judged


def _rows(path: Path) -> Iterator[tuple[object, Mapping[str, Any]]]:
    """(place, row) of a table by its ending; any other file is JSON lines."""
    unpacked = path.with_suffix("") if path.suffix == ".gz" else path
    yield from RowReader(path) if unpacked.suffix.lower() in (".csv", ".tsv") else read_records(path)


def fit(logits: Floats, relevant: npt.NDArray[np.bool_]) -> tuple[float, float]:
    """(slope, intercept) of Platt's scale. Raises InputError if relevance does not increase with the logit."""
    from scipy.optimize import minimize

    positive = int(relevant.sum())
    negative = len(relevant) - positive
    targets = np.where(relevant, (positive + 1) / (positive + 2), 1 / (negative + 2))
    centre, width = float(logits.mean()), max(float(logits.std()), 1e-9)
    standard = (logits - centre) / width  # keeps the optimiser's numbers near 1

    def loss(parameters: Floats) -> tuple[float, Floats]:
        z = parameters[0] * standard + parameters[1]
        residual = np.exp(-np.logaddexp(0, -z)) - targets
        return float((np.logaddexp(0, z) - targets * z).sum()), np.array([residual @ standard, residual.sum()])

    found = minimize(loss, np.zeros(2), jac=True, method="BFGS").x
    slope, intercept = float(found[0] / width), float(found[1] - found[0] * centre / width)
    if not slope > 0:
        raise InputError(
            f"expected relevant pairs to have higher logits, got a slope of {slope:.3g}",
            hint="check the judgements: is a higher label more relevant?",
        )
    return slope, intercept


def curve_of(logits: Floats, relevant: npt.NDArray[np.bool_]) -> tuple[tuple[float, int, int], ...]:
    """(logit, pairs at or above it, relevant ones among them) for up to POINTS of the distinct logits, descending."""
    falling = np.argsort(-logits, kind="stable")
    last = np.flatnonzero(np.append(logits[falling][1:] != logits[falling][:-1], True))
    found = np.cumsum(relevant[falling])
    if len(last) > POINTS:
        last = last[np.unique(np.linspace(0, len(last) - 1, POINTS).round().astype(int))]
    return tuple((float(logits[falling[end]]), int(end) + 1, int(found[end])) for end in last)


def interval(hits: npt.NDArray[np.bool_], groups: npt.NDArray[np.int64]) -> Share:
    """The share of hits with Clopper and Pearson's interval at the effective sample size.

    ``hits`` (n,); ``groups`` (n,): number of the query of each pair.
    """
    from scipy.stats import beta, t

    n, count, value = len(hits), len(np.unique(groups)), float(hits.mean())
    rest = (1 - CONFIDENCE) / 2
    size = n / design_effect(hits, groups)
    if count > 1:
        size *= float(t.ppf(rest, n - 1) / t.ppf(rest, count - 1)) ** 2
    low = float(beta.ppf(rest, value * size, size - value * size + 1)) if value > 0 else 0.0
    high = float(beta.ppf(1 - rest, value * size + 1, size - value * size)) if value < 1 else 1.0
    return Share(value, low, high)


def design_effect(hits: npt.NDArray[np.bool_], groups: npt.NDArray[np.int64]) -> float:
    """Factor by which clustering in groups increases the variance of a share; at least 1.

    The variance of a ratio estimator over groups (Cochran 1977, §3.12), divided by that of independent pairs.
    """
    n, value = len(hits), float(hits.mean())
    _, numbers = np.unique(groups, return_inverse=True)
    count = int(numbers.max()) + 1
    if count < 2 or not 0 < value < 1:
        return 1.0
    sums = np.bincount(numbers, weights=hits.astype(np.float64) - value, minlength=count)
    correction = count / (count - 1) * (n - 1) / n
    return max(1.0, correction * float((sums**2).sum()) / (n * value * (1 - value)))


def calibrate(
    reranker: Reranker,
    judged: Sequence[JudgedPair],
    *,
    targets: Sequence[str] = (),
    about: Mapping[str, Any] | None = None,
) -> Findings:
    """Score the judged pairs with a model and fit. ``targets``: thresholds to report, for example "precision=0.9".

    ``about``: additional facts for the calibration file. Raises InputError for fewer than FOLDS queries, for a fold
    whose other queries have only one kind of judgement, and as :func:`fit` does.
    """
    names = {query: number for number, query in enumerate(dict.fromkeys(one.pair.query for one in judged))}
    if len(names) < FOLDS:
        raise InputError(f"expected judged pairs of at least {FOLDS} queries, got {len(names)}")
    logits = reranker.score_detailed([one.pair for one in judged]).logits.astype(np.float64)
    relevant = np.array([one.relevant for one in judged])
    groups = np.array([names[one.pair.query] for one in judged], dtype=np.int64)
    facts = {
        "model": reranker.name, "engine": reranker.engine.name, "precision": reranker.engine.precision,
        "length": reranker.encoder.policy, "max_length": reranker.max_length, **(about or {}),
    }  # fmt: skip
    return _findings(logits, relevant, groups, reranker.weights_hash, facts, targets)


def _findings(
    logits: Floats,
    relevant: npt.NDArray[np.bool_],
    groups: npt.NDArray[np.int64],
    weights: str,
    about: Mapping[str, Any],
    targets: Sequence[str],
) -> Findings:
    made = _made(logits, relevant, weights, about)
    folds = groups % FOLDS
    parts = {fold: _made(logits[folds != fold], relevant[folds != fold], weights, {}) for fold in np.unique(folds)}
    chances = np.array([parts[fold].probability(x) for fold, x in zip(folds, logits, strict=True)])
    bins = tuple(
        Bin(float(chances[part].mean()), interval(relevant[part], groups[part]), len(part))
        for part in np.array_split(np.argsort(chances, kind="stable"), min(BINS, max(2, len(chances) // 10)))
        if len(part)
    )
    plain = np.array([sigmoid(x) for x in logits])
    return Findings(
        made, bins, float(((chances - relevant) ** 2).mean()), float(((plain - relevant) ** 2).mean()),
        float(sum(one.pairs * abs(one.predicted - one.observed.value) for one in bins) / len(logits)),
        tuple(_target(text, made, parts, logits, relevant, groups) for text in targets), len(np.unique(groups)),
    )  # fmt: skip


def _made(logits: Floats, relevant: npt.NDArray[np.bool_], weights: str, about: Mapping[str, Any]) -> Calibration:
    if not 0 < relevant.sum() < len(relevant):
        raise InputError(
            f"expected relevant and irrelevant pairs in any {FOLDS - 1} of {FOLDS} parts of the queries, got one kind",
            hint="judge more queries",
        )
    slope, intercept = fit(logits, relevant)
    return Calibration(
        slope, intercept, weights, len(logits), int(relevant.sum()), curve_of(logits, relevant), dict(about)
    )


def _target(
    text: str,
    made: Calibration,
    parts: Mapping[int, Calibration],
    logits: Floats,
    relevant: npt.NDArray[np.bool_],
    groups: npt.NDArray[np.int64],
) -> Target:
    def chosen(calibration: Calibration) -> float | None:
        try:
            return calibration.threshold(text)
        except InputError:
            return None

    bounds = {fold: chosen(part) for fold, part in parts.items()}
    minimum = np.array([np.inf if (bound := bounds[fold]) is None else bound for fold in groups % FOLDS])
    kept = logits >= minimum
    precision = interval(relevant[kept], groups[kept]) if kept.any() else None
    recall = interval(kept[relevant], groups[relevant]) if relevant.any() else None
    return Target(text, chosen(made), precision, recall)


def plot(findings: Findings, path: Path) -> None:
    """Write the reliability plot as SVG: share of relevant pairs against predicted probability, with intervals."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 5), layout="constrained")
    axes = figure.subplots()
    axes.plot([0, 1], [0, 1], color="0.7", linewidth=1)
    x = [one.predicted for one in findings.bins]
    y = [one.observed.value for one in findings.bins]
    spread = [
        [one.observed.value - one.observed.low for one in findings.bins],
        [one.observed.high - one.observed.value for one in findings.bins],
    ]
    axes.errorbar(x, y, yerr=spread, fmt="o", capsize=3)
    axes.set(xlim=(0, 1), ylim=(0, 1), xlabel="predicted probability (out of fold)", ylabel="share of relevant pairs")
    made = findings.calibration
    axes.set_title(f"{made.about.get('model', '')}: {made.pairs:,} pairs of {findings.queries:,} queries", fontsize=10)
    figure.savefig(path, format="svg", metadata={"Date": None})


def as_json(findings: Findings) -> str:
    """The findings as JSON text."""
    record = {
        "pairs": findings.calibration.pairs, "relevant": findings.calibration.relevant, "queries": findings.queries,
        "slope": findings.calibration.slope, "intercept": findings.calibration.intercept,
        "brier": findings.brier, "brier_uncalibrated": findings.brier_uncalibrated, "calibration_error": findings.error,
        "bins": [{**one._asdict(), "observed": one.observed._asdict()} for one in findings.bins],
        "targets": [
            {
                "target": one.target, "logit": one.logit,
                "score": None if one.logit is None else sigmoid(one.logit),
                "precision": one.precision and one.precision._asdict(),
                "recall": one.recall and one.recall._asdict(),
            }
            for one in findings.targets
        ],
    }  # fmt: skip
    return json.dumps(record)
