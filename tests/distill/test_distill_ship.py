"""Platt scaling: with two distinct logits the regression is saturated, so its solution is known in closed form."""

import numpy as np
import pytest

pytest.importorskip("torch", reason="distillation needs pip install 'turborank[train]'")

from turborank.distill.ship import RIDGE, platt
from turborank.errors import InputError


def test_platt_reproduces_the_balanced_class_shares_of_two_logits():
    """Logit -1: 2 of 10 relevant documents and 60 of 80 others; logit 3: the remaining 8 and 20."""
    logits = np.repeat([-1.0, -1.0, 3.0, 3.0], [2, 60, 8, 20])
    labels = np.repeat([True, False, True, False], [2, 60, 8, 20])
    low, high = np.log((2 / 10) / (60 / 80)), np.log((8 / 10) / (20 / 80))  # log odds with both classes alike
    factor = (high - low) / 4
    assert platt(logits, labels) == pytest.approx((factor, low + factor), abs=100 * RIDGE)


def test_platt_is_stationary_and_ignores_the_scale_of_classes():
    """At the optimum the gradient (its formula is written out here) is 0; repeating a class changes nothing."""
    rng = np.random.default_rng(0)
    labels = rng.random(500) < 0.2
    logits = (rng.normal(size=500) + labels).astype(np.float32) * 4 - 2
    factor, bias = platt(logits, labels)
    p = 1 / (1 + np.exp(-(factor * logits.astype(np.float64) + bias)))
    weight = np.where(labels, 0.5 / labels.sum(), 0.5 / (~labels).sum())
    residual = weight * (p - labels)
    assert abs(residual @ logits + RIDGE * factor) < 1e-9
    assert abs(residual.sum() + RIDGE * bias) < 1e-9
    again = platt(np.r_[logits, logits[~labels]], np.r_[labels, labels[~labels]])
    assert again == pytest.approx((factor, bias), abs=1e-6)


def test_platt_stays_finite_on_separable_data_and_refuses_what_cannot_be_calibrated():
    labels = np.arange(100) >= 60
    logits = np.where(labels, 3.0, -2.0)
    factor, bias = platt(logits, labels)
    assert 0 < factor < 100
    assert abs(bias) < 100
    with pytest.raises(InputError, match="only one kind"):
        platt(logits, np.zeros(100, dtype=np.bool_))
    with pytest.raises(InputError, match="the model ranks backwards"):
        platt(-logits, labels)
