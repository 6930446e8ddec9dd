"""BERT, XLM-RoBERTa and DeBERTa against transformers' own classes, on random weights."""

import dataclasses
import math
import tracemalloc
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from families import (
    FAMILIES,
    SMALL,
    family_config,
    family_tokenizer,
    family_weights,
    save_family,
    their_config,
    their_logits,
    their_model,
)
from random_models import packed

from turborank import Reranker
from turborank.architectures import ARCHITECTURES, deberta, encoder, recognise
from turborank.engines.reference import ReferenceEngine
from turborank.errors import CheckpointError
from turborank.ops import reference
from turborank.tokens import read_template
from turborank.types import Float32, ModelConfig, PackedBatch

torch = pytest.importorskip("torch")
LENGTHS = [3, 17, 130, 400, 512]
TOLERANCE = 1e-4  # on the logit


def batch_of(lengths: list[int], seed: int = 1) -> PackedBatch:
    """Random tokens without XLM-R's padding token, which transformers would not count as a position."""
    batch = packed(lengths, SMALL["vocab_size"], seed)
    batch.input_ids[batch.input_ids == 1] = 5
    return batch


def theirs(family: str, model: Any, batch: PackedBatch) -> Float32:
    """transformers' logits (P,) of a ragged batch, padded on the right and masked."""
    bounds = list(zip(batch.cu_seqlens[:-1], batch.cu_seqlens[1:], strict=True))
    shape = len(bounds), batch.max_seqlen
    ids, kinds, mask = torch.ones(shape, dtype=torch.long), torch.zeros(shape, dtype=torch.long), torch.zeros(shape)
    for row, (start, end) in enumerate(bounds):
        ids[row, : end - start] = torch.from_numpy(batch.input_ids[start:end])
        kinds[row, : end - start] = torch.from_numpy(batch.type_ids[start:end])
        mask[row, : end - start] = 1
    segments = {"token_type_ids": kinds} if family in ("bert", "electra") else {}
    with torch.no_grad():
        logits: Float32 = model(input_ids=ids, attention_mask=mask.long(), **segments).logits[:, 0].numpy()
    return logits


def tensors(weights: dict[str, Float32], batch: PackedBatch) -> tuple[dict[str, Any], PackedBatch]:
    moved = (torch.from_numpy(x) for x in (batch.input_ids, batch.type_ids, batch.cu_seqlens))
    return {name: torch.from_numpy(w) for name, w in weights.items()}, PackedBatch(*moved, batch.max_seqlen)


def ours(
    config: ModelConfig, weights: dict[str, Float32], batch: PackedBatch, ops: Any = reference, **other: Any
) -> Float32:
    """Our logits (P,), over numpy with functions of ``ops`` replaced by ``other``."""
    changed = types.SimpleNamespace(**{**vars(ops), **other})
    logits: Float32 = ARCHITECTURES[config.architecture].forward(weights, config, batch, changed)
    return logits


# ---------------------------------------------------------------- parity


@pytest.mark.parametrize("length", [40, 300, 900])
def test_jinabert_with_positions_and_flat_slopes_is_bert(length: int) -> None:
    """transformers' BERT with a table of 1,000 rows in which rows 16 … 255 repeat, as docs/model.md §3.1 says."""
    places = np.r_[np.arange(256), np.resize(np.arange(16, 256), 744)]
    weights = family_weights(family_config("bert", max_position_embeddings=256))
    table = "embeddings.position_embeddings.weight"
    wide = weights | {table: weights[table][places]}
    model, batch = their_model("bert", wide, max_position_embeddings=1000), batch_of([length, 17])
    raw = SMALL | {"type_vocab_size": 2, "layer_norm_eps": 1e-12, "position_embedding_type": "alibi"}
    raw |= {"max_position_embeddings": 1000, "alibi_slopes": [0.0] * 3, "repeat_positions_from": 16}
    config = recognise(raw, {name: value.shape for name, value in weights.items()})
    assert config.architecture == "jinabert"
    expected = theirs("bert", model, batch)
    assert ours(config, weights, batch) == pytest.approx(expected, abs=TOLERANCE)
    from turborank.ops import torch as torch_ops

    their_weights, moved = tensors(weights, batch)
    assert ours(config, their_weights, moved, torch_ops).numpy() == pytest.approx(expected, abs=TOLERANCE)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("lengths", [[n] for n in LENGTHS] + [[17, 400, 3, 130, 17]], ids=str)
