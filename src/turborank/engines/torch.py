"""The torch engine: the same forward over differentiable ops on a CPU, over Triton kernels on a GPU.

torch is imported when the engine is prepared, never before.
"""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import numpy as np

from turborank.architectures import ARCHITECTURES, WORD_TABLES
from turborank.checkpoint.tensors import TensorFile, dense
from turborank.engines import cores
from turborank.errors import EngineUnavailableError
from turborank.types import Float32, Int32, ModelConfig, PackedBatch

PRECISIONS = ("fp32", "bf16", "fp16")
CUDA_TOKENS = 65_536  # tokens in one batch: a GPU wants more at a time than a CPU


def available() -> str | None:
    if importlib.util.find_spec("torch") is None:
        return "torch is not installed; pip install 'turborank[torch]'"
    return None


def supports(config: ModelConfig) -> bool:
    return config.architecture in ARCHITECTURES


def automatic() -> str:
    """fp16 on GPUs: as fast as bf16, eight times as exact, and what leaves its range is an error. fp32 on CPUs."""
    import torch

    return "fp16" if torch.cuda.is_available() else "fp32"


def converted(weights: Mapping[str, Float32], dtype: Any, device: Any) -> dict[str, Any]:
    """Weights on the device in ``dtype``, but norms and a cosine head's own numbers in float32.

    They are few, and in bf16 their rounding is a third of the error of a cosine head's logits and most of their shift.
    """
    import torch

    def exact(name: str) -> bool:
        return "norm" in name.lower() or name in ("head.scale", "head.bias", "head.focus")

    return {
        name: torch.from_numpy(value).to(device, torch.float32 if exact(name) else dtype)
        for name, value in weights.items()
    }


class TorchEngine:
    """torch, on the first CUDA device or the CPU, where it uses as many threads as ``torch.set_num_threads`` said."""

    name = "torch"

    def __init__(
        self,
        weights: Mapping[str, Float32],
        config: ModelConfig,
        precision: str,
        words: Mapping[str, Any] | None = None,
    ) -> None:
        """``words``: tables that stay in the type they are stored in, or take the precision's on a GPU."""
        import torch

        self.config = config
        self.precision = precision
        self.threads: int = torch.get_num_threads()  # of the whole process
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        cuda = self.device.type == "cuda"
        self.isa = torch.cuda.get_device_name() if cuda else torch.backends.cpu.get_cpu_capability()
        if precision == "fp16" and not cuda:
            raise EngineUnavailableError("expected a CUDA device for fp16, got a CPU", hint="use bf16 or fp32")
        dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
        self.dtype = dtype
        self.weights = converted(weights, dtype, self.device)
        self.weights |= {n: table.to(self.device, dtype) if cuda else table for n, table in (words or {}).items()}
        if cuda:
            self.token_budget = CUDA_TOKENS
        self.replayed = self._replayed() if cuda and importlib.util.find_spec("triton") is not None else None

    def _replayed(self) -> Any:
        """The forward in Triton kernels, where they fit; if it never mixes rows of different pairs, as CUDA graphs."""
        from turborank.engines import cuda_graphs
        from turborank.ops import triton as triton_ops

        if not triton_ops.supports(self.config):
            return None
        forward = ARCHITECTURES[self.config.architecture].forward
        fill = self.config.head == "classifier" and self.config.architecture != "deberta"
        return cuda_graphs.Replayed(
            lambda batch: forward(self.weights, self.config, batch, triton_ops), self.device, fill=fill
        )

    def logits(self, batch: PackedBatch) -> Float32:
        """Logits (P,)."""
        import torch

        from turborank.ops import torch as torch_ops

        if self.replayed is not None:
            replayed: Float32 = self.replayed.logits(batch)
            return replayed

        def move(values: Int32) -> Any:
            return torch.from_numpy(np.ascontiguousarray(values)).to(self.device)

        moved = PackedBatch(move(batch.input_ids), move(batch.type_ids), move(batch.cu_seqlens), batch.max_seqlen)

        def take(table: Any, ids: Any) -> Any:
            return torch_ops.take(table, ids).to(self.dtype)

        ops: Any = SimpleNamespace(**{**vars(torch_ops), "take": take})
        with torch.inference_mode():
            out = ARCHITECTURES[self.config.architecture].forward(self.weights, self.config, moved, ops)
        result: Float32 = out.float().cpu().numpy()
        return result


def prepare(weights: Mapping[str, Float32], config: ModelConfig, *, precision: str, threads: int) -> TorchEngine:
    """Weights moved to the device in the precision asked for.

    ``threads`` are torch's own business, but it knows nothing of CPU quotas: it gets no more threads than cores.
    """
    cores.limit_torch()
    if not isinstance(weights, TensorFile):
        return TorchEngine(dense(weights), config, precision)
    words = {name: table for name in WORD_TABLES if (table := _mapped(weights, name)) is not None}
    engine = TorchEngine(dense(weights, without=words), config, precision, words)
    weights.release()
    return engine


def _mapped(weights: TensorFile, name: str) -> Any:
    """A table as a tensor over the file itself, in the type it is stored in; None where it is int8 or not there."""
    import torch

    if name not in weights:
        return None
    raw = weights.stored(name)
    if raw.dtype == np.int8:
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # it may not be written to, and is not
        table = torch.from_numpy(raw.view(np.int16) if raw.dtype == np.uint16 else raw)
    return table.view(torch.bfloat16) if raw.dtype == np.uint16 else table
