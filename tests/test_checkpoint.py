"""Loading, verifying and saving model folders."""

import json
import os
import re
import shutil
import subprocess
import sys
import tracemalloc
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from helpers import (
    raw_config,
    rewrite,
    small_config,
    stored_name,
    write_checkpoint,
    write_safetensors,
)
from random_models import random_weights
from sample_tokenizers import bpe_tokenizer

from turborank import catalog, checkpoint
from turborank.checkpoint import load, save
from turborank.checkpoint.tensors import TensorFile, quantise
from turborank.errors import CheckpointError, InputError, ModelNotFoundError, UnknownKeyError

CONFIG = small_config()
# ---------------------------------------------------------------- what is loaded


@pytest.mark.parametrize("prefix", ["bert.", ""])
@pytest.mark.parametrize(("dtype", "error"), [("F32", 0.0), ("F16", 2**-11), ("BF16", 2**-8)])
def test_every_stored_type_and_prefix_gives_the_same_float32(
    tmp_path: Path, dtype: str, error: float, prefix: str
) -> None:
    weights = random_weights(CONFIG)
    loaded = load(write_checkpoint(tmp_path / "m", CONFIG, weights=weights, dtype=dtype, prefix=prefix))
    assert set(loaded.weights) == set(weights)
    for name, value in weights.items():
        got = loaded.weights[name]
        assert got.dtype == np.float32
        assert got.flags.writeable
        np.testing.assert_allclose(got, value, rtol=error, atol=1e-7 if error else 0)


def test_what_a_checkpoint_says_of_itself(random_checkpoint: Path) -> None:
    loaded = load(random_checkpoint)
    assert (loaded.name, loaded.origin, loaded.revision) == ("random-jinabert", "local", None)
    assert loaded.config == CONFIG
    assert loaded.raw_config == raw_config(CONFIG)  # auto_map included, and ignored
    assert loaded.tokenizer.encode("ab", "c").tokens == ["<s>", "a", "b", "</s>", "</s>", "c", "</s>"]
    assert load(str(random_checkpoint)).folder == random_checkpoint


def test_bfloat16_is_the_upper_half_of_a_float32(tmp_path: Path) -> None:
    bits = np.array([0x3F80, 0xC049, 0x7F7F, 0x0001, 0x8000], np.uint16)
    write_safetensors(tmp_path / "t", {"x": ("BF16", bits)})
    expected = [1.0, -3.140625, (2 - 2**-7) * 2.0**127, 2.0**-133, -0.0]
    got = TensorFile(tmp_path / "t", str)["x"]
    assert got.tolist() == expected
    assert np.signbit(got).tolist() == [False, True, False, False, True]


def test_int8_rows_with_their_scales(random_checkpoint: Path) -> None:
    name = "embeddings.word_embeddings.weight"
    rows, scale = quantise(random_weights(CONFIG)[name])
    rewrite(random_checkpoint, lambda t: t.update({"bert." + name: ("I8", rows), f"bert.{name}_scale": ("F32", scale)}))
    weights = load(random_checkpoint).weights
    assert weights[name].dtype == np.int8
    np.testing.assert_array_equal(weights[name], rows)
    np.testing.assert_array_equal(weights[name + "_scale"], scale)


def test_the_cosine_head(tmp_path: Path) -> None:
    config = small_config(head="cosine")
    assert load(write_checkpoint(tmp_path / "m", config)).config == config


def test_stored_buffers_are_ignored(random_checkpoint: Path) -> None:
    positions = ("I64", np.arange(512)[None])
    rewrite(random_checkpoint, lambda t: t.update({"bert.embeddings.position_ids": positions}))
    assert "embeddings.position_ids" not in load(random_checkpoint).weights


def test_a_tokenizer_that_cuts_and_pads_does_so_no_more(random_checkpoint: Path) -> None:
    tokenizer = bpe_tokenizer()
    tokenizer.enable_truncation(8)
    tokenizer.enable_padding(length=8)
    tokenizer.save(str(random_checkpoint / "tokenizer.json"))
    loaded = load(random_checkpoint).tokenizer
    assert len(loaded.encode("a" * 20, "b").ids) == 25
    assert len(loaded.encode("a", "b").ids) == 6


def test_loading_and_verifying_copies_no_weights(tmp_path: Path) -> None:
    config = small_config(intermediate_size=22_000)  # 25 MB of float32
    folder = write_checkpoint(tmp_path / "m", config, dtype="F32")
    load(folder)
    tracemalloc.start()
    try:
        load(folder)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 1_000_000 < 24_000_000 < (folder / "model.safetensors").stat().st_size


# ---------------------------------------------------------------- where a name leads


