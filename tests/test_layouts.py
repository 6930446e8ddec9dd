"""Layouts of model folders: shards, module chains, renamed tensors, two labels, ONNX only, missing keys."""

import dataclasses
import hashlib
import json
import math
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import (
    cache_copy,
    reconfigure,
    refusal,
    small_config,
    stored,
    stored_name,
    write_checkpoint,
    write_safetensors,
)  # fmt: skip
from random_models import packed, random_weights
from sample_tokenizers import bpe_tokenizer

from turborank import Reranker, checkpoint
from turborank.architectures import ARCHITECTURES, recognise
from turborank.checkpoint import hub, load, save
from turborank.engines import ENGINES
from turborank.engines.reference import ReferenceEngine
from turborank.types import Float32

CONFIG = small_config()
INDEX = "model.safetensors.index.json"


# ---------------------------------------------------------------- shards


def write_shards(folder: Path, parts: int = 3) -> tuple[Path, dict[str, Float32]]:
    write_checkpoint(folder, CONFIG)
    (folder / "model.safetensors").unlink()
    weights = random_weights(CONFIG)
    tensors = {stored_name(name): stored(value, "F32") for name, value in weights.items()}
    names, table = list(tensors), {}
    for part in range(parts):
        file = f"model-{part + 1:05}-of-{parts:05}.safetensors"
        write_safetensors(folder / file, {name: tensors[name] for name in names[part::parts]})
        table |= dict.fromkeys(names[part::parts], file)
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": table}))
    return folder, weights


def test_shards_are_one_model(tmp_path: Path) -> None:
    folder, weights = write_shards(tmp_path / "m")
    loaded = load(folder)
    assert set(loaded.weights) == set(weights)
    for name, value in weights.items():
        np.testing.assert_array_equal(loaded.weights[name], value)
    save(loaded, tmp_path / "again")
    for path in folder.iterdir():
        assert (tmp_path / "again" / path.name).read_bytes() == path.read_bytes()
    assert checkpoint.hashes(loaded).keys() >= {INDEX, "model-00003-of-00003.safetensors"}
    shards = sorted(folder.glob("*.safetensors"))
    listed = json.dumps({path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in shards})
    assert Reranker(folder, engine="reference").weights_hash == hashlib.sha256(listed.encode()).hexdigest()


def test_shards_that_are_not_as_their_index_says(tmp_path: Path) -> None:
    folder, _ = write_shards(tmp_path / "m")
    table = json.loads((folder / INDEX).read_text())["weight_map"]

    def index(changed: Any) -> Path:
        (folder / INDEX).write_text(json.dumps({"weight_map": changed}))
        return folder

    first, file = next(iter(table.items()))
    assert f"{first}: in {file}, but not in the index" in refusal(index({k: v for k, v in table.items() if k != first}))
    other = next(name for name in table.values() if name != file)
    assert f"{first}: missing from {other}" in refusal(index(table | {first: other}))
    assert f"nothing: missing from {file}" in refusal(index(table | {"nothing": file}))
    assert "got no elsewhere.safetensors" in refusal(index(table | {first: "elsewhere.safetensors"}))
    for wrong in ("../m/model-00001-of-00003.safetensors", "/etc/passwd", "weights.bin", 7):
        assert "the names of safetensors files beside the index, got" in refusal(index(table | {first: wrong}))
    assert "expected a weight_map" in refusal(index([]))


# ---------------------------------------------------------------- what a config leaves out


@pytest.mark.parametrize("changes", [{"architectures": None}, {"id2label": None}, {"architectures": ["BertModel"]}])
def test_architectures_and_labels_are_not_needed(tmp_path: Path, changes: dict[str, Any]) -> None:
    folder = write_checkpoint(tmp_path / "m", CONFIG)
    reconfigure(folder, id2label={"0": "LABEL_0"})
    assert load(reconfigure(folder, **changes)).config == CONFIG


