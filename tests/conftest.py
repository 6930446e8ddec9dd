import ctypes.util
import os
from pathlib import Path

import fault_counts
import pytest
import skips
from helpers import write_checkpoint

if ctypes.util.find_library("cuda") is None:
    # Without a GPU Triton interprets kernels (test_fused.py), if it is told so before anything imports it.
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture
def random_checkpoint(tmp_path: Path) -> Path:
    """The folder of a small random JinaBERT: bfloat16, prefix ``bert.``, tiny BPE tokenizer."""
    return write_checkpoint(tmp_path / "random-jinabert")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print the skipped tests by reason, above pytest's last line."""
    if fault_counts.EVERY:
        for line in fault_counts.summary():
            terminalreporter.write_line(line)
    reports = terminalreporter.stats.get("skipped", ())
    reasons = [report.longrepr[2] for report in reports if isinstance(report.longrepr, tuple)]
    if reasons:
        terminalreporter.write_line(f"skipped: {skips.summary(reasons)}", yellow=True)
