"""The exception hierarchy: every error that turborank raises on purpose.

    TurborankError
    ├── InputError              the caller's input cannot be ranked          (also a ValueError)
    │   ├── TooLongError        a pair exceeds the length limit and the policy is "error"
    │   └── UnknownKeyError     a name that is not in the table of allowed names
    ├── CheckpointError         a model folder is incomplete, damaged or of an unknown architecture
    │   └── ModelNotFoundError  the model is not on this machine and could not be downloaded
    ├── EngineError             the engine failed, or returned a logit that is not finite
    │   └── EngineUnavailableError   this machine lacks the engine, precision or instruction set
    └── TrainingError           a training step or checkpoint could not be completed

All messages have the same order: what was expected, what came, where, what to do.
Each class has a stable ``code`` (for programs) and an HTTP ``status`` (for the service). An instance
may have a ``hint`` (what to do next), which follows the message.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Self


class TurborankError(Exception):
    """Base class of all errors that turborank raises on purpose."""

    code = "error"
    status = 500

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(f"{message}; {hint}" if hint else message)
        self.message = message
        self.hint = hint


class InputError(TurborankError, ValueError):
    """The caller's input is invalid and cannot be ranked."""

    code = "invalid_input"
    status = 422


class TooLongError(InputError):
    """A pair has more tokens than the model reads and the length policy is ``error``."""

    code = "too_long"

    def __init__(self, message: str, *, hint: str | None = None, place: int = 0, where: str = "") -> None:
        super().__init__(f"{where}: {message}" if where else message, hint=hint)
        self.fault = message
        self.place = place  # 0-based index of the pair among those passed in

    def at(self, place: int, where: str) -> TooLongError:
        """A copy of this error with another index and with ``where`` in front of the message."""
        return TooLongError(self.fault, hint=self.hint, place=place, where=where)


class UnknownKeyError(InputError):
    """A name that is not in the table of allowed names; the message lists them and the closest match."""

    code = "unknown_key"

    def __init__(self, what: str, got: object, expected: Iterable[str], *, hint: str | None = None) -> None:
        import difflib  # imported here because it would add a tenth to the import time of turborank

        names = sorted(expected)
        close = difflib.get_close_matches(str(got), names, n=1)
        message = f"expected {what} to be one of {', '.join(names)}, got {got!r:.80}"
        if close:
            message += f" (did you mean {close[0]!r}?)"
        super().__init__(message, hint=hint)


class CheckpointError(TurborankError):
    """A model folder is incomplete, damaged or of an unknown architecture."""

    code = "bad_checkpoint"

    @classmethod
    def listing(cls, expected: str, faults: list[str], path: Path) -> Self:
        """An error whose message lists all faults of a file."""
        count = "1 fault" if len(faults) == 1 else f"{len(faults)} faults"
        return cls("\n  ".join([f"expected {expected}, got {count} in {path}:", *faults]))


class ModelNotFoundError(CheckpointError):
    """The model is not on this machine and could not be downloaded."""

    code = "model_not_found"
    status = 404


class EngineError(TurborankError):
    """The engine failed, or returned a logit that is not finite."""

    code = "engine_error"


class EngineUnavailableError(EngineError):
    """The requested engine, precision or instruction set is not available on this machine."""

    code = "engine_unavailable"


class TrainingError(TurborankError):
    """A training run cannot continue; its last complete checkpoint stays on disk."""

    code = "training_stopped"
