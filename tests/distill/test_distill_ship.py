"""From students to a shipped model: means, int8, and Platt scaling, solved in closed form for two distinct logits."""

import numpy as np
import pytest
from helpers import native_config, random_weights, small_config, write_checkpoint
from safetensors.numpy import load_file

pytest.importorskip("torch", reason="distillation needs pip install 'turborank[train]'")

from turborank import Reranker
from turborank.distill.students import RIDGE, average, platt, scale_logits, write_int8
from turborank.errors import InputError

PAIRS = [("which bee", "a bee of the trees"), ("which bee", "rents rose in the city")]


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


def test_the_average_is_the_mean_of_every_weight_and_needs_one_shape(tmp_path):
    config = small_config()
    one = random_weights(config)
    other = {name: 3 * weight for name, weight in one.items()}
    folders = [
        write_checkpoint(tmp_path / name, config, weights=weights, dtype="F32")
        for name, weights in (("one", one), ("other", other))
    ]
    student = average(folders)
    assert student.weights.keys() == one.keys()
    for name, weight in one.items():
        np.testing.assert_allclose(student.weights[name].numpy(), 2 * weight, rtol=1e-6, err_msg=name)
    with pytest.raises(InputError, match="expected at least one model to ship, got none"):
        average([])
    larger = write_checkpoint(tmp_path / "larger", native_config())
    with pytest.raises(InputError, match=rf"expected models of one shape to average, got another at {larger}"):
        average([folders[0], larger])


def test_a_scaled_head_scales_every_logit_and_int8_keeps_them_near(tmp_path):
    folder = write_checkpoint(tmp_path / "model", dtype="F32")
    before = Reranker(folder, engine="reference").score(PAIRS)
    student = average([folder])
    scale_logits(student, 2.5, -0.75)
    student.save(tmp_path / "scaled")
    after = Reranker(tmp_path / "scaled", engine="reference").score(PAIRS)
    np.testing.assert_allclose(after, 2.5 * before - 0.75, rtol=1e-5, atol=1e-5)
    write_int8(student, tmp_path / "int8")
    stored = load_file(tmp_path / "int8" / "model.safetensors")
    matrices = [name for name, weight in student.weights.items() if weight.ndim == 2]
    assert matrices
    for name in matrices:
        weight, integers = student.weights[name].numpy(), stored[name]
        assert integers.dtype == np.int8
        half_step = np.abs(weight).max(axis=1, keepdims=True) / 127 / 2  # one scale a row
        scale = stored[next(key for key in stored if key.startswith(name) and key != name)].reshape(-1, 1)
        assert (np.abs(integers * scale - weight) <= half_step * 1.001 + 1e-9).all(), name
    np.testing.assert_allclose(Reranker(tmp_path / "int8", engine="reference").score(PAIRS), after, atol=0.1)
