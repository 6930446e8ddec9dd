"""The training loop: optimiser, schedule, checkpoints, evaluation, learning curve; resumable from any checkpoint.

The caller supplies the loss: ``step_loss(model, step)`` samples its own batch from the step number (and the process
rank), so a resumed run sees the same data and, on a CPU, ends in the same bits. accelerate runs the loop on GPUs and
several machines.

A run's folder holds ``curve.jsonl`` (a row per step), ``step-000200/`` (a model folder plus optimiser state), and
``best/`` (the model folder of the best evaluation).
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
from turborank.architectures.jinabert import POSITIONS
from turborank.data.files import replacing_folder, write_text
from turborank.distill.students import LOGIT_PARAMETERS, WORDS, Student
from turborank.errors import TrainingError
from turborank.ops import torch_training
from turborank.types import PackedBatch

FLOAT32 = ("head.",)  # prefixes of parameters that are computed in float32: scalars of the head


def tensors(batch: PackedBatch, device: torch.device | str = "cpu") -> PackedBatch:
    """A packed batch with torch tensors on ``device`` instead of numpy arrays."""

    def move(values: Any) -> Any:
        return torch.from_numpy(np.ascontiguousarray(values)).to(device)

    return PackedBatch(move(batch.input_ids), move(batch.type_ids), move(batch.cu_seqlens), batch.max_seqlen)


class StudentModel(nn.Module):
    """The parameters of a student, by the checkpoint's names, and the logarithm of a scale of all logits.

    The scale is trained with a higher learning rate and multiplied into the head when the model is saved, so that
    margin losses can rescale logits quickly. ``dtype`` is the type of activations and products; ``freeze_words`` keeps
    the word embeddings fixed, and the position table if its rows repeat.
    """

    def __init__(self, student: Student, *, dtype: torch.dtype = torch.float32, freeze_words: bool = False) -> None:
        super().__init__()
        self.config = student.config
        self.dtype = dtype
        self.frozen = {WORDS} if freeze_words else set[str]()
        if freeze_words and self.config.repeat_from:
            self.frozen.add(POSITIONS)  # short pairs would move the first rows away from those that repeat
        self.recompute = False  # gradient checkpointing per layer (arXiv 1604.06174)
        self.names = list(student.weights)
        for name, weight in student.weights.items():
            value = weight.detach().float().clone()
            if name in self.frozen:
                self.register_buffer(_key(name), value.to(dtype), persistent=False)
            else:
                self.register_parameter(_key(name), nn.Parameter(value))
        self.log_scale = nn.Parameter(torch.zeros(1))

    def master(self, name: str) -> Tensor:
        """A float32 parameter, or a frozen one in the compute type."""
        value = getattr(self, _key(name))
        assert isinstance(value, Tensor)
        return value

    def compute_weights(self) -> dict[str, Tensor]:
        """The weights of a forward pass: parameters cast to the compute type, part of the autograd graph."""
        return {
            name: w if name.startswith(FLOAT32) else w.to(self.dtype)
            for name, w in ((name, self.master(name)) for name in self.names)
        }

    def forward(
        self,
        batch: PackedBatch,
        trace: list[Tensor] | None = None,
        record: list[tuple[Tensor, ...]] | None = None,
    ) -> Tensor:
        """Logits (P,) in float32. ``trace`` collects embeddings and layer outputs, (T, C) each; ``record`` collects
        (queries, keys, values) per layer."""
        ops = torch_training.special(recompute=self.recompute, record=record)
        forward = ARCHITECTURES[self.config.architecture].forward
        logits: Tensor = forward(self.compute_weights(), self.config, batch, ops, trace)
        return logits.float() * self.log_scale.exp()

    @torch.no_grad()
    def weights(self, original: dict[str, Tensor], average: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
        """Float32 weights of a checkpoint, with the scale multiplied into the head.

        Frozen weights are taken from ``original``; ``average``, if given, replaces the current parameters.
        """
        source = average or dict(self.named_parameters())
        out = {
            name: original[name] if name in self.frozen else source[_key(name)].detach().clone() for name in self.names
        }
        factor = source["log_scale"].detach().exp()
        for name in LOGIT_PARAMETERS & set(out):
            out[name] = out[name] * factor
        return out


def _key(name: str) -> str:
    return name.replace(".", "/")  # torch allows no dots in parameter names


SCALE_RATE = 30.0  # learning rate of SCALARS, relative to the other parameters'
SCALARS = ("log_scale", "head/focus")
CURVE, STATE, COUNTERS = "curve.jsonl", "state.safetensors", "state.json"


class Loss(NamedTuple):
    """A step's loss (a scalar with gradient), its parts for the curve, and the number of tokens read."""

    total: Tensor
    parts: dict[str, float]
    tokens: int


