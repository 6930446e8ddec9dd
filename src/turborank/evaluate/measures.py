"""Measures by ir-measures (most of them computed by trec_eval), and a significance test of differences.

Measures are computed over the queries of the judgements: a query without results counts as zero.
:func:`turborank.data.trec.ranked` breaks ties before any measure is computed, so all of them follow trec_eval's rule.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from turborank.data.trec import Qrels, Run, ranked
from turborank.errors import InputError

MEASURES = ("nDCG@10", "R@100", "MRR@10", "MAP", "Success@1", "Success@5", "Success@10", "Judged@10")
ALIASES = {
    "hit": "Success",
    "hit_rate": "Success",
    "hitrate": "Success",
    "recall": "R",
    "ndcg": "nDCG",
    "precision": "P",
}
RESAMPLES = 10_000
SEED = 20_240_418
CHUNK = 4_000_000  # random draws in memory at a time
CUTOFFS = range(1, 1 << 31)  # accepted cut-offs; any other makes trec_eval abort the process

PerQuery = dict[str, dict[str, float]]  # measure -> query id -> value


def parse(name: str, relevant_from: int = 1) -> Any:
    """The ir-measures measure of this name. Binary measures count grades of at least ``relevant_from`` as relevant.

    ``MRR@10``, ``MAP``, ``hit_rate@5``, ``recall@100`` mean RR@10, AP, Success@5, R@100.
    Raises InputError for a name that ir-measures does not know, or that the installed libraries do not compute.
    """
    import ir_measures

    base, at, cutoff = name.strip().partition("@")
    try:
        measure = ir_measures.parse_measure(ALIASES.get(base.lower(), base) + at + cutoff)
        if "rel" in measure.SUPPORTED_PARAMS and "rel" not in measure.params and relevant_from != 1:
            measure = measure(rel=relevant_from)
        if measure.params.get("cutoff", 1) not in CUTOFFS:
            raise ValueError("cutoff")
        next(iter(ir_measures.iter_calc([measure], {"q": {"d": 1}}, {"q": {"d": 1.0}})))
    except Exception as error:
        raise InputError(f"expected a measure such as {', '.join(MEASURES)}, got {name!r}") from error
    return measure


def per_query(run: Run, qrels: Qrels, names: Sequence[str], relevant_from: int = 1) -> PerQuery:
    """The value of every measure for every judged query, queries in the order of ``qrels``."""
    import ir_measures

    spellings: dict[Any, list[str]] = {}  # MRR@10 and RR@10 name the same measure
    for name in names:
        spellings.setdefault(parse(name, relevant_from), []).append(name)
    # trec_eval reads every grade below 0 as -1, and aborts on a query that has only lower ones.
    judged = {
        query_id: {doc_id: max(grade, -1) for doc_id, grade in known.items()} for query_id, known in qrels.items()
    }
    # Distinct descending numbers instead of scores, so that no provider applies its own rule for ties.
    plain = {
        query_id: {scored.doc_id: float(-rank) for rank, scored in enumerate(ranked(run[query_id]))}
        for query_id in qrels
        if run.get(query_id)
    }
    values: PerQuery = {name: dict.fromkeys(qrels, 0.0) for name in names}
    for metric in ir_measures.iter_calc(list(spellings), judged, plain):
        for name in spellings[metric.measure]:
            values[name][metric.query_id] = float(metric.value)
    return values


def means(values: PerQuery) -> dict[str, float]:
    """The mean of each measure over its queries; measures without queries are left out."""
    return {name: float(np.mean(list(by_query.values()))) for name, by_query in values.items() if by_query}


@dataclass(frozen=True, slots=True)
class Comparison:
    """Difference between two systems on the same queries."""

    measure: str
    difference: float  # mean of ours minus theirs
    low: float  # 95 % confidence interval of the difference
    high: float
    p_value: float  # two-sided; null hypothesis: no difference; not adjusted for the number of comparisons
    better: int  # number of queries
    worse: int
    equal: int


def paired_bootstrap(
    ours: Mapping[str, float],
    theirs: Mapping[str, float],
    measure: str,
    *,
    resamples: int = RESAMPLES,
    seed: int = SEED,
) -> Comparison:
    """Compare two systems by a paired bootstrap over queries (Efron and Tibshirani 1993, §13.3 and §16.4).

    ``ours`` and ``theirs``: query id -> value of the measure. The interval is the 2.5th to 97.5th percentile of the
    resampled mean difference. The p-value is the share of resamples of the *centred* differences whose mean is at
    least as far from zero as the observed mean; the observation itself is counted, so the p-value is never zero.

    Raises InputError if the queries of the two sides differ, or if there are none.
    """
    if ours.keys() != theirs.keys() or not ours:
        raise InputError(f"expected the same queries on both sides, got {len(ours)} and {len(theirs)}")
    gaps = np.asarray([ours[query_id] - theirs[query_id] for query_id in ours], dtype=np.float64)
    observed = float(gaps.mean())
    sampled = _resampled_means(gaps, resamples, seed)
    # 1e-12: tolerance for sums of the same numbers in another order, which differ in the last bits
    extreme = int(np.count_nonzero(np.abs(sampled - observed) >= abs(observed) - 1e-12))
    low, high = np.percentile(sampled, [2.5, 97.5])
    return Comparison(
        measure=measure,
        difference=observed,
        low=float(low),
        high=float(high),
        p_value=(extreme + 1) / (resamples + 1),
        better=int(np.count_nonzero(gaps > 1e-12)),
        worse=int(np.count_nonzero(gaps < -1e-12)),
        equal=int(np.count_nonzero(np.abs(gaps) <= 1e-12)),
    )


def _resampled_means(gaps: npt.NDArray[np.float64], resamples: int, seed: int) -> npt.NDArray[np.float64]:
    rng = np.random.default_rng(seed)
    rows = max(1, CHUNK // len(gaps))
    parts = [
        gaps[rng.integers(0, len(gaps), (min(rows, resamples - start), len(gaps)))].mean(axis=1)
        for start in range(0, resamples, rows)
    ]
    return np.concatenate(parts)
