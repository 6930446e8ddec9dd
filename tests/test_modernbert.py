"""ModernBERT against transformers' own class, on random weights, in both spellings of its config and both layouts."""

import dataclasses
import json
import math
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import write_safetensors
from random_models import packed, random_weights
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from turborank import Reranker
from turborank.architectures import ARCHITECTURES, modernbert, recognise
from turborank.engines.reference import ReferenceEngine
from turborank.errors import CheckpointError
from turborank.ops import reference
from turborank.types import Float32, ModelConfig, PackedBatch

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

TOLERANCE = 1e-4  # on the logit
# Version 4's spelling; one head of 64, a window of 4 to either side, two thetas unlike the defaults.
V4: dict[str, Any] = {
    "architectures": ["ModernBertForSequenceClassification"], "model_type": "modernbert", "vocab_size": 99,
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 1,
    "hidden_activation": "gelu", "classifier_activation": "gelu", "max_position_embeddings": 8192, "norm_eps": 1e-5,
    "norm_bias": False, "attention_bias": False, "mlp_bias": False, "classifier_bias": False,
    "global_attn_every_n_layers": 3, "local_attention": 8, "global_rope_theta": 80000.0, "local_rope_theta": 1000.0,
    "classifier_pooling": "cls", "pad_token_id": 0, "bos_token_id": 1, "cls_token_id": 1, "eos_token_id": 2,
    "sep_token_id": 2, "position_embedding_type": "absolute", "layer_norm_eps": 1e-5, "id2label": {"0": "LABEL_0"},
}  # fmt: skip
_FLAT = ("global_attn_every_n_layers", "global_rope_theta", "local_rope_theta")
# The same model as version 5 writes it.
V5: dict[str, Any] = {key: value for key, value in V4.items() if key not in _FLAT} | {
    "rope_parameters": {
        "full_attention": {"rope_theta": 80000.0, "rope_type": "default"},
        "sliding_attention": {"rope_theta": 1000.0, "rope_type": "default"},
    },
    "layer_types": ["full_attention", "sliding_attention", "sliding_attention", "full_attention"],
}
# layer_types only: thetas are the defaults, and the last layer slides.
KINDS_ONLY: dict[str, Any] = {key: value for key, value in V5.items() if key != "rope_parameters"} | {
    "layer_types": ["full_attention", "sliding_attention", "full_attention", "sliding_attention"]
}
SPELLINGS = {"v4": V4, "v5": V5, "layer_types only": KINDS_ONLY}


def sharp(config: ModelConfig, seed: int = 0) -> dict[str, Float32]:
    """Random weights whose attention is far from uniform."""
    weights = random_weights(config, seed)
    return {name: value * np.float32(2 if "Wqkv" in name else 1) for name, value in weights.items()}


def their_model(raw: dict[str, Any], weights: dict[str, Float32]) -> Any:
    """transformers' own class, made from that config.json, holding exactly these weights."""
    config = transformers.ModernBertConfig.from_dict(dict(raw), attn_implementation="eager")
    config.num_labels = 1
    model = transformers.ModernBertForSequenceClassification(config)
    stored = {name.removeprefix("model."): name for name in model.state_dict()}
    assert set(stored) == set(weights)
    model.load_state_dict({stored[name]: torch.from_numpy(value) for name, value in weights.items()})
    return model.eval()


def theirs(model: Any, batch: PackedBatch) -> Float32:
    logits = []
    for start, end in zip(batch.cu_seqlens[:-1], batch.cu_seqlens[1:], strict=True):
        with torch.no_grad():
            ids = torch.from_numpy(batch.input_ids[start:end].astype(np.int64))[None]
            logits.append(model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0, 0].item())
    return np.asarray(logits, np.float32)


def ours(config: ModelConfig, weights: dict[str, Float32], batch: PackedBatch, **other: Any) -> Float32:
    """The numpy forward, with some ops replaced by ``other``."""
    ops: Any = types.SimpleNamespace(**{**vars(reference), **other})
    logits: Float32 = modernbert.forward(weights, config, batch, ops)
    return logits


def moved(weights: dict[str, Float32], batch: PackedBatch) -> tuple[dict[str, Any], PackedBatch]:
    arrays = (torch.from_numpy(x) for x in (batch.input_ids, batch.type_ids, batch.cu_seqlens))
    return {name: torch.from_numpy(w) for name, w in weights.items()}, PackedBatch(*arrays, batch.max_seqlen)


# ---------------------------------------------------------------- parity


