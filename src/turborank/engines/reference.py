"""The reference engine: the forward pass over numpy, one pair at a time.

The rounding of a BLAS matrix product may depend on its number of rows. Pairs are computed one by one so that a
pair's logit has the same bits in every batch.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

import numpy as np

from turborank.architectures import ARCHITECTURES, WORD_TABLES
from turborank.checkpoint.tensors import TensorFile, dense
from turborank.ops import Array, reference
from turborank.types import Float32, ModelConfig, PackedBatch

PRECISIONS = ("fp32",)


def available() -> str | None:
    return None


def automatic() -> str:
    return "fp32"


def supports(config: ModelConfig) -> bool:
    return config.architecture in ARCHITECTURES


class ReferenceEngine:
    """numpy, float32."""

    name = "reference"
    isa = "numpy"
    precision = "fp32"

    def __init__(self, weights: Mapping[str, Float32], config: ModelConfig, threads: int) -> None:
        self.weights = weights
        self.config = config
        self.threads = threads  # informative only: numpy's BLAS library sets its own number of threads

    def trace(self, batch: PackedBatch) -> tuple[Float32, list[Array]]:
        """Logits (P,), and the hidden states of the whole batch: embeddings and each layer's output."""
        states: list[Array] = []
        logits = ARCHITECTURES[self.config.architecture].forward(self.weights, self.config, batch, reference, states)
        return logits, states

    def with_threads(self, threads: int) -> Self:
        """Itself: numpy's BLAS library has one number of threads for the process."""
        return self

    def shrink(self) -> None:
        """Do nothing: no work space is kept between calls."""

    def logits(self, batch: PackedBatch) -> Float32:
        forward = ARCHITECTURES[self.config.architecture].forward
        out = np.empty(batch.pairs, dtype=np.float32)
        for pair in range(batch.pairs):
            start, end = batch.cu_seqlens[pair], batch.cu_seqlens[pair + 1]
            alone = PackedBatch(
                batch.input_ids[start:end],
                batch.type_ids[start:end],
                np.asarray([0, end - start], dtype=np.int32),
                int(end - start),
            )
            out[pair] = forward(self.weights, self.config, alone, reference)[0]
        return out


def prepare(weights: Mapping[str, Float32], config: ModelConfig, *, precision: str, threads: int) -> ReferenceEngine:
    """Convert weights to float32, int8 ones included. Word embeddings stay in the file and are converted row by row."""
    if not isinstance(weights, TensorFile):
        return ReferenceEngine(dense(weights), config, threads)
    words: dict[str, Any] = {name: weights.rows(name) for name in WORD_TABLES if name in weights}
    wide = dense(weights, without=words)
    weights.release()
    return ReferenceEngine(wide | words, config, threads)
