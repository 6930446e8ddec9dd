"""Options that several subcommands share, so that one word means one thing everywhere."""

from __future__ import annotations

import shutil
from typing import Annotated

import typer

WIDTH = 100  # of tables when standard output is not a terminal

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
Threads = Annotated[int | None, typer.Option(help="Threads to compute with.", show_default="all cores")]
Offline = Annotated[bool, typer.Option("--offline", help="Never touch the network.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")]


def width() -> int:
    """Columns to fill: COLUMNS, or the terminal's, or WIDTH."""
    return max(40, shutil.get_terminal_size((WIDTH, 24)).columns)
