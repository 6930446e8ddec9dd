"""The training loop: optimiser, schedule, checkpoints, a learning curve; resumable from any of its checkpoints.

What is trained, and on what, is the caller's: ``loss_of(model, step)`` draws its own batch from the step's number
(and the process's rank), so a resumed run sees the same data, and on a CPU ends in the same bits. accelerate carries
the same loop to a GPU or to many machines; with one process it adds nothing.

A run's folder: ``curve.jsonl``, ``step-000200/`` (a model folder with the optimiser's state in it), ``best/`` (the
model folder of the best evaluation).
"""

from __future__ import annotations

import errno
import json
import math
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from turborank.architectures import ARCHITECTURES
from turborank.data.files import replacing_folder, write_text
from turborank.distill.students import WORDS, Student
from turborank.errors import TrainingError
from turborank.ops import torch_training
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
        ops = torch_training.special(recompute=self.recompute, record=record)
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


SCALE_RATE = 30.0  # the learning rate of single numbers of the head, in those of the weights
NUMBERS = ("log_scale", "head/focus")
CURVE, STATE, COUNTERS = "curve.jsonl", "state.safetensors", "state.json"


class Loss(NamedTuple):
    """One step's loss, its parts for the curve, and the tokens it read."""

    total: Tensor
    parts: dict[str, float]
    tokens: int


LossOf = Callable[[Model, int], Loss]
Evaluate = Callable[[Student], dict[str, float]]
Progress = Callable[[dict[str, Any], int], None]  # a row of the curve, and the steps in all


@dataclass(frozen=True)
class Schedule:
    """How long, how fast, how often."""

    steps: int
    learning_rate: float = 1e-4
    warmup: int = 20
    decay: str = "cosine"  # "cosine" or "linear", to a twentieth
    weight_decay: float = 0.01
    clip: float = 1.0  # of the gradient's norm
    average: float = 0.0  # of an exponential moving average of the weights, which is then what is evaluated and saved
    save_every: int = 100
    evaluate_every: int = 100
    patience: int = 0  # evaluations without a better one before the run ends; 0: never
    stop: int | None = None  # leave here, to be resumed

    def rate(self, step: int) -> float:
        """Linear warm-up, then decay to a twentieth of the learning rate."""
        if step < self.warmup:
            return self.learning_rate * (step + 1) / self.warmup
        progress = (step - self.warmup) / max(1, self.steps - self.warmup)
        shape = 0.5 * (1 + math.cos(math.pi * progress)) if self.decay == "cosine" else 1 - progress
        return self.learning_rate * max(0.05, shape)


@dataclass
class Counters:
    """Where a run is."""

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    best: float = -math.inf
    waited: int = 0  # evaluations since the best


