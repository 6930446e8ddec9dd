"""The command line: one module for each subcommand; here the options and the progress output that they share."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer

from turborank.types import RerankerOptions

if TYPE_CHECKING:
    from turborank import types

WIDTH = 100  # columns of tables when standard output is not a terminal
LOG_EVERY = 30.0  # seconds between progress lines when standard error is not a terminal
HELP = {one.name: one.metadata["help"] for one in dataclasses.fields(RerankerOptions)}

Model = Annotated[
    str | None,
    typer.Option(
        "--model",
        "-m",
        help="Name from `turborank models`, folder, or Hugging Face id.",
        show_default="the embedded model",
    ),
]
Engine = Annotated[str, typer.Option(help=HELP["engine"])]
Precision = Annotated[str, typer.Option(help=HELP["precision"])]
Calibration = Annotated[
    Path | None,
    typer.Option(help="Calibration file from `turborank calibrate`.", show_default="calibration.json of the model"),
]
Threads = Annotated[int | None, typer.Option(help=HELP["threads"], show_default="all cores")]
Offline = Annotated[bool, typer.Option("--offline", help=HELP["offline"])]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


DEFAULT = RerankerOptions()
COMPUTE = [one for one in dataclasses.fields(RerankerOptions) if one.name != "faithful"]


def with_compute(command: Callable[..., Any]) -> Callable[..., Any]:
    """The command with an option for each field of RerankerOptions in place of its parameter ``compute``."""
    signature = inspect.signature(command, eval_str=True)
    types = get_type_hints(RerankerOptions)

    @functools.wraps(command)
    def _run(**given: Any) -> Any:
        chosen = {one.name: given.pop(one.name, one.default) for one in COMPUTE}
        chosen["offline"] = chosen["offline"] or None  # without --offline, HF_HUB_OFFLINE decides
        return command(**given, compute=RerankerOptions(**chosen))

    parameters: list[inspect.Parameter] = []
    for parameter in signature.parameters.values():
        if parameter.name != "compute":
            parameters.append(parameter)
            continue
        for one in COMPUTE:
            flags = ["--offline"] if one.name == "offline" else []
            shown = one.metadata["shown"] or True
            option = typer.Option(*flags, help=one.metadata["help"], show_default=shown)
            kind, default = (bool, False) if one.name == "offline" else (types[one.name], one.default)
            parameters.append(parameter.replace(name=one.name, annotation=Annotated[kind, option], default=default))
    _run.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    _run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return _run


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
