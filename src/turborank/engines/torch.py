"""The torch engine: the same forward over differentiable ops, on CUDA where there is one.

torch is imported when the engine is prepared, never before.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from typing import Any

import numpy as np

from turborank.architectures import ARCHITECTURES
from turborank.errors import EngineUnavailableError
from turborank.quantised import dense
from turborank.types import Float32, ModelConfig, PackedBatch

PRECISIONS = ("fp32", "bf16", "fp16")


def available() -> str | None:
    if importlib.util.find_spec("torch") is None:
        return "torch is not installed; pip install 'turborank[torch]'"
    return None


def supports(config: ModelConfig) -> bool:
    return config.architecture in ARCHITECTURES


class TorchEngine:
    """torch, on the first CUDA device or the CPU."""

    name = "torch"

    def __init__(self, weights: Mapping[str, Float32], config: ModelConfig, precision: str, threads: int) -> None:
        import torch

        self.config = config
        self.precision = precision
        self.threads = threads
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        cuda = self.device.type == "cuda"
        self.isa = torch.cuda.get_device_name() if cuda else torch.backends.cpu.get_cpu_capability()
        if precision == "fp16" and not cuda:
            raise EngineUnavailableError("expected a CUDA device for fp16, got a CPU", hint="use bf16 or fp32")
        dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
        self.weights = {name: torch.from_numpy(value).to(self.device, dtype) for name, value in weights.items()}

    def logits(self, batch: PackedBatch) -> Float32:
        import torch

        from turborank.ops import pytorch

        def move(values: Any) -> Any:
            return torch.from_numpy(np.ascontiguousarray(values)).to(self.device)

        moved = PackedBatch(move(batch.input_ids), move(batch.type_ids), move(batch.cu_seqlens), batch.max_seqlen)
        with torch.inference_mode():
            out = ARCHITECTURES[self.config.architecture].forward(self.weights, self.config, moved, pytorch)
        result: Float32 = out.float().cpu().numpy()
        return result


def prepare(weights: Mapping[str, Float32], config: ModelConfig, *, precision: str, threads: int) -> TorchEngine:
    """Weights moved to the device in the precision asked for."""
    return TorchEngine(dense(weights), config, precision, threads)
