"""The catalog's families in the native engine, against transformers' classes and, layer by layer, the reference."""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np
import pytest

native = pytest.importorskip("turborank.engines.native")
if native.available() is not None:
    pytest.skip(native.available(), allow_module_level=True)

from families import FAMILIES, family_config, family_weights, save_family, their_logits, their_model  # noqa: E402
from instruction_sets import ISAS, ROWS  # noqa: E402
from test_architectures_parity import LENGTHS, TOLERANCE, batch_of, theirs  # noqa: E402

from turborank import Reranker  # noqa: E402
from turborank.architectures import ARCHITECTURES  # noqa: E402
from turborank.ops import reference  # noqa: E402
from turborank.types import Float32, ModelConfig, PackedBatch  # noqa: E402


@pytest.mark.parametrize("lengths", [[n] for n in LENGTHS] + [[17, 400, 3, 130, 17]], ids=str)
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_of_transformers(
    monkeypatch: pytest.MonkeyPatch, family: str, isa: str, lengths: list[int]
) -> None:
    monkeypatch.setenv(native.ISA_VARIABLE, isa)
    config = family_config(family)
    assert native.supports(config)
    weights, batch = family_weights(config, seed=len(lengths)), batch_of(lengths)
    engine = native.prepare(weights, config, precision="fp32", threads=2)
    assert engine.isa == isa
    expected = theirs(family, their_model(family, weights), batch)
    np.testing.assert_allclose(engine.logits(batch), expected, atol=TOLERANCE, rtol=0)


@functools.cache  # the reference is the same for every row
def case(family: str) -> tuple[ModelConfig, dict[str, Float32], PackedBatch, list[Float32]]:
    """A model of published width, a batch, and the reference's states."""
    sizes = {"hidden_size": 384, "num_attention_heads": 12, "intermediate_size": 1536}
    config = family_config(family, **sizes, **({"embedding_size": 384} if family == "electra" else {}))
    weights, batch = family_weights(config), batch_of([130, 40, 7])
    states: list[Float32] = []
    ARCHITECTURES[family].forward(weights, config, batch, reference, states)
    return config, weights, batch, states


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("isa", "precision"), ROWS)
def test_layers_follow_the_reference(monkeypatch: pytest.MonkeyPatch, family: str, isa: str, precision: str) -> None:
    monkeypatch.setenv(native.ISA_VARIABLE, isa)
    config, weights, batch, states = case(family)
    layers = native.prepare(weights, config, precision=precision, threads=2).layers(batch)
    allowed = {"fp32": 1e-5, "bf16": 0.02, "int8": 0.05}[precision]
    assert len(layers) == len(states)
    for got, want in zip(layers, states, strict=True):
        assert np.sqrt(np.mean((got - want) ** 2)) <= allowed * np.sqrt(np.mean(want**2))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_pair_has_the_same_bits_whatever_its_neighbours(family: str) -> None:
    config = family_config(family)
    engine = native.prepare(family_weights(config), config, precision="fp32", threads=2)
    batch = batch_of([130, 7, 64, 7])
    together = engine.logits(batch)
    for pair, (start, end) in enumerate(zip(batch.cu_seqlens[:-1], batch.cu_seqlens[1:], strict=True)):
        cu = np.asarray([0, end - start], np.int32)
        alone = PackedBatch(batch.input_ids[start:end], batch.type_ids[start:end], cu, int(end - start))
        assert engine.logits(alone)[0] == together[pair]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_checkpoint_saved_by_transformers_ranks_as_it_does_there(family: str, tmp_path: Path) -> None:
    model = save_family(tmp_path, family)
    pairs = [("What is the capital of France?", "Paris is the capital."), ("paris", "the " * 700), ("", "Zürich")]
    reranker = Reranker(tmp_path, engine="native", precision="fp32")
    np.testing.assert_allclose(reranker.score(pairs), their_logits(model, tmp_path, pairs), atol=TOLERANCE, rtol=0)
