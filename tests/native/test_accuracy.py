"""The error of int8 against the reference, also for wide logits, outliers and long pairs."""

from __future__ import annotations

import dataclasses
import functools

import numpy as np
import pytest
import shapes
from instruction_sets import ISAS, ROWS

from turborank.checkpoint.tensors import dense, quantise
from turborank.engines import native

if native.available() is not None:
    pytest.skip(str(native.available()), allow_module_level=True)

RNG = np.random.default_rng(5)
LENGTHS = [int(n) for n in RNG.integers(10, 120, 60)]


def ranks(x):
    return np.argsort(np.argsort(x))


def spearman(a, b):
    return float(np.corrcoef(ranks(a), ranks(b))[0, 1])


def distinct(model, seed=0, wide=3.0):
    """Weights whose logits differ between pairs as much as trained ones do, more than the initialiser's."""
    tensors = shapes.weights(model, seed)
    tensors["embeddings.word_embeddings.weight"] *= wide
    return tensors


@pytest.fixture(params=ISAS)
def isa(request, monkeypatch):
    monkeypatch.setenv(native.ISA_VARIABLE, request.param)
    return request.param


# The reference is slow and the same for every instruction set: each case is computed once.


@functools.cache
def turbo_case(outliers):
    model = shapes.config()
    tensors, tokens = distinct(model), shapes.batch(LENGTHS)
    for name in tensors:
        if outliers and name.lower().endswith("norm.weight"):
            tensors[name][[5, 77, 123, 200, 301, 380]] *= 10
    return model, tensors, tokens, shapes.reference_logits(tensors, model, tokens)


@functools.cache
def wide_case(factor):
    model = shapes.config(hidden=128, heads=4, inner=64, layers=2)
    tensors, tokens = shapes.weights(model), shapes.batch([1200, 300, 64])
    for name in tensors:
        if ".query." in name or ".key." in name:
            tensors[name] *= factor
    return model, tensors, tokens, shapes.reference_logits(tensors, model, tokens)


@functools.cache
def long_case(length):
    model = shapes.config(hidden=64, heads=2, inner=64, layers=2)
    tensors, tokens = shapes.weights(model), shapes.batch([length])
    return model, tensors, tokens, shapes.reference_logits(tensors, model, tokens)


def test_int8_error_and_order(isa):
    model, tensors, tokens, expected = turbo_case(False)
    error = native.prepare(tensors, model, precision="int8").logits(tokens) - expected
    assert np.sqrt(np.mean(error**2)) <= 0.02 * expected.std()
    assert spearman(error + expected, expected) >= 0.999


def test_outlier_channels(isa):
    """Six channels of every norm have ten times the gain, as in trained encoders."""
    model, tensors, tokens, expected = turbo_case(True)
    assert spearman(native.prepare(tensors, model, precision="int8").logits(tokens), expected) >= 0.997


@functools.cache
def stored_case(feed_forward):
    """One layer whose weights int8 represents exactly, so only activations are rounded; and the reference's output."""
    model = shapes.config(layers=1, head="cosine", feed_forward=feed_forward)
    tensors, tokens = shapes.weights(model), shapes.batch([90, 41, 200])
    given = dict(tensors)
    for name, weight in tensors.items():
        if name.startswith("encoder") and weight.ndim == 2:
            given[name], given[f"{name}_scale"] = quantise(weight)
    trace = []
    shapes.reference_logits(dense(given), model, tokens, trace)
    return model, given, tokens, trace[-1]


@pytest.mark.parametrize("feed_forward", ["gelu", "geglu"])
def test_rows_that_the_head_reads_are_rounded_more_finely(isa, feed_forward):
    """The cosine heads' first mean is over type 0 only: a few rows, so rounding errors do not average out."""
    model, given, tokens, expected = stored_case(feed_forward)
    got = native.prepare(given, model, precision="int8").layers(tokens)[-1]
    squares = ((got - expected) ** 2).mean(axis=1)
    query, document = (np.sqrt(squares[tokens.type_ids == kind].mean()) for kind in (0, 1))
    assert query <= 0.3 * document


