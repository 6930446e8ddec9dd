"""Model folders for tests: small, random, in the published layout."""

import json
import shutil
import signal
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from random_models import model_config, random_weights
from sample_tokenizers import bpe_tokenizer
from tokenizers import Tokenizer

from turborank.checkpoint import load
from turborank.errors import CheckpointError
from turborank.types import ModelConfig

Tensors = dict[str, tuple[str, Any]]
NAMES = {"F16": "float16", "F32": "float32", "F64": "float64"}


def small_config(**changes: Any) -> ModelConfig:
    """A JinaBERT that fits the tiny BPE tokenizer: two layers, four heads, 48 wide, 40 tokens."""
    size = {"vocab_size": 40, "hidden_size": 48, "num_attention_heads": 4, "intermediate_size": 64, "max_length": 512}
    return model_config(**{**size, "slopes": (0.25, 0.0625, 0.015625, 0.00390625), **changes})


def native_config(**changes: Any) -> ModelConfig:
    """The same in sizes that the native engine supports, whose bits are equal in every process."""
    return small_config(hidden_size=64, num_attention_heads=2, slopes=(0.25, 0.0625), **changes)


def raw_config(config: ModelConfig) -> dict[str, Any]:
    """``config.json`` of a JinaBERT, with the published keys."""
    return {
        "architectures": ["JinaBertModel"],
        "auto_map": {"AutoModel": "modeling_bert.JinaBertModel"},
        "model_type": "bert",
        "position_embedding_type": "alibi",
        "alibi_slopes": list(config.slopes),
        "feed_forward_type": "geglu" if config.feed_forward == "geglu" else "original",
        "hidden_act": "gelu",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "intermediate_size": config.intermediate_size,
        "max_position_embeddings": config.max_length,
        "type_vocab_size": config.type_vocab_size,
        "layer_norm_eps": config.layer_norm_eps,
        "torch_dtype": "float16",
    }


def bfloat16_bits(values: npt.NDArray[np.float32]) -> npt.NDArray[np.uint16]:
    """float32 rounded to bfloat16, ties to even, as bits; for finite values."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def stored(values: npt.NDArray[Any], dtype: str) -> tuple[str, npt.NDArray[Any]]:
    """An array as ``dtype`` stores it; bfloat16 as bits."""
    if dtype == "BF16":
        return dtype, bfloat16_bits(values)
    return dtype, values.astype(NAMES[dtype])


def write_safetensors(path: Path, tensors: Mapping[str, tuple[str, npt.NDArray[Any]]]) -> None:
    """Stored name -> (dtype, the array whose bytes are stored), by the format's own description: the library's numpy
    interface cannot write bfloat16, and its torch interface needs torch."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    data = bytearray()
    for name, (dtype, array) in tensors.items():
        start = len(data)
        data += np.ascontiguousarray(array).tobytes()
        header[name] = {"dtype": dtype, "shape": list(array.shape), "data_offsets": [start, len(data)]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def stored_name(name: str, prefix: str = "bert.") -> str:
    """The published name: tensors of encoder and pooler have a prefix, those of the head have none."""
    return name if name.startswith(("classifier.", "head.")) else prefix + name


def write_checkpoint(
    folder: Path,
    config: ModelConfig | None = None,
    *,
    weights: Mapping[str, npt.NDArray[np.float32]] | None = None,
    dtype: str = "BF16",
    prefix: str = "bert.",
    tokenizer: Tokenizer | None = None,
) -> Path:
    """A random JinaBERT in the published layout; the folder."""
    config = config or small_config()
    weights = weights or random_weights(config)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {stored_name(name, prefix): stored(value, dtype) for name, value in weights.items()}
    write_safetensors(folder / "model.safetensors", tensors)
    (folder / "config.json").write_text(json.dumps(raw_config(config), indent=2) + "\n", encoding="utf-8")
    (tokenizer or bpe_tokenizer()).save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"model_max_length": 512}\n', encoding="utf-8")
    return folder


def tensors(dtype: str = "F32") -> Tensors:
    """The random model of :func:`small_config`, as a safetensors file stores it."""
    return {stored_name(name): stored(value, dtype) for name, value in random_weights(small_config()).items()}


def rewrite(folder: Path, change: Callable[[Tensors], object]) -> Path:
    """The folder with its weights file changed."""
    table = tensors()
    change(table)
    write_safetensors(folder / "model.safetensors", table)
    return folder


def reconfigure(folder: Path, **changes: Any) -> Path:
    """The folder with config.json changed; None removes a key."""
    raw = json.loads((folder / "config.json").read_text(encoding="utf-8")) | changes
    kept = {key: value for key, value in raw.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(kept), encoding="utf-8")
    return folder


def refusal(folder: Path, **options: Any) -> str:
    """The message of the CheckpointError."""
    with pytest.raises(CheckpointError) as caught:
        load(folder, **options)
    return str(caught.value)


def cache_copy(home: Path, repo: str, revision: str, folder: Path) -> None:
    """A repository in the layout of huggingface_hub's cache."""
    root = home / f"models--{repo.replace('/', '--')}"
    shutil.copytree(folder, root / "snapshots" / revision)
    (root / "refs").mkdir()
    (root / "refs" / "main").write_text(revision)


def heed_interrupts() -> None:
    """For ``preexec_fn``: a shell starts background jobs, such as this test run, with SIGINT ignored."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
