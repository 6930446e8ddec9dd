"""The reference implementation, against arithmetic, the specification's figures and an independent implementation."""

import dataclasses
import itertools
import math
import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from random_models import model_config, packed, random_weights

from turborank.architectures import encoder, jinabert
from turborank.errors import CheckpointError
from turborank.ops import reference
from turborank.types import ModelConfig, PackedBatch


@pytest.mark.parametrize(
    ("size", "parameters"),
    [
        ({"num_hidden_layers": 6}, 37_771_777),  # turbo
        ({"num_hidden_layers": 4}, 33_046_273),  # tiny
        (
            {"vocab_size": 30_528, "hidden_size": 768, "num_hidden_layers": 12, "intermediate_size": 3072},
            137_369_089,  # base
        ),
    ],
)
def test_parameter_counts_are_the_published_ones(size: dict[str, int], parameters: int) -> None:
    config = model_config(**{"vocab_size": 61_056, **size})
    assert sum(math.prod(shape) for shape in jinabert.parameters(config).values()) == parameters


def test_slopes() -> None:
    eight = [2.0**-k for k in range(1, 9)]
    assert jinabert.standard_slopes(8) == tuple(eight)
    assert jinabert.standard_slopes(12) == pytest.approx([*eight, 2**-0.5, 2**-1.5, 2**-2.5, 2**-3.5])
    # docs/model.md §3.3: the published rerankers
    assert jinabert.halved_tail_slopes(12)[8:] == pytest.approx([0.35355339, 0.17677670, 0.08838835, 0.04419417])
    assert jinabert.halved_tail_slopes(12)[:8] == tuple(eight)


TINY = {
    "position_embedding_type": "alibi", "num_attention_heads": 12, "hidden_size": 384, "vocab_size": 61_056,
    "num_hidden_layers": 4, "intermediate_size": 1536, "max_position_embeddings": 8192, "type_vocab_size": 2,
    "layer_norm_eps": 1e-12,
}  # fmt: skip


def test_the_published_shape_gets_the_published_slopes() -> None:
    published = jinabert.recognise(TINY, {})
    other = jinabert.recognise({**TINY, "vocab_size": 30_528}, {})
    named = jinabert.recognise({**TINY, "alibi_slopes": "standard"}, {})
    assert published is not None
    assert other is not None
    assert named is not None
    assert published.slopes == jinabert.halved_tail_slopes(12)
    assert other.slopes == named.slopes == jinabert.standard_slopes(12)
    with pytest.raises(CheckpointError, match="expected 12 alibi_slopes, one a head, got 2"):
        jinabert.recognise({**TINY, "alibi_slopes": [1, 2]}, {})


def test_rows_of_learned_positions_by_hand() -> None:
    config = model_config(learned_positions=6, repeat_from=2)
    rows = jinabert.position_rows(np.arange(12, dtype=np.int32), config)
    assert rows.tolist() == [0, 1, 2, 3, 4, 5, 2, 3, 4, 5, 2, 3]


@pytest.mark.parametrize(
    ("rows", "given"), [(512, None), (512, 512), (512, 0), (512, "64"), (8192, 64), (9000, None), (0, 64)]
)
def test_positions_without_a_row_are_refused(rows: int, given: object) -> None:
    raw = {
        "position_embedding_type": "alibi", "num_attention_heads": 12, "hidden_size": 384, "vocab_size": 500,
        "num_hidden_layers": 4, "intermediate_size": 1536, "max_position_embeddings": 8192, "type_vocab_size": 2,
        "layer_norm_eps": 1e-12, "repeat_positions_from": given,
    }  # fmt: skip
    names = {jinabert.POSITIONS: (rows, 384)} if rows else {}
    with pytest.raises(CheckpointError, match=f"got {rows} rows and repeat_positions_from {given!r} in config.json"):
        jinabert.recognise(raw, names)


