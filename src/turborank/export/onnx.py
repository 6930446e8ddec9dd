"""Models as ONNX graphs over padded batches, and a comparison of ONNX Runtime's logits with the reference engine's.

The graph is traced from the forward that all engines share, over :mod:`turborank.ops.torch_padded`. Batch size and
length are dynamic; the biases of ALiBi (arXiv 2108.12409) and DeBERTa (arXiv 2006.03654) are computed from positions,
so that a graph holds no n×n constant.
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

OPSET = 18  # supported by all runtimes since 2023
TOLERANCE = 1e-4  # maximum |Δlogit| against the reference engine
ONE_FILE = 2_000_000_000  # bytes of weights; protobuf ends at 2 GiB, more are stored in model.onnx.data
CHECKED = ((2, 3), (17,), (9, 64, 33), (300, 1))  # tokens of the pairs of each compared batch


class Padded(nn.Module):
    """A model over padded batches: ids and mask (P, n) in, logits (P, 1) out."""

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
    """Names of a graph's inputs, all int64 (batch, length); ``token_type_ids`` only for models with segments."""
    segments = ("token_type_ids",) if config.type_vocab_size > 1 else ()
    return ("input_ids", "attention_mask", *segments)


def write(weights: Mapping[str, Float32], config: ModelConfig, path: Path, about: Mapping[str, str]) -> None:
    """Write the graph of float32 ``weights`` to ``path``, with ``about`` as its metadata."""
    names = inputs(config)
    # Sizes are dynamic, but the exporter turns every size of 0 or 1 in the example into a constant, the batch size
    # included. Each input gets its own tensor: the exporter would merge a shared one into one input.
    example = tuple(torch.ones(2, 40, dtype=torch.int64) for _ in names)
    sizes = {0: torch.export.Dim("batch"), 1: torch.export.Dim("length")}
    with _quiet():
        program = torch.onnx.export(
            Padded(weights, config).eval(), example, dynamo=True, opset_version=OPSET, verbose=False,
            input_names=list(names), output_names=["logits"], dynamic_shapes=(sizes,) * len(names),
        )  # fmt: skip
        assert program is not None  # only the older exporter returns None
        program.model.producer_name = "turborank"
        program.model.metadata_props.update(about)
        large = sum(value.nbytes for value in weights.values()) > ONE_FILE
        program.save(path, external_data=large)


@contextmanager
def _quiet() -> Iterator[None]:
    """Suppress the exporter's warnings about optional libraries and its internals."""
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
    """A batch of random tokens; the second half of each pair is segment 1 where the model has one."""
    rng = np.random.default_rng((seed, *lengths))
    ids = rng.integers(0, config.vocab_size, sum(lengths)).astype(np.int32)
    types = [(np.arange(n) >= max(1, n // 2)) * min(1, max(0, config.type_vocab_size - 1)) for n in lengths]
    return PackedBatch(
        ids, np.concatenate(types).astype(np.int32), np.cumsum([0, *lengths], dtype=np.int32), max(lengths)
    )


def pad(batch: PackedBatch, names: Sequence[str]) -> dict[str, npt.NDArray[np.int64]]:
    """A packed batch as the graph's inputs (P, n), padded on the right with zeros."""
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
    worst = float(np.max(errors))  # NaN if one is NaN
    if not worst <= TOLERANCE:
        raise EngineError(f"expected ONNX Runtime's logits within {TOLERANCE} of ours, got {worst:.2e} away for {path}")
    return worst