BERT: dict[str, Any] = {
    "model_type": "bert", "vocab_size": 40, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "intermediate_size": 64, "max_position_embeddings": 64, "type_vocab_size": 2, "layer_norm_eps": 1e-12,
}  # fmt: skip


def write_bert(folder: Path, labels: int = 1, **changes: Any) -> tuple[Path, dict[str, Float32]]:
    weights = random_weights(recognise(BERT, {}))
    if labels != 1:
        rng = np.random.default_rng(5)
        for name in ("classifier.weight", "classifier.bias"):
            shape = (labels, *weights[name].shape[1:])
            weights[name] = rng.normal(size=shape).astype(np.float32)
    folder.mkdir(exist_ok=True)
    tensors = {n if n.startswith("classifier.") else f"bert.{n}": stored(w, "F32") for n, w in weights.items()}
    write_safetensors(folder / "model.safetensors", tensors)
    raw = {key: value for key, value in (BERT | changes).items() if value is not None}
    (folder / "config.json").write_text(json.dumps(raw))
    bpe_tokenizer().save(str(folder / "tokenizer.json"))
    return folder, weights


@pytest.mark.parametrize(
    ("names", "whose"),
    [
        (["bert.encoder.layer.0.attention.self.query.weight"], "BERT's (model_type 'bert')"),
        (["roberta.encoder.layer.0.attention.self.query.weight", "classifier.out_proj.weight"], "a RoBERTa's or"),
        (["model.layers.0.attn.Wqkv.weight"], "ModernBERT's (model_type 'modernbert')"),
        (["deberta.encoder.rel_embeddings.weight"], "DeBERTa-v2's (model_type 'deberta-v2')"),
        (["bert.encoder.layer.0.mlp.gated_layers.weight"], "JinaBERT's (position_embedding_type 'alibi')"),
        (["model.layers.0.self_attn.q_norm.weight"], "a Qwen3's, a decoder, which turborank does not run"),
        (["model.layers.0.self_attn.q_proj.weight"], "a decoder's"),
        (["distilbert.transformer.layer.0.attention.q_lin.weight"], "DistilBERT's, which turborank does not run"),
        (["new.encoder.layer.0.attention.qkv_proj.weight"], "Alibaba's gte (model_type 'new')"),
    ],
)
def test_a_folder_of_no_known_type_is_told_whose_it_looks_like(tmp_path: Path, names: list[str], whose: str) -> None:
    folder, _ = write_bert(tmp_path / "m", model_type="mystery")
    extra = {} if "classifier.out_proj.weight" in names else {"classifier.weight": ("F32", np.ones((1, 32), "f4"))}
    write_safetensors(folder / "model.safetensors", {n: ("F32", np.ones((1, 32), "f4")) for n in names} | extra)
    assert f"got model_type 'mystery', position_embedding_type None in config.json; its tensors look like {whose}" in (
        refusal(folder)
    )
    write_safetensors(folder / "model.safetensors", {names[0]: ("F32", np.ones((1, 32), "f4"))})
    assert "got a model without one" in refusal(folder)


# ---------------------------------------------------------------- two labels


def two_logits(folder: Path, weights: dict[str, Float32], row: int, text: tuple[str, str]) -> float:
    """log p/(1-p) of label ``row`` under softmax, each logit computed by a model with that row alone."""
    config = recognise(BERT, {})
    encoding = bpe_tokenizer().encode(*text)
    ids, types = (np.asarray(x, np.int32) for x in (encoding.ids, encoding.type_ids))
    batch = packed([len(ids)])
    batch = type(batch)(ids, types, batch.cu_seqlens, len(ids))
    logits = []
    for label in (0, 1):
        head = {n: weights[n][label : label + 1] for n in ("classifier.weight", "classifier.bias")}
        logits.append(float(ReferenceEngine({**weights, **head}, config, 1).logits(batch)[0]))
    exponentials = [math.exp(logit) for logit in logits]
    p = exponentials[row] / sum(exponentials)
    return math.log(p / (1 - p))


