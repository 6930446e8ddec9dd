"""Model folders that are refused; the error lists every fault with what was expected and what was found."""

import json
import re
import shutil
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import (
    Tensors,
    reconfigure,
    refusal,
    rewrite,
    small_config,
    stored,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from random_models import random_weights
from safetensors.numpy import save_file
from sample_tokenizers import SHARED, bpe_tokenizer, wordpiece_tokenizer
from tokenizers import Tokenizer, models

from turborank import catalog, checkpoint
from turborank.checkpoint import load, verify
from turborank.checkpoint.tensors import TensorFile, quantise
from turborank.data.files import file_hash
from turborank.errors import CheckpointError, ModelNotFoundError

CONFIG = small_config()
# ---------------------------------------------------------------- what is refused: files


def test_no_such_path(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError, match=r"no such path at .*absent"):
        load(tmp_path / "absent")
    with pytest.raises(ModelNotFoundError, match=r"no such path at .*absent"):
        load(str(tmp_path / "absent"))


def test_a_file_instead_of_a_folder(random_checkpoint: Path) -> None:
    with pytest.raises(ModelNotFoundError, match=r"got a file at .*config\.json; give the folder"):
        load(random_checkpoint / "config.json")


def test_an_empty_folder(tmp_path: Path) -> None:
    assert "got an empty folder" in refusal(tmp_path)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
def test_a_missing_file_is_named(random_checkpoint: Path, name: str) -> None:
    (random_checkpoint / name).unlink()
    assert f"got no {name}" in refusal(random_checkpoint)


def test_a_broken_link_is_a_missing_file(random_checkpoint: Path) -> None:
    (random_checkpoint / "model.safetensors").unlink()
    (random_checkpoint / "model.safetensors").symlink_to(random_checkpoint / "gone")
    assert "got no model.safetensors" in refusal(random_checkpoint)


def test_only_slow_tokenizer_files(random_checkpoint: Path) -> None:
    (random_checkpoint / "tokenizer.json").rename(random_checkpoint / "vocab.txt")
    assert "save_pretrained" in refusal(random_checkpoint)


@pytest.mark.slow
def test_a_pickle_is_refused_with_a_way_to_convert_it_that_works(random_checkpoint: Path) -> None:
    torch = pytest.importorskip("torch")
    from safetensors.torch import load_file

    weights = load_file(random_checkpoint / "model.safetensors")
    (random_checkpoint / "model.safetensors").unlink()
    torch.save(weights, random_checkpoint / "pytorch_model.bin")
    message = refusal(random_checkpoint)
    assert "can run code" in message
    run_hint(message, random_checkpoint)
    assert load(random_checkpoint).weights["classifier.bias"] == weights["classifier.bias"].float().numpy()


def run_hint(message: str, folder: Path) -> None:
    """Run the command that an error message suggests."""
    command = re.search(r'python -c "(.+)"$', message)
    assert command, message
    subprocess.run([sys.executable, "-c", command[1]], cwd=folder, check=True, timeout=120)


def test_a_truncated_file(random_checkpoint: Path) -> None:
    path = random_checkpoint / "model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1000])
    message = refusal(random_checkpoint)
    assert f"expected {len(whole):,} bytes, got {len(whole) - 1000:,}: the file is truncated" in message


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"1234",
        b"<html>none</html>",
        b"\xff" * 64,
        struct.pack("<Q", 2) + b"[]",
        struct.pack("<Q", 8) + b'{"a":{}}',
    ],
)
def test_garbage_instead_of_weights(random_checkpoint: Path, data: bytes) -> None:
    (random_checkpoint / "model.safetensors").write_bytes(data)
    assert "expected a safetensors file" in refusal(random_checkpoint)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(place=st.integers(0, 4000), value=st.integers(0, 255))
def test_a_changed_byte_in_the_header_is_refused_or_harmless(random_checkpoint: Path, place: int, value: int) -> None:
    path = random_checkpoint / "model.safetensors"
    damaged = bytearray(path.read_bytes())
    assert struct.unpack("<Q", damaged[:8])[0] > 4000
    damaged[place] = value
    copy = random_checkpoint.with_name("damaged")
    shutil.copytree(random_checkpoint, copy, dirs_exist_ok=True)
    (copy / "model.safetensors").write_bytes(damaged)
    try:
        loaded = load(copy).weights
    except CheckpointError:
        return
    original = load(random_checkpoint).weights  # metadata, or nothing, was changed
    assert set(loaded) == set(original)
    assert all((loaded[name] == original[name]).all() for name in original)


