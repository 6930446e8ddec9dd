"""What int8 costs in nDCG@10: the embedded model in int8 and in fp32 over the same queries and candidates of every set,
and in bf16 where they differ.

python runs/precision.py OUT [DATA [SET ...]]      DATA: ../shared/data/eval; what is done in OUT is kept

Writes runs/results/precision.md. Large collections by a sample of their queries and a shorter list (the table says
which), because fp32 reads about 8,000 tokens a second on two cores; an hour in all.

Beside each difference stands what noise alone does: normal deviates of the size of int8's error, added to fp32's
logits, a hundred times (texts with the same logit stay together).
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from turborank.data.datasets import load
from turborank.data.trec import Run, Scored, ranked, read_run
from turborank.evaluate.measures import means, per_query

HERE = Path(__file__).resolve().parent
MEASURE, LIMIT = "nDCG@10", 0.002
PRECISIONS = ("fp32", "int8")
DRAWS, SIZES = 100, (1.0, 0.5, 0.25)


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


class Noise(NamedTuple):
    """int8's error in a set, and how the measure moves by noise of each of SIZES times that error."""

    error: float  # rms of a logit within its query, as a share of the logits' standard deviation there
    moved: list[Any]  # of each size (DRAWS,)

    def within(self) -> list[float]:
        """The share of draws that move the measure by at most LIMIT."""
        return [float(np.mean(np.abs(moved) <= LIMIT)) for moved in self.moved]


def noise(row: Row, out: Path, data: Path) -> Noise:
    exact, rounded = (
        read_run(next((out / precision / row.name).glob("*/turborank*/run.trec"))) for precision in PRECISIONS
    )
    logits, errors = {}, []
    for query, documents in exact.items():
        logits[query] = np.array([scored.score for scored in documents])
        theirs = {scored.doc_id: scored.score for scored in rounded[query]}
        apart = np.array([theirs[scored.doc_id] for scored in documents]) - logits[query]
        errors.append(np.mean((apart - apart.mean()) ** 2))
    size = np.sqrt(np.mean(errors))
    dataset = load(row.name, data_dir=data, offline=True)
    qrels = {query: dataset.qrels[query] for query in exact}

    def measured(run: Run) -> float:
        return means(per_query(run, qrels, [MEASURE], dataset.relevant_from))[MEASURE]

    def shaken(scale: float) -> Run:
        noisy = {}
        for query, documents in exact.items():
            values, of = np.unique(logits[query], return_inverse=True)
            drawn = (values + rng.normal(scale=scale, size=len(values)))[of]
            found = [Scored(scored.doc_id, value) for scored, value in zip(documents, drawn, strict=True)]
            noisy[query] = ranked(found)[:10]
        return noisy

    rng, before = np.random.default_rng(0), measured(exact)
    moved = [np.array([measured(shaken(times * size)) - before for _ in range(DRAWS)]) for times in SIZES]
    spread = np.sqrt(np.mean([values.var() for values in logits.values()]))
    return Noise(size / spread, moved)


def main(out: Path, data: Path, names: list[str]) -> None:
    lines = [
        "# int8 beside fp32", "",
        f"{MEASURE} of the embedded model in the native engine, the same queries and candidates (BM25's best, or the",
        f"run that comes with the set). Expected: at most {LIMIT} apart; where they are further, bf16 stands",
        "beside them. *Error*: of a logit within its query, rms, as a share of the logits' standard deviation.",
        f"*Noise*: normal deviates of that size on fp32's logits, {DRAWS} times: how the measure moves (mean ±",
        f"standard deviation), and how often by at most {LIMIT}. `python runs/precision.py OUT` writes it.", "",
        "| set | queries | depth | fp32 | int8 | difference | error | noise | within | | bf16 |",
        "|---|--:|--:|--:|--:|--:|--:|--:|--:|---|--:|",
    ]  # fmt: skip
    differences, chances = [], np.ones(len(SIZES))
    for row in [row for row in ROWS if row.name in (names or [row.name])]:
        found = {precision: evaluate(row, precision, out, data) for precision in PRECISIONS}
        values = [found[precision]["measures"][MEASURE] for precision in PRECISIONS]
        queries = found["int8"]["manifest"]["queries_evaluated"]
        apart = values[1] - values[0]
        differences.append(apart)
        further = " | "
        if abs(apart) > LIMIT:
            further = f"**further apart** | {evaluate(row, 'bf16', out, data)['measures'][MEASURE]:.4f}"
        chance = noise(row, out, data)
        chances *= chance.within()
        lines.append(
            f"| {row.name} | {queries}{' of the set' if row.sample else ''} | {row.depth} | {values[0]:.4f} | "
            f"{values[1]:.4f} | {apart:+.4f} | {chance.error:.2%} | {chance.moved[0].mean():+.4f} ± "
            f"{chance.moved[0].std():.4f} | {chance.within()[0]:.0%} | {further} |"
        )
        squares = sum(d * d for d in differences) / len(differences)
        summary = (
            f"Mean difference {sum(differences) / len(differences):+.4f}, root mean square {squares**0.5:.4f}. "
            f"Noise leaves all within {LIMIT} at once in "
            + ", ".join(
                f"{share:.0%} of the draws with {times:g} times that error"
                for times, share in zip(SIZES, chances, strict=True)
            )
            + "."
        )
        (HERE / "results" / "precision.md").write_text("\n".join([*lines, "", summary]) + "\n")


if __name__ == "__main__":
    data = Path(sys.argv[2] if len(sys.argv) > 2 else HERE.parent.parent / "shared" / "data" / "eval")
    main(Path(sys.argv[1]), data, sys.argv[3:])
