"""Each layer of the native engine against the numpy reference, for every instruction set and precision here."""

from __future__ import annotations

import functools
import os
from pathlib import Path

import numpy as np
import pytest
import shapes
from instruction_sets import ISAS, ROWS

from turborank.engines import native

if native.available() is not None:
    pytest.skip(str(native.available()), allow_module_level=True)

MODELS = {
    "turbo": {},
    "tiny": {"layers": 4},
    "cosine": {"feed_forward": "gelu", "head": "cosine"},
    "focus": {"feed_forward": "gelu", "head": "focus"},
    "base": {"hidden": 768, "inner": 1024, "layers": 2},
    "small": {"hidden": 96, "heads": 3, "inner": 160, "layers": 3, "feed_forward": "gelu"},
    "one layer": {"hidden": 128, "heads": 2, "inner": 64, "layers": 1},
    "many heads": {"hidden": 576, "heads": 18, "inner": 64, "layers": 2},
    "no bias": {"layers": 2, "alibi": False},
}
# Maximum difference from the reference: of a logit, relative to the logits' spread; of a layer's output (rms), relative
# to the output's rms. Random weights of these shapes; fp32 differs only by rounding.
TOLERANCE = {"fp32": (1e-4, 1e-5), "bf16": (0.1, 0.02), "int8": (0.15, 0.05)}


@pytest.fixture
def prepare(monkeypatch):
    """An engine on a given instruction set."""

    def prepared(isa, precision, tensors, model, threads=2):
        monkeypatch.setenv("TURBORANK_ISA", isa)
        return native.prepare(tensors, model, precision=precision, threads=threads)

    return prepared


def rms(x):
    return float(np.sqrt(np.mean(np.square(x))))


@functools.lru_cache(maxsize=1)  # the reference is the same for every row: the tests are ordered by model
def case(kind):
    """A model, its weights, a batch, and the reference's states and logits."""
    model = shapes.config(**MODELS[kind])
    tensors = shapes.weights(model)
    tokens = shapes.batch([2, 3, 31, 32, 33, 64, 100, 17, 300] if kind == "turbo" else [5, 40, 129])
    states = []
    expected = shapes.reference_logits(tensors, model, tokens, states)
    return model, tensors, tokens, states, expected


@pytest.mark.parametrize(("isa", "precision"), ROWS)
@pytest.mark.parametrize("kind", MODELS)
def test_layers_and_logits_follow_the_reference(prepare, isa, precision, kind):
    model, tensors, tokens, states, expected = case(kind)
    engine = prepare(isa, precision, tensors, model)
    logit_tolerance, layer_tolerance = TOLERANCE[precision]
    layers = engine.layers(tokens)
    assert [layer.shape for layer in layers] == [state.shape for state in states]
    for got, want in zip(layers, states, strict=True):
        assert rms(got - want) <= layer_tolerance * rms(want)
    scale = 1.0 if precision == "fp32" else max(float(expected.std()), 0.3)
    assert np.abs(engine.logits(tokens) - expected).max() <= logit_tolerance * scale
    assert (engine.isa, engine.precision) == (isa, precision)


@pytest.mark.parametrize("isa", ISAS)
def test_the_forced_row_is_the_one_that_runs(prepare, isa):
    engine = prepare(isa, "int8", shapes.weights(shapes.config(layers=1)), shapes.config(layers=1))
    cpu = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    instruction = {
        "amx": "tdpbssd",
        "avx512vnni": "vpdpbusd",
        "avxvnni": "vpdpbusd ymm" if not cpu or "avx_vnni" in cpu.split() else "vpdpbusd ymm, EVEX",
        "avx2": "vpmaddwd",
        "armi8mm": "smmla",
        "armdot": "sdot",
        "portable": "int8 multiply-add",
    }
    assert engine.kernel == instruction[isa]
    amd = "AuthenticAMD" in cpu
    fast_bf16 = isa in ("amx", "armi8mm") or (isa == "avx512vnni" and amd and "bf16" in native.precisions(isa))
    assert engine.attention == ("bf16" if fast_bf16 else "fp32")
    assert os.environ["TURBORANK_ISA"] == engine.isa
