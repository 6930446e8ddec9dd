"""The committed table: it has every available collection, its text is generated from its numbers."""

import copy
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from turborank.evaluate import DATASETS

RUNS = Path(__file__).parents[2] / "runs"
sys.path.append(str(RUNS))

import evaluate_table  # noqa: E402  a script beside the package, not in it

ROWS: list[dict[str, Any]] = json.loads((RUNS / "results" / "evaluation.json").read_text())["rows"]


def test_every_available_collection_is_in_the_table() -> None:
    at_hand = {name for name, row in DATASETS.items() if row.group in ("collections", "rag")} | {"scifact"}
    at_hand |= {"hotpotqa-hipporag", "clapnq-dev", "liveqa-med-nist"}  # folders in BEIR layout, without a row
    assert {row["name"] for row in ROWS} == at_hand
    script = (RUNS / "evaluate.sh").read_text()
    assert all(name in script for name in at_hand)


def test_its_text_is_made_from_its_numbers() -> None:
    assert evaluate_table.table(ROWS) == (RUNS / "results" / "evaluation.md").read_text()


@pytest.mark.parametrize("page", evaluate_table.PAGES, ids=lambda page: page.parent.name)
def test_small_tables_show_its_numbers(page: Path) -> None:
    """In README and in the model's card; a figure that is not the table's is noticed."""
    text = page.read_text(encoding="utf-8")
    assert evaluate_table.shown(text, ROWS) == text
    for label in evaluate_table.SHOWN:
        [line] = [line for line in text.splitlines() if line.startswith(f"| {label} |")]
        assert evaluate_table.shown(line.replace("0.", "0.1"), ROWS).count("0.1") < line.count("0."), label


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row['part']}-{row['name']}")
def test_every_figure_says_what_it_depends_on(row: dict[str, Any]) -> None:
    first, *models = row["systems"]
    assert models
    assert len(row["first_stage"]["sha256"]) == len(row["dataset"]["fingerprint"]) == 64
    for system in models:
        assert {"engine", "precision", "isa", "depth", "tokens", "tokens_truncated", "seconds"} <= system.keys()
        found = system["compared_with"][first["name"]]
        difference = system["measures"][found["measure"]] - first["measures"][found["measure"]]
        assert found["difference"] == pytest.approx(difference)
        assert found["low"] <= found["difference"] <= found["high"]


def test_parts_done_anew_replace_theirs_and_other_weights_replace_all(tmp_path: Path) -> None:
    path = tmp_path / "evaluation.json"
    path.write_text(json.dumps({"rows": ROWS}))
    part = ROWS[0]["part"]
    new = copy.deepcopy([row for row in ROWS if row["part"] == part])
    assert evaluate_table.kept(path, new) == [row for row in ROWS if row["part"] != part]
    for row in new:
        for system in row["systems"]:
            if "weights_sha256" in system:
                system["weights_sha256"] = "0" * 64
    assert evaluate_table.kept(path, new) == []
    assert evaluate_table.kept(tmp_path / "none.json", new) == []
