"""A student as torch sees it: float32 masters, a forward in the compute type, nothing padded."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from turborank.architectures import ARCHITECTURES
from turborank.distill.students import WORDS, Student
from turborank.ops import training
from turborank.types import PackedBatch

EXACT = ("head.",)  # parameters that stay float32: numbers, not matrices
# The last linear of each kind of head: what a factor on the logits is multiplied into.
LAST = {f"{name}.{kind}" for name in ("classifier", "classifier.out_proj") for kind in ("weight", "bias")}
LAST |= {"head.scale", "head.bias"}


def tensors(batch: PackedBatch, device: torch.device | str = "cpu") -> PackedBatch:
    """A packed batch of numpy arrays as one of torch tensors on ``device``."""

    def move(values: Any) -> Any:
        return torch.from_numpy(np.ascontiguousarray(values)).to(device)

    return PackedBatch(move(batch.input_ids), move(batch.type_ids), move(batch.cu_seqlens), batch.max_seqlen)


class Model(nn.Module):
    """Trainable parameters by the checkpoint's names, and the logarithm of a scale that all logits share.

    The scale is learnt faster than the weights and multiplied into the head when the model is saved, so that losses on
    margins do not have to wait until a head of 20·cosine has grown (``dtype``: of activations and products).
    """

    def __init__(self, student: Student, *, dtype: torch.dtype = torch.float32, freeze_words: bool = False) -> None:
        super().__init__()
        self.config = student.config
        self.dtype = dtype
        self.frozen = {WORDS} if freeze_words else set[str]()
        self.recompute = False  # trade time for memory: keep no activations between layers
        self.names = list(student.weights)
        for name, weight in student.weights.items():
            value = weight.detach().float().clone()
            if name in self.frozen:
                self.register_buffer(_key(name), value.to(dtype), persistent=False)
            else:
                self.register_parameter(_key(name), nn.Parameter(value))
        self.log_scale = nn.Parameter(torch.zeros(1))

    def master(self, name: str) -> Tensor:
        """The float32 parameter (or the frozen table in the compute type)."""
        value = getattr(self, _key(name))
        assert isinstance(value, Tensor)
        return value

    def compute_weights(self) -> dict[str, Tensor]:
        """What a forward reads: masters in the compute type, still part of the graph."""
        return {
            name: w if name.startswith(EXACT) else w.to(self.dtype)
            for name, w in ((name, self.master(name)) for name in self.names)
        }

    def forward(
        self,
        batch: PackedBatch,
        trace: list[Tensor] | None = None,
        record: list[tuple[Tensor, ...]] | None = None,
    ) -> Tensor:
        """Logits (P,) in float32. ``trace`` collects embeddings and layer outputs (T, C), ``record`` each layer's
        queries, keys and values."""
        ops = training.special(recompute=self.recompute, record=record)
        forward = ARCHITECTURES[self.config.architecture].forward
        logits: Tensor = forward(self.compute_weights(), self.config, batch, ops, trace)
        return logits.float() * self.log_scale.exp()

    @torch.no_grad()
    def weights(self, original: dict[str, Tensor], average: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
        """Float32 tensors of a checkpoint, the scale multiplied into the head. ``original`` gives what is frozen;
        ``average``, if given, the parameters instead of the current ones."""
        source = average or dict(self.named_parameters())
        out = {
            name: original[name] if name in self.frozen else source[_key(name)].detach().clone() for name in self.names
        }
        factor = source["log_scale"].detach().exp()
        for name in LAST & set(out):
            out[name] = out[name] * factor
        return out


def _key(name: str) -> str:
    return name.replace(".", "/")  # torch allows no dots in a parameter's own name
