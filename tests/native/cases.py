"""Write random cases for check.cpp: a model, a batch, and the reference's logits.

python tests/native/cases.py FOLDER [COUNT [SEED [LAYOUTS]]]     LAYOUTS: what `native_check --layouts` printed
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import BinaryIO

import numpy as np
import shapes

from turborank.checkpoint.tensors import SCALE, dense, quantise
from turborank.engines import native, native_weights
from turborank.types import ModelConfig, PackedBatch


def draw(rng: np.random.Generator) -> tuple[ModelConfig, list[int]]:
    """A small model of any supported kind, and the lengths of a ragged batch."""
    head_size = int(rng.choice([32, 64]))
    heads = int(rng.choice([1, 2, 3, 17]))
    sizes = {
        "hidden": head_size * heads,
        "heads": heads,
        "layers": int(rng.integers(1, 4)),
        "inner": 32 * int(rng.integers(1, 7)),
        "vocab": int(rng.integers(50, 300)),
    }
    longest = int(rng.choice([10, 70, 400]))
    family = rng.choice(["jinabert", "deberta", "modernbert"])
    if family == "jinabert":
        model = shapes.config(
            **sizes,
            feed_forward=str(rng.choice(["geglu", "gelu"])),
            head=str(rng.choice(["classifier", "cosine", "focus", "sum"])),
            alibi=bool(rng.random() < 0.8),
        )
        if rng.random() < 0.5:
            model = dataclasses.replace(model, learned_positions=30, repeat_from=int(rng.integers(1, 30)))
    elif family == "deberta":
        model = shapes.deberta(**sizes, max_length=400, buckets=int(rng.integers(2, 50)), furthest=300)
    else:
        pooling, window = str(rng.choice(["cls", "mean"])), int(rng.choice([1, 20, 64, 150]))
        model = shapes.modernbert(**sizes, max_length=400, half_window=window, pooling=pooling)
    return model, [int(n) for n in rng.integers(2, longest, int(rng.integers(1, 9)))]


Layouts = dict[tuple[str, str], native_weights.Packing]


def layouts(path: str | None, model: ModelConfig) -> Layouts:
    """Layouts of each row and precision that computes a model: those of this machine, or those that a file names."""
    if path is None:
        rows = {
            (row, p)
            for isa in native.isas()
            for p in native.precisions(isa)
            for row in (isa, native.row_of(isa, p, model))
        }
        return {(row, p): native.layout(row, p) for row, p in sorted(rows)}
    rows = [line.split() for line in Path(path).read_text().splitlines()]
    return {
        (isa, p): native_weights.Packing(p, int(group), bool(int(tiles)), int(offset), int(lanes), int(exchange))
        for isa, p, group, tiles, offset, lanes, exchange, *_ in rows
    }


def write_model(
    file: BinaryIO, model: ModelConfig, tensors: dict, isa: str, precision: str, layout: native_weights.Packing
) -> None:
    """Write the weights in the layout of one instruction set."""
    packed, facts = native_weights.pack(tensors, model, layout)
    config = native.plain_config(model) | facts
    numbers = [f"{name} {float(value):.9g}" for name, value in config.items()]
    file.write((f"model {isa} {precision} " + " ".join(numbers) + "\n").encode())
    for name, array in packed.items():
        file.write(f"array {name} {array.nbytes}\n".encode() + array.tobytes())


def write(
    file: BinaryIO, model: ModelConfig, tokens: PackedBatch, tensors: dict, expected: np.ndarray, rows: Layouts
) -> None:
    """The format that check.cpp reads."""
    for (isa, precision), layout in rows.items():
        write_model(file, model, tensors, isa, precision, layout)
    file.write(f"batch {tokens.tokens} {tokens.pairs}\n".encode())
    for array in (tokens.input_ids, tokens.type_ids, tokens.cu_seqlens, expected.astype(np.float32)):
        file.write(array.tobytes())
    wide = 1.0 if model.head == "classifier" else 10.0  # a cosine is multiplied by 10
    for precision, tolerance in (("fp32", 1e-4), ("bf16", 0.02 * wide), ("int8", 0.04 * wide)):
        file.write(f"\ntolerance {precision} {tolerance}".encode())


def main(folder: str, count: str = "8", seed: str = "0", rows: str | None = None) -> None:
    Path(folder).mkdir(parents=True, exist_ok=True)
    for i in range(int(seed), int(seed) + int(count)):
        rng = np.random.default_rng(i)
        model, lengths = draw(rng)
        tensors = shapes.weights(model, i)
        if i % 2:  # every other model comes quantised, as the embedded one does
            for name in [n for n, v in tensors.items() if v.ndim == 2 and n.endswith("weight") and len(v) > 2]:
                tensors[name], tensors[name + SCALE] = quantise(tensors[name])
        tokens = shapes.batch(lengths, model.vocab_size, i)
        expected = shapes.reference_logits(dense(tensors), model, tokens)
        with (Path(folder) / f"case{i}.bin").open("wb") as file:
            write(file, model, tokens, tensors, expected, layouts(rows, model))


if __name__ == "__main__":
    main(*sys.argv[1:])