def test_a_git_lfs_pointer(random_checkpoint: Path) -> None:
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 75600000\n"
    (random_checkpoint / "model.safetensors").write_text(pointer, encoding="utf-8")
    assert "git lfs pull" in refusal(random_checkpoint)


# ---------------------------------------------------------------- what is refused: tensors


def test_all_faults_are_told_at_once(random_checkpoint: Path) -> None:
    def change(table: Tensors) -> None:
        del table["bert.pooler.dense.bias"]
        del table["bert.encoder.layer.1.mlp.wo.weight"]
        table["bert.encoder.layer.0.mlp.layernorm.bias"] = stored(np.zeros(47), "F32")
        table["bert.encoder.layer.2.output.dense.bias"] = stored(np.zeros(48), "F32")
        table["bert.embeddings.LayerNorm.bias"] = stored(np.zeros(48), "F64")

    message = refusal(rewrite(random_checkpoint, change))
    assert "expected the 38 tensors of a jinabert model, got 5 faults in" in message
    assert "pooler.dense.bias: missing, expected [48]" in message
    assert "encoder.layer.1.mlp.wo.weight: missing, expected [48, 64]" in message
    assert "encoder.layer.0.mlp.layernorm.bias: expected [48], got [47]" in message
    assert "encoder.layer.2.output.dense.bias: unknown to a jinabert model, F32 [48]" in message
    assert "embeddings.LayerNorm.bias: expected one of F32, F16, BF16 or a matrix of I8, got F64" in message


# Bit patterns that are no number: ±inf, quiet and signalling NaNs of both signs.
NOT_FINITE = {
    "F32": [0x7F800000, 0xFF800000, 0x7FC00000, 0xFFC00000, 0x7F800001, 0xFF800001, 0x7FFFFFFF, 0xFFFFFFFF],
    "F16": [0x7C00, 0xFC00, 0x7E00, 0xFE00, 0x7C01, 0xFC01, 0x7FFF, 0xFFFF],
    "BF16": [0x7F80, 0xFF80, 0x7FC0, 0xFFC0, 0x7F81, 0xFF81, 0x7FFF, 0xFFFF],
}
LARGEST = {"F32": [0x7F7FFFFF, 0xFF7FFFFF], "F16": [0x7BFF, 0xFBFF], "BF16": [0x7F7F, 0xFF7F]}


@pytest.mark.parametrize("dtype", NOT_FINITE)
def test_nan_and_infinity_are_found_and_named(random_checkpoint: Path, dtype: str) -> None:
    unsigned = np.uint32 if dtype == "F32" else np.uint16
    name = "bert.encoder.layer.1.attention.self.key.bias"

    def with_bits(pattern: int) -> Path:
        bits = stored(random_weights(CONFIG)[name.removeprefix("bert.")], dtype)[1].view(unsigned).copy()
        bits[17] = pattern
        return rewrite(random_checkpoint, lambda t: t.update({name: (dtype, bits)}))

    for pattern in NOT_FINITE[dtype]:
        message = refusal(with_bits(pattern))
        assert "got 1 fault in" in message
        assert "encoder.layer.1.attention.self.key.bias: contains NaN or infinity" in message
    for pattern in LARGEST[dtype]:
        load(with_bits(pattern))


@given(bits=st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=8))
@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_finite_agrees_with_numpy(tmp_path: Path, bits: list[int]) -> None:
    values = np.array(bits, np.uint32).view(np.float32)
    save_file({"x": values}, tmp_path / "t")
    assert TensorFile(tmp_path / "t", str).finite("x") == bool(np.isfinite(values).all())


def test_nan_in_the_scales_of_int8(random_checkpoint: Path) -> None:
    name = "embeddings.word_embeddings.weight"
    rows, scale = quantise(random_weights(CONFIG)[name])
    scale[3] = np.nan
    rewrite(random_checkpoint, lambda t: t.update({"bert." + name: ("I8", rows), f"bert.{name}_scale": ("F32", scale)}))
    assert f"{name}_scale: contains NaN or infinity" in refusal(random_checkpoint)


