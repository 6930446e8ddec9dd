import ctypes.util
import os
from pathlib import Path

import pytest
from helpers import write_checkpoint

if ctypes.util.find_library("cuda") is None:
    # Without a GPU Triton interprets kernels (test_fused.py), if it is told so before anything imports it.
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture
def random_checkpoint(tmp_path: Path) -> Path:
    """The folder of a small random JinaBERT: bfloat16, prefix ``bert.``, tiny BPE tokenizer."""
    return write_checkpoint(tmp_path / "random-jinabert")
