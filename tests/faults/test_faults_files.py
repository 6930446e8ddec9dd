"""Full disks, read-only disks and kill -9 at every call with which a command changes files (file_faults.py)."""

import fault_counts
import injection
import pytest

CASES = (
    "score", "distill lists", "distill score", "distill student", "distill suspects", "Hub download", "evaluate",
    "evaluate over older results", "checkpoint of a training run",
)  # fmt: skip
ORDINARY = ("Hub download", "checkpoint of a training run")  # the others take longer than an ordinary run has


@pytest.mark.parametrize("case", CASES if fault_counts.EVERY else ORDINARY)
def test_files_are_old_or_new_and_the_same_command_completes_them(case: str) -> None:
    if case.startswith(("evaluate", "distill")):
        pytest.importorskip("bm25s", reason="bm25s is not installed in this environment")
    done = injection.run("file_faults.py", case, "0" if fault_counts.EVERY else "2")
    found = injection.outcomes(done)
    assert set(found) == {f"{case}: {kind}" for kind in ("kill -9", "full disk", "read-only disk")}
    for what, outcomes in found.items():
        assert outcomes["told"] + outcomes["killed"] > 0
        fault_counts.count(what, outcomes.total())