@given(st.floats(-50, 50))
def test_erf_and_gelu_are_exact(x: float) -> None:
    value = np.asarray([x], dtype=np.float64)
    assert reference.erf(value)[0] == pytest.approx(math.erf(x), abs=2e-8)
    gelu = x * 0.5 * (1 + math.erf(x / math.sqrt(2)))
    assert reference.gelu(value.astype(np.float32))[0] == pytest.approx(gelu, rel=1e-5, abs=1e-6)


def test_alibi_by_hand() -> None:
    """With q = 0 the scores are -slope·|i-j| alone: for slope ln 2, query 1 weighs three keys 1/2 : 1 : 1/2."""
    q, k = np.zeros((3, 2), np.float32), np.ones((3, 2), np.float32)
    v = np.asarray([[1, 10], [2, 20], [4, 40]], np.float32)
    cu = np.asarray([0, 3], np.int32)
    out = reference.attention(q, k, v, cu, 2, (math.log(2), 0.0), False)
    # head 0 (column 0, slope ln 2); head 1 (column 1, slope 0: plain mean)
    assert out[:, 0] == pytest.approx(
        [(1 + 2 / 2 + 4 / 4) / 1.75, (1 / 2 + 2 + 4 / 2) / 2, (1 / 4 + 2 / 2 + 4) / 1.75], rel=1e-6
    )
    assert out[:, 1] == pytest.approx([70 / 3] * 3, rel=1e-6)


def test_scores_are_scaled_before_the_bias() -> None:
    """One head of size 4: q·k/√4 - slope·distance, two keys, checked with the logistic function."""
    q = np.asarray([[1, 1, 1, 1], [0, 0, 0, 0]], np.float32)
    k = np.asarray([[0, 0, 0, 0], [3, 3, 3, 3]], np.float32)
    v = np.asarray([[0] * 4, [1] * 4], np.float32)
    out = reference.attention(q, k, v, np.asarray([0, 2], np.int32), 1, (2.0,), False)
    assert out[0, 0] == pytest.approx(1 / (1 + math.exp(-(12 / 2 - 2.0))), rel=1e-6)
    assert out[1, 0] == pytest.approx(1 / (1 + math.exp(-2.0)), rel=1e-6)  # its own key at distance 0


def test_geglu_by_hand() -> None:
    """Activation on the first half, no bias in the gate, post-norm over two numbers."""
    config = model_config(hidden_size=2, intermediate_size=1, num_attention_heads=1)
    weights = {
        "l.mlp.gated_layers.weight": np.asarray([[1, 0], [0, 1]], np.float32),
        "l.mlp.wo.weight": np.asarray([[2], [0]], np.float32),
        "l.mlp.wo.bias": np.asarray([0.5, 0], np.float32),
        "l.mlp.layernorm.weight": np.asarray([3, 3], np.float32),
        "l.mlp.layernorm.bias": np.asarray([0, 1], np.float32),
    }
    x = np.asarray([[1.0, 2.0]], np.float32)
    u = 0.5 * (1 + math.erf(1 / math.sqrt(2))) * 2  # gelu(first half) · second half
    a, b = 2 * u + 0.5 + 1.0, 2.0
    mean, half = (a + b) / 2, abs(a - b) / 2  # of two numbers, the standard deviation is half their distance
    out = encoder.feed_forward(weights, "l", x, config, reference)
    assert out[0] == pytest.approx([3 * (a - mean) / half, 3 * (b - mean) / half + 1], rel=1e-5)


