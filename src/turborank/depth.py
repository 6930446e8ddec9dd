"""Adaptive depth: when to stop reading down a first stage's list.

After every BLOCK documents one number is computed: the share of the final top n that is still to come. It is estimated
from two facts, the share of the list that is left and how far the n-th best logit so far stands above the last logits
read, in their standard deviations:

    sigmoid(INTERCEPT + LEFT · ln(left / total) + GAP · (n-th best - mean(last 2·BLOCK)) / std(last 2·BLOCK))

Reading stops when it falls below STOP. Standardised logits make the rule one for all models. The coefficients were
fitted on 535 queries of six collections (logistic regression, n = 10, lists of 100 by BM25); docs/depth.md has the
collections, what is lost and what is saved on collections that the fit had not seen, and where the rule fails.
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
STOP = 0.06  # of the top n: 0.6 documents of ten are still expected, most of them at its lower end
_LEAST_STD = 1e-6  # logits that are all alike


def checked(depth: int | str | None, top_n: int | None) -> int | str | None:
    """``depth`` as it is. Raises InputError for anything but a whole number from 1, None, and "auto" with top_n."""
    if isinstance(depth, str) and depth == AUTO and top_n is None:
        raise InputError("expected top_n with depth='auto', got none", hint="say how many documents are needed")
    if depth is None or (isinstance(depth, str) and depth == AUTO):
        return depth
    if isinstance(depth, bool) or not isinstance(depth, int) or depth < 1:
        raise InputError(f"expected depth to be a positive whole number or 'auto', got {depth!r:.80}")
    return depth


def to_come(logits: Float32, top_n: int, total: int) -> float:
    """The expected share of the final top n among the documents not read yet.

    ``logits`` (d,) are those of the first d documents of a list of ``total``, in the order of the first stage.
    """
    read = len(logits)
    if read >= total:
        return 0.0
    if read < top_n:
        return 1.0
    nth = float(np.partition(logits, read - top_n)[read - top_n])
    last = np.asarray(logits[-2 * BLOCK :], dtype=np.float64)
    gap = (nth - float(last.mean())) / max(float(last.std()), _LEAST_STD)
    return sigmoid(INTERCEPT + LEFT * math.log((total - read) / total) + GAP * gap)


def enough(logits: Float32, top_n: int, total: int) -> bool:
    """Whether to stop reading: less than STOP of the top n is expected from what is left."""
    return to_come(logits, top_n, total) < STOP