@pytest.mark.parametrize("pooling", ["cls", "mean"])
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_logits_are_those_of_transformers(spelling: str, pooling: str) -> None:
    from turborank.ops import torch as torch_ops
    from turborank.ops import torch_padded

    raw = SPELLINGS[spelling] | {"classifier_pooling": pooling}
    config = recognise(raw, {})
    weights, batch = sharp(config), packed([3, 17, 130, 5, 600, 128], 99)
    expected = theirs(their_model(raw, weights), batch)
    assert np.ptp(expected) > 1000 * TOLERANCE
    np.testing.assert_allclose(ours(config, weights, batch), expected, atol=TOLERANCE, rtol=0)
    tensors, packed_batch = moved(weights, batch)
    got = modernbert.forward(tensors, config, packed_batch, torch_ops)
    np.testing.assert_allclose(got.numpy(), expected, atol=TOLERANCE, rtol=0)
    shape = batch.pairs, batch.max_seqlen
    ids, mask = torch.zeros(shape, dtype=torch.long), torch.zeros(shape, dtype=torch.long)
    for row, (start, end) in enumerate(zip(batch.cu_seqlens[:-1], batch.cu_seqlens[1:], strict=True)):
        ids[row, : end - start] = torch.from_numpy(batch.input_ids[start:end].astype(np.int64))
        mask[row, : end - start] = 1
    got = modernbert.forward(tensors, config, PackedBatch(ids, ids * 0, mask, batch.max_seqlen), torch_padded)
    np.testing.assert_allclose(got.numpy(), expected, atol=TOLERANCE, rtol=0)


def test_both_spellings_are_one_model() -> None:
    config = recognise(V4, {})
    assert recognise(V5, {}) == config
    assert (config.global_theta, config.local_theta) == (80000.0, 1000.0)
    assert (config.half_window, config.global_layers, config.pooling) == (4, (0, 3), "cls")
    only = recognise(KINDS_ONLY, {})
    assert (only.global_theta, only.local_theta, only.global_layers) == (160000.0, 10000.0, (0, 2))
    assert recognise(V4 | {"local_rope_theta": None}, {}).local_theta == 80000.0  # transformers 4: the global one


