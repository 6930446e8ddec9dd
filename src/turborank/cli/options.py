"""Options that several subcommands share, so that one word means one thing everywhere."""

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

WIDTH = 100  # of tables when standard output is not a terminal
LOG_EVERY = 30.0  # seconds between two lines about one piece of work when standard error is not a terminal


Model = Annotated[
    str | None,
    typer.Option(
        "--model",
        "-m",
        help="A name that `turborank models` lists, a folder, or a Hugging Face id.",
        show_default="the one that ships with turborank",
    ),
]
Engine = Annotated[str, typer.Option(help="auto, native, torch or reference.")]
Precision = Annotated[str, typer.Option(help="auto, or one that the engine has: int8, bf16, fp32.")]
Length = Annotated[str, typer.Option(help="What to do with long documents: truncate, windows (read it all) or error.")]
MaxLength = Annotated[
    int | None, typer.Option(help="Tokens read of a question with a document.", show_default="the model's")
]
Calibration = Annotated[
    Path | None,
    typer.Option(help="File that `turborank calibrate` made.", show_default="calibration.json of the model"),
]
Threads = Annotated[int | None, typer.Option(help="Threads to compute with.", show_default="all cores")]
Offline = Annotated[bool, typer.Option("--offline", help="Never touch the network.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")]


def width() -> int:
    """Columns to fill: COLUMNS, or the terminal's, or WIDTH."""
    return max(40, shutil.get_terminal_size((WIDTH, 24)).columns)


@contextmanager
def progress() -> Iterator[types.StartProgress]:
    """A bar for every piece of long work, on standard error; where that is no terminal, a line now and then."""
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
    """Lines after the first LOG_EVERY seconds; the last one when the work is done."""
    started = said = time.monotonic()
    spoken = False

    def step(done: int, total: int) -> None:
        nonlocal said, spoken
        now = time.monotonic()
        if now - said >= LOG_EVERY or (spoken and done >= total):
            said, spoken = now, True
            print(f"turborank: {what}: {done:,} of {total:,} in {now - started:,.0f} s", file=sys.stderr, flush=True)

    return step
