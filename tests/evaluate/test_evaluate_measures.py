"""Measures against trec_eval and arithmetic; the bootstrap against the enumeration of all resamples."""

import itertools
import math
import random

import numpy as np
import pytest

from turborank import InputError
from turborank.data.trec import Qrels, Run, Scored, ranked
from turborank.evaluate.measures import means, paired_bootstrap, parse, per_query

pytrec_eval = pytest.importorskip("pytrec_eval")

TREC = {
    "nDCG@10": "ndcg_cut_10", "nDCG@3": "ndcg_cut_3", "R@5": "recall_5", "MAP": "map", "MRR": "recip_rank",
    "Success@1": "success_1", "Success@5": "success_5", "P@5": "P_5",
}  # fmt: skip


def random_case(seed: int, level: int = 1) -> tuple[Qrels, Run]:
    """Judgements of -1 … 3 and runs with many ties, some only in 32 bits; one query is missing from the run."""
    rng = random.Random(seed)
    names = [f"d{n}" for n in range(30)] + ["é", "z", "Z", "d1é"]
    qrels: Qrels = {}
    run: Run = {}
    for n in range(12):
        judged = {name: rng.choice([-1, 0, 0, 1, 2, 3]) for name in rng.sample(names, 14)}
        judged[names[0]] = max(
            level, judged.get(names[0], 0)
        )  # pytrec_eval leaves out queries without relevant documents
        qrels[f"q{n}"] = judged
        listed = rng.sample(names, rng.randint(1, 30))
        if n:
            scores = [rng.choice([1.0, 1.0 + 1e-9, 2.0, 0.5, -3.0, rng.random()]) for _ in listed]
            run[f"q{n}"] = [Scored(*pair) for pair in zip(listed, scores, strict=True)]
    return qrels, run


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("level", [1, 2])
def test_measures_are_those_of_trec_eval_on_runs_with_ties(seed: int, level: int) -> None:
    qrels, run = random_case(seed, level)
    graded = {"nDCG@10", "nDCG@3"}
    wanted = {ours: theirs for ours, theirs in TREC.items() if level == 1 or ours not in graded}
    families = {name.rpartition("_")[0] if name[-1].isdigit() else name for name in wanted.values()}
    cutoffs = {f"{family}.1,3,5,10" if family not in ("map", "recip_rank") else family for family in families}
    evaluator = pytrec_eval.RelevanceEvaluator(qrels, cutoffs, relevance_level=level)
    theirs = evaluator.evaluate({query: {s.doc_id: s.score for s in documents} for query, documents in run.items()})
    ours = per_query(run, qrels, list(wanted), relevant_from=level)
    for name, trec in wanted.items():
        for query in qrels:
            expected = theirs[query][trec] if query in run else 0.0
            assert ours[name][query] == pytest.approx(expected, abs=1e-9), (name, query)


def test_mrr_with_a_cutoff_breaks_ties_as_trec_eval_does() -> None:
    run = {"q": [Scored("a", 1.0), Scored("b", 1.0), Scored("c", 1.0)]}  # trec_eval reads c, b, a
    assert per_query(run, {"q": {"a": 1}}, ["MRR@10", "MRR@2"]) == {"MRR@10": {"q": 1 / 3}, "MRR@2": {"q": 0.0}}


def test_ties_are_ordered_by_float32_score_then_document_id_descending() -> None:
    given = [Scored("a", 1.0), Scored("c", 0.5), Scored("b", 1.0 + 1e-9), Scored("d", 2.0)]
    assert [scored.doc_id for scored in ranked(given)] == ["d", "b", "a", "c"]


def test_by_hand() -> None:
    qrels = {"q": {"a": 2, "b": 1, "c": 0}, "missing": {"a": 1}}
    run = {"q": [Scored("c", 3.0), Scored("a", 2.0), Scored("new", 1.0), Scored("b", 0.0)]}
    values = per_query(run, qrels, ["nDCG@10", "MAP", "Success@1", "Judged@2", "Judged@10", "R@2", "hit_rate@2"])
    dcg = 2 / math.log2(3) + 1 / math.log2(5)
    assert values["nDCG@10"]["q"] == pytest.approx(dcg / (2 / math.log2(2) + 1 / math.log2(3)))
    assert values["MAP"]["q"] == pytest.approx((1 / 2 + 2 / 4) / 2)
    assert values["Success@1"]["q"] == 0
    assert values["hit_rate@2"]["q"] == 1
    assert values["Judged@2"]["q"] == 1
    assert values["Judged@10"]["q"] == 3 / 4
    assert values["R@2"]["q"] == 0.5
    assert all(by_query["missing"] == 0 for by_query in values.values())
    assert means(values)["MAP"] == pytest.approx(0.25)


