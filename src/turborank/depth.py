"""Adaptive depth: early stopping on a first stage's list.

After each block of BLOCK documents, estimate the share of the final top n that is still unread, from the share of the
list that is left and from the distance of the n-th best logit to the last logits, in their standard deviations:

    sigmoid(INTERCEPT + LEFT · ln(left / total) + GAP · (n-th best - mean(last 2·BLOCK)) / std(last 2·BLOCK))

Scoring stops when the estimate falls below STOP. The logits are standardised, so one rule serves all models. The
coefficients were fitted by logistic regression on 535 queries of six collections (n = 10, BM25 lists of 100);
docs/depth.md reports what is kept and saved on collections that the fit had not seen, and where the rule fails.
"""

from __future__ import annotations

import math

import numpy as np

from turborank.calibration import sigmoid
from turborank.errors import InputError
from turborank.types import Float32

AUTO = "auto"
BLOCK = 10  # documents between two decisions
INTERCEPT, LEFT, GAP = -0.251, 1.106, -0.2949
STOP = 0.06  # share of the top n; of ten documents 0.6 are still expected, most of them at low ranks
_MINIMUM_STD = 1e-6  # avoids dividing by zero when all logits are equal


def checked(depth: int | str | None, top_n: int | None) -> int | str | None:
    """Validate ``depth`` and return it. Raises InputError unless it is None, an int from 1, or "auto" with a top_n."""
    if isinstance(depth, str) and depth == AUTO and top_n is None:
        raise InputError("expected top_n with depth='auto', got none", hint="give the number of documents you need")
    if depth is None or (isinstance(depth, str) and depth == AUTO):
        return depth
    if isinstance(depth, bool) or not isinstance(depth, int) or depth < 1:
        raise InputError(f"expected depth to be a positive whole number or 'auto', got {depth!r:.80}")
    return depth


def to_come(logits: Float32, top_n: int, total: int) -> float:
    """Expected share (0 to 1) of the final top n among the documents that are not scored yet.

    ``logits`` (d,): logits of the first d of ``total`` documents, in the order of the first stage.
    """
    read = len(logits)
    if read >= total:
        return 0.0
    if read < top_n:
        return 1.0
    nth = float(np.partition(logits, read - top_n)[read - top_n])
    last = np.asarray(logits[-2 * BLOCK :], dtype=np.float64)
    gap = (nth - float(last.mean())) / max(float(last.std()), _MINIMUM_STD)
    return sigmoid(INTERCEPT + LEFT * math.log((total - read) / total) + GAP * gap)


def enough(logits: Float32, top_n: int, total: int) -> bool:
    """Whether to stop scoring: less than STOP of the top n is expected among the documents that are left."""
    return to_come(logits, top_n, total) < STOP
