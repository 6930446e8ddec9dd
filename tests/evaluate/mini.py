"""A collection in BEIR layout that is small enough for computation by hand."""

import json
from pathlib import Path

DOCUMENTS = {
    "d1": ("Tides", "The moon pulls the sea twice a day."),
    "d2": ("Bread", "Yeast makes dough rise by giving off gas."),
    "d3": ("Sails", "A sail is a wing that stands on its edge."),
    "d4": ("", "The sea is salt because rivers carry salt into the sea."),
    "d5": ("Yeast", "Yeast is a fungus; bakers keep yeast alive with flour."),
    "d6": ("Wings", "Birds steer with the tail and lift with the wing."),
}
QUERIES = {"q1": "why does the sea rise and fall?", "q2": "what makes dough rise?", "q3": "wing", "unjudged": "moon"}
QRELS = [("q1", "d1", 2), ("q1", "d4", 1), ("q2", "d2", 1), ("q2", "d5", 0), ("q3", "d3", 1), ("q3", "d6", 1)]


def write_mini(folder: Path) -> Path:
    """The collection at ``folder``."""
    (folder / "qrels").mkdir(parents=True)
    lines = [json.dumps({"_id": name, "title": title, "text": text}) for name, (title, text) in DOCUMENTS.items()]
    (folder / "corpus.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    lines = [json.dumps({"_id": name, "text": text}) for name, text in QUERIES.items()]
    (folder / "queries.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    lines = ["query-id\tcorpus-id\tscore", *(f"{q}\t{d}\t{r}" for q, d, r in QRELS)]
    (folder / "qrels" / "test.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def append(path: Path, line: str | bytes) -> None:
    """Append a line to a file."""
    with path.open("ab") as file:
        file.write((line if isinstance(line, bytes) else line.encode()) + b"\n")
