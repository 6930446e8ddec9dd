"""A pair's logit has the same bits for any batch, order and number of threads."""

from __future__ import annotations

import concurrent.futures

import numpy as np
import pytest
import shapes
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from instruction_sets import ROWS

from turborank.engines import native

if native.available() is not None:
    pytest.skip(str(native.available()), allow_module_level=True)

ENGINES: dict[tuple[tuple[str, str], str], native.NativeEngine] = {}


def engine(row, threads, head="classifier"):
    if (row, head) not in ENGINES:
        if head == "deberta":
            model = shapes.deberta(max_length=2000, buckets=32, furthest=300)
        elif head in ("modernbert", "mean"):
            model = shapes.modernbert(max_length=2000, half_window=20, pooling="mean" if head == "mean" else "cls")
        else:
            model = shapes.config(hidden=128, heads=4, inner=256, layers=2, head=head)
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv(native.ISA_VARIABLE, row[0])
            ENGINES[row, head] = native.prepare(shapes.weights(model), model, precision=row[1], threads=1)
    ENGINES[row, head].threads = threads
    return ENGINES[row, head]


@settings(max_examples=80, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    row=st.sampled_from(ROWS),
    head=st.sampled_from(["classifier", "focus", "sum", "deberta", "modernbert", "mean"]),
    lengths=st.lists(st.integers(1, 300), min_size=1, max_size=9),
    threads=st.integers(1, 5),
    seed=st.integers(0, 1000),
)
def test_neighbours_order_and_threads_change_no_bit(row, head, lengths, threads, seed):
    tokens = shapes.batch([n + (head in ("focus", "sum")) for n in lengths], seed=seed)  # tokens of both types
    alone = np.array([engine(row, 1, head).logits(shapes.single(tokens, p))[0] for p in range(len(lengths))])
    assert np.array_equal(engine(row, threads, head).logits(tokens), alone)


@pytest.mark.parametrize("lengths", [[1500, 40, 700], [600, 1500, 603, 30, 597]], ids=["unlike", "like"])
@pytest.mark.parametrize("head", ["classifier", "sum", "deberta", "modernbert", "mean"])
@pytest.mark.parametrize("row", ROWS, ids="-".join)
def test_long_pairs_are_shared_by_the_threads_bit_for_bit(row, head, lengths):
    tokens = shapes.batch(lengths)
    one = engine(row, 1, head).logits(tokens)
    assert np.array_equal(engine(row, 2, head).logits(tokens), one)
    assert np.array_equal(engine(row, 3, head).logits(tokens), one)


def test_callers_of_one_engine_take_turns():
    tokens = [shapes.batch([n, 2 * n, 50], seed=n) for n in (5, 60, 130, 200)]
    shared = engine(ROWS[0], 2)
    expected = [shared.logits(t) for t in tokens]
    with concurrent.futures.ThreadPoolExecutor(4) as callers:
        for _ in range(20):
            got = list(callers.map(shared.logits, tokens))
            assert all(np.array_equal(a, b) for a, b in zip(got, expected, strict=True))


def test_work_space_may_be_given_back_between_calls_and_during_them():
    tokens = [shapes.batch([n, 2 * n, 50], seed=n) for n in (5, 60, 130, 200)]
    shared = engine(ROWS[0], 2).with_threads(2)  # a copy: the engines of this module are shared
    expected = [shared.logits(t) for t in tokens]
    with concurrent.futures.ThreadPoolExecutor(4) as callers:
        for _ in range(20):
            got = callers.map(shared.logits, tokens)
            shared.shrink()
            assert all(np.array_equal(a, b) for a, b in zip(got, expected, strict=True))


def test_all_rows_quantise_to_the_same_integers():
    """int8 products are exact on every instruction set; they differ only by rounding between the products."""
    tokens = shapes.batch([20, 90])
    logits = [engine((isa, "int8"), 1).logits(tokens) for isa in native.isas()]
    spread = np.max(logits, axis=0) - np.min(logits, axis=0)
    assert spread.max() < 0.01
