"""Every error turborank raises, in one tree.

    TurborankError
    ├── InputError              what the caller sent cannot be ranked        (also a ValueError)
    │   ├── TooLongError        a pair exceeds the length limit and the policy is "error"
    │   └── UnknownKeyError     a name that is in none of our tables
    ├── CheckpointError         a model folder that cannot be trusted or understood
    │   └── ModelNotFoundError  no such model here, and it could not be fetched
    ├── EngineError             the engine cannot run, or produced something that is not a score
    │   └── EngineUnavailableError   the engine, precision or instruction set is not on this machine
    └── TrainingError           a step or a checkpoint of a training run could not be finished

One grammar for all messages: what was expected, what came, where, what to do.
Each class carries a stable ``code`` (for programs), an HTTP ``status`` (for the service) and the
instance may carry a ``hint`` (what to do next), which is printed after the message.
"""

from __future__ import annotations

from collections.abc import Iterable


class TurborankError(Exception):
    """Base of all errors raised on purpose by turborank."""

    code = "error"
    status = 500

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(f"{message}; {hint}" if hint else message)
        self.message = message
        self.hint = hint


class InputError(TurborankError, ValueError):
    """The caller's input cannot be ranked as it stands."""

    code = "invalid_input"
    status = 422


class TooLongError(InputError):
    """A pair has more tokens than the model reads and the length policy is ``error``."""

    code = "too_long"

    def __init__(self, message: str, *, hint: str | None = None, place: int = 0, where: str = "") -> None:
        super().__init__(f"{where}: {message}" if where else message, hint=hint)
        self.fault = message
        self.place = place  # of the pair among those given

    def at(self, place: int, where: str) -> TooLongError:
        """The same fault, by another name of its place."""
        return TooLongError(self.fault, hint=self.hint, place=place, where=where)


class UnknownKeyError(InputError):
    """A name that is in none of our tables; the message lists the table."""

    code = "unknown_key"

    def __init__(self, what: str, got: object, expected: Iterable[str], *, hint: str | None = None) -> None:
        import difflib  # only for people who mistype: it costs a tenth of our import

        names = sorted(expected)
        close = difflib.get_close_matches(str(got), names, n=1)
        message = f"expected {what} to be one of {', '.join(names)}, got {got!r:.80}"
        if close:
            message += f" (did you mean {close[0]!r}?)"
        super().__init__(message, hint=hint)


class CheckpointError(TurborankError):
    """A model folder that is incomplete, damaged, or of no architecture we know."""

    code = "bad_checkpoint"


class ModelNotFoundError(CheckpointError):
    """No such model on this machine, and none could be fetched."""

    code = "model_not_found"
    status = 404


class EngineError(TurborankError):
    """The engine failed, or produced something that is not a score."""

    code = "engine_error"


class EngineUnavailableError(EngineError):
    """The engine, precision or instruction set asked for does not exist on this machine."""

    code = "engine_unavailable"


class TrainingError(TurborankError):
    """A training run cannot go on; its last whole checkpoint stays."""

    code = "training_stopped"