class Run:
    """A student in training, and the folder of its run."""

    def __init__(
        self,
        student: Student,
        out: Path,
        schedule: Schedule,
        *,
        dtype: torch.dtype = torch.float32,
        freeze_words: bool = True,
        recompute: bool = False,
    ) -> None:
        self.student, self.out, self.schedule = student, out, schedule
        self.accelerator = Accelerator(cpu=not torch.cuda.is_available())
        self.model = Model(student, dtype=dtype, freeze_words=freeze_words)
        self.model.recompute = recompute
        self.wrapped, self.adam = self.accelerator.prepare(self.model, _optimiser(self.model, schedule))
        self.average: dict[str, Tensor] | None = None
        if schedule.average:
            self.average = {name: p.detach().clone() for name, p in self.model.named_parameters()}
        self.extra: list[nn.Parameter] = []
        self.at = Counters()
        self.rank = self.accelerator.process_index

    def add(self, parameters: Sequence[nn.Parameter]) -> None:
        """Train these, too; they are kept in checkpoints and are no part of the student."""
        self.extra += parameters
        if parameters:
            self.adam.add_param_group({"params": list(parameters), "weight_decay": 0.0, "factor": 1.0})

    def _named(self) -> list[tuple[str, nn.Parameter]]:
        return [*self.model.named_parameters(), *((f"extra/{place}", p) for place, p in enumerate(self.extra))]

    def current(self) -> Student:
        """The student as it would be saved now."""
        weights = self.model.weights(self.student.weights, self.average)
        return Student({n: w.cpu() for n, w in weights.items()}, self.student.raw_config, self.student.tokenizer)

    def resume(self) -> bool:
        """Go on from the newest whole checkpoint; False where there is none."""
        found = checkpoints(self.out)
        if not found:
            _shorten(self.out / CURVE, 0)
            return False
        counters = json.loads((found[-1] / COUNTERS).read_text(encoding="utf-8"))
        state = load_file(found[-1] / STATE)
        with torch.no_grad():
            for name, p in self._named():
                p.copy_(state[f"master/{name}"])
            for name, average in (self.average or {}).items():
                average.copy_(state[f"average/{name}"])
        for name, p in self._named():
            if f"first/{name}" in state:
                self.adam.state[p] = {
                    "step": state[f"step/{name}"],
                    "exp_avg": state[f"first/{name}"].to(p.device),
                    "exp_avg_sq": state[f"second/{name}"].to(p.device),
                }
        self.at = Counters(**counters)
        _shorten(self.out / CURVE, self.at.step)
        return True

    def save(self) -> None:
        """A checkpoint that ``Reranker`` loads and :meth:`resume` goes on from."""
        if not self.accelerator.is_main_process:
            return

        def write(folder: Path) -> None:
            self.current().save(folder)
            save_file(self._state(), folder / STATE)
            (folder / COUNTERS).write_text(json.dumps(self.at.__dict__), encoding="utf-8")

        _whole(self.out / f"step-{self.at.step:06}", write)
        for old in checkpoints(self.out)[:-2]:
            shutil.rmtree(old, ignore_errors=True)

    def finish(self, student: Student) -> None:
        """The model folder ``final/``, once the schedule has ended."""
        if self.accelerator.is_main_process:
            _whole(self.out / "final", student.save)

    def _state(self) -> dict[str, Tensor]:
        averages = self.average or {}
        state = {f"average/{name}": average.cpu().contiguous() for name, average in averages.items()}
        for name, p in self._named():
            state[f"master/{name}"] = p.detach().cpu().contiguous()
            moments = self.adam.state.get(p)
            if moments:
                state[f"first/{name}"] = moments["exp_avg"].cpu().contiguous()
                state[f"second/{name}"] = moments["exp_avg_sq"].cpu().contiguous()
                state[f"step/{name}"] = torch.as_tensor(moments["step"]).cpu().reshape(())
        return state

    def train(self, loss_of: LossOf, evaluate: Evaluate | None = None, progress: Progress | None = None) -> Student:
        """Steps up to the schedule's end. Raises TrainingError where no step can be taken; what was saved stays."""
        schedule, at = self.schedule, self.at
        self.out.mkdir(parents=True, exist_ok=True)
        end = min(schedule.stop or schedule.steps, schedule.steps)
        while at.step < end and not self._waited_enough():
            row = self._step(loss_of)
            if evaluate is not None and (at.step % schedule.evaluate_every == 0 or at.step == schedule.steps):
                row |= self._evaluate(evaluate)
            last = at.step == end or self._waited_enough()
            if at.step % schedule.save_every == 0 or last:
                self.save()
            self._note(row)
            if progress is not None:
                progress(row, schedule.steps)
        return self.current()

    def _waited_enough(self) -> bool:
        return bool(self.schedule.patience) and self.at.waited >= self.schedule.patience

    def _step(self, loss_of: LossOf) -> dict[str, Any]:
        at, started = self.at, time.monotonic()
        rate = self.schedule.rate(at.step)
        for group in self.adam.param_groups:
            group["lr"] = rate * group["factor"]
        try:
            loss = loss_of(self.wrapped, at.step)
            if not bool(torch.isfinite(loss.total)):
                raise TrainingError(
                    f"expected a finite loss, got {loss.total.item()} at step {at.step + 1} ({loss.parts})",
                    hint=f"lower --learning-rate (now {rate:.1e}); the last good checkpoint is in {self.out}",
                )
            self.accelerator.backward(loss.total)
            for p in self.extra:  # not the wrapped model's, so nobody else adds up their gradients
                p.grad = None if p.grad is None else self.accelerator.reduce(p.grad, "mean")
            norm = self.accelerator.clip_grad_norm_(self.wrapped.parameters(), self.schedule.clip)
            self.adam.step()
            self.adam.zero_grad(set_to_none=True)
        except (MemoryError, torch.OutOfMemoryError, RuntimeError) as error:
            if isinstance(error, RuntimeError) and "memory" not in str(error).lower():
                raise
            raise TrainingError(
                f"expected a step to fit the memory, got: {str(error).splitlines()[0]} at step {at.step + 1}",
                hint="lower --budget or add --recompute; the last good checkpoint stays, run the same command again",
            ) from error
        if self.average is not None:
            # as long as few steps have been taken, the average is the plain mean of them
            keep = min(self.schedule.average, (at.step + 1) / (at.step + 10))
            for name, p in self.model.named_parameters():
                self.average[name].lerp_(p.detach(), 1 - keep)
        at.step, at.tokens = at.step + 1, at.tokens + loss.tokens * self.accelerator.num_processes
        taken = time.monotonic() - started
        at.seconds += taken
        row: dict[str, Any] = {"step": at.step, "tokens": at.tokens, "lr": rate, "grad_norm": float(norm or 0.0)}
        row |= loss.parts | {"loss": loss.total.item(), "log_scale": self.model.log_scale.item()}
        return row | {"tokens_per_s": round(loss.tokens * self.accelerator.num_processes / max(taken, 1e-9))}

    def _evaluate(self, evaluate: Evaluate) -> dict[str, float]:
        """Measures of the student as it would be served, by one process; all learn how long there was no better one."""
        measured = self._measured(evaluate) if self.accelerator.is_main_process else {}
        told = broadcast_object_list([self.at.best, self.at.waited])
        self.at.best, self.at.waited = told
        return measured

    def _measured(self, evaluate: Evaluate) -> dict[str, float]:
        """The first measure decides what is best."""
        student = self.current()
        measured = evaluate(student)
        main = next(iter(measured.values()))
        if main > self.at.best:
            self.at.best, self.at.waited = main, 0
            _whole(self.out / "best", student.save)
        else:
            self.at.waited += 1
        return measured

    def _note(self, row: dict[str, Any]) -> None:
        if self.accelerator.is_main_process:
            kept = {name: round(v, 6) if isinstance(v, float) and name != "lr" else v for name, v in row.items()}
            try:
                with (self.out / CURVE).open("a", encoding="utf-8") as curve:
                    curve.write(json.dumps(kept) + "\n")
            except OSError as error:
                raise _unwritten("the curve", self.out / CURVE, error) from error