@pytest.mark.parametrize(
    ("labels", "row"),
    [
        ({"0": "irrelevant", "1": "relevant"}, 1),
        ({"0": "RELEVANT", "1": "not_relevant"}, 0),
        ({"0": "non-relevant", "1": "Relevant"}, 1),
    ],
)
def test_two_labels_that_say_which_is_relevant_are_one_logit(tmp_path: Path, labels: Any, row: int) -> None:
    folder, weights = write_bert(tmp_path / "m", 2, id2label=labels, num_labels=2)
    reranker = Reranker(folder, engine="reference")
    text = ("ab", "cab")
    assert float(reranker.score([text])[0]) == pytest.approx(two_logits(folder, weights, row, text), abs=1e-4)
    save(reranker.checkpoint, tmp_path / "again")  # the file keeps both labels
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()
    assert (tmp_path / "again" / "config.json").read_bytes() == (folder / "config.json").read_bytes()


@pytest.mark.parametrize(
    "labels", [None, {"0": "LABEL_0", "1": "LABEL_1"}, {"0": "NEGATIVE", "1": "POSITIVE"}, {"0": "relevant", "1": "x"}]
)
def test_two_labels_that_say_nothing_are_refused_with_the_option_that_decides(tmp_path: Path, labels: Any) -> None:
    folder, weights = write_bert(tmp_path / "m", 2, id2label=labels)
    said = refusal(folder)
    assert "got a classifier with 2 labels" in said
    assert "no statement which label means relevant" in said
    assert (
        """checkpoint.load(…, relevant_label=1), or in config.json "id2label": {"0": "irrelevant", "1": "relevant"}"""
        in said
    )
    for chosen, row in ((1, 1), ("1", 1), (0, 0)):
        reranker = Reranker(checkpoint.load(folder, relevant_label=chosen), engine="reference")
        got = float(reranker.score([("ab", "cab")])[0])
        assert got == pytest.approx(two_logits(folder, weights, row, ("ab", "cab")), abs=1e-4)
        travelled = pickle.loads(pickle.dumps(reranker))
        assert travelled.score([("ab", "cab")]).tobytes() == reranker.score([("ab", "cab")]).tobytes()
    assert "relevant_label to be 0, 1 or one of" in refusal(folder, relevant_label="other")


def test_a_label_can_be_named(tmp_path: Path) -> None:
    folder, weights = write_bert(tmp_path / "m", 2, id2label={"0": "match", "1": "mismatch"})
    got = float(Reranker(checkpoint.load(folder, relevant_label="match"), engine="reference").score([("ab", "c")])[0])
    assert got == pytest.approx(two_logits(folder, weights, 0, ("ab", "c")), abs=1e-4)


def test_three_labels_are_refused(tmp_path: Path) -> None:
    folder, _ = write_bert(tmp_path / "m", 3)
    assert "got a classifier with 3 labels" in refusal(folder, relevant_label=1)


# ---------------------------------------------------------------- ONNX alone


def test_a_folder_with_nothing_but_onnx_says_where_the_original_is(tmp_path: Path) -> None:
    folder, _ = write_bert(tmp_path / "m", _name_or_path="cross-encoder/ms-marco-MiniLM-L-6-v2")
    (folder / "model.safetensors").unlink()
    (folder / "onnx").mkdir()
    (folder / "onnx" / "model_quantized.onnx").write_bytes(b"onnx")
    said = refusal(folder)
    assert "got no model.safetensors; the weights are there as ONNX only" in said
    assert "a bert model exported from cross-encoder/ms-marco-MiniLM-L-6-v2: load that" in said
    reconfigure(folder, _name_or_path="/home/someone/model")
    assert "load a bert model it was exported from: its card names it" in refusal(folder)


# ---------------------------------------------------------------- jina-reranker-v2's names

