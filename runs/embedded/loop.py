"""The loop both stages share: bf16 compute over fp32 masters, a step schedule, checkpoints, a learning curve."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

FROZEN = "embeddings.word_embeddings.weight"
THREADS = 2


class Schedule(NamedTuple):
    steps: int
    learning_rate: float
    warmup: int = 20
    checkpoint_every: int = 50
    stop: int | None = None  # leave here, to be resumed

    def at(self, step: int) -> float:
        """Linear warm-up, then linear decay to a twentieth."""
        if step < self.warmup:
            return self.learning_rate * (step + 1) / self.warmup
        return self.learning_rate * max(0.05, (self.steps - step) / max(1, self.steps - self.warmup))


class Loss(NamedTuple):
    total: Tensor
    parts: dict[str, float]
    tokens: int


def compute_weights(master: dict[str, Tensor], frozen: Tensor) -> dict[str, Tensor]:
    """bf16 views of the masters for one step; the head's two numbers stay float32."""
    weights = {name: p if name.startswith("head.") else p.bfloat16() for name, p in master.items()}
    weights[FROZEN] = frozen
    return weights


def optimiser(master: dict[str, Tensor]) -> torch.optim.AdamW:
    matrices = [p for p in master.values() if p.ndim == 2]
    vectors = [p for p in master.values() if p.ndim == 1]
    groups = [{"params": matrices, "weight_decay": 0.01}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, betas=(0.9, 0.98), eps=1e-8, fused=True)


def run(
    weights: dict[str, Tensor],
    loss_of: Callable[[dict[str, Tensor], int], Loss],
    schedule: Schedule,
    out: Path,
    *,
    resume: bool,
    threads: int = THREADS,
    on_checkpoint: Callable[[dict[str, Tensor], int], dict[str, float]] | None = None,
) -> dict[str, Tensor]:
    """Train ``weights`` (float32) for ``schedule.steps`` steps. ``loss_of(weights, step)`` draws its own batch from the
    step number alone, so that a resumed run sees the same data. Returns the trained weights."""
    torch.set_num_threads(threads)
    out.mkdir(parents=True, exist_ok=True)
    frozen = weights[FROZEN].bfloat16()
    master = {name: w.clone().requires_grad_() for name, w in weights.items() if name != FROZEN}
    adam = optimiser(master)
    step, tokens = 0, 0
    state = out / "state.pt"
    if resume and state.exists():
        kept = torch.load(state, weights_only=True)
        step, tokens = kept["step"], kept["tokens"]
        adam.load_state_dict(kept["adam"])
        with torch.no_grad():
            for name, p in master.items():
                p.copy_(kept["master"][name])
    started, fresh = time.monotonic(), 0
    with (out / "curve.jsonl").open("a", encoding="utf-8") as curve:
        while step < (schedule.stop or schedule.steps):
            for group in adam.param_groups:
                group["lr"] = schedule.at(step)
            loss = loss_of(compute_weights(master, frozen), step)
            loss.total.backward()
            norm = torch.nn.utils.clip_grad_norm_(master.values(), 1.0)
            adam.step()
            adam.zero_grad(set_to_none=True)
            step, tokens, fresh = step + 1, tokens + loss.tokens, fresh + loss.tokens
            row = {"step": step, "tokens": tokens, "lr": adam.param_groups[0]["lr"], "grad_norm": float(norm)}
            row |= loss.parts | {"tokens_per_s": round(fresh / (time.monotonic() - started))}
            if step % schedule.checkpoint_every == 0 or step in (schedule.stop, schedule.steps):
                current = {name: p.detach() for name, p in master.items()} | {FROZEN: weights[FROZEN]}
                partial = state.with_suffix(".tmp")
                torch.save({"step": step, "tokens": tokens, "adam": adam.state_dict(), "master": dict(master)}, partial)
                partial.replace(state)
                if on_checkpoint:
                    row |= on_checkpoint(current, step)
            print(json.dumps(row), file=curve, flush=True)
    return {name: p.detach() for name, p in master.items()} | {FROZEN: weights[FROZEN]}