def test_logits_are_those_of_transformers(family: str, lengths: list[int]) -> None:
    from turborank.ops import torch as torch_ops

    config = family_config(family)
    weights = family_weights(config, seed=len(lengths))
    batch = batch_of(lengths)
    expected = theirs(family, their_model(family, weights), batch)
    np.testing.assert_allclose(ours(config, weights, batch), expected, atol=TOLERANCE, rtol=0)
    got = ours(config, *tensors(weights, batch), ops=torch_ops)
    np.testing.assert_allclose(got, expected, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize(
    ("family", "width"),
    [
        ("bert", {"hidden_size": 384, "num_attention_heads": 12, "intermediate_size": 1536}),  # MiniLM
        ("xlm_roberta", {"hidden_size": 768, "num_attention_heads": 12, "intermediate_size": 3072}),  # bge
        ("deberta", {"hidden_size": 384, "num_attention_heads": 6, "intermediate_size": 1536}),  # mxbai-xsmall
    ],
)
def test_logits_are_those_of_transformers_at_published_width(family: str, width: dict[str, int]) -> None:
    changes = {**width, "num_hidden_layers": 2}
    config = family_config(family, **changes)
    weights = family_weights(config)
    batch = batch_of([250, 40])
    expected = theirs(family, their_model(family, weights, **changes), batch)
    np.testing.assert_allclose(ours(config, weights, batch), expected, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_torch_agrees_with_the_reference_layer_by_layer_and_learns(family: str) -> None:
    from turborank.ops import torch as torch_ops

    config = family_config(family)
    weights, batch = family_weights(config), batch_of([4, 9, 300, 9, 70])
    expected: list[Float32] = []
    forward = ARCHITECTURES[family].forward
    logits = forward(weights, config, batch, reference, expected)
    parameters, moved = tensors(weights, batch)
    twin: list[Any] = []
    out = forward({n: t.requires_grad_() for n, t in parameters.items()}, config, moved, torch_ops, twin)
    assert len(expected) == len(twin) == config.num_hidden_layers + 1
    for a, b in zip(expected, twin, strict=True):
        np.testing.assert_allclose(a, b.detach().numpy(), atol=1e-5)
    np.testing.assert_allclose(logits, out.detach().numpy(), atol=1e-5)
    out.sum().backward()
    assert all(t.grad is not None and torch.isfinite(t.grad).all() and t.grad.any() for t in parameters.values())


def test_torch_attends_in_blocks_when_scores_would_be_large(monkeypatch: pytest.MonkeyPatch) -> None:
    from turborank.ops import torch as torch_ops

    config = family_config("deberta")
    weights, batch = family_weights(config), batch_of([200, 30])
    whole = ours(config, *tensors(weights, batch), ops=torch_ops)
    monkeypatch.setattr(torch_ops, "SCORE_BUDGET", 3 * 200 * 7)  # seven queries at a time
    np.testing.assert_allclose(ours(config, *tensors(weights, batch), ops=torch_ops), whole, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_torch_runs_in_bf16(family: str) -> None:
    from turborank.engines import torch as torch_engine

    config = family_config(family)
    weights, batch = family_weights(config), batch_of([40, 7, 90])
    got = torch_engine.prepare(weights, config, precision="bf16", threads=1).logits(batch)
    np.testing.assert_allclose(got, ours(config, weights, batch), atol=0.05)  # logits spread over about 0.5


@pytest.mark.parametrize("family", FAMILIES)
def test_a_pair_has_the_same_bits_whatever_its_neighbours(family: str) -> None:
    config = family_config(family)
    engine = ReferenceEngine(family_weights(config), config, 1)
    lengths = [130, 7, 64, 7]
    batch = batch_of(lengths)
    together = engine.logits(batch)
    for pair, (start, end) in enumerate(zip(batch.cu_seqlens[:-1], batch.cu_seqlens[1:], strict=True)):
        cu = np.asarray([0, end - start], np.int32)
        alone = PackedBatch(batch.input_ids[start:end], batch.type_ids[start:end], cu, lengths[pair])
        assert engine.logits(alone)[0] == together[pair]


# ---------------------------------------------------------------- what parity rests on: every term matters


def test_electra_s_head_is_not_xlm_robertas() -> None:
    config = family_config("electra")
    weights, batch = family_weights(config), batch_of(LENGTHS)
    tanh = dataclasses.replace(config, architecture="xlm_roberta")
    assert np.abs(ours(config, weights, batch) - ours(tanh, weights, batch)).min() > 10 * TOLERANCE


def test_a_small_electra_is_refused_by_name() -> None:
    with pytest.raises(CheckpointError, match="an ELECTRA with embedding_size 96, got 32"):
        recognise(their_config("electra", embedding_size=32).to_dict(), {})


@pytest.mark.parametrize("table", encoder.TABLES[1:])
def test_bert_needs_its_positions_and_segments(table: str) -> None:
    config = family_config("bert")
    weights, batch = family_weights(config), batch_of(LENGTHS)
    without = {**weights, f"{table}.weight": np.zeros_like(weights[f"{table}.weight"])}
    change = np.abs(ours(config, weights, batch) - ours(config, without, batch))
    assert change.min() > 10 * TOLERANCE


def test_xlm_roberta_counts_positions_from_two() -> None:
    config = family_config("xlm_roberta")
    weights, batch = family_weights(config), batch_of(LENGTHS[:4])
    assert (config.max_length, config.position_offset) == (512, 2)
    name = "embeddings.position_embeddings.weight"
    from_zero = {**weights, name: np.roll(weights[name], 2, axis=0)}
    change = np.abs(ours(config, weights, batch) - ours(config, from_zero, batch))
    assert change.min() > 10 * TOLERANCE
    marked = PackedBatch(batch.input_ids, np.ones_like(batch.type_ids), batch.cu_seqlens, batch.max_seqlen)
    np.testing.assert_array_equal(ours(config, weights, marked), ours(config, weights, batch))  # one segment


def _without(term: str) -> Any:
    def attention(q: Float32, k: Float32, v: Float32, pos_q: Float32, pos_k: Float32, *rest: Any) -> Float32:
        pos_q, pos_k = (pos_q * 0, pos_k) if term == "p2c" else (pos_q, pos_k * 0)
        return reference.disentangled_attention(q, k, v, pos_q, pos_k, *rest)

    return attention


def _mirrored(q: Float32, k: Float32, v: Float32, pos_q: Float32, pos_k: Float32, rows: Any, *rest: Any) -> Float32:
    return reference.disentangled_attention(q, k, v, pos_q, pos_k, rows[::-1], *rest)


def _linear(q: Float32, k: Float32, v: Float32, pos_q: Float32, pos_k: Float32, rows: Any, *rest: Any) -> Float32:
    clipped = [min(max(d + 256, 0), 511) for d in range(-511, 512)]
    return reference.disentangled_attention(q, k, v, pos_q, pos_k, clipped, *rest)


@pytest.mark.parametrize(
    ("wrong", "lengths"),
    [(_without("c2p"), LENGTHS), (_without("p2c"), LENGTHS), (_mirrored, LENGTHS), (_linear, LENGTHS[-2:])],
    ids=["no c2p", "no p2c", "key minus query", "no log buckets"],
)
def test_deberta_needs_both_terms_the_sign_and_the_buckets(wrong: Any, lengths: list[int]) -> None:
    config = family_config("deberta")
    weights, batch = family_weights(config), batch_of(lengths)
    change = np.abs(ours(config, weights, batch) - ours(config, weights, batch, disentangled_attention=wrong))
    assert change.max() > 100 * TOLERANCE
    assert change.min() > 10 * TOLERANCE


# ---------------------------------------------------------------- by hand


def test_disentangled_attention_by_hand() -> None:
    """One head of size 1: S[i,j] = (q_i·k_j + q_i·K[r] + Q[r]·k_j)/√3 with r = 0, 1, 2 for i-j = -1, 0, 1."""
    q, k, v = (np.asarray([[a], [b]], np.float32) for a, b in ((2, -1), (3, 0.5), (0, 1)))
    pos_q, pos_k = (np.asarray([[a], [b], [c]], np.float32) for a, b, c in ((1, 0.25, -1), (0.5, -2, 4)))
    cu = np.asarray([0, 2], np.int32)
    out = reference.disentangled_attention(q, k, v, pos_q, pos_k, (0, 1, 2), cu, 1, False)
    first = [2 * 3 + 2 * -2 + 0.25 * 3, 2 * 0.5 + 2 * 0.5 + 1 * 0.5]  # query 0: distances 0 and -1
    second = [-1 * 3 + -1 * 4 + -1 * 3, -1 * 0.5 + -1 * -2 + 0.25 * 0.5]  # query 1: distances 1 and 0
    for row, (a, b) in enumerate((first, second)):
        assert out[row, 0] == pytest.approx(1 / (1 + math.exp((a - b) / math.sqrt(3))), rel=1e-6)


def test_near_distances_have_their_own_bucket_and_far_ones_share() -> None:
    bucket = [deberta.bucket(d, 256, 512) for d in range(-511, 512)]
    assert bucket[511 - 128 : 511 + 129] == list(range(-128, 129))
    assert bucket == sorted(bucket)
    assert bucket == [-b for b in reversed(bucket)]
    # ceil(ln(d/128) / ln(511/128) · 127) + 128
    assert [bucket[511 + d] for d in (129, 256, 362, 511)] == [128 + 1, 128 + 64, 128 + 96, 128 + 127]
    assert [deberta.bucket(d, 256, 512) for d in (129, 256)] == [
        math.ceil(math.log(d / 128) / math.log(511 / 128) * 127) + 128 for d in (129, 256)
    ]
    rows = deberta.relative_rows(family_config("deberta"))
    assert (rows[0], rows[511], rows[-1], len(rows)) == (1, 256, 511, 1023)


def test_buckets_are_those_of_transformers() -> None:
    from transformers.models.deberta_v2.modeling_deberta_v2 import make_log_bucket_position

    for buckets, furthest in ((256, 512), (32, 512), (256, 1024)):
        distances = torch.arange(1 - furthest, furthest)
        expected = make_log_bucket_position(distances, buckets, furthest).long().tolist()
        assert [deberta.bucket(d, buckets, furthest) for d in distances.tolist()] == expected


def test_disentangled_attention_memory_is_bounded() -> None:
    """The score tensor of four heads would be 268 MB; one block of one head, its distances included, is 25 MB."""
    n = 4096
    rows = np.zeros((n, 8), np.float32)
    places = np.zeros((512, 8), np.float32)
    table = [min(max(d + 256, 0), 511) for d in range(1 - n, n)]
    tracemalloc.start()
    reference.disentangled_attention(rows, rows, rows, places, places, table, np.asarray([0, n], np.int32), 4, False)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 100e6


# ---------------------------------------------------------------- recognising a checkpoint


@pytest.mark.parametrize(
    ("family", "size", "parameters"),
    [
        ("bert", (30_522, 384, 6, 12, 1536), 22_713_601),  # ms-marco-MiniLM-L-6-v2
        ("bert", (30_522, 384, 4, 12, 1536), 19_164_673),  # ms-marco-MiniLM-L-4-v2
        ("xlm_roberta", (250_002, 768, 12, 12, 3072), 278_044_417),  # bge-reranker-base
        ("deberta", (128_100, 384, 12, 6, 1536), 70_830_337),  # mxbai-rerank-xsmall-v1
        ("deberta", (128_100, 768, 12, 12, 3072), 184_422_913),  # mxbai-rerank-base-v1
    ],
)
def test_parameter_counts_are_the_published_ones(family: str, size: tuple[int, ...], parameters: int) -> None:
    """docs/model.md §5."""
    keys = "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size"
    config = family_config(family, **dict(zip(keys, size, strict=True)))
    assert config.architecture == family
    assert config.max_length == 512
    assert sum(math.prod(shape) for shape in ARCHITECTURES[family].parameters(config).values()) == parameters


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"share_att_key": False}, "share_att_key True, got False"),
        ({"pos_att_type": "c2p"}, "pos_att_type 'p2c|c2p', got"),
        ({"norm_rel_ebd": "none"}, "norm_rel_ebd 'layer_norm', got 'none'"),
        ({"conv_kernel_size": 3}, "conv_kernel_size 0, got 3"),
        ({"position_buckets": -1}, "position_buckets from 2 to 511, got -1"),
        ({"relative_attention": False, "type_vocab_size": 2}, "relative_attention True, got False; type_vocab_size 0"),
    ],
)
def test_a_deberta_of_another_kind_is_refused_not_misread(changes: dict[str, Any], said: str) -> None:
    raw = {**their_config("deberta").to_dict(), **changes}
    with pytest.raises(CheckpointError) as caught:
        recognise(raw, {})
    assert said in str(caught.value)