StepLoss = Callable[[StudentModel, int], Loss]
Evaluate = Callable[[Student], dict[str, float]]
StepCallback = Callable[[dict[str, Any], int], None]  # (row of the curve, steps of the schedule)


@dataclass(frozen=True)
class Schedule:
    """Steps, learning rate, checkpoints and early stopping."""

    steps: int
    learning_rate: float = 1e-4
    warmup: int = 20
    decay: str = "cosine"  # "cosine" or "linear", to a twentieth of the learning rate
    weight_decay: float = 0.01
    clip: float = 1.0  # maximum norm of the gradient
    average: float = 0.0  # decay of a moving average of the weights, which is evaluated and saved; 0: none
    save_every: int = 100  # steps
    evaluate_every: int = 100  # steps
    patience: int = 0  # stop after this many evaluations without improvement; 0: never
    stop: int | None = None  # stop after this step, to be resumed later

    def rate(self, step: int) -> float:
        """The learning rate of a step: linear warm-up, then decay to a twentieth."""
        if step < self.warmup:
            return self.learning_rate * (step + 1) / self.warmup
        progress = (step - self.warmup) / max(1, self.steps - self.warmup)
        shape = 0.5 * (1 + math.cos(math.pi * progress)) if self.decay == "cosine" else 1 - progress
        return self.learning_rate * max(0.05, shape)


@dataclass
class RunState:
    """Counters of a run, saved in every checkpoint."""

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    best: float = -math.inf
    waited: int = 0  # evaluations since the best one


class Run:
    """A student in training, and the folder of its run. ``dtype``, ``freeze_words``: see :class:`StudentModel`."""

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
        self.model = StudentModel(student, dtype=dtype, freeze_words=freeze_words)
        self.model.recompute = recompute
        self.wrapped, self.adam = self.accelerator.prepare(self.model, _optimiser(self.model, schedule))
        self.average: dict[str, Tensor] | None = None
        if schedule.average:
            self.average = {name: p.detach().clone() for name, p in self.model.named_parameters()}
        self.extra: list[nn.Parameter] = []
        self.state = RunState()
        self.rank = self.accelerator.process_index

    def add(self, parameters: Sequence[nn.Parameter]) -> None:
        """Train further parameters. They are saved in checkpoints, but are not part of the student."""
        self.extra += parameters
        if parameters:
            self.adam.add_param_group({"params": list(parameters), "weight_decay": 0.0, "factor": 1.0})

    def _named(self) -> list[tuple[str, nn.Parameter]]:
        return [*self.model.named_parameters(), *((f"extra/{index}", p) for index, p in enumerate(self.extra))]

    def current(self) -> Student:
        """The student with the current (or averaged) weights."""
        weights = self.model.weights(self.student.weights, self.average)
        return Student({n: w.cpu() for n, w in weights.items()}, self.student.raw_config, self.student.tokenizer)

    def resume(self) -> bool:
        """Continue from the newest complete checkpoint; False where there is none."""
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
        self.state = RunState(**counters)
        _shorten(self.out / CURVE, self.state.step)
        return True

    def save(self) -> None:
        """Write a checkpoint that ``Reranker`` loads and :meth:`resume` continues from; the last two are kept."""
        if not self.accelerator.is_main_process:
            return

        def write(folder: Path) -> None:
            self.current().save(folder)
            save_file(self._tensors(), folder / STATE)
            (folder / COUNTERS).write_text(json.dumps(self.state.__dict__), encoding="utf-8")

        _replace_folder(self.out / f"step-{self.state.step:06}", write)
        for old in checkpoints(self.out)[:-2]:
            shutil.rmtree(old, ignore_errors=True)

    def finish(self, student: Student) -> None:
        """Write the model folder ``final/``."""
        if self.accelerator.is_main_process:
            _replace_folder(self.out / "final", student.save)

    def _tensors(self) -> dict[str, Tensor]:
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

    def train(
        self, step_loss: StepLoss, evaluate: Evaluate | None = None, progress: StepCallback | None = None
    ) -> Student:
        """Train to the end of the schedule; the resulting student.

        Raises TrainingError for a loss that is not finite, lack of memory, and files that cannot be written; complete
        checkpoints stay.
        """
        schedule, at = self.schedule, self.state
        self.out.mkdir(parents=True, exist_ok=True)
        end = min(schedule.stop or schedule.steps, schedule.steps)
        while at.step < end and not self._out_of_patience():
            row = self._step(step_loss)
            if evaluate is not None and (at.step % schedule.evaluate_every == 0 or at.step == schedule.steps):
                row |= self._evaluate(evaluate)
            last = at.step == end or self._out_of_patience()
            if at.step % schedule.save_every == 0 or last:
                self.save()
            self._append_row(row)
            if progress is not None:
                progress(row, schedule.steps)
        return self.current()

    def _out_of_patience(self) -> bool:
        return bool(self.schedule.patience) and self.state.waited >= self.schedule.patience

    def _step(self, step_loss: StepLoss) -> dict[str, Any]:
        at, started = self.state, time.monotonic()
        rate = self.schedule.rate(at.step)
        for group in self.adam.param_groups:
            group["lr"] = rate * group["factor"]
        try:
            loss = step_loss(self.wrapped, at.step)
            if not bool(torch.isfinite(loss.total)):
                raise TrainingError(
                    f"expected a finite loss, got {loss.total.item()} at step {at.step + 1} ({loss.parts})",
                    hint=f"lower --learning-rate (now {rate:.1e}); the last good checkpoint is in {self.out}",
                )
            self.accelerator.backward(loss.total)
            for p in self.extra:  # not part of the wrapped model, so accelerate does not average their gradients
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
            # in the first steps the decay is lower, so that the initial weights do not dominate
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
        """Evaluate on rank 0; broadcast the best score and the early-stopping counter."""
        measured = self._measured(evaluate) if self.accelerator.is_main_process else {}
        best_and_waited = broadcast_object_list([self.state.best, self.state.waited])
        self.state.best, self.state.waited = best_and_waited
        return measured

    def _measured(self, evaluate: Evaluate) -> dict[str, float]:
        """Evaluate; the first measure decides whether the student is saved as ``best/``."""
        student = self.current()
        measured = evaluate(student)
        main = next(iter(measured.values()))
        if main > self.state.best:
            self.state.best, self.state.waited = main, 0
            _replace_folder(self.out / "best", student.save)
        else:
            self.state.waited += 1
        return measured

    def _append_row(self, row: dict[str, Any]) -> None:
        if self.accelerator.is_main_process:
            kept = {name: round(v, 6) if isinstance(v, float) and name != "lr" else v for name, v in row.items()}
            try:
                with (self.out / CURVE).open("a", encoding="utf-8") as curve:
                    curve.write(json.dumps(kept) + "\n")
            except OSError as error:
                raise _write_error("the curve", self.out / CURVE, error) from error


