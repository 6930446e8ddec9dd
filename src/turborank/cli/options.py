"""Options and progress output shared by several subcommands."""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from turborank import types

WIDTH = 100  # columns of tables when standard output is not a terminal
LOG_EVERY = 30.0  # seconds between progress lines when standard error is not a terminal


Model = Annotated[
    str | None,
    typer.Option(
        "--model",
        "-m",
        help="Name from `turborank models`, folder, or Hugging Face id.",
        show_default="the embedded model",
    ),
]
Engine = Annotated[str, typer.Option(help="auto, native, torch or reference.")]
Precision = Annotated[str, typer.Option(help="auto, int8, bf16 or fp32, if the engine supports it.")]
Length = Annotated[
    str, typer.Option(help="Policy for long documents: truncate, windows (read all of the text) or error.")
]
MaxLength = Annotated[
    int | None, typer.Option(help="Maximum tokens of a query with one document.", show_default="the model's")
]
Calibration = Annotated[
    Path | None,
    typer.Option(help="Calibration file from `turborank calibrate`.", show_default="calibration.json of the model"),
]
Threads = Annotated[int | None, typer.Option(help="Number of compute threads.", show_default="all cores")]
Offline = Annotated[bool, typer.Option("--offline", help="Do not use the network.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def width() -> int:
    """Width of tables in columns: COLUMNS, else the terminal's, else WIDTH."""
    return max(40, shutil.get_terminal_size((WIDTH, 24)).columns)


@contextmanager
def progress() -> Iterator[types.StartProgress]:
    """A function that starts a progress bar on standard error; without a terminal, prints a line every LOG_EVERY s."""
    if not sys.stderr.isatty():
        yield _logged
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns: tuple[Any, ...] = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, console=Console(stderr=True), transient=True) as bars:

        def start(what: str) -> types.Progress:
            task = bars.add_task(what, total=None, visible=False)

            def step(done: int, total: int) -> None:
                bars.update(task, completed=done, total=total, visible=done < total)

            return step

        yield start


def _logged(what: str) -> types.Progress:
    """Progress as lines, one every LOG_EVERY seconds; a task that printed any prints another one at its end."""
    started = last = time.monotonic()
    printed = False

    def step(done: int, total: int) -> None:
        nonlocal last, printed
        now = time.monotonic()
        if now - last >= LOG_EVERY or (printed and done >= total):
            last, printed = now, True
            print(f"turborank: {what}: {done:,} of {total:,} in {now - started:,.0f} s", file=sys.stderr, flush=True)

    return step