@functools.cache
def long_queries_case():
    """All tokens but the last belong to the query: two-term int8 is used for every row of every block."""
    model = shapes.config(hidden=128, heads=4, inner=256, layers=2, head="focus")
    tensors, tokens = shapes.weights(model), shapes.batch([1300, 700, 90])
    types = np.zeros_like(tokens.type_ids)
    types[tokens.cu_seqlens[1:] - 1] = 1
    tokens = dataclasses.replace(tokens, type_ids=types)
    return model, tensors, tokens, shapes.reference_logits(tensors, model, tokens)


def test_queries_of_any_length(isa):
    model, tensors, tokens, expected = long_queries_case()
    error = native.prepare(tensors, model, precision="int8", threads=2).logits(tokens) - expected
    assert np.abs(error).max() <= 0.02


@pytest.mark.parametrize("factor", [1, 8, 40])
def test_wide_logits_stay_exact_with_skipping(isa, factor):
    """Query and key weights times `factor`: scores exceed the range of a fixed offset; skipped blocks do not matter."""
    model, tensors, tokens, expected = wide_case(factor)
    got = native.prepare(tensors, model, precision="fp32").logits(tokens)
    assert np.abs(got - expected).max() <= 1e-4


CASES = [(isa, n) for n in (2, 31, 32, 33, 255, 256, 257, 1025) for isa in ISAS]
CASES += [(isa, 8192) for isa in ISAS if isa != "portable"]  # which takes a minute for them


@pytest.mark.parametrize(("isa", "length"), CASES, indirect=["isa"])
def test_every_length_follows_the_reference(isa, length):
    model, tensors, tokens, expected = long_case(length)
    assert np.abs(native.prepare(tensors, model, precision="fp32").logits(tokens) - expected).max() <= 1e-4
    assert np.abs(native.prepare(tensors, model, precision="int8").logits(tokens) - expected).max() <= 0.02


@functools.cache
def relative_case(factor, buckets, furthest):
    model = shapes.deberta(max_length=2100, buckets=buckets, furthest=furthest, layers=3)
    tensors, tokens = shapes.weights(model), shapes.batch([2050, 257, 31, 1])
    for name in tensors:
        if "query_proj" in name or "key_proj" in name:
            tensors[name] *= factor
    return model, tensors, tokens, shapes.reference_logits(tensors, model, tokens)


@pytest.mark.parametrize(("factor", "buckets", "furthest"), [(1, 256, 512), (8, 256, 512), (40, 20, 400)])
def test_relative_positions_at_any_distance(isa, factor, buckets, furthest):
    """Near and far rows of the table, table sizes not divisible by 32, scores beyond the range of a fixed offset."""
    model, tensors, tokens, expected = relative_case(factor, buckets, furthest)
    engine = native.prepare(tensors, model, precision="fp32", threads=2)
    assert engine.isa == isa
    assert np.abs(engine.logits(tokens) - expected).max() <= 1e-4
    if factor == 1:
        assert np.abs(native.prepare(tensors, model, precision="int8").logits(tokens) - expected).max() <= 0.02


MODERN = {
    "published window": {"layers": 5},
    "mean": {"pooling": "mean", "head_bias": True},
    "narrow": {"half_window": 3, "hidden": 96, "heads": 3},
    "wide": {"half_window": 200, "hidden": 256, "heads": 2},  # heads of 128, windows of several chunks
    "one layer": {"layers": 1},
    "window in the last layer": {"layers": 3},
}


@functools.cache
def modern_case(kind, factor=30):
    """Queries and keys so large that attention is far from uniform."""
    model = shapes.modernbert(**MODERN[kind], max_length=2100)
    tensors, tokens = shapes.weights(model), shapes.batch([1100, 257, 31, 1])
    for layer in range(model.num_hidden_layers):
        tensors[f"layers.{layer}.attn.Wqkv.weight"][: 2 * model.hidden_size] *= factor**0.5
    states = []
    return model, tensors, tokens, shapes.reference_logits(tensors, model, tokens, states), states


