"""From trained folders to the folder that is shipped: average, calibrate, quantise.

*Average*: the plain mean of the weights of runs that began from the same student (model soups, arXiv 2203.05482).
*Calibrate*: Platt scaling (1999) of the logits on held-out labelled queries, both classes weighted alike, so that a
score of ½ is where a labelled document and a candidate from its pool are equally likely. The factor is positive:
ranking does not depend on it. *Quantise*: every matrix to int8 with one scale a row, a quarter of the bytes.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from safetensors.numpy import save_file

from turborank.checkpoint import verify
from turborank.checkpoint.tensors import SCALE, quantise
from turborank.distill.folder import TrainingFolder
from turborank.distill.students import Student
from turborank.distill.train import Serving, held_out_logits
from turborank.distill.trainer import LAST
from turborank.errors import InputError


def average(folders: Sequence[str | Path]) -> Student:
    """The mean of several models of one shape."""
    if not folders:
        raise InputError("expected at least one model to ship, got none")
    students = [Student.load(Path(folder)) for folder in folders]
    first = students[0]
    shapes = {name: w.shape for name, w in first.weights.items()}
    for folder, other in zip(folders, students, strict=True):
        if {name: w.shape for name, w in other.weights.items()} != shapes:
            raise InputError(f"expected models of one shape to average, got another at {folder}")
    for name in shapes:
        first.weights[name] = sum(s.weights[name] for s in students) / len(students)  # type: ignore[assignment]
    return first


def platt(logits: npt.NDArray[np.floating], labels: npt.NDArray[np.bool_]) -> tuple[float, float]:
    """(factor, bias) of the class-balanced logistic regression of ``labels`` on ``logits``, by Newton's method.

    Raises InputError where it has no use: only one class, or labels that do not rise with the logits.
    """
    if labels.all() or not labels.any():
        raise InputError("expected labelled and other documents to calibrate on, got only one kind")
    x = np.stack([logits, np.ones_like(logits)], axis=1).astype(np.float64)
    y = labels.astype(np.float64)
    weight = np.where(labels, 0.5 / labels.sum(), 0.5 / (~labels).sum())
    w = np.zeros(2)
    for _ in range(100):
        p = 1.0 / (1.0 + np.exp(-np.clip(x @ w, -500, 500)))
        # The tiny ridge keeps separable data from running away.
        gradient = x.T @ (weight * (p - y)) + 1e-6 * w
        hessian = (x.T * (weight * p * (1 - p))) @ x + 1e-6 * np.eye(2)
        step = np.linalg.solve(hessian, gradient)
        w = w - step
        if np.abs(step).max() < 1e-9:
            break
    if not w[0] > 0:
        raise InputError(
            f"expected logits that rise with relevance, got a factor of {w[0]:.3g}: the model ranks backwards"
        )
    return float(w[0]), float(w[1])


def calibrate(student: Student, folder: TrainingFolder, serving: Serving) -> tuple[float, float]:
    """Multiply Platt's factor and bias into the head, in place; returns them."""
    logits, labels = held_out_logits(student, folder, serving)
    factor, bias = platt(logits, labels > 0)
    scale_logits(student, factor, bias)
    return factor, bias


def scale_logits(student: Student, factor: float, bias: float) -> None:
    """Multiply ``factor`` and add ``bias`` to every logit, in place, in the last layer of the head."""
    for name in LAST & set(student.weights):
        student.weights[name] = student.weights[name] * factor
    for name in ("head.bias", "classifier.bias", "classifier.out_proj.bias"):
        if name in student.weights:
            student.weights[name] = student.weights[name] + bias


def write_int8(student: Student, folder: Path) -> None:
    """A model folder with int8 matrices (see :mod:`turborank.checkpoint.tensors`)."""
    tensors: dict[str, npt.NDArray[np.generic]] = {}
    for name, weight in sorted(student.weights.items()):
        value = weight.detach().float().numpy()
        if value.ndim == 2:
            tensors[name], tensors[name + SCALE] = quantise(value)
        else:
            tensors[name] = value
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / verify.WEIGHTS
    save_file(tensors, path, metadata={"format": "np"})
    path.chmod(0o644)
    (folder / verify.CONFIG).write_text(json.dumps(student.raw_config, indent=2) + "\n", encoding="utf-8")
    student.tokenizer.save(str(folder / verify.TOKENIZER), pretty=False)
