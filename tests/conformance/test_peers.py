"""Libraries that evaluate and score, and frameworks that our adapters run inside, each in its own environment, where
one of our test files runs beside them.

TURBORANK_CONFORMANCE=~/.cache/turborank-conformance pytest tests/conformance/test_peers.py
"""

import os
import re
import subprocess
from pathlib import Path

import pytest
from environments import FRAMEWORKS, PEERS, VARIABLE, python

TESTS = Path(__file__).parents[1]
ALL = {**PEERS, **FRAMEWORKS}

pytestmark = pytest.mark.skipif(not os.environ.get(VARIABLE), reason=f"{VARIABLE} names no folder for the environments")


@pytest.mark.parametrize("name", ALL)
def test_peer(name: str) -> None:
    environment = {**os.environ, "PYTHONPATH": str(TESTS.parent / "src"), "HF_HUB_OFFLINE": "1", "DO_NOT_TRACK": "1"}
    command = [str(python(name)), "-m", "pytest", "-q", "-p", "no:cacheprovider", str(TESTS / ALL[name].script)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=TESTS.parent, timeout=900)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    assert re.search(r"\b[1-9]\d* passed", done.stdout), done.stdout  # a file that skips itself proves nothing
