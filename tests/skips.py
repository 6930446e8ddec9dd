"""Count the skipped tests by reason, in one line at the end of a run."""

import re
from collections import Counter
from collections.abc import Iterable

# What a test may lack on a machine where `make install` has run: the reasons that tests give, and how they are summed
# up. Whatever matches none of them is listed as it is.
LACKING = {
    "published weights or data": r"needs the .*published|needs published weights",
    "a GPU": r"no CUDA device",
    "client environments": (
        r"TURBORANK_CONFORMANCE names no folder|not installed in this environment|sentence.transformers"
        r"|playwright is not installed|no Chromium"
    ),
    "a precision that the forced instruction set lacks": r"^the row \w+ has no ",
    "an architecture that turborank has": r"of no architecture turborank has",
}


def lacking(reason: str) -> str:
    """What the skipped test needs, or its stated reason."""
    return next((what for what, pattern in LACKING.items() if re.search(pattern, reason)), reason)


def summary(reasons: Iterable[str]) -> str:
    """Numbers of skipped tests by what they need (a module that is skipped as a whole counts once)."""
    counts = Counter(lacking(reason.removeprefix("Skipped: ")) for reason in reasons)
    known = [f"{counts.pop(what)} need {what}" for what in LACKING if what in counts]
    return ", ".join([*known, *(f"{count}: {reason}" for reason, count in counts.items())])