def checkpoints(out: Path) -> list[Path]:
    """The whole checkpoints of a run, oldest first."""
    return sorted(path for path in out.glob("step-*") if (path / COUNTERS).is_file())


def _whole(target: Path, write: Callable[[Path], None]) -> None:
    """Write a folder so that it appears whole or not at all. Raises TrainingError; the old one then stays."""
    try:
        with replacing_folder(target) as folder:
            write(folder)
    except (OSError, SafetensorError) as error:
        raise _unwritten("a checkpoint", target, error) from error


def _unwritten(what: str, target: Path, error: Exception) -> TrainingError:
    full = getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error)
    return TrainingError(
        f"expected to write {what}, got: {'the disk is full' if full else error} at {target}",
        hint="the checkpoints that are there are whole; make room and run the same command again",
    )


def _optimiser(model: Model, schedule: Schedule) -> torch.optim.AdamW:
    named = [(name, p) for name, p in model.named_parameters() if name not in NUMBERS]
    numbers = [p for name, p in model.named_parameters() if name in NUMBERS]
    groups = [
        {"params": [p for _, p in named if p.ndim >= 2], "weight_decay": schedule.weight_decay, "factor": 1.0},
        {"params": [p for _, p in named if p.ndim < 2], "weight_decay": 0.0, "factor": 1.0},
        {"params": numbers, "weight_decay": 0.0, "factor": SCALE_RATE},
    ]
    return torch.optim.AdamW(groups, lr=schedule.learning_rate, betas=(0.9, 0.98), eps=1e-8, fused=True)


def _shorten(curve: Path, steps: int) -> None:
    """Drop the rows that come after the checkpoint a run goes on from: they will be written again."""
    if curve.is_file():
        rows = [line for line in curve.read_text(encoding="utf-8").splitlines() if line.strip()]
        kept = [line for line in rows if json.loads(line)["step"] <= steps]
        write_text(curve, "".join(f"{line}\n" for line in kept))
