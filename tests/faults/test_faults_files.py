"""Full disks, read-only disks and kill -9 at every call with which a command changes files (file_faults.py)."""

import json

import fault_counts
import injection
import pytest

CASES = (
    "score", "distill lists", "distill score", "distill suspects", "Hub download", "evaluate",
    "evaluate over older results", "checkpoint of a training run",
)  # fmt: skip
ORDINARY = ("score", "Hub download", "checkpoint of a training run")  # the others take longer than an ordinary run has


@pytest.mark.parametrize("case", CASES if fault_counts.EVERY else ORDINARY)
def test_files_are_old_or_new_and_the_same_command_completes_them(case: str) -> None:
    if case.startswith(("evaluate", "distill")):
        pytest.importorskip("bm25s", reason="bm25s is not installed in this environment")
    done = injection.run("file_faults.py", case, "0" if fault_counts.EVERY else "3")
    found = json.loads(done.stdout)
    assert set(found["outcomes"]) == {"kill -9", "full disk", "read-only disk"}
    for kind, outcomes in found["outcomes"].items():
        assert outcomes.get("told", 0) + outcomes.get("killed", 0) > 0
        fault_counts.count(f"{case}: {kind}", sum(outcomes.values()))