def test_int8_without_its_scales(random_checkpoint: Path) -> None:
    name = "embeddings.word_embeddings.weight"
    rows, _ = quantise(random_weights(CONFIG)[name])
    rewrite(random_checkpoint, lambda t: t.update({"bert." + name: ("I8", rows)}))
    assert f"{name}: int8 without its scales, expected {name}_scale [40]" in refusal(random_checkpoint)


def test_scales_without_int8_and_int8_vectors(random_checkpoint: Path) -> None:
    def change(table: Tensors) -> None:
        table["bert.embeddings.word_embeddings.weight_scale"] = stored(np.ones(40), "F32")
        table["bert.pooler.dense.bias"] = ("I8", np.ones(48, np.int8))

    message = refusal(rewrite(random_checkpoint, change))
    assert "embeddings.word_embeddings.weight_scale: unknown" in message
    assert "pooler.dense.bias: expected one of F32, F16, BF16 or a matrix of I8, got I8" in message


def test_one_tensor_under_two_names(random_checkpoint: Path) -> None:
    rewrite(random_checkpoint, lambda t: t.update({"pooler.dense.bias": t["bert.pooler.dense.bias"]}))
    message = refusal(random_checkpoint)
    assert "expected each tensor once" in message
    assert "bert.pooler.dense.bias" in message


def test_a_classifier_is_no_reranker(random_checkpoint: Path) -> None:
    rewrite(random_checkpoint, lambda t: t.update({"classifier.weight": stored(np.zeros((3, 48)), "F32")}))
    assert "got a classifier with 3 labels" in refusal(random_checkpoint)


def test_an_embedding_model_is_no_reranker(random_checkpoint: Path) -> None:
    rewrite(random_checkpoint, lambda t: [t.pop(name) for name in ("classifier.weight", "classifier.bias")])
    assert "an embedding model" in refusal(random_checkpoint)


# ---------------------------------------------------------------- what is refused: config


@pytest.mark.parametrize("text", ["", "{", "\xff", "{'a': 1}", "[" * 100_000])
def test_config_that_is_no_json(random_checkpoint: Path, text: str) -> None:
    (random_checkpoint / "config.json").write_bytes(text.encode("latin-1"))
    message = refusal(random_checkpoint)
    assert "expected JSON" in message
    assert "config.json" in message


def test_config_that_is_no_object(random_checkpoint: Path) -> None:
    (random_checkpoint / "config.json").write_text("[1]", encoding="utf-8")
    assert "expected a JSON object, got a list" in refusal(random_checkpoint)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"hidden_size": None}, "hidden_size: expected an integer, 1 to 2147483647, got no such key"),
        ({"vocab_size": "40"}, "vocab_size: expected an integer, 1 to 2147483647, got '40'"),
        ({"max_position_embeddings": 2**31}, "max_position_embeddings: expected an integer, 1 to 2147483647, got 2147"),
        ({"alibi_slopes": [10**400] * 4}, "alibi_slopes: expected finite numbers"),
        ({"num_hidden_layers": 2.0}, "num_hidden_layers: expected an integer, 1 to 1024, got 2.0"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers: expected an integer, 1 to 1024, got 1000000000"),
        ({"num_attention_heads": 10**9}, "num_attention_heads: expected an integer, 1 to 1024, got 1000000000"),
        ({"num_attention_heads": 0}, "num_attention_heads: expected an integer, 1 to 1024, got 0"),
        ({"intermediate_size": True}, "intermediate_size: expected an integer, 1 to 2147483647, got True"),
        ({"layer_norm_eps": "tiny"}, "layer_norm_eps: expected a number between 0 and 1, got 'tiny'"),
        ({"layer_norm_eps": float("nan")}, "layer_norm_eps: expected a number between 0 and 1, got nan"),
        (
            {"num_attention_heads": 7, "alibi_slopes": [1] * 7},
            "hidden_size: expected a multiple of num_attention_heads",
        ),
        ({"hidden_act": "relu"}, "hidden_act: expected 'gelu', got 'relu'"),
        ({"feed_forward_type": "reglu"}, "feed_forward_type: expected 'geglu' or 'original', got 'reglu'"),
        ({"alibi_slopes": 3}, "alibi_slopes: expected a list or the name of a rule, got 3"),
        ({"alibi_slopes": [0.5, "x", 0.1, 0.1]}, "alibi_slopes: expected finite numbers"),
        ({"alibi_slopes": [0.5]}, "expected 4 alibi_slopes"),
    ],
)
def test_malformed_config_values(random_checkpoint: Path, changes: dict[str, Any], said: str) -> None:
    message = refusal(reconfigure(random_checkpoint, **changes))
    assert said in message
    assert "config.json" in message