def test_relevance_from_grade_two_concerns_binary_measures_only() -> None:
    qrels, run = {"q": {"a": 1, "b": 2}}, {"q": [Scored("a", 2.0), Scored("b", 1.0)]}
    one, two = (per_query(run, qrels, ["Success@1", "nDCG@10"], relevant_from=level) for level in (1, 2))
    assert (one["Success@1"]["q"], two["Success@1"]["q"]) == (1, 0)
    assert one["nDCG@10"] == two["nDCG@10"]


def test_every_spelling_of_a_measure_gets_its_value() -> None:
    names = ["MRR@10", "RR@10", "MAP", "AP", "recall@10", "R@10"]
    values = per_query({"q": [Scored("b", 2.0), Scored("a", 1.0)]}, {"q": {"a": 1}}, names)
    assert means(values) == {"MRR@10": 0.5, "RR@10": 0.5, "MAP": 0.5, "AP": 0.5, "recall@10": 1, "R@10": 1}


def test_grades_far_below_zero_are_judged_and_not_relevant() -> None:
    run, names = {"q": [Scored("a", 1.0)]}, ["nDCG@10", "MAP", "Judged@10"]
    assert means(per_query(run, {"q": {"a": -2, "b": -1000}}, names)) == {"nDCG@10": 0, "MAP": 0, "Judged@10": 1}


@pytest.mark.parametrize("name", ["nonsense", "nDCG@", "nDCG@ten", "", "nDCG@0", "P@-1", "nDCG@3000000000", "ERR@10"])
def test_unknown_measures_are_named(name: str) -> None:
    with pytest.raises(InputError, match="expected a measure such as"):
        parse(name)


def test_bootstrap_interval_and_p_value_against_all_resamples() -> None:
    gaps = [0.5, -0.2, 0.3, 0.1, 0.4]
    ours = {str(i): gap + 1 for i, gap in enumerate(gaps)}
    theirs = dict.fromkeys(ours, 1.0)
    every = np.asarray([np.mean(pick) for pick in itertools.product(gaps, repeat=len(gaps))])  # all 3125 resamples
    found = paired_bootstrap(ours, theirs, "m", resamples=200_000)
    assert found.difference == pytest.approx(0.22)
    assert found.p_value == pytest.approx(np.mean(np.abs(every - 0.22) >= 0.22 - 1e-12), abs=0.005)
    assert (found.low, found.high) == pytest.approx(np.percentile(every, [2.5, 97.5]), abs=0.011)
    assert (found.better, found.worse, found.equal) == (4, 1, 0)


def test_bootstrap_of_equals_and_its_symmetry() -> None:
    rng = np.random.default_rng(0)
    a, b = ({str(i): float(v) for i, v in enumerate(rng.random(40))} for _ in range(2))
    same = paired_bootstrap(a, dict(a), "m")
    assert (same.difference, same.low, same.high, same.p_value, same.equal) == (0, 0, 0, 1, 40)
    there, back = paired_bootstrap(a, b, "m"), paired_bootstrap(b, a, "m")
    assert there.p_value == back.p_value
    assert (there.difference, there.low) == pytest.approx((-back.difference, -back.high))
    assert paired_bootstrap(a, b, "m") == there  # the seed is part of the method
    with pytest.raises(InputError, match="the same queries"):
        paired_bootstrap(a, {"0": 1.0}, "m")


def test_bootstrap_p_values_are_calibrated() -> None:
    """Under no difference, p < 0.05 happens about one time in twenty (binomial, 200 trials: at most 20, p ≈ 0.002)."""
    rng = np.random.default_rng(1)
    hits = 0
    for trial in range(200):
        gaps = rng.normal(0, 1, 60)
        ours = {str(i): float(gap) for i, gap in enumerate(gaps)}
        hits += paired_bootstrap(ours, dict.fromkeys(ours, 0.0), "m", resamples=500, seed=trial).p_value < 0.05
    assert 2 <= hits <= 20
