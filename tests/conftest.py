from pathlib import Path

import pytest
from helpers import write_checkpoint


@pytest.fixture
def random_checkpoint(tmp_path: Path) -> Path:
    """The folder of a small random JinaBERT: bfloat16, prefix ``bert.``, tiny BPE tokenizer."""
    return write_checkpoint(tmp_path / "random-jinabert")
