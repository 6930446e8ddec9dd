"""Shared by the tests of the adapters: a small model and the code of a page."""

from __future__ import annotations

import re
from pathlib import Path

PAGES = Path(__file__).resolve().parents[2] / "docs" / "integrations"
FENCE = re.compile(r"^```python\n(.*?)^```$", re.DOTALL | re.MULTILINE)
QUERY = "how do bees choose a home"
TEXTS = ["sourdough needs a starter", "scouts dance for it", "tides follow the moon", "the swarm votes"]
LONG = "the tide goes out and comes in. " * 40 + "bees choose a home by dancing."  # 1310 letters: three windows or more


def code(page: str) -> str:
    """Run all Python code of a page, in order; the page's assertions check the results."""
    blocks = FENCE.findall((PAGES / page).read_text(encoding="utf-8"))
    assert any("assert" in block for block in blocks)
    return "\n".join(blocks)


def run(page: str) -> dict[str, object]:
    """Names that the page's code defines."""
    scope: dict[str, object] = {"__name__": "page"}
    exec(compile(code(page), page, "exec"), scope)
    return scope
