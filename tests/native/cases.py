"""Write random cases for check.cpp: a model, a batch, and the law's logits.

python tests/native/cases.py FOLDER [COUNT [SEED]]
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import BinaryIO

import numpy as np
import shapes

from turborank.architectures import jinabert
from turborank.checkpoint.tensors import SCALE, dense, quantise
from turborank.engines import native, native_weights
from turborank.types import ModelConfig, PackedBatch


def draw(rng: np.random.Generator) -> tuple[ModelConfig, list[int]]:
    """A small model of any supported kind, and the lengths of a ragged batch."""
    head_size = int(rng.choice([32, 64]))
    heads = int(rng.choice([1, 2, 3, 17]))
    model = shapes.config(
        hidden=head_size * heads,
        heads=heads,
        layers=int(rng.integers(1, 4)),
        inner=32 * int(rng.integers(1, 7)),
        vocab=int(rng.integers(50, 300)),
        feed_forward=str(rng.choice(["geglu", "gelu"])),
        head=str(rng.choice(["classifier", "cosine", "focus"])),
        alibi=bool(rng.random() < 0.8),
    )
    longest = int(rng.choice([10, 70, 400]))
    return model, [int(n) for n in rng.integers(2, longest, int(rng.integers(1, 9)))]


def write_model(file: BinaryIO, model: ModelConfig, tensors: dict, isa: str, precision: str) -> None:
    """What one row of the instruction-set table reads."""
    packed, facts = native_weights.pack(tensors, model, native.layout(isa, precision))
    m = model
    numbers = (m.vocab_size, m.hidden_size, m.num_hidden_layers, m.num_attention_heads, m.intermediate_size)
    more = (m.type_vocab_size, facts["positions"], m.position_offset, m.max_length, m.layer_norm_eps)
    flags = (int(m.feed_forward == "geglu"), int(m.head != "classifier"))
    passage = jinabert.PASSAGE if m.head == "focus" else 0
    rest = (passage, int(bool(m.slopes)), facts["stored"], int(facts["mixed"]), facts["least"])
    file.write((f"model {isa} {precision} " + " ".join(map(str, numbers + more + flags + rest)) + "\n").encode())
    for name, array in packed.items():
        file.write(f"array {name} {array.nbytes}\n".encode() + array.tobytes())


def write(file: BinaryIO, model: ModelConfig, tokens: PackedBatch, tensors: dict, expected: np.ndarray) -> None:
    """The format that check.cpp reads. A machine with another table than this one's finds the rows they share."""
    for isa in native.isas():
        for precision in native.precisions(isa):
            write_model(file, model, tensors, isa, precision)
    file.write(f"batch {tokens.tokens} {tokens.pairs}\n".encode())
    for array in (tokens.input_ids, tokens.type_ids, tokens.cu_seqlens, expected.astype(np.float32)):
        file.write(array.tobytes())
    wide = 1.0 if model.head == "classifier" else 10.0  # the cosine heads multiply by 10
    for precision, tolerance in (("fp32", 1e-4), ("bf16", 0.02 * wide), ("int8", 0.04 * wide)):
        file.write(f"\ntolerance {precision} {tolerance}".encode())


def main(folder: str, count: int = 8, seed: int = 0) -> None:
    Path(folder).mkdir(parents=True, exist_ok=True)
    for i in range(seed, seed + count):
        rng = np.random.default_rng(i)
        model, lengths = draw(rng)
        tensors = shapes.weights(model, i)
        if i % 2:  # every other model comes quantised, as the embedded one does
            for name in [n for n, v in tensors.items() if v.ndim == 2 and n.endswith("weight") and len(v) > 2]:
                tensors[name], tensors[name + SCALE] = quantise(tensors[name])
        tokens = shapes.batch(lengths, model.vocab_size, i)
        expected = shapes.law(dense(tensors), model, tokens)
        with (Path(folder) / f"case{i}.bin").open("wb") as file:
            write(file, model, tokens, tensors, expected)


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:]))
