"""DATASETS against the BEIR table of ir_datasets: addresses, checksums, counts.

Needs an environment with ir-datasets; skipped elsewhere. Nothing is downloaded.
"""

import json
from importlib.resources import files
from typing import Any

import pytest

pytest.importorskip("ir_datasets", reason="ir-datasets is not installed in this environment")

from turborank.data.dataset_table import DATASETS, DatasetRow

PUBLIC = [row for row in DATASETS.values() if row.group == "beir" and row.files]


def shipped(name: str) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads(files("ir_datasets").joinpath(f"etc/{name}.json").read_text())
    return loaded


def described(row: DatasetRow) -> dict[str, Any]:
    """ir_datasets' description of the split we evaluate."""
    name = row.name.replace("cqadupstack-", "cqadupstack/").replace("webis-touche2020", "webis-touche2020/v2")
    about, name = shipped("metadata"), f"beir/{name}"
    split: dict[str, Any] = about[f"{name}/{row.split}"] if f"{name}/{row.split}" in about else about[name]
    documents = split["docs"]
    return {**split, "docs": about[documents["_ref"]]["docs"] if "_ref" in documents else documents}


@pytest.mark.parametrize("row", PUBLIC, ids=lambda row: row.name)
def test_addresses_and_checksums(row: DatasetRow) -> None:
    (ours,) = row.files
    theirs = {entry["url"]: entry["expected_md5"] for entry in shipped("downloads")["beir"].values()}
    assert theirs[ours.url] == ours.md5


@pytest.mark.parametrize("row", PUBLIC, ids=lambda row: row.name)
def test_counts(row: DatasetRow) -> None:
    theirs = described(row)
    counts = (theirs["queries"]["count"], theirs["docs"]["count"], theirs["qrels"]["count"])
    assert (row.queries, row.documents, row.judgements) == counts
