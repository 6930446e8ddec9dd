"""Adaptive depth: the rule by arithmetic, when it stops, and that scores keep their bits."""

import math

import numpy as np
import pytest
from helpers import write_checkpoint

from turborank import InputError, Reranker, scheduler


def falling(size, *, high, low):
    """``high`` logits near 5, then ``low`` noise around 0 that repeats: -1, 1, -1, 1 …"""
    return np.array([5.0 + i / 100 for i in range(high)] + [(-1.0) ** i for i in range(low)], dtype=np.float32)[:size]


def test_the_estimate_is_the_formula():
    logits = falling(40, high=10, low=30)
    gap = (5.0 - 0.0) / 1.0  # n-th best, mean and standard deviation of the last twenty
    want = 1 / (
        1 + math.exp(-(scheduler.STOP_INTERCEPT + scheduler.STOP_LEFT * math.log(60 / 100) + scheduler.STOP_GAP * gap))
    )
    assert scheduler.expected_share(logits, 10, 100) == pytest.approx(want, rel=1e-6)
    assert scheduler.expected_share(logits, 10, 40) == 0.0
    assert scheduler.expected_share(logits[:9], 10, 100) == 1.0


def test_the_scale_of_the_logits_does_not_matter():
    logits = falling(30, high=10, low=20)
    assert scheduler.expected_share(logits * 8 + 64, 10, 100) == pytest.approx(
        scheduler.expected_share(logits, 10, 100), rel=1e-5
    )


def test_a_clear_gap_stops_early_and_a_flat_list_late():
    def read(logits):
        steps = range(scheduler.DEPTH_BLOCK, 101, scheduler.DEPTH_BLOCK)
        return next(d for d in steps if d == 100 or scheduler.deep_enough(logits[:d], 10, 100))

    assert read(np.concatenate([falling(10, high=10, low=0) * 10, falling(90, high=0, low=90)])) <= 30
    assert read(np.linspace(0, 1, 100, dtype=np.float32)) >= 90  # ever better
    assert read(np.zeros(100, dtype=np.float32)) == 90  # all alike: what is left is expected to be as good


def test_what_is_read_has_the_same_bits_and_the_rest_is_left_out(tmp_path):
    reranker = Reranker(write_checkpoint(tmp_path / "bees"))
    documents = [f"bee {'tide ' * (i % 7)}{chr(97 + i % 26)}" for i in range(60)]
    whole = {one.index: one for one in reranker.rank("bees", documents)}
    found = reranker.rank("bees", documents, top_n=3, depth="auto")
    assert found == [whole[one.index] for one in found]
    assert len(found) == 3
    first = reranker.rank("bees", documents, depth=20)
    assert {one.index for one in first} == set(range(20))
    assert first == [whole[one.index] for one in first]
    assert reranker.rank("bees", documents, top_n=3, depth="auto") == found
    assert reranker.rank("bees", [], top_n=3, depth="auto") == []


@pytest.mark.parametrize("given", ["auto", 0, "deep", True, 1.5])
def test_what_is_refused(tmp_path, given):
    with pytest.raises(InputError, match="depth"):
        Reranker(write_checkpoint(tmp_path / "bees")).rank("bees", ["a"], depth=given)