def test_other_families_and_positions_are_not_recognised() -> None:
    for changes in ({"model_type": "mpnet"}, {"position_embedding_type": "relative_key"}):
        with pytest.raises(CheckpointError, match="jinabert, bert, xlm_roberta, deberta, modernbert, electra; got mod"):
            recognise({**their_config("bert").to_dict(), **changes}, {})


# ---------------------------------------------------------------- from text


@pytest.mark.parametrize(
    ("family", "template", "types"),
    [
        ("bert", "[CLS] q [SEP] d [SEP]", (0, 0, 0, 1, 1)),
        ("xlm_roberta", "<s> q </s></s> d </s>", (0, 0, 0, 0, 0)),
        ("electra", "[CLS] q [SEP] d [SEP]", (0, 0, 0, 1, 1)),
        ("deberta", "[CLS] q [SEP] d [SEP]", (0, 0, 0, 1, 1)),  # it has no segments and ignores them
    ],
)
def test_the_template_is_the_family_s(family: str, template: str, types: tuple[int, ...]) -> None:
    tokenizer = family_tokenizer(family)
    read = read_template(tokenizer)
    parts = ["".join(tokenizer.id_to_token(i) for i in part) for part in (read.prefix, read.middle, read.suffix)]
    assert f"{parts[0]} q {parts[1]} d {parts[2]}" == template
    assert read.types == types


@pytest.mark.parametrize("family", FAMILIES)
def test_a_checkpoint_saved_by_transformers_ranks_as_it_does_there(family: str, tmp_path: Path) -> None:
    model = save_family(tmp_path, family)
    pairs = [
        ("What is the capital of France?", "Paris is the capital of France."),
        ("What is the capital of France?", "Bread bakes, and Berlin is the capital of Germany!"),
        ("paris", "the " * 700),  # cut to 512 tokens
        ("what is " * 200, "bread bakes " * 200),  # both are cut
        ("", "Zürich"),
    ]
    expected = their_logits(model, tmp_path, pairs)
    assert np.ptp(expected) > 100 * TOLERANCE
    for engine in ("reference", "torch"):
        reranker = Reranker(tmp_path, engine=engine, precision="fp32")
        assert reranker.checkpoint.config.architecture == family
        assert reranker.max_length == 512
        np.testing.assert_allclose(reranker.score(pairs), expected, atol=TOLERANCE, rtol=0)
