"""From training runs to the model folder that is published: average, calibrate, quantise.

*Average*: the mean of the weights of runs that started from the same student (model soups, arXiv 2203.05482).
*Calibrate*: Platt scaling (J. Platt, "Probabilistic outputs for support vector machines", 1999) of the logits on
held-out labelled queries with balanced classes, so that a score of ½ means that a labelled document and a candidate
from its pool are equally likely. The factor is positive, so the ranking does not change. *Quantise*: every matrix to
int8 with one scale per row (docs/model.md §2.3), a quarter of the bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from safetensors.numpy import save_file
from scipy.optimize import root
from scipy.special import expit

from turborank.checkpoint import verify
from turborank.checkpoint.tensors import SCALE, quantise
from turborank.data.files import os_errors, replacing_together
from turborank.distill.folder import TrainingFolder
from turborank.distill.students import Student
from turborank.distill.train import ServingOptions, held_out_logits
from turborank.distill.trainer import LOGIT_PARAMETERS
from turborank.errors import InputError

Float64 = npt.NDArray[np.float64]
RIDGE = 1e-6  # L2 penalty that keeps the regression finite on separable data


def average(folders: Sequence[str | Path]) -> Student:
    """The mean of several models of equal shapes. Raises InputError where shapes differ or there is no model."""
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
    """(factor, bias) of the class-balanced logistic regression of ``labels`` (N,) on ``logits`` (N,).

    Raises InputError for labels of one class only, and for a factor that is not positive: the model ranks backwards.
    """
    if labels.all() or not labels.any():
        raise InputError("expected labelled and other documents to calibrate on, got only one kind")
    x = np.stack([logits, np.ones_like(logits)], axis=1).astype(np.float64)
    y = labels.astype(np.float64)
    weight = np.where(labels, 0.5 / labels.sum(), 0.5 / (~labels).sum())

    def gradient(w: Float64) -> Float64:
        return np.asarray(x.T @ (weight * (expit(x @ w) - y)) + RIDGE * w)

    def hessian(w: Float64) -> Float64:
        p = expit(x @ w)
        return np.asarray((x.T * (weight * p * (1 - p))) @ x + RIDGE * np.eye(2))

    # The loss is strictly convex: the one root of its gradient is the minimum, to more digits than its value shows.
    factor, bias = map(float, root(gradient, np.zeros(2), jac=hessian, method="lm", tol=1e-12).x)
    if not factor > 0:
        raise InputError(
            f"expected logits that rise with relevance, got a factor of {factor:.3g}: the model ranks backwards"
        )
    return factor, bias


def calibrate(student: Student, folder: TrainingFolder, serving: ServingOptions) -> tuple[float, float]:
    """Fit :func:`platt` on the held-out queries of ``folder``, apply it to the head in place; (factor, bias)."""
    logits, labels = held_out_logits(student, folder, serving)
    factor, bias = platt(logits, labels > 0)
    scale_logits(student, factor, bias)
    return factor, bias


def scale_logits(student: Student, factor: float, bias: float) -> None:
    """Multiply ``factor`` and add ``bias`` to every logit, in place, in the last layer of the head."""
    for name in LOGIT_PARAMETERS & set(student.weights):
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
    with replacing_together(folder) as new, os_errors(folder / verify.WEIGHTS):
        save_file(tensors, new / verify.WEIGHTS, metadata={"format": "np"})
        student.save_around(new)