def checkpoints(out: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    return sorted(path for path in out.glob("step-*") if (path / COUNTERS).is_file())


def _replace_folder(target: Path, write: Callable[[Path], None]) -> None:
    """Replace a folder atomically by what ``write`` puts there. Raises TrainingError; the old folder then stays."""
    try:
        with replacing_folder(target) as folder:
            write(folder)
    except (OSError, SafetensorError) as error:
        raise _write_error("a checkpoint", target, error) from error


def _write_error(what: str, target: Path, error: Exception) -> TrainingError:
    full = getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error)
    return TrainingError(
        f"expected to write {what}, got: {'the disk is full' if full else error} at {target}",
        hint="existing checkpoints are complete; make room and run the same command again",
    )


def _optimiser(model: StudentModel, schedule: Schedule) -> torch.optim.AdamW:
    named = [(name, p) for name, p in model.named_parameters() if name not in SCALARS]
    numbers = [p for name, p in model.named_parameters() if name in SCALARS]
    groups = [
        {"params": [p for _, p in named if p.ndim >= 2], "weight_decay": schedule.weight_decay, "factor": 1.0},
        {"params": [p for _, p in named if p.ndim < 2], "weight_decay": 0.0, "factor": 1.0},
        {"params": numbers, "weight_decay": 0.0, "factor": SCALE_RATE},
    ]
    return torch.optim.AdamW(groups, lr=schedule.learning_rate, betas=(0.9, 0.98), eps=1e-8, fused=True)


def _shorten(curve: Path, steps: int) -> None:
    """Drop the rows after step ``steps``: resuming there writes them again."""
    if curve.is_file():
        rows = [line for line in curve.read_text(encoding="utf-8").splitlines() if line.strip()]
        kept = [line for line in rows if json.loads(line)["step"] <= steps]
        write_text(curve, "".join(f"{line}\n" for line in kept))