def test_unknown_words_and_nonsense(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("jina-reranker-v1-trubo-en", ""):
        with pytest.raises(UnknownKeyError, match="expected the model to be one of"):
            load(name)
    for name in ("./nothing", "~/nothing-here", "~nobody-of-this-name/x", "a/b/c", "..", "a/b--c", "a/" + "b" * 5000):
        with pytest.raises(CheckpointError):
            load(name, offline=True)
    with pytest.raises(InputError, match="expected a model's name or folder, got int"):
        load(3)  # type: ignore[arg-type]


def test_weights_that_were_never_public() -> None:
    for name in ("jina-reranker-v1-base-en", "jinaai/jina-reranker-v1-base-en"):
        with pytest.raises(ModelNotFoundError, match="expected a model whose weights are public"):
            load(name)


def test_a_local_folder_wins_over_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_checkpoint(tmp_path / "jina-reranker-v1-tiny-en")
    write_checkpoint(tmp_path / "someone" / "model")
    for name in ("jina-reranker-v1-tiny-en", "someone/model"):
        assert load(name, offline=True).origin == "local"


def test_the_embedded_model() -> None:
    row = catalog.lookup(catalog.DEFAULT)
    if not (row.folder / "model.safetensors").exists():
        with pytest.raises(ModelNotFoundError, match=re.escape(str(row.folder))):
            load()
        pytest.skip("the embedded model is not in this checkout")
    loaded = load()
    assert (loaded.name, loaded.origin) == (row.name, "embedded")
    assert load(catalog.DEFAULT, offline=True).folder == row.folder
    config = loaded.config
    assert (config.architecture, config.num_hidden_layers, config.hidden_size, config.max_length) == (
        row.architecture, row.layers, row.hidden_size, row.max_length,
    )  # fmt: skip
    parameters = [loaded.weights[name].size for name in loaded.weights if not name.endswith("_scale")]
    assert sum(parameters) == row.parameters


def test_a_local_folder_needs_no_hub(random_checkpoint: Path) -> None:
    code = (
        "import sys; from turborank.checkpoint import load; load(sys.argv[1]); print('huggingface_hub' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(random_checkpoint)], capture_output=True, text=True, timeout=60
    )
    assert done.stdout == "False\n", done.stderr


# ---------------------------------------------------------------- saving


def same_files(a: Path, b: Path) -> bool:
    names = sorted(os.listdir(a))
    return names == sorted(os.listdir(b)) and all((a / name).read_bytes() == (b / name).read_bytes() for name in names)


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
def test_saved_is_loaded_byte_for_byte(tmp_path: Path, dtype: str) -> None:
    folder = write_checkpoint(tmp_path / "m", dtype=dtype)
    save(load(folder), tmp_path / "deep" / "copy")
    assert same_files(folder, tmp_path / "deep" / "copy")


def test_a_file_by_safetensors_torch_is_saved_byte_for_byte(random_checkpoint: Path, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    from safetensors.torch import save_file as save_torch

    generator = torch.Generator().manual_seed(0)
    weights = {
        stored_name(name): torch.randn(value.shape, generator=generator).to(torch.bfloat16)
        for name, value in random_weights(CONFIG).items()
    }
    weights["bert.embeddings.position_ids"] = torch.arange(512)[None]
    save_torch(weights, random_checkpoint / "model.safetensors", metadata={"format": "pt", "made": "by hand"})
    loaded = load(random_checkpoint)
    for name in loaded.weights:
        np.testing.assert_array_equal(loaded.weights[name], weights[stored_name(name)].float().numpy())
    save(loaded, tmp_path / "copy")
    assert same_files(random_checkpoint, tmp_path / "copy")


def test_saving_onto_itself_changes_nothing(random_checkpoint: Path, tmp_path: Path) -> None:
    shutil.copytree(random_checkpoint, tmp_path / "before")
    loaded = load(random_checkpoint)
    save(loaded, random_checkpoint)
    assert same_files(random_checkpoint, tmp_path / "before")
    assert np.isfinite(loaded.weights["classifier.weight"]).all()


def test_new_weights_and_config_are_saved_anew(random_checkpoint: Path, tmp_path: Path) -> None:
    loaded = load(random_checkpoint)
    weights = random_weights(CONFIG, seed=1)
    raw = {**loaded.raw_config, "max_position_embeddings": 64}
    save(replace(loaded, weights=weights, raw_config=raw), tmp_path / "new")
    again = load(tmp_path / "new")
    assert again.config.max_length == 64
    for name, value in weights.items():
        np.testing.assert_array_equal(again.weights[name], value)


def test_saving_onto_a_file(random_checkpoint: Path) -> None:
    with pytest.raises(CheckpointError, match="got a file at"):
        save(load(random_checkpoint), random_checkpoint / "config.json")


def test_hashes(random_checkpoint: Path) -> None:
    (random_checkpoint / "config.json").write_text(json.dumps(raw_config(CONFIG)), encoding="utf-8")
    (random_checkpoint / "README.md").write_bytes(b"abc")
    got = checkpoint.hashes(load(random_checkpoint))
    assert set(got) == {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "README.md"}
    # FIPS 180-4, the example "abc"
    assert got["README.md"] == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
