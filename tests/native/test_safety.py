"""Invalid input raises an exception that says what was expected; floating-point mode and memory are unchanged."""

from __future__ import annotations

import dataclasses
import math
import os
import resource

import numpy as np
import pytest
import shapes
from instruction_sets import ISAS

from turborank.checkpoint.tensors import SCALE, dense, quantise
from turborank.engines import native
from turborank.errors import CheckpointError, EngineUnavailableError, InputError
from turborank.types import PackedBatch

if native.available() is not None:
    pytest.skip(str(native.available()), allow_module_level=True)

MODEL = shapes.config(hidden=64, heads=2, inner=64, layers=1, vocab=100, max_length=50)
TENSORS = shapes.weights(MODEL)


@pytest.fixture(scope="module")
def engine():
    return native.prepare(TENSORS, MODEL, precision="int8", threads=2)


def ints(*values):
    return np.array(values, np.int32)


BAD = {
    "id too large": ((ints(1, 100), ints(0, 0), ints(0, 2)), "input_ids from 0 to 99, got 100 at token 1"),
    "id negative": ((ints(-1, 5), ints(0, 0), ints(0, 2)), "input_ids from 0 to 99, got -1 at token 0"),
    "type too large": ((ints(1, 2), ints(0, 2), ints(0, 2)), "type_ids from 0 to 1, got 2"),
    "types missing": ((ints(1, 2), ints(0), ints(0, 2)), "as many type_ids"),
    "no pair": ((ints(), ints(), ints(0)), "at least one pair"),
    "no offsets": ((ints(), ints(), ints()), "at least one pair"),
    "empty pair": ((ints(1, 2), ints(0, 0), ints(0, 2, 2)), "increasing cu_seqlens"),
    "decreasing": ((ints(1, 2, 3), ints(0, 0, 0), ints(0, 2, 1, 3)), "increasing cu_seqlens"),
    "beyond the end": ((ints(1, 2, 3), ints(0, 0, 0), ints(0, 9, 3)), "cu_seqlens"),
    "wrong start": ((ints(1, 2), ints(0, 0), ints(1, 2)), "begin with 0"),
    "wrong end": ((ints(1, 2), ints(0, 0), ints(0, 3)), "number of tokens"),
    "too long": ((np.zeros(51, np.int32), np.zeros(51, np.int32), ints(0, 51)), "at most 50 tokens, got 51 at pair 0"),
    "wrong dtype": ((np.zeros(2, np.int64), ints(0, 0), ints(0, 2)), "int32 array, got 1 dimensions of int64"),
    "wrong shape": ((np.zeros((1, 2), np.int32), ints(0, 0), ints(0, 2)), "got 2 dimensions"),
}


@pytest.mark.parametrize("fault", BAD)
def test_a_batch_that_does_not_fit_is_refused(engine, fault):
    (ids, types, offsets), message = BAD[fault]
    with pytest.raises(InputError, match=message):
        engine.logits(PackedBatch(ids, types, offsets, 2))


def test_a_missing_or_misshapen_tensor_is_named():
    name = "encoder.layer.0.mlp.wo.weight"
    with pytest.raises(CheckpointError, match=f"got none at {name}"):
        native.prepare({n: v for n, v in TENSORS.items() if n != name}, MODEL)
    with pytest.raises(CheckpointError, match=r"expected shape \(64, 64\), got \(63, 64\)"):
        native.prepare(TENSORS | {name: TENSORS[name][:-1]}, MODEL)
    with pytest.raises(CheckpointError, match=r"expected 64 float32 row scales, got 0 of float64 at .*_scale"):
        native.prepare(TENSORS | {name: np.zeros((64, 64), np.int8)}, MODEL)
    with pytest.raises(
        CheckpointError, match=r"float32, float16, uint16, int8, got 2 dimensions of float64 at encoder"
    ):
        native.prepare(TENSORS | {name: TENSORS[name].astype(np.float64)}, MODEL)
    with pytest.raises(CheckpointError, match="one slope for each head"):
        native.prepare(TENSORS, dataclasses.replace(MODEL, slopes=(0.5,)))
    with pytest.raises(CheckpointError, match=r"expected a positive max_length, got 0 in the model's config"):
        native.prepare(TENSORS, dataclasses.replace(MODEL, max_length=0))
    with pytest.raises(CheckpointError, match=r"expected finite slopes of at least 0, got .*nan"):
        native.prepare(TENSORS, dataclasses.replace(MODEL, slopes=(math.nan,) * MODEL.num_attention_heads))


def test_what_the_machine_lacks_is_refused(monkeypatch):
    with pytest.raises(EngineUnavailableError, match="expected a precision among"):
        native.prepare(TENSORS, MODEL, precision="int4")
    monkeypatch.setenv(native.ISA_VARIABLE, "z80")
    with pytest.raises(EngineUnavailableError, match="TURBORANK_ISA"):
        native.prepare(TENSORS, MODEL)


def test_more_position_buckets_than_distances_are_left_to_other_engines():
    """256 buckets of which 128 end at distance 200: neighbouring distances are more than one row apart."""
    model = shapes.deberta(buckets=256, furthest=200)
    assert not native.supports(model)
    with pytest.raises(
        EngineUnavailableError, match=r"no more position buckets than distances, got deberta .* 256 bucket"
    ):
        native.prepare(shapes.weights(model), model)


@pytest.mark.parametrize("isa", ISAS)
def test_int8_tensors_are_used_as_they_are(isa, monkeypatch):
    monkeypatch.setenv(native.ISA_VARIABLE, isa)
    stored = dict(TENSORS)
    for name in [n for n, v in TENSORS.items() if v.ndim == 2 and n != "classifier.weight"]:
        stored[name], stored[name + SCALE] = quantise(TENSORS[name])
    tokens = shapes.batch([7, 40, 33], vocab=100)
    expected = shapes.reference_logits(dense(stored), MODEL, tokens)
    assert np.abs(native.prepare(stored, MODEL, precision="fp32").logits(tokens) - expected).max() < 1e-4
    assert np.abs(native.prepare(stored, MODEL, precision="int8").logits(tokens) - expected).max() < 0.02


def test_word_embeddings_outlive_the_callers_reference():
    words = "embeddings.word_embeddings.weight"
    tensors = {name: value.copy() for name, value in TENSORS.items()}
    engine, tokens = native.prepare(tensors, MODEL, precision="fp32"), shapes.batch([5], vocab=100)
    before = engine.logits(tokens)
    shape = tensors.pop(words).shape
    del tensors
    garbage = [np.full(shape, np.nan, np.float32) for _ in range(50)]
    assert np.array_equal(engine.logits(tokens), before)
    del garbage


def test_ten_thousand_calls_leave_no_memory_behind(engine):
    tokens = shapes.batch([3, 20], vocab=100)
    for _ in range(500):
        engine.logits(tokens)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(10_000):
        engine.logits(tokens)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2_000  # KiB


def test_denormals_survive_a_call(engine):
    """The kernels treat denormals as zero; the caller's arithmetic still computes with them."""
    engine.logits(shapes.batch([3, 20], vocab=100))
    assert np.float32(1e-38) / np.float32(10) > 0


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_child_starts_its_own_threads(engine):
    tokens = shapes.batch([40, 40, 40, 40], vocab=100)
    expected = engine.logits(tokens)
    child = os.fork()
    if child == 0:
        os._exit(0 if np.array_equal(engine.logits(tokens), expected) else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