def test_published_width_and_window() -> None:
    """The shape of Ettin-17m: four heads of 64, a window of 64 to either side."""
    changes = {
        "hidden_size": 256, "intermediate_size": 384, "num_attention_heads": 4, "local_attention": 128,
        "global_rope_theta": 160000.0, "local_rope_theta": 160000.0,
    }  # fmt: skip
    raw = V4 | changes
    config = recognise(raw, {})
    weights, batch = sharp(config), packed([64, 65, 66, 129, 300], 99)
    expected = theirs(their_model(raw, weights), batch)
    np.testing.assert_allclose(ours(config, weights, batch), expected, atol=TOLERANCE, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_eight_thousand_tokens(pooling: str) -> None:
    from turborank.ops import torch as torch_ops

    raw = V4 | {"classifier_pooling": pooling, "num_hidden_layers": 3, "local_attention": 128}
    config = recognise(raw, {})
    weights, batch = sharp(config), packed([8192], 99)
    model = their_model(raw, weights)
    model.set_attn_implementation("sdpa")
    expected = theirs(model, batch)
    np.testing.assert_allclose(ours(config, weights, batch), expected, atol=TOLERANCE, rtol=0)
    tensors, packed_batch = moved(weights, batch)
    got = modernbert.forward(tensors, config, packed_batch, torch_ops)
    np.testing.assert_allclose(got.numpy(), expected, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_torch_agrees_layer_by_layer_and_learns(pooling: str) -> None:
    from turborank.ops import torch_training

    config = recognise(V4 | {"classifier_pooling": pooling}, {})
    weights, batch = sharp(config), packed([4, 9, 300, 290, 9], 99)
    expected: list[Float32] = []
    logits = modernbert.forward(weights, config, batch, reference, expected)
    tensors, packed_batch = moved(weights, batch)
    twin: list[Any] = []
    out = modernbert.forward(
        {n: t.requires_grad_() for n, t in tensors.items()}, config, packed_batch, torch_training, twin
    )
    assert len(expected) == len(twin) == config.num_hidden_layers + 1
    for a, b in zip(expected, twin, strict=True):
        np.testing.assert_allclose(a, b.detach().numpy(), atol=5e-4)  # sharp attention amplifies; up to 8 in size
    np.testing.assert_allclose(logits, out.detach().numpy(), atol=2e-5)
    out.sum().backward()
    assert all(t.grad is not None and torch.isfinite(t.grad).all() and t.grad.any() for t in tensors.values())


def test_torch_runs_in_bf16() -> None:
    from turborank.engines import torch as torch_engine

    config = recognise(V4 | {"classifier_pooling": "mean"}, {})
    weights, batch = random_weights(config), packed([40, 7, 90], 99)
    got = torch_engine.prepare(weights, config, precision="bf16", threads=1).logits(batch)
    np.testing.assert_allclose(got, ours(config, weights, batch), atol=0.1)  # logits spread over about 1


@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_a_pair_has_the_same_bits_whatever_its_neighbours(pooling: str) -> None:
    config = recognise(V4 | {"classifier_pooling": pooling}, {})
    engine, batch = ReferenceEngine(sharp(config), config, 1), packed([130, 7, 64, 7], 99)
    together = engine.logits(batch)
    for pair, (start, end) in enumerate(zip(batch.cu_seqlens[:-1], batch.cu_seqlens[1:], strict=True)):
        cu = np.asarray([0, end - start], np.int32)
        alone = PackedBatch(batch.input_ids[start:end], batch.type_ids[start:end], cu, int(end - start))
        assert engine.logits(alone)[0] == together[pair]


# ---------------------------------------------------------------- what parity rests on: every rule matters


@pytest.mark.parametrize(
    "changes",
    [
        {"half_window": 3},
        {"half_window": 5},
        {"global_layers": (0, 1, 2, 3)},
        {"global_theta": 160000.0},
        {"local_theta": 10000.0},
        {"pooling": "mean"},
        {"layer_norm_eps": 1e-2},
    ],
    ids=str,
)
def test_every_fact_of_the_config_changes_the_logit(changes: dict[str, Any]) -> None:
    config = recognise(V4, {})
    weights, batch = sharp(config), packed([40, 130], 99)
    wrong = dataclasses.replace(config, **changes)
    assert np.abs(ours(config, weights, batch) - ours(wrong, weights, batch)).min() > 10 * TOLERANCE


def test_rotation_by_hand() -> None:
    """One head of 4, theta 100: frequencies 1 and 1/10; channel i turns with i + 2."""
    x = np.asarray([[1, 2, 3, 4]] * 3, np.float32)
    got = reference.rotate(x, np.asarray([0, 1, 3], np.int32), 1, 100.0)
    np.testing.assert_array_equal(got[:2], x[:2])  # both are first in their pair
    a, b = (1.0, 3.0), (2.0, 4.0)
    expected = [
        a[0] * math.cos(1) - a[1] * math.sin(1),
        b[0] * math.cos(0.1) - b[1] * math.sin(0.1),
        a[1] * math.cos(1) + a[0] * math.sin(1),
        b[1] * math.cos(0.1) + b[0] * math.sin(0.1),
    ]
    np.testing.assert_allclose(got[2], expected, rtol=1e-6)


def test_a_window_is_inclusive_on_both_sides() -> None:
    """Equal scores: the context of query i is the mean of values i-2 … i+2."""
    n = 9
    values = np.arange(n, dtype=np.float32)[:, None]
    zeros, cu = np.zeros((n, 1), np.float32), np.asarray([0, n], np.int32)
    got = reference.attention(zeros, zeros, values, cu, 1, (), False, 2)
    expected = [np.mean([j for j in range(n) if abs(i - j) <= 2]) for i in range(n)]
    np.testing.assert_allclose(got[:, 0], expected, rtol=1e-6)
    first = reference.attention(zeros[:1], zeros, values, cu, 1, (), True, 2)
    assert first[0, 0] == pytest.approx(1.0)


def test_sliding_layers_cost_their_window(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys multiplied by the numpy reference: at most a block and the window on both sides, whatever the length."""
    seen: list[int] = []
    softmax = reference.softmax

    def watched(scores: Float32) -> Float32:
        seen.append(scores.shape[1])
        return softmax(scores)

    monkeypatch.setattr(reference, "softmax", watched)
    rows, cu = np.zeros((4096, 4), np.float32), np.asarray([0, 4096], np.int32)
    reference.attention(rows, rows, rows, cu, 1, (), False, 64)
    assert max(seen) == reference.QUERY_BLOCK + 2 * 64


# ---------------------------------------------------------------- shapes and refusals

# H, F, L, heads -> parameters of the trunk, of the transformers layout, of the module layout; tensors of the trunk.
PUBLISHED = {
    "17m": ((256, 384, 7, 4), 16_797_440, None, 16_863_745, 44),
    "32m": ((384, 576, 10, 6), 31_883_136, None, 32_031_745, 62),
    "68m": ((512, 768, 19, 8), 68_144_640, None, 68_408_321, 116),
    "150m": ((768, 1152, 22, 12), 149_014_272, 149_605_633, 149_606_401, 134),
    "400m": ((1024, 2624, 28, 16), 394_781_696, 395_832_321, 395_833_345, 170),
    "1b": ((1792, 3840, 28, 28), 1_028_050_688, None, 1_031_267_329, 170),
}


@pytest.mark.parametrize("size", PUBLISHED)
def test_parameters_are_as_many_as_published(size: str) -> None:
    (width, inner, layers, heads), trunk, plain, modules, tensors = PUBLISHED[size]
    raw = V4 | {
        "vocab_size": 50368, "hidden_size": width, "intermediate_size": inner, "num_hidden_layers": layers,
        "num_attention_heads": heads,
    }  # fmt: skip
    for names, total, head in (({}, plain, 4), ({modernbert.HEAD_BIAS: (width,)}, modules, 5)):
        shapes = modernbert.parameters(recognise(raw, names))
        below = {n: s for n, s in shapes.items() if not n.startswith(("head.", "classifier."))}
        assert sum(math.prod(s) for s in below.values()) == trunk
        assert (len(below), len(shapes)) == (tensors, tensors + head)
        if total is not None:
            assert sum(math.prod(s) for s in shapes.values()) == total


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"hidden_activation": "silu"}, "hidden_activation 'gelu', got 'silu'"),
        ({"classifier_activation": "relu"}, "classifier_activation 'gelu', got 'relu'"),
        ({"norm_bias": True}, "norm_bias False, got True"),
        ({"attention_bias": True, "mlp_bias": True}, "attention_bias False, got True; mlp_bias False, got True"),
        ({"rope_scaling": {"type": "yarn"}}, "rope_scaling None, got {'type': 'yarn'}"),
        ({"classifier_pooling": "max"}, "classifier_pooling 'cls' or 'mean', got 'max'"),
        ({"local_attention": 1}, "local_attention a number of at least 2, got 1"),
        ({"global_rope_theta": "big"}, "global_rope_theta a number of at least 1, got 'big'"),
        ({"norm_eps": 0}, "norm_eps between 0 and 1, got 0"),
        ({"layer_types": ["full_attention"]}, "layer_types 4 of full_attention, sliding_attention, got"),
        ({"rope_parameters": {"rope_theta": 1e4}}, "rope_parameters with full_attention"),
        (
            {"rope_parameters": {k: {"rope_theta": 1e4, "rope_type": "yarn"} for k in modernbert.THETAS}},
            "rope_type 'default' for full_attention, got 'yarn'",
        ),
    ],
    ids=str,
)
def test_a_modernbert_of_another_kind_is_refused_not_misread(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        recognise(V4 | changes, {})
    assert said in str(caught.value)


@pytest.mark.parametrize("kind", ["absolute", "sans_pos", "rope"])
def test_the_leftover_position_key_means_nothing(kind: str) -> None:
    assert recognise(V4 | {"position_embedding_type": kind}, {}) == recognise(V4, {})


# ---------------------------------------------------------------- from text, in both layouts

WORDS = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", *(f"w{i}" for i in range(90))]


def tokenizer() -> Tokenizer:
    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    made.add_special_tokens(WORDS[:4])
    return made


def write_plain(folder: Path, raw: dict[str, Any], weights: dict[str, Float32]) -> Path:
    """The transformers layout."""
    folder.mkdir(exist_ok=True)
    head = ("head.", "classifier.")
    tensors = {name if name.startswith(head) else f"model.{name}": ("F32", w) for name, w in weights.items()}
    write_safetensors(folder / "model.safetensors", tensors)
    (folder / "config.json").write_text(json.dumps(raw), encoding="utf-8")
    tokenizer().save(str(folder / "tokenizer.json"))
    return folder


def write_modules(folder: Path, raw: dict[str, Any], weights: dict[str, Float32], pooling: str = "cls") -> Path:
    """The published Ettin rerankers' chain of modules; config.json has a wrong classifier_pooling."""
    folder.mkdir(exist_ok=True)
    trunk = {n: ("F32", w) for n, w in weights.items() if not n.startswith(("head.", "classifier."))}
    write_safetensors(folder / "model.safetensors", trunk)
    lie = "mean" if pooling == "cls" else "cls"
    raw = raw | {"architectures": ["ModernBertModel"], "classifier_pooling": lie}
    (folder / "config.json").write_text(json.dumps(raw), encoding="utf-8")
    tokenizer().save(str(folder / "tokenizer.json"))
    width, kind = raw["hidden_size"], "sentence_transformers.base.modules"
    dense: dict[str, Any] = {"in_features": width, "out_features": width, "bias": False}
    chain: list[tuple[str, str, dict[str, Any], dict[str, Float32]]] = [
        ("Pooling", "1_Pooling", {"pooling_mode": pooling, "embedding_dimension": width}, {}),
        (
            "Dense", "2_Dense", dense | {"activation_function": "torch.nn.modules.activation.GELU"},
            {"linear.weight": weights["head.dense.weight"]},
        ),
        (
            "LayerNorm", "3_LayerNorm", {"dimension": width},
            {"norm.weight": weights["head.norm.weight"], "norm.bias": weights["head.norm.bias"]},
        ),
        (
            "Dense", "4_Dense",
            dense | {"out_features": 1, "bias": True, "activation_function": "torch.nn.modules.linear.Identity"},
            {"linear.weight": weights["classifier.weight"], "linear.bias": weights["classifier.bias"]},
        ),
    ]  # fmt: skip
    rows = [{"idx": 0, "name": "0", "path": "", "type": f"{kind}.transformer.Transformer"}]
    for number, (name, path, config, tensors) in enumerate(chain, 1):
        rows.append({"idx": number, "name": str(number), "path": path, "type": f"{kind}.{name.lower()}.{name}"})
        (folder / path).mkdir(exist_ok=True)
        (folder / path / "config.json").write_text(json.dumps(config), encoding="utf-8")
        if tensors:
            write_safetensors(folder / path / "model.safetensors", {n: ("F32", w) for n, w in tensors.items()})
    (folder / "modules.json").write_text(json.dumps(rows), encoding="utf-8")
    settings = {"model_type": "CrossEncoder", "activation_fn": "torch.nn.modules.linear.Identity", "prompts": {}}
    (folder / "config_sentence_transformers.json").write_text(json.dumps(settings), encoding="utf-8")
    return folder


PAIRS = [("w1 w2", "w3 w4 w5 w6"), ("w1 w2", " ".join(f"w{i % 90}" for i in range(300))), ("w8", "")]


def test_a_checkpoint_in_transformers_layout_ranks_as_it_does_there(tmp_path: Path) -> None:
    raw = V4 | {"classifier_pooling": "mean"}
    weights = sharp(recognise(raw, {}))
    folder = write_plain(tmp_path / "m", raw, weights)
    model = transformers.ModernBertForSequenceClassification.from_pretrained(folder, attn_implementation="eager").eval()
    expected = []
    for query, document in PAIRS:
        ids = torch.tensor([tokenizer().encode(query, document).ids])
        with torch.no_grad():
            expected.append(model(input_ids=ids).logits[0, 0].item())
    for engine in ("reference", "torch"):
        reranker = Reranker(folder, engine=engine, precision="fp32")
        assert (reranker.checkpoint.config.architecture, reranker.max_length) == ("modernbert", 8192)
        np.testing.assert_allclose(reranker.score(PAIRS), expected, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_the_module_layout_is_the_same_model(tmp_path: Path, pooling: str) -> None:
    """Composed from transformers' bare encoder and torch's layers, as sentence-transformers does."""
    config = recognise(V5, {modernbert.HEAD_BIAS: (64,)})
    weights = sharp(config)
    folder = write_modules(tmp_path / "m", V5, weights, pooling)
    trunk = transformers.ModernBertModel.from_pretrained(folder, attn_implementation="eager").eval()
    t = {name: torch.from_numpy(value) for name, value in weights.items()}
    expected = []
    for query, document in PAIRS:
        ids = torch.tensor([tokenizer().encode(query, document).ids])
        with torch.no_grad():
            states = trunk(input_ids=ids).last_hidden_state[0]
            pooled = states[0] if pooling == "cls" else states.mean(dim=0)
            hidden = torch.nn.functional.gelu(t["head.dense.weight"] @ pooled)
            normed = torch.nn.functional.layer_norm(hidden, (64,), t["head.norm.weight"], t["head.norm.bias"], 1e-5)
            expected.append((t["classifier.weight"] @ normed + t["classifier.bias"]).item())
    reranker = Reranker(folder, engine="reference")
    assert reranker.checkpoint.config.pooling == pooling
    np.testing.assert_allclose(reranker.score(PAIRS), expected, atol=TOLERANCE, rtol=0)
    assert ARCHITECTURES["modernbert"].parameters(reranker.checkpoint.config).keys() == weights.keys()
