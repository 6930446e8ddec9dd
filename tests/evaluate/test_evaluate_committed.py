"""The committed table: it has every available collection, its text is generated from its numbers."""

import copy
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from turborank.catalog import DEFAULT
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
    assert models[0]["name"] == DEFAULT
    assert len(row["first_stage"]["sha256"]) == len(row["dataset"]["fingerprint"]) == 64
    for system in models:
        assert {"engine", "precision", "isa", "depth", "tokens", "tokens_truncated", "seconds"} <= system.keys()
        found = system["compared_with"][first["name"]]
        difference = system["measures"][found["measure"]] - first["measures"][found["measure"]]
        assert found["difference"] == pytest.approx(difference)
        assert found["low"] <= found["difference"] <= found["high"]


@pytest.fixture
def earlier(tmp_path: Path) -> Path:
    """The committed numbers in a folder of their own."""
    path = tmp_path / "evaluation.json"
    path.write_text(json.dumps({"rows": ROWS}))
    return path


def test_the_committed_table_is_one_of_the_model_that_ships(earlier: Path) -> None:
    assert evaluate_table.merged(earlier, []) == ROWS
    assert evaluate_table.merged(earlier.with_name("none.json"), []) == []


def test_another_model_over_the_same_candidates_joins_the_row(earlier: Path) -> None:
    """It comes after the embedded one, replaces its own earlier figures, and leaves every other row alone."""
    new = copy.deepcopy(ROWS[0])
    new["systems"][1:] = [new["systems"][1] | {"name": "another", "weights_sha256": "0" * 64}]
    rows = evaluate_table.merged(earlier, [new])
    [row] = [row for row in rows if row["name"] == new["name"] and row["part"] == new["part"]]
    names = [system["name"] for system in ROWS[0]["systems"]]
    assert [system["name"] for system in row["systems"]] == [*names[:2], "another", *names[2:]]
    assert len(rows) == len(ROWS)
    earlier.write_text(json.dumps({"rows": rows}))
    assert evaluate_table.merged(earlier, [copy.deepcopy(row)]) == [row, *(r for r in rows if r is not row)]


def test_small_tables_never_show_another_models_figures() -> None:
    rows = copy.deepcopy(ROWS)
    for row in rows:
        row["systems"][1]["name"] = "another"
    text = evaluate_table.PAGES[0].read_text(encoding="utf-8").replace("| 0.", "| 0.1")
    assert evaluate_table.shown(text, rows) == text


def test_other_candidates_and_an_earlier_embedded_model_leave_the_table(earlier: Path) -> None:
    new = copy.deepcopy(ROWS[0])
    new["systems"][0]["depth"] += 1
    [row] = [row for row in evaluate_table.merged(earlier, [new]) if row["part"] == new["part"]][:1]
    assert row["systems"] == new["systems"]
    stale = copy.deepcopy(ROWS)
    for row in stale:
        row["systems"] = [s | {"weights_sha256": "0" * 64} if "weights_sha256" in s else s for s in row["systems"][:2]]
    earlier.write_text(json.dumps({"rows": stale}))
    assert evaluate_table.merged(earlier, []) == []
