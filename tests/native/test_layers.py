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
from turborank.engines.native_weights import Packing, pack
from turborank.errors import CheckpointError

if native.available() is not None:
    pytest.skip(str(native.available()), allow_module_level=True)

MODELS = {
    "turbo": {},
    "tiny": {"layers": 4},
    "cosine": {"feed_forward": "gelu", "head": "cosine"},
    "focus": {"feed_forward": "gelu", "head": "focus"},
    "sum": {"feed_forward": "gelu", "head": "sum"},
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


@pytest.mark.skipif("avx2" not in ISAS, reason="an instruction set of x86-64 that is not among those tested")
@pytest.mark.parametrize(("kind", "kernel"), [("turbo", "vpmaddwd"), ("cosine", "vpmaddubsw"), ("focus", "vpmaddubsw")])
def test_seven_bits_are_for_cosine_heads(prepare, kind, kernel):
    model = shapes.config(**MODELS[kind] | {"layers": 1})
    engine = prepare("avx2", "int8", shapes.weights(model), model)
    assert (engine.isa, engine.kernel) == ("avx2", kernel)


@pytest.mark.parametrize(
    ("head", "name"), [("cosine", "head.bias"), ("focus", "head.focus"), ("sum", "head.scale"), ("sum", "head.focus")]
)
def test_a_missing_parameter_of_the_cosine_is_an_error(head, name):
    model = shapes.config(**MODELS["small"] | {"head": head})
    tensors = shapes.weights(model)
    del tensors[name]
    with pytest.raises(CheckpointError, match=f"got none at {name}"):
        native.prepare(tensors, model)


@pytest.mark.parametrize("isa", ISAS)
def test_sums_of_weights_of_one_sign(prepare, isa):
    """Where the instruction adds products in 16 bits (AVX2 with this head), these sums are the largest."""
    model = shapes.config(**MODELS["small"] | {"head": "cosine"})
    tensors = shapes.weights(model)
    for name in tensors:
        if name.endswith("output.dense.weight"):  # the products whose channels are not mixed
            tensors[name] = np.abs(tensors[name])
    tokens, states = shapes.batch([5, 40, 129]), []
    shapes.reference_logits(tensors, model, tokens, states)
    layers = prepare(isa, "int8", tensors, model).layers(tokens)
    for got, want in zip(layers, states, strict=True):
        assert rms(got - want) <= TOLERANCE["int8"][1] * rms(want)


@pytest.mark.parametrize("one_sign", [False, True])
def test_four_products_of_avx2_fit_16_bits(one_sign):
    model = shapes.config(**MODELS["small"])
    tensors = shapes.weights(model)
    if one_sign:
        tensors = {name: np.abs(value) for name, value in tensors.items()}
    packed, _ = pack(tensors, model, Packing("int8", 4, False, 64, 8, 4))
    for name, rows in (("1.out", 96), ("1.down", 160)):
        panels = packed[name + ".panels"].reshape(3, -1)[:, :-128].view(np.int8)  # the last bytes are initial sums
        words = panels.reshape(3, -1, 2, 32, 2, 2).astype(np.int64)  # panel, eight of the depth, half, column, two, two
        for sign in (1, -1):  # an activation is at most 127
            assert 127 * np.maximum(sign * words, 0).sum(axis=(2, 5)).max() <= np.iinfo(np.int16).max
        codes = words.transpose(0, 3, 1, 2, 4, 5).reshape(96, -1)[:, :rows]
        which = "attention.output" if name == "1.out" else "output"
        want = tensors[f"encoder.layer.1.{which}.dense.weight"]
        scale = packed[name + ".scale"].view(np.float32)[:, None]
        assert np.abs(codes * scale - want).max() <= 1.01 * scale.max()  # rounded twice: half a step of each


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


def test_the_engine_is_compiled_with_optimisation():
    assert native.build().endswith("-O3"), "kernels of another level are several times slower: build the engine anew"
