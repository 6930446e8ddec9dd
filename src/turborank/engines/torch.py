"""The torch engine: the forward over torch ops on a CPU, over Triton kernels on a GPU (docs/gpu.md).

torch is imported when the engine is prepared, not when this module is imported.
"""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any, Self

import numpy as np

from turborank.architectures import ARCHITECTURES, WORD_TABLES
from turborank.checkpoint.tensors import TensorFile, dense
from turborank.engines import cores
from turborank.errors import EngineUnavailableError
from turborank.types import Float32, Int32, ModelConfig, PackedBatch

PRECISIONS = ("fp32", "bf16", "fp16")
CUDA_TOKENS = 65_536  # token budget of a batch on a GPU, which needs larger batches than a CPU


def available() -> str | None:
    if importlib.util.find_spec("torch") is None:
        return "torch is not installed; pip install 'turborank[torch]'"
    return None


def supports(config: ModelConfig) -> bool:
    return config.architecture in ARCHITECTURES


def automatic() -> str:
    """fp16 on GPUs, as fast as bf16 with three more bits of precision; overflow is reported as an error. Else fp32."""
    import torch

    return "fp16" if torch.cuda.is_available() else "fp32"


def converted(weights: Mapping[str, Float32], dtype: Any, device: Any) -> dict[str, Any]:
    """Weights on the device in ``dtype``; norms and the cosine head's scalars stay float32.

    These are few numbers, and rounding them to bf16 causes a third of the error of a cosine head's logits.
    """
    import torch

    def exact(name: str) -> bool:
        return "norm" in name.lower() or name in ("head.scale", "head.bias", "head.focus")

    return {
        name: torch.from_numpy(value).to(device, torch.float32 if exact(name) else dtype)
        for name, value in weights.items()
    }


class TorchEngine:
    """torch on the first CUDA device, else on the CPU with the threads of ``torch.set_num_threads``."""

    name = "torch"

    def __init__(
        self,
        weights: Mapping[str, Float32],
        config: ModelConfig,
        precision: str,
        words: Mapping[str, Any] | None = None,
    ) -> None:
        """``words``: embedding tables, kept in their stored type on a CPU and in the precision's type on a GPU.

        Raises EngineUnavailableError for fp16 without a CUDA device.
        """
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
        """The forward over Triton kernels, or None if they do not support the model.

        CUDA graphs are used only if no op mixes rows of different pairs, because graphs need padded batches.
        """
        from turborank.ops import triton as triton_ops

        if not triton_ops.supports(self.config):
            return None
        forward = ARCHITECTURES[self.config.architecture].forward
        fill = self.config.head == "classifier" and self.config.architecture != "deberta"
        return triton_ops.GraphRunner(
            lambda batch: forward(self.weights, self.config, batch, triton_ops), self.device, fill=fill
        )

    def with_threads(self, threads: int) -> Self:
        """Itself: torch has one number of threads for the process."""
        return self

    def shrink(self) -> None:
        """Do nothing: no work space is kept between calls."""

    def logits(self, batch: PackedBatch) -> Float32:
        """Logits (P,), float32."""
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


def limit_threads() -> None:
    """Give torch no more threads than :func:`turborank.engines.cores.allowed`: it knows nothing of CPU quotas."""
    import torch

    if torch.get_num_threads() > (most := cores.allowed()):
        torch.set_num_threads(most)


def prepare(weights: Mapping[str, Float32], config: ModelConfig, *, precision: str, threads: int) -> TorchEngine:
    """Weights moved to the device in the precision asked for.

    ``threads`` is ignored; torch's own number (``torch.set_num_threads``) counts, up to the cores that may be used.
    """
    limit_threads()
    if not isinstance(weights, TensorFile):
        return TorchEngine(dense(weights), config, precision)
    words = {name: table for name in WORD_TABLES if (table := _mapped(weights, name)) is not None}
    engine = TorchEngine(dense(weights, without=words), config, precision, words)
    weights.release()
    return engine


def _mapped(weights: TensorFile, name: str) -> Any:
    """A table as a tensor that shares the mapped file's memory, in its stored type; None if int8 or absent."""
    import torch

    if name not in weights:
        return None
    raw = weights.stored(name)
    if raw.dtype == np.int8:
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # torch warns that the array is read-only
        table = torch.from_numpy(raw.view(np.int16) if raw.dtype == np.uint16 else raw)
    return table.view(torch.bfloat16) if raw.dtype == np.uint16 else table
