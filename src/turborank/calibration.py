"""Calibration: convert logits to probabilities, and choose thresholds for a precision or a recall.

``turborank calibrate`` fits a calibration on judged pairs (turborank.evaluate.calibrate) and writes it as
``calibration.json`` to the model's folder. A reranker loads it from there; ``rank(…, threshold="precision=0.9")`` uses
it. docs/calibration.md describes the fit and how its figures are validated.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from turborank.data.files import write_text
from turborank.errors import CheckpointError, InputError

FILE = "calibration.json"
FORMAT = 1
TARGETS = ("precision", "recall", "probability")
_TARGET = re.compile(rf"({'|'.join(TARGETS)})=(.+)")


def sigmoid(logit: float) -> float:
    """1 / (1 + e^-logit), without overflow."""
    return 1.0 / (1.0 + math.exp(-logit)) if logit >= 0 else math.exp(logit) / (1.0 + math.exp(logit))


@dataclass(frozen=True)
class Calibration:
    """P(relevant) = sigmoid(slope · logit + intercept), and the number of judged pairs at or above each threshold."""

    slope: float  # above 0
    intercept: float
    weights: str  # SHA-256 of the model.safetensors that the calibration belongs to
    pairs: int  # judged pairs
    relevant: int  # relevant ones among them
    curve: tuple[tuple[float, int, int], ...]  # (logit, pairs at or above it, relevant ones), descending logits
    about: Mapping[str, Any]  # engine, precision, length policy, file of the pairs; for information only

    def probability(self, logit: float) -> float:
        """Probability that a document with this logit is relevant, on data like the judged pairs."""
        return sigmoid(self.slope * logit + self.intercept)

    def threshold(self, target: str) -> float:
        """The threshold, as a logit, for ``precision=0.9``, ``recall=0.95`` or ``probability=0.5``.

        Among the logits of ``curve``: the lowest that reaches the precision (so that recall is highest), or the highest
        that reaches the recall. Raises InputError for any other target and for a precision that no logit reaches.
        """
        name, value = parse_target(target)
        if name == "probability":
            if not 0 < value < 1:
                raise InputError(f"expected a probability between 0 and 1, both excluded, got {target!r}")
            return (math.log(value / (1 - value)) - self.intercept) / self.slope
        if name == "recall":
            return next(logit for logit, _, found in self.curve if found >= value * self.relevant)
        reached = [logit for logit, kept, found in self.curve if found >= value * kept]
        if not reached:
            best = max(found / kept for _, kept, found in self.curve)
            raise InputError(
                f"expected a precision that the judged pairs reach, got {value:g}; the highest is {best:.3f}",
                hint="ask for a lower precision, or judge more pairs and calibrate again",
            )
        return reached[-1]


MOST_PAIRS = 2**53  # integers up to it are exact in float64


def parse_target(text: str) -> tuple[str, float]:
    """Parse a target: "precision=0.9" gives ("precision", 0.9). Raises InputError for anything else."""
    found = _TARGET.fullmatch(text.strip())
    try:
        value = float(found[2]) if found else math.nan
    except ValueError:
        value = math.nan
    if found is None or not 0 <= value <= 1:
        raise InputError(
            "expected a threshold such as 0.5, precision=0.9, recall=0.95 or probability=0.5 (each 0 to 1), "
            f"got {text!r:.80}"
        )
    return found[1], value


def write(calibration: Calibration, path: Path) -> None:
    """Write the calibration as JSON to ``path``, atomically."""
    text = json.dumps({"format": FORMAT, **asdict(calibration)}, indent=1, allow_nan=False)
    write_text(path, re.sub(r"\[\s+([-\d.e]+),\s+(\d+),\s+(\d+)\s+\]", r"[\1, \2, \3]", text) + "\n")


def read(path: Path, weights: str) -> Calibration:
    """Read the calibration at ``path`` for the model whose weights have this SHA-256.

    Raises CheckpointError for a file that is not a calibration, and InputError for a calibration of other weights.
    """
    try:
        record = json.loads(path.read_bytes())  # as bytes, it may begin with a byte-order mark
        if record.pop("format") != FORMAT:
            raise ValueError(f"expected format {FORMAT}")
        made = Calibration(**{**record, "curve": tuple((float(x), int(k), int(f)) for x, k, f in record["curve"])})
        if not (made.slope > 0 and math.isfinite(made.slope + made.intercept) and made.curve and made.relevant > 0):
            raise ValueError("expected a slope above 0 and a curve")
        if not isinstance(made.weights, str):
            raise TypeError("expected the sha256 of the weights")
        if not all(0 <= found <= kept <= made.pairs <= MOST_PAIRS for _, kept, found in made.curve):
            raise ValueError("expected a curve of counts that are at most the number of pairs")
        if made.curve[-1][2] != made.relevant:
            raise ValueError("expected a curve that ends with all relevant pairs")
    except OSError as error:
        raise CheckpointError(f"expected a readable calibration, got {error.strerror} at {path}") from None
    except (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RecursionError) as error:
        raise CheckpointError(
            f"expected a calibration, got {type(error).__name__} ({error}) at {path}",
            hint="delete it, or run turborank calibrate again",
        ) from None
    if made.weights != weights:
        raise InputError(
            f"expected a calibration of the weights {weights[:12]}…, got one of {made.weights[:12]}… at {path}",
            hint="run turborank calibrate with this model",
        )
    return made
