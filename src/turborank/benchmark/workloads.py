"""The workloads, and a model with random weights to run them on."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from turborank.architectures import ARCHITECTURES, jinabert
from turborank.types import Encoding, Float32, ModelConfig


class Workload(NamedTuple):
    """Pairs of given lengths, in the order a caller would give them."""

    title: str
    lengths: tuple[int, ...]


def _ragged(pairs: int = 100, median: float = 142.0, spread: float = 0.6) -> tuple[int, ...]:
    """Log-normal lengths like those of search results, 16 to 1,024, mean about 170."""
    drawn = np.random.default_rng(11).lognormal(math.log(median), spread, pairs)
    return tuple(int(n) for n in np.clip(np.rint(drawn), 16, 1024))


WORKLOADS: dict[str, Workload] = {
    "ragged": Workload("100 documents, mean {mean:.0f} tokens", _ragged()),
    "32x128": Workload("32 × 128", (128,) * 32),
    "8x512": Workload("8 × 512", (512,) * 8),
    "2x2048": Workload("2 × 2,048", (2048,) * 2),
    "1x64": Workload("1 × 64", (64,)),
    "1x8192": Workload("1 × 8,192", (8192,)),
}
LONG = "1x8192"  # padded peers need up to 12 GB for it, so it runs in one process at a time


def title(workload: str) -> str:
    """How a table calls a workload."""
    lengths = WORKLOADS[workload].lengths
    return WORKLOADS[workload].title.format(mean=sum(lengths) / len(lengths))


def encodings(workload: str, vocabulary: int, types: int = 2) -> list[Encoding]:
    """The workload's random tokens, the same in every process; two thirds of a pair are its document."""
    rng = np.random.default_rng(5)
    out = []
    for n in WORKLOADS[workload].lengths:
        ids = rng.integers(5, vocabulary, n).astype(np.int32)
        second = (np.arange(n) >= n // 3) if types > 1 else np.zeros(n)
        out.append(Encoding(ids, second.astype(np.int32), read=n))
    return out


def sizes(model: Path) -> tuple[int, int]:
    """A checkpoint's vocabulary and number of token types: what ``encodings`` may draw from."""
    config = json.loads((model / "config.json").read_text())
    return int(config["vocab_size"]), int(config.get("type_vocab_size", 0))  # ModernBERT has none


TURBO: dict[str, Any] = {
    "architectures": ["JinaBertModel"], "model_type": "bert", "position_embedding_type": "alibi",
    "feed_forward_type": "geglu", "hidden_act": "gelu", "vocab_size": 61056, "hidden_size": 384,
    "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536, "max_position_embeddings": 8192,
    "type_vocab_size": 2, "layer_norm_eps": 1e-12, "alibi_slopes": "halved-tail",
}  # fmt: skip


def turbo_config(layers: int = 6) -> ModelConfig:
    """The published shape; fewer layers for tests."""
    raw = TURBO | {"num_hidden_layers": layers}
    found = jinabert.recognise(raw, {"encoder.layer.0.mlp.gated_layers.weight": (3072, 384)})
    assert found is not None
    return found


def random_weights(config: ModelConfig, seed: int = 0) -> dict[str, Float32]:
    """As the published config initialises a model, N(0, 0.02), except where that would be too easy: biases are not
    zero, gains not one, and queries and keys are wide enough (N(0, 1/C)) for attention scores of standard deviation
    about 1. Flat attention would let ALiBi skipping drop more than it can in a trained model."""
    rng = np.random.default_rng(seed)
    weights: dict[str, Float32] = {}
    for name, shape in ARCHITECTURES[config.architecture].parameters(config).items():
        wide = name.endswith(("query.weight", "key.weight"))
        spread = 1 / math.sqrt(config.hidden_size) if wide else 0.02
        centre = 1.0 if name.lower().endswith("layernorm.weight") else 0.0
        weights[name] = (centre + spread * rng.standard_normal(shape, dtype=np.float32)).astype(np.float32)
    return weights


def write_model(folder: Path, tokenizer: Path, layers: int = 6) -> None:
    """A random checkpoint in the published layout, stored as bfloat16 like the published one."""
    config = turbo_config(layers)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    blocks, offset = [], 0
    for name, value in random_weights(config).items():
        bits = value.view(np.uint32)
        block = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("<u2").tobytes()  # to nearest, ties to even
        header[name] = {"dtype": "BF16", "shape": list(value.shape), "data_offsets": [offset, offset + len(block)]}
        blocks.append(block)
        offset += len(block)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(TURBO | {"num_hidden_layers": layers}, indent=1))
    if tokenizer.resolve() != (folder / "tokenizer.json").resolve():
        shutil.copyfile(tokenizer, folder / "tokenizer.json")
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.writelines(blocks)
