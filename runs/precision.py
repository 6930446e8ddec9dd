"""What int8 costs in nDCG@10: the embedded model in int8 and in fp32 over the same queries and candidates of every set,
and in bf16 where they differ.

python runs/precision.py OUT [DATA]      DATA: ../shared/data/eval; what is done in OUT is kept

Writes runs/results/precision.md. Large collections by a sample of their queries and a shorter list (the table says
which), because fp32 reads about 8,000 tokens a second on two cores; an hour in all.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).resolve().parent
MEASURE, LIMIT = "nDCG@10", 0.002
PRECISIONS = ("fp32", "int8")


class Row(NamedTuple):
    """A set, how many of its queries (None: all) and how many candidates of each."""

    name: str
    sample: int | None = None
    depth: int = 100
    options: tuple[str, ...] = ()


ROWS = (
    Row("trec-dl21-pool", options=("--run", "{data}/trec-dl21-pool/runs/bm25.txt")),
    Row("npl"),
    Row("med"),
    Row("wikiqa"),
    Row("cisi", depth=50),
    Row("cranfield", depth=30),
    Row("scifact", depth=30),
    Row("chunking_evaluation", depth=10),
    Row("anthropic-docs-rag", depth=10),
    Row("time", depth=30),
    Row("pubmedqa-l", 100, 10),
    Row("qmsum", depth=3, options=("--skip-constant",)),
)


def evaluate(row: Row, precision: str, out: Path, data: Path) -> dict:
    """The systems of ``turborank evaluate``'s results.json: the first stage and the model."""
    folder = out / precision / row.name
    if not (folder / "results.json").exists():
        command = ["turborank", "evaluate", row.name, "--precision", precision, "--depth", str(row.depth)]
        command += ["--sample", str(row.sample)] if row.sample else []
        command += [option.format(data=data) for option in row.options]
        command += ["--data-dir", str(data), "--offline", "--out", str(folder)]
        print(" ".join(command), flush=True)
        subprocess.run(command, check=True)
    return json.loads((folder / "results.json").read_text())["datasets"][0]["systems"][-1]


def main(out: Path, data: Path) -> None:
    lines = [
        "# int8 beside fp32", "",
        f"{MEASURE} of the embedded model in the native engine, the same queries and candidates (BM25's best, or the",
        f"run that comes with the set). Expected: at most {LIMIT} apart; where they are further, bf16 stands",
        "beside them. `python runs/precision.py OUT` writes it.", "",
        "| set | queries | depth | fp32 | int8 | difference | | bf16 |", "|---|--:|--:|--:|--:|--:|---|--:|",
    ]  # fmt: skip
    differences = []
    for row in ROWS:
        found = {precision: evaluate(row, precision, out, data) for precision in PRECISIONS}
        values = [found[precision]["measures"][MEASURE] for precision in PRECISIONS]
        queries = found["int8"]["manifest"]["queries_evaluated"]
        apart = values[1] - values[0]
        differences.append(apart)
        further = " | "
        if abs(apart) > LIMIT:
            further = f"**further apart** | {evaluate(row, 'bf16', out, data)['measures'][MEASURE]:.4f}"
        lines.append(
            f"| {row.name} | {queries}{' of the set' if row.sample else ''} | {row.depth} | {values[0]:.4f} | "
            f"{values[1]:.4f} | {apart:+.4f} | {further} |"
        )
        squares = sum(d * d for d in differences) / len(differences)
        summary = f"Mean difference {sum(differences) / len(differences):+.4f}, root mean square {squares**0.5:.4f}."
        (HERE / "results" / "precision.md").write_text("\n".join([*lines, "", summary]) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2] if len(sys.argv) > 2 else HERE.parent.parent / "shared" / "data" / "eval"))