XLMR: dict[str, Any] = {
    "architectures": ["XLMRobertaForSequenceClassification"], "auto_map": {"AutoModel": "modeling.XLMRobertaModel"},
    "vocab_size": 40, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64,
    "max_position_embeddings": 66, "pad_token_id": 1, "type_vocab_size": 1, "layer_norm_eps": 1e-5,
    "position_embedding_type": "absolute", "hidden_act": "gelu", "num_labels": 1, "use_flash_attn": True,
    "emb_pooler": None,
}  # fmt: skip


def fused_names(weights: dict[str, Float32]) -> dict[str, Float32]:
    """The canonical tensors as jina-reranker-v2 stores them: 12 a layer in place of 16."""
    out: dict[str, Float32] = {}
    parts = {
        "attention.output.dense": "mixer.out_proj", "attention.output.LayerNorm": "norm1",
        "intermediate.dense": "mlp.fc1", "output.dense": "mlp.fc2", "output.LayerNorm": "norm2",
    }  # fmt: skip
    for name, value in weights.items():
        kind = name.rpartition(".")[2]
        if name.startswith("embeddings.LayerNorm"):
            out[f"roberta.emb_ln.{kind}"] = value
        elif not name.startswith("encoder.layer."):
            out[name if name.startswith("classifier.") else f"roberta.{name}"] = value
        else:
            _, _, layer, rest = name.split(".", 3)
            middle = rest.removesuffix(f".{kind}")
            to = f"roberta.encoder.layers.{layer}"
            if middle == "attention.self.query":
                qkv = [weights[name.replace("query", part)] for part in ("query", "key", "value")]
                out[f"{to}.mixer.Wqkv.{kind}"] = np.concatenate(qkv)
            elif middle in parts:
                out[f"{to}.{parts[middle]}.{kind}"] = value
    return out


@pytest.mark.parametrize("dtype", ["BF16", "F32"])
def test_renamed_and_fused_tensors_are_xlm_robertas(tmp_path: Path, dtype: str) -> None:
    weights = random_weights(recognise(XLMR | {"model_type": "xlm-roberta"}, {}))
    kept = fused_names(weights)
    assert (len(weights), len(kept)) == (5 + 2 * 16 + 4, 5 + 2 * 12 + 4)
    tmp_path.joinpath("m").mkdir()
    write_safetensors(tmp_path / "m" / "model.safetensors", {n: stored(w, dtype) for n, w in kept.items()})
    (tmp_path / "m" / "config.json").write_text(json.dumps(XLMR))
    bpe_tokenizer().save(str(tmp_path / "m" / "tokenizer.json"))
    loaded = load(tmp_path / "m")
    assert (loaded.config.architecture, loaded.config.max_length, loaded.config.position_offset) == (
        "xlm_roberta",
        64,
        2,
    )
    assert set(loaded.weights) == set(weights)
    for name, value in weights.items():
        np.testing.assert_allclose(loaded.weights[name], value, rtol=2**-8 if dtype == "BF16" else 0, atol=1e-6)
    save(loaded, tmp_path / "again")
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "m" / name).read_bytes()
    kept["lora_A"] = np.ones((2, 2), np.float32)
    write_safetensors(tmp_path / "m" / "model.safetensors", {n: stored(w, dtype) for n, w in kept.items()})
    assert "lora_A: unknown to a xlm_roberta model" in refusal(tmp_path / "m")


def test_published_tensor_and_parameter_counts_of_jina_reranker_v2() -> None:
    raw = XLMR | {
        "model_type": "xlm-roberta", "vocab_size": 250002, "hidden_size": 768, "num_hidden_layers": 12,
        "num_attention_heads": 12, "intermediate_size": 3072, "max_position_embeddings": 1026,
    }  # fmt: skip
    shapes = ARCHITECTURES["xlm_roberta"].parameters(recognise(raw, {}))
    assert sum(math.prod(shape) for shape in shapes.values()) == 278_437_633
    assert len(shapes) == 201