@pytest.mark.parametrize("length", [3, 17, 130])
def test_equals_bert_where_they_are_the_same_model(length: int) -> None:
    """Zero slopes, plain feed-forward, zeroed positions: transformers' BertForSequenceClassification."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    config = model_config(vocab_size=99, feed_forward="gelu", slopes=(0.0,) * 12)
    weights = random_weights(config, seed=length)
    bert = transformers.BertForSequenceClassification(
        transformers.BertConfig(
            vocab_size=99, hidden_size=384, num_hidden_layers=config.num_hidden_layers, num_attention_heads=12,
            intermediate_size=1536, max_position_embeddings=512, num_labels=1, layer_norm_eps=1e-12,
        )
    ).eval()  # fmt: skip
    named = {
        (name if name.startswith("classifier") else f"bert.{name}"): torch.from_numpy(w) for name, w in weights.items()
    }
    named["bert.embeddings.position_embeddings.weight"] = torch.zeros(512, 384)
    missing, unexpected = bert.load_state_dict(named, strict=False)
    assert not unexpected
    assert all("position_ids" in name or "token_type_ids" in name for name in missing)
    batch = packed([length], vocab_size=99, seed=length)
    with torch.no_grad():
        ids, types = (torch.from_numpy(x).long()[None] for x in (batch.input_ids, batch.type_ids))
        theirs = bert(input_ids=ids, token_type_ids=types).logits[0, 0].item()
    ours = jinabert.forward(weights, config, batch, reference)
    assert ours[0] == pytest.approx(theirs, abs=1e-5)


@pytest.mark.parametrize("feed_forward", ["geglu", "gelu"])
@pytest.mark.parametrize("head", ["classifier", "cosine", "focus", "sum"])
def test_torch_agrees_with_the_reference_layer_by_layer(head: str, feed_forward: str) -> None:
    torch = pytest.importorskip("torch")
    from turborank.ops import torch as torch_ops

    config = model_config(vocab_size=99, head=head, feed_forward=feed_forward)
    weights = random_weights(config)
    batch = packed([4, 9, 400, 9, 70], vocab_size=99)
    ours: list[np.ndarray] = []
    logits = jinabert.forward(weights, config, batch, reference, ours)
    theirs: list[torch.Tensor] = []
    tensors = {name: torch.from_numpy(w).requires_grad_() for name, w in weights.items()}
    moved = PackedBatch(*(torch.from_numpy(x) for x in (batch.input_ids, batch.type_ids, batch.cu_seqlens)), 400)  # type: ignore[arg-type]
    out = jinabert.forward(tensors, config, moved, torch_ops, theirs)
    assert len(ours) == len(theirs) == config.num_hidden_layers + 1
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(a, b.detach().numpy(), atol=1e-5)
    np.testing.assert_allclose(logits, out.detach().numpy(), atol=1e-5)
    out.sum().backward()
    assert all(t.grad is not None and torch.isfinite(t.grad).all() for t in tensors.values())


def test_torch_splits_long_attention_into_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    torch = pytest.importorskip("torch")
    from turborank.ops import torch as torch_ops

    rng = np.random.default_rng(0)
    q, k, v = rng.normal(size=(3, 90, 24)).astype(np.float32)
    cu = np.asarray([0, 50, 60, 90], np.int32)
    slopes = jinabert.standard_slopes(12)
    expected = reference.attention(q, k, v, cu, 12, slopes, False)
    monkeypatch.setattr(torch_ops, "SCORE_BUDGET", 12 * 50 * 7)  # seven queries at a time
    out = torch_ops.attention(*(torch.from_numpy(x) for x in (q, k, v)), torch.from_numpy(cu), 12, slopes, False)
    np.testing.assert_allclose(expected, out.numpy(), atol=1e-6)


def test_first_token_shortcut_is_exact() -> None:
    config = model_config(vocab_size=99)
    weights = random_weights(config)
    batch = packed([5, 40, 21], vocab_size=99)
    x = reference.take(weights["embeddings.word_embeddings.weight"], batch.input_ids)
    whole = encoder.encode(weights, config, x, batch.cu_seqlens, reference, first_only=False)
    short = encoder.encode(weights, config, x, batch.cu_seqlens, reference, first_only=True)
    np.testing.assert_allclose(whole[batch.cu_seqlens[:-1]], short, atol=2e-6)


def test_cosine_head_by_hand() -> None:
    x = np.asarray([[1, 0], [3, 0], [0, 2], [0, 4], [1, 1], [1, 1]], np.float32)
    types = np.asarray([0, 0, 1, 1, 0, 1], np.int32)
    cu = np.asarray([0, 4, 6], np.int32)
    query, document = reference.segment_means(x, types, cu)
    assert query.tolist() == [[2, 0], [1, 1]]
    assert document.tolist() == [[0, 3], [1, 1]]
    assert reference.cosine(query, document) == pytest.approx([0.0, 1.0])


def test_focused_means_by_hand() -> None:
    """Passages of two tokens: (0, 4) at right angles to the query, and the shorter last one (3, 0) along it."""
    x = np.asarray([[5, 0], [0, 1], [0, 3], [3, 0], [1, 1], [2, 0]], np.float32)
    types = np.asarray([0, 1, 1, 1, 0, 1], np.int32)
    cu = np.asarray([0, 4, 6], np.int32)
    query = np.asarray([[5, 0], [1, 1]], np.float32)
    plain = reference.focused_means(x, query, np.zeros(1, np.float32), types, cu, 2)
    np.testing.assert_allclose(plain, [[1, 4 / 3], [2, 0]], rtol=1e-6)  # a focus of 0: the mean
    focused = reference.focused_means(x, query, np.full(1, math.log(3), np.float32), types, cu, 2)
    # weights 1 and 3, for two tokens and for one: (1·(0, 4) + 3·(3, 0)) / (1·2 + 3·1)
    np.testing.assert_allclose(focused, [[9 / 5, 4 / 5], [2, 0]], rtol=1e-6)
    far = reference.focused_means(x, query, np.full(1, 1e4, np.float32), types, cu, 2)
    np.testing.assert_allclose(far, [[3, 0], [2, 0]], rtol=1e-6)  # only the best passage


def test_sum_adds_the_cosine_of_the_states_before_the_last_layer() -> None:
    config = model_config(vocab_size=99, num_hidden_layers=3, head="sum")
    weights = random_weights(config) | {"head.scale": np.full(1, 7, np.float32), "head.focus": np.zeros(1, np.float32)}
    batch, trace = packed([9, 40], vocab_size=99), list[np.ndarray]()
    logits = jinabert.forward(weights, config, batch, reference, trace)
    alone = jinabert.forward(weights, dataclasses.replace(config, head="classifier"), batch, reference)
    assert [len(states) for states in trace] == [49, 49, 49, 2]
    for pair, (start, end) in enumerate(itertools.pairwise(batch.cu_seqlens)):
        states, types = trace[-2][start:end].astype(np.float64), batch.type_ids[start:end]
        query, document = states[types == 0].mean(axis=0), states[types == 1].mean(axis=0)
        cosine = query @ document / math.sqrt((query @ query) * (document @ document))
        assert logits[pair] == pytest.approx(alone[pair] + 7 * cosine, abs=1e-5)


HEADS = {
    "classifier": ["classifier.weight"],
    "cosine": ["head.scale", "head.bias"],
    "focus": ["head.scale", "head.bias", "head.focus"],
    "sum": ["classifier.weight", "head.scale", "head.focus"],
}


@pytest.mark.parametrize("head", HEADS)
def test_tensor_names_decide_the_head(head: str) -> None:
    """docs/model.md §2.1, both ways."""
    found = jinabert.recognise(TINY, dict.fromkeys(HEADS[head], (1,)))
    assert found is not None
    assert found.head == head
    of_heads = {name for names in HEADS.values() for name in names}
    assert of_heads & set(jinabert.parameters(found)) == set(HEADS[head])


def test_attention_memory_is_bounded_at_full_length() -> None:
    """The full score tensor of two heads would be 537 MB; one block of one head is 13 MB."""
    n = 8192
    rows = np.zeros((n, 4), np.float32)
    tracemalloc.start()
    reference.attention(rows, rows, rows, np.asarray([0, n], np.int32), 2, jinabert.standard_slopes(2), False)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 100e6


def test_other_families_are_not_jinabert() -> None:
    assert jinabert.recognise({"model_type": "bert", "position_embedding_type": "absolute"}, {}) is None
    assert isinstance(model_config(), ModelConfig)
