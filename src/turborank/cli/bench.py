"""``turborank bench``: speed and error of the engines on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from turborank.cli import options

EXAMPLES = (
    ("compare the engines, precisions and instruction sets of this machine", "turborank bench"),
    ("compare with other libraries, from a checkout of turborank", "turborank bench --peers bench/peers.py"),
    ("JSON output", "turborank bench --workload 32x128 --json"),
)

Workloads = Annotated[
    list[str] | None,
    typer.Option(
        "--workload",
        "-w",
        help="Pairs × tokens: 32x128, 8x512, 2x2048, 1x64, 1x8192, or ragged (mixed lengths); repeatable.",
        show_default="ragged, 32x128, 8x512 and 1x64",
    ),
]
Rounds = Annotated[int, typer.Option(min=1, help="Rounds of measurement on each workload.")]
Peers = Annotated[
    Path | None,
    typer.Option(help="Python file with a table PEERS of other libraries; those not installed are skipped."),
]
Fast = Annotated[
    bool, typer.Option("--no-error", help="Do not measure the error, which needs the slow reference engine.")
]


def bench(
    workload: Workloads = None,
    rounds: Rounds = 3,
    threads: options.Threads = None,
    peers: Peers = None,
    no_error: Fast = False,
    as_json: options.AsJson = False,
) -> None:
    """Measure speed in tokens per second, and the error against the reference engine.

    The model has the shape of jina-reranker-v1-turbo-en and random weights. Each engine runs in its own process; they
    are measured in turns. Padding is not counted as tokens.
    """
    from turborank import benchmark

    found = benchmark.compare(
        workloads=workload or ["ragged", "32x128", "8x512", "1x64"], rounds=rounds, threads=threads,
        peers=peers, errors=not no_error,
    )  # fmt: skip
    if as_json:
        import json

        print(json.dumps(found))
        return
    from rich.console import Console
    from rich.table import Table

    console = Console(width=options.width(), highlight=False, markup=False)
    for name, rows in found["workloads"].items():
        table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
        table.add_column(benchmark.title(name), overflow="fold")
        for column in ("tokens/s", "min ms", "median ms", "max error", "rms, of std"):
            table.add_column(column, justify="right")
        for row in sorted(rows, key=lambda row: float(row["min_s"])):
            table.add_row(*_cells(row))
        console.print(table)
        console.print()
    for name, reason in found["left_out"].items():
        console.print(f"left out {name}: {reason}")


def _cells(row: dict[str, Any]) -> list[str]:
    share = row.get("rms_share")
    return [
        str(row["label"]), f"{row['tokens_s']:,.0f}", f"{1e3 * row['min_s']:,.2f}", f"{1e3 * row['median_s']:,.2f}",
        f"{row['max']:.1e}" if "max" in row else "–", "–" if share is None else f"{share:.2%}",
    ]  # fmt: skip
