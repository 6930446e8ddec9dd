"""Faults that tests inject, counted for `make faults`; an ordinary run injects a few of each kind."""

import json
import os
from collections import Counter

EVERY = os.environ.get("TURBORANK_FAULTS") == "all"  # set by `make faults`: each of them, not a few of each kind
LINES = os.environ.get("TURBORANK_FAULTS_LINES") == "1"  # print a line for each call of count()
injected: Counter[str] = Counter()  # what -> faults; each of them was survived, or its test failed


def count(what: str, faults: int) -> None:
    """Add faults that a test injected and found survived."""
    injected[what] += faults
    if LINES:
        print(f"\n{json.dumps(['survived', what, faults])}", flush=True)


def summary() -> list[str]:
    """Lines of a table, and the total."""
    if not injected:
        return []
    width = max(map(len, injected))
    lines = [f"  {what:{width}}  {faults:6,}" for what, faults in sorted(injected.items())]
    total = injected.total()
    return ["faults injected and survived", *lines, f"  {'all':{width}}  {total:6,}"]