# ---------------------------------------------------------------- module chains (whole ones: test_modernbert.py)


def write_chain(folder: Path, kinds: list[str]) -> Path:
    rows = [
        {"idx": i, "name": str(i), "path": f"{i}_{kind}" if i else "", "type": f"sentence_transformers.models.{kind}"}
        for i, kind in enumerate(kinds)
    ]
    (folder / "modules.json").write_text(json.dumps(rows))
    return folder


def test_a_chain_of_the_encoder_alone_is_the_plain_layout(random_checkpoint: Path) -> None:
    assert load(write_chain(random_checkpoint, ["Transformer"])).config == CONFIG


def test_other_chains_are_refused_by_name(random_checkpoint: Path) -> None:
    said = refusal(write_chain(random_checkpoint, ["Transformer", "Pooling", "Normalize"]))
    assert "got Transformer → Pooling → Normalize" in said
    assert "this is an embedding model" in said
    assert "got Transformer → Dense" in refusal(write_chain(random_checkpoint, ["Transformer", "Dense"]))


@pytest.mark.parametrize("text", ["{}", "[]", '[{"type": "Transformer"}]', '[{"type": "a.B", "path": "../elsewhere"}]'])
def test_modules_that_are_none(random_checkpoint: Path, text: str) -> None:
    (random_checkpoint / "modules.json").write_text(text)
    assert "expected a list of modules" in refusal(random_checkpoint)


@pytest.fixture
def ettin(tmp_path: Path) -> Path:
    modernbert = pytest.importorskip("test_modernbert")  # needs torch and transformers
    config = recognise(modernbert.V5, {"head.norm.bias": (64,)})
    folder: Path = modernbert.write_modules(tmp_path / "ettin", modernbert.V5, random_weights(config))
    return folder


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("file", "changes", "said"),
    [
        ("1_Pooling", {"pooling_mode": "max"}, "pooling of cls or mean, got max"),
        ("1_Pooling", {"pooling_mode": None}, "pooling of cls or mean, got none"),
        ("2_Dense", {"activation_function": "torch.nn.modules.activation.Tanh"}, "GELU, got Tanh in 2_Dense"),
        ("2_Dense", {"use_residual": True}, "no use_residual, got True in 2_Dense"),
        ("3_LayerNorm", {"dimension": 32}, "dimension 64, got 32 in 3_LayerNorm"),
        ("4_Dense", {"out_features": 2}, "out_features 1, got 2 in 4_Dense"),
        ("", {"prompts": {"query": "Rank: "}, "default_prompt_name": "query"}, "no default prompt, got 'Rank: '"),
    ],
)
def test_modules_that_no_forward_has(ettin: Path, file: str, changes: dict[str, Any], said: str) -> None:
    edit(ettin / file / "config.json" if file else ettin / "config_sentence_transformers.json", **changes)
    assert said in refusal(ettin)


def test_older_pooling_keys_and_the_chain_s_length(ettin: Path) -> None:
    older = {"pooling_mode_cls_token": False, "pooling_mode_mean_tokens": True, "word_embedding_dimension": 64}
    (ettin / "1_Pooling" / "config.json").write_text(json.dumps(older))
    (ettin / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 7999}))
    loaded = load(ettin)
    assert (loaded.config.pooling, loaded.config.max_length, loaded.config.head_bias) == ("mean", 7999, True)


def test_modules_are_saved_byte_for_byte(ettin: Path, tmp_path: Path) -> None:
    save(load(ettin), tmp_path / "again")
    for path in ettin.rglob("*"):
        if path.is_file():
            assert (tmp_path / "again" / path.relative_to(ettin)).read_bytes() == path.read_bytes()


