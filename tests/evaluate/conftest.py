from pathlib import Path

import pytest
from mini import write_mini

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data" / "eval"


@pytest.fixture
def mini(tmp_path: Path) -> Path:
    return write_mini(tmp_path / "mini")


@pytest.fixture
def shared() -> Path:
    """The folder of real collections."""
    if not SHARED.is_dir():
        pytest.skip(f"needs the published collections, which are not at {SHARED}")
    return SHARED