@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8"])
@pytest.mark.parametrize("kind", MODERN)
def test_modernbert_follows_the_reference_layer_by_layer(isa, kind, precision):
    if precision not in native.precisions(isa):
        pytest.skip(f"the row {isa} has no {precision}")
    model, tensors, tokens, expected, states = modern_case(kind)
    engine = native.prepare(tensors, model, precision=precision, threads=2)
    assert (engine.isa, engine.precision) == (isa, precision)
    layers = engine.layers(tokens)
    assert [layer.shape for layer in layers] == [state.shape for state in states]
    allowed = {"fp32": 2e-6, "bf16": 0.005, "int8": 0.01}[precision]
    for got, want in zip(layers, states, strict=True):
        assert np.sqrt(np.mean((got - want) ** 2)) <= allowed * np.sqrt(np.mean(want**2))
    assert np.abs(engine.logits(tokens) - expected).max() <= {"fp32": 1e-5, "bf16": 0.02, "int8": 0.05}[precision]


@pytest.mark.parametrize(
    "change", [{"half_window": 63}, {"half_window": 65}, {"global_layers": (0, 2)}, {"local_theta": 160_000.0}]
)
def test_windows_and_thetas_matter(change):
    """A wrong window, kind of layer or base frequency changes logits by more than the tolerance of the test above."""
    model, tensors, tokens, _, states = modern_case("published window")
    wrong = native.prepare(tensors, dataclasses.replace(model, **change), precision="fp32").layers(tokens)
    worst = max(np.sqrt(np.mean((got - want) ** 2) / np.mean(want**2)) for got, want in zip(wrong, states, strict=True))
    assert worst > 1e-5


@functools.cache
def position_case(rows, repeated):
    """Learned positions beside ALiBi: a row for each of 600 tokens, or 70 of which 60 repeat (docs/model.md §3.1)."""
    model = shapes.config(hidden=128, heads=4, inner=64, layers=2, feed_forward="gelu", max_length=600)
    model = dataclasses.replace(model, learned_positions=rows, repeat_from=repeated)
    tensors, tokens = shapes.weights(model), shapes.batch([600, 71, 70, 1, 200])
    places = np.arange(600) if not repeated else np.r_[np.arange(70), np.resize(np.arange(10, 70), 530)]
    table = tensors["embeddings.position_embeddings.weight"][places]
    wider = tensors | {"embeddings.position_embeddings.weight": table}
    expected = shapes.reference_logits(wider, dataclasses.replace(model, learned_positions=600, repeat_from=0), tokens)
    return model, tensors, tokens, expected


@pytest.mark.parametrize(("isa", "precision"), ROWS, indirect=["isa"])
@pytest.mark.parametrize(("rows", "repeated"), [(600, 0), (70, 10)])
def test_learned_positions_beside_alibi(isa, precision, rows, repeated):
    model, tensors, tokens, expected = position_case(rows, repeated)
    error = native.prepare(tensors, model, precision=precision).logits(tokens) - expected
    assert np.abs(error).max() <= (1e-4 if precision == "fp32" else 0.01)


@functools.cache
def steep_case():
    """Slopes that limit attention to one key, to a few, and not at all; some weights underflow."""
    model = dataclasses.replace(shapes.config(hidden=128, heads=4, inner=64, layers=2), slopes=(60.0, 8.0, 0.5, 0.0))
    tensors, tokens = shapes.weights(model), shapes.batch([100, 128, 129, 300])
    return model, tensors, tokens, shapes.reference_logits(tensors, model, tokens)


@pytest.mark.parametrize(("isa", "precision"), ROWS, indirect=["isa"])
def test_steep_heads(isa, precision):
    model, tensors, tokens, expected = steep_case()
    error = native.prepare(tensors, model, precision=precision).logits(tokens) - expected
    assert np.abs(error).max() <= (1e-4 if precision == "fp32" else 0.01)