def test_new_weights_of_a_module_chain_are_saved_as_one_file(ettin: Path, tmp_path: Path) -> None:
    loaded = load(ettin)
    changed = dataclasses.replace(loaded, weights={name: loaded.weights[name] for name in loaded.weights})
    save(changed, tmp_path / "again")
    assert not (tmp_path / "again" / "modules.json").exists()
    again = load(tmp_path / "again")
    assert again.config == loaded.config  # the pooling of the chain, not that of the old config.json
    for name in loaded.weights:
        np.testing.assert_array_equal(again.weights[name], loaded.weights[name])


def test_missing_module_weights_and_a_bare_trunk(ettin: Path) -> None:
    (ettin / "2_Dense" / "model.safetensors").unlink()
    assert "expected the weights of the modules, got no" in refusal(ettin)
    (ettin / "modules.json").unlink()
    said = refusal(ettin)
    assert "whose tensors look like ModernBERT's" in said
    assert "fetch its modules.json" in said


# ---------------------------------------------------------------- the cache


def test_a_cached_chain_or_index_is_whole_only_with_its_parts(
    ettin: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hf"))
    cache_copy(tmp_path / "hf", "someone/ettin", "a" * 40, ettin)
    shards, _ = write_shards(tmp_path / "shards")
    cache_copy(tmp_path / "hf", "someone/shards", "a" * 40, shards)
    for repo, part in (
        ("someone/ettin", "2_Dense/model.safetensors"),
        ("someone/shards", "model-00002-of-00003.safetensors"),
    ):
        folder, missing = hub.cached(repo, None)
        assert folder is not None
        assert missing == []
        (folder / part).unlink()
        assert hub.cached(repo, None)[1] == [part]


# ---------------------------------------------------------------- memory

PROGRAM = """
import sys
import numpy as np
from turborank import checkpoint, engines
from turborank.types import PackedBatch
model = checkpoint.load(sys.argv[1])
engine = engines.prepare(model.weights, model.config, name=sys.argv[2], precision=sys.argv[3], threads=1)
ids = np.asarray([0, 7, model.config.vocab_size - 1], np.int32)
print(float(engine.logits(PackedBatch(ids, ids * 0, np.asarray([0, 3], np.int32), 3))[0]))
# VmHWM is this process's own peak; getrusage's would be at least its parent's.
print(int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0]) / 2**10)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize(("engine", "precision"), [("native", "int8"), ("reference", "fp32"), ("torch", "fp32")])
@pytest.mark.parametrize("dtype", ["F16", "BF16"])
def test_a_large_table_of_words_is_never_copied(tmp_path: Path, engine: str, precision: str, dtype: str) -> None:
    """200 MiB of word embeddings in 16 bits, 400 in float32. Compared with the same model with few words, the process's
    peak may only grow by the pages of the file that are resident while they are checked."""
    if (reason := ENGINES[engine].available()) is not None:
        pytest.skip(reason)
    peaks, logits = [], []
    rows = 200 * 2**20 // (64 * 2)
    for vocab in (64, rows):
        raw = XLMR | {
            "model_type": "xlm-roberta",
            "vocab_size": vocab,
            "hidden_size": 64,
            "max_position_embeddings": 514,
        }
        weights = random_weights(recognise(raw, {}))
        table = weights["embeddings.word_embeddings.weight"]
        table[[7, -1]] = np.linspace(-1, 1, 128, dtype=np.float32).reshape(2, 64)  # what is read is the same in both
        table[0] = 0.5
        folder = tmp_path / str(vocab)
        folder.mkdir()
        write_safetensors(folder / "model.safetensors", {n: stored(w, dtype) for n, w in weights.items()})
        (folder / "config.json").write_text(json.dumps(raw))
        bpe_tokenizer().save(str(folder / "tokenizer.json"))
        run = subprocess.run(
            [sys.executable, "-c", PROGRAM, str(folder), engine, precision], capture_output=True, text=True, check=True
        )
        logit, peak = map(float, run.stdout.split())
        peaks.append(peak)
        logits.append(logit)
    assert all(map(math.isfinite, logits))
    assert peaks[1] - peaks[0] < 80
