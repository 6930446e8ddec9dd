"""``turborank bench``: how fast this machine ranks, and how exactly."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from turborank.cli import options

EXAMPLES = (
    ("engines, precisions and instruction sets of this machine, in turns", "turborank bench"),
    ("with other libraries, from a checkout of turborank", "turborank bench --peers bench/peers.py"),
    ("for programs", "turborank bench --workload 32x128 --json"),
)

Workloads = Annotated[
    list[str] | None,
    typer.Option(
        "--workload",
        "-w",
        help="ragged, 32x128, 8x512, 2x2048, 1x64 or 1x8192; repeatable.",
        show_default="ragged, 32x128, 8x512 and 1x64",
    ),
]
Rounds = Annotated[int, typer.Option(min=1, help="Turns that each contestant has on each workload.")]
Peers = Annotated[
    Path | None, typer.Option(help="A Python file with a table PEERS; rows whose libraries are installed take part.")
]
Fast = Annotated[bool, typer.Option("--no-error", help="Leave out the error, which needs the slow reference engine.")]


def bench(
    workload: Workloads = None,
    rounds: Rounds = 3,
    threads: options.Threads = None,
    peers: Peers = None,
    no_error: Fast = False,
    as_json: options.AsJson = False,
) -> None:
    """Measure speed in real tokens per second, and beside it the error against the reference engine.

    The model has the shape of jina-reranker-v1-turbo-en and random weights. Each contestant runs in its own process;
    all take turns. Padding does not count as tokens.
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
        for column in ("tokens/s", "least ms", "median ms", "max error", "rms, of std"):
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