def test_all_faults_of_a_config_are_told_at_once(random_checkpoint: Path) -> None:
    message = refusal(reconfigure(random_checkpoint, hidden_size=None, vocab_size=-1, layer_norm_eps=[]))
    assert "got 3 faults in" in message


def test_an_unknown_family(random_checkpoint: Path) -> None:
    folder = reconfigure(random_checkpoint, model_type="gpt2", position_embedding_type="rotary", layer_norm_eps=None)
    assert "expected a model of one of these families" in refusal(folder)


def test_a_config_of_another_size(random_checkpoint: Path) -> None:
    message = refusal(reconfigure(random_checkpoint, intermediate_size=32))
    assert "encoder.layer.0.mlp.wo.weight: expected [48, 32], got [48, 64]" in message


# ---------------------------------------------------------------- what is refused: tokenizers


def test_a_tokenizer_that_is_no_json(random_checkpoint: Path) -> None:
    (random_checkpoint / "tokenizer.json").write_text("{", encoding="utf-8")
    assert "expected a tokenizer, got something else at" in refusal(random_checkpoint)


def test_a_tokenizer_of_another_model(random_checkpoint: Path) -> None:
    tokenizer = bpe_tokenizer()
    tokenizer.add_tokens([f"word{i}" for i in range(5)])  # ids 37 … 41, of which 40 and 41 have no row
    tokenizer.save(str(random_checkpoint / "tokenizer.json"))
    message = refusal(random_checkpoint)
    assert "expected token ids below 40" in message
    assert "'word4' with id 41" in message


def test_token_ids_with_gaps(random_checkpoint: Path) -> None:
    """A vocabulary with few tokens, one of them with an id beyond the embedding table."""
    path = random_checkpoint / "tokenizer.json"
    data = json.loads(path.read_text(encoding="utf-8"))
    data["model"]["vocab"]["z"] = 4000
    path.write_text(json.dumps(data), encoding="utf-8")
    assert "'z' with id 4000" in refusal(random_checkpoint)


def test_a_tokenizer_without_a_pair_template(random_checkpoint: Path) -> None:
    tokenizer = Tokenizer(models.BPE(vocab={"a": 0, "b": 1}, merges=[]))
    tokenizer.save(str(random_checkpoint / "tokenizer.json"))
    assert "got 0 special tokens" in refusal(random_checkpoint)


def test_a_template_with_tokens_that_the_vocabulary_lacks(random_checkpoint: Path) -> None:
    path = random_checkpoint / "tokenizer.json"
    data = json.loads(path.read_text(encoding="utf-8"))
    data["post_processor"]["sep"] = ["[SEP]", 39]
    path.write_text(json.dumps(data), encoding="utf-8")
    assert "'[SEP]' with id 39" in refusal(random_checkpoint)


def test_berts_template_is_a_template(random_checkpoint: Path) -> None:
    wordpiece_tokenizer().save(str(random_checkpoint / "tokenizer.json"))
    assert load(random_checkpoint).tokenizer.encode("red", "bee").tokens == ["[CLS]", "red", "[SEP]", "bee", "[SEP]"]


def test_the_published_tokenizer_fits_the_published_config() -> None:
    path = SHARED / "reference/jina_tokenizer"
    if not path.exists():
        pytest.skip("needs the published tokenizer and config, which are not on this machine")
    for name in ("turbo", "tiny"):
        raw = verify.json_object(path / f"config_{name}.json")
        config = checkpoint.model_config(raw, {"encoder.layer.0.mlp.gated_layers.weight": ()}, path)
        assert config.max_length == 8192
        assert verify.tokenizer(path / "tokenizer.json", config).get_vocab_size() == 60_516
        pinned = catalog.lookup(f"jina-reranker-v1-{name}-en").hashes
        assert file_hash(path / f"config_{name}.json") == pinned["config.json"]
        for file in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
            assert file_hash(path / file) == pinned[file]
