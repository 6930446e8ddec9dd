"""Reciprocal rank fusion against arithmetic in the test and another implementation's formula."""

import itertools
import random
from fractions import Fraction

import pytest

from turborank import InputError
from turborank.fusion import reciprocal_rank_fusion


def test_the_formula_of_the_paper():
    fused = reciprocal_rank_fusion([["a", "b", "c"], ["c", "d"]])
    want = {"a": 1 / 61, "b": 1 / 62, "c": 1 / 63 + 1 / 61, "d": 1 / 62}
    assert [key for key, _ in fused] == ["c", "a", "b", "d"]  # b before d: equal scores, b appeared first
    assert dict(fused) == pytest.approx(want, rel=1e-15)


def test_weights_and_k():
    fused = reciprocal_rank_fusion([["a", "b"], ["b", "a"]], k=0, weights=[3, 1])
    assert fused == [("a", 3 / 1 + 1 / 2), ("b", 3 / 2 + 1 / 1)]
    assert reciprocal_rank_fusion([]) == []


def test_exact_sums_of_random_lists():
    draw = random.Random(7)
    for _ in range(50):
        lists = [draw.sample(range(30), draw.randrange(31)) for _ in range(3)]
        exact = {
            key: sum(Fraction(1, 60 + one.index(key) + 1) for one in lists if key in one)
            for key in set().union(*map(set, lists))
        }
        fused = reciprocal_rank_fusion(lists)
        assert {key: pytest.approx(score) for key, score in fused} == {key: float(one) for key, one in exact.items()}
        falling = [exact[key] for key, _ in fused]
        assert all(one >= other - Fraction(1, 10**15) for one, other in itertools.pairwise(falling))


@pytest.mark.parametrize(
    ("rankings", "options"),
    [(["ab"], {}), ([["a", "a"]], {}), ([["a"]], {"k": -1}), ([["a"]], {"weights": [1, 2]}), ("ab", {})],
)
def test_what_is_refused(rankings, options):
    with pytest.raises(InputError):
        reciprocal_rank_fusion(rankings, **options)
