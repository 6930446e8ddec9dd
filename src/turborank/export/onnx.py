"""A model as an ONNX graph over padded batches, and the proof that ONNX Runtime computes our logits with it.

The graph is traced from the very forward that all engines share, over :mod:`turborank.ops.torch_padded`. Batch size and
length are free; ALiBi's and DeBERTa's biases are computed inside from positions, so a graph holds no n×n constant.
"""

from __future__ import annotations

import importlib
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from turborank.architectures import ARCHITECTURES
from turborank.errors import EngineError
from turborank.ops import reference, torch_padded
from turborank.types import Float32, ModelConfig, PackedBatch

OPSET = 18  # every runtime since 2023 knows it
TOLERANCE = 1e-4  # of logits, against the reference engine
ONE_FILE = 2_000_000_000  # bytes of weights; protobuf ends at 2 GiB, and larger ones go to model.onnx.data
CHECKED = ((2, 3), (17,), (9, 64, 33), (300, 1))  # lengths of the batches that are compared; cut to the model's


class Padded(nn.Module):
    """The model as programs expect it: ids and mask (P, N) in, logits (P, 1) out."""

    def __init__(self, weights: Mapping[str, Float32], config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.names = list(weights)
        for name, value in weights.items():
            self.register_buffer(name.replace(".", "/"), torch.from_numpy(np.ascontiguousarray(value)))

    def forward(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None) -> Tensor:
        weights = {name: self.get_buffer(name.replace(".", "/")) for name in self.names}
        types = torch.zeros_like(input_ids) if token_type_ids is None else token_type_ids
        batch: Any = PackedBatch(input_ids, types, attention_mask, 0)  # type: ignore[arg-type]
        logits: Tensor = ARCHITECTURES[self.config.architecture].forward(weights, self.config, batch, torch_padded)
        return logits[:, None]


def inputs(config: ModelConfig) -> tuple[str, ...]:
    """Names of a graph's inputs, all int64 (batch, length). A model with one segment is not asked for segments."""
    segments = ("token_type_ids",) if config.type_vocab_size > 1 else ()
    return ("input_ids", "attention_mask", *segments)


def write(weights: Mapping[str, Float32], config: ModelConfig, path: Path, about: Mapping[str, str]) -> None:
    """Write the graph of float32 ``weights`` to ``path``; ``about`` becomes its metadata."""
    names = inputs(config)
    # The sizes are free, but the exporter makes a constant of any size that is 0 or 1 here, the number of passages
    # included. One tensor each: it would take one for all for one input.
    example = tuple(torch.ones(2, 40, dtype=torch.int64) for _ in names)
    sizes = {0: torch.export.Dim("batch"), 1: torch.export.Dim("length")}
    with _quiet():
        program = torch.onnx.export(
            Padded(weights, config).eval(), example, dynamo=True, opset_version=OPSET, verbose=False,
            input_names=list(names), output_names=["logits"], dynamic_shapes=(sizes,) * len(names),
        )  # fmt: skip
        assert program is not None  # it is for the older exporter only
        program.model.producer_name = "turborank"
        program.model.metadata_props.update(about)
        large = sum(value.nbytes for value in weights.values()) > ONE_FILE
        program.save(path, external_data=large)


@contextmanager
def _quiet() -> Iterator[None]:
    """The exporter's remarks on libraries that are not installed and on its own parts concern nobody here."""
    log = logging.getLogger("torch.onnx")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        log.setLevel(level)


def random_batch(lengths: Sequence[int], config: ModelConfig, seed: int) -> PackedBatch:
    """Pairs of random tokens, the latter half of each of segment 1 where the model has one."""
    rng = np.random.default_rng((seed, *lengths))
    ids = rng.integers(0, config.vocab_size, sum(lengths)).astype(np.int32)
    types = [(np.arange(n) >= max(1, n // 2)) * min(1, max(0, config.type_vocab_size - 1)) for n in lengths]
    return PackedBatch(
        ids, np.concatenate(types).astype(np.int32), np.cumsum([0, *lengths], dtype=np.int32), max(lengths)
    )


def pad(batch: PackedBatch, names: Sequence[str]) -> dict[str, npt.NDArray[np.int64]]:
    """A packed batch as the graph's inputs, padded on the right with zeros."""
    mask = np.arange(batch.max_seqlen) < np.diff(batch.cu_seqlens)[:, None]  # (P, N)
    rows = {
        "input_ids": batch.input_ids,
        "attention_mask": np.ones_like(batch.input_ids),
        "token_type_ids": batch.type_ids,
    }
    out = {name: np.zeros(mask.shape, dtype=np.int64) for name in names}
    for name in names:
        out[name][mask] = rows[name]
    return out


def check(weights: Mapping[str, Float32], config: ModelConfig, path: Path) -> float | None:
    """The largest |Δlogit| between ONNX Runtime and the reference engine over batches of several lengths.

    None where ONNX Runtime is not installed. Raises EngineError above TOLERANCE.
    """
    try:
        runtime: Any = importlib.import_module("onnxruntime")
    except ModuleNotFoundError:
        return None
    session = runtime.InferenceSession(path, providers=["CPUExecutionProvider"])
    errors = []
    for seed, lengths in enumerate(CHECKED):
        batch = random_batch([max(2, min(n, config.max_length)) for n in lengths], config, seed)
        expected = ARCHITECTURES[config.architecture].forward(weights, config, batch, reference)
        found = session.run(["logits"], pad(batch, inputs(config)))[0][:, 0]
        errors.append(np.abs(found - expected).max())
    worst = float(np.max(errors))  # NaN if any of them is
    if not worst <= TOLERANCE:
        raise EngineError(f"expected ONNX Runtime's logits within {TOLERANCE} of ours, got {worst:.2e} away for {path}")
    return worst
