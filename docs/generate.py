"""Write docs/cli.md and docs/models.md from the code; with --check, only say whether they are out of date.

A test runs the check, so the two pages cannot differ from what the program does.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer

from turborank import catalog
from turborank.architectures import ARCHITECTURES
from turborank.cli.main import COMMANDS, build

HERE = Path(__file__).resolve().parent
NOTE = "<!-- Written by docs/generate.py (make docs); do not edit. -->"


def cli() -> str:
    """Every subcommand: what it does, what it takes, examples."""
    lines = [NOTE, "", "# The command", "", "`turborank COMMAND --help` says the same on the terminal.", ""]
    lines += ["Errors are one line on standard error; the exit code is then 2, and nothing has been printed.", ""]
    application: Any = typer.main.get_command(build())
    for name in COMMANDS:
        command = functools.reduce(lambda group, word: group.commands[word], name.split(), application)
        lines += [f"## turborank {name}", "", inspect.cleandoc(command.help), ""]
        lines += ["```console", *_examples(name), "```", ""]
        lines += ["| argument or option | default | |", "|---|---|---|", *_parameters(command), ""]
    return "\n".join(lines)


def _examples(name: str) -> Iterator[str]:
    for number, (purpose, line) in enumerate(COMMANDS[name].examples):
        if number:
            yield ""
        yield from (f"# {purpose}", f"$ {line}")


def _parameters(command: Any) -> Iterator[str]:
    for parameter in command.params:
        names = ", ".join(f"`{name}`" for name in parameter.opts) if parameter.opts[0].startswith("-") else ""
        names = names or f"`{parameter.name.upper()}{'…' if parameter.nargs != 1 else ''}`"
        default = parameter.show_default if isinstance(parameter.show_default, str) else parameter.default
        written = "" if default is None or default is False else str(default)
        yield f"| {names} | {written} | {(parameter.help or '').replace('|', '/')} |"


def models() -> str:
    """The catalog as a table."""
    lines = [
        NOTE,
        "",
        "# Models",
        "",
        "Known by name (on the Hugging Face Hub as in brackets); `turborank models` also says which are here.",
    ]
    lines += ["A folder in the published layout, or a Hugging Face id, can be given in place of a name.", ""]
    lines += ["| name | architecture | parameters | layers × hidden | tokens | licence | BEIR | LoCo | hit rate |"]
    lines += ["|---|---|--:|--:|--:|---|--:|--:|--:|"]
    for row in catalog.MODELS.values():
        name = f"{row.name} (`{row.repo}`)" if row.repo else row.name
        family = row.architecture + ("" if row.architecture in ARCHITECTURES else " (not yet)")
        shape = f"{row.layers} × {row.hidden_size}"
        published = " | ".join("" if value is None else f"{value:.2f}" for value in (row.beir, row.loco, row.hit_rate))
        cells = f"{name} | {family} | {row.parameters:,} | {shape} | {row.max_length:,} | {row.licence} | {published}"
        lines.append(f"| {cells} |")
    lines += [
        "",
        "BEIR and LoCo are nDCG@10, the hit rate is that at 10, all times 100, as published by Jina AI for its",
    ]
    lines += ["own first stage; they were not measured with turborank.", ""]
    lines += [f"- **{row.name}**: {row.note}." for row in catalog.MODELS.values() if row.note]
    return "\n".join([*lines, ""])


PAGES = {"cli.md": cli, "models.md": models}


def main(check: bool) -> int:
    stale = 0
    for name, page in PAGES.items():
        path, text = HERE / name, page()
        if path.exists() and path.read_text(encoding="utf-8") == text:
            continue
        stale += 1
        if not check:
            path.write_text(text, encoding="utf-8")
        print(f"docs/{name}", "is out of date; run make docs" if check else "written")
    return 1 if check and stale else 0


if __name__ == "__main__":
    sys.exit(main(check="--check" in sys.argv[1:]))
