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
from turborank.cli import COMMANDS, build

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
    """The catalog: which to begin with, the facts, the published quality."""
    lines = [NOTE, "", "# Models", ""]
    lines += ["Known by name; `turborank models` also says which are here. A folder in one of the layouts below, or a"]
    lines += [
        "Hugging Face id, can be given in place of a name.",
        "",
        "## Where to begin",
        "",
        "| you want | take |",
        "|---|---|",
    ]
    lines += [f"| {need} | `{name}` |" for need, name in catalog.PICKS]
    lines += ["", "## What they are", ""]
    lines += [
        "| name | on the Hub | family | parameters | layers × hidden | work | speed | tokens | languages | licence |"
    ]
    lines += ["|---|---|---|--:|--:|--:|---|--:|---|---|"]
    for row in catalog.MODELS.values():
        family = row.architecture + ("" if row.architecture in ARCHITECTURES else " (not yet)")
        licence = f"**{row.licence}**, no commercial use" if row.noncommercial else row.licence
        cells = [
            row.name, f"`{row.repo}`" if row.repo else "", family, f"{row.parameters:,}",
            f"{row.layers} × {row.hidden_size}", f"{row.work:.2f}", row.speed, f"{row.max_length:,}", row.languages,
            licence,
        ]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    limits = ", ".join(f"{name} up to {limit:g}" for name, limit in catalog.SPEEDS[:-1])
    lines += ["", *WORK.format(limits=limits, last=catalog.SPEEDS[-1][0]).splitlines()]
    lines += ["", "## Published quality", "", "| name | MTEB | NanoBEIR | BEIR | LoCo | hit rate | MKQA |"]
    lines += ["|---|--:|--:|--:|--:|--:|--:|"]
    for row in catalog.MODELS.values():
        figures = (row.mteb, row.nanobeir, row.beir, row.loco, row.hit_rate, row.mkqa)
        if any(figure is not None for figure in figures):
            lines.append(f"| {row.name} | {' | '.join('' if f is None else f'{f:.2f}' for f in figures)} |")
    lines += ["", *QUALITY.splitlines()]
    lines += ["", "## Notes", ""]
    lines += [f"- **{row.name}**: {row.note}." for row in catalog.MODELS.values() if row.note]
    return "\n".join([*lines, "", *LAYOUTS, ""])


WORK = """Work is computed from the shape: multiply-adds a token in the linear layers, as a multiple of MiniLM-L6's
10.6 million. It decides the speed class:
{limits}; {last} beyond.
Attention comes on top: it grows with the square of the length, except in the sliding layers of ModernBERT, two of
three. Measured speed is in `bench/`. The licence is that of the published model; one that forbids commercial use is
said again when the model is loaded."""

QUALITY = """All times 100, as published and not measured with turborank; compare within a column only. MTEB (English,
v2, retrieval; mean of six first stages) and NanoBEIR are nDCG@10 from the announcement of the Ettin rerankers; BEIR and
LoCo (nDCG@10) and the hit rate (at 10) from the model card of jina-reranker-v1; MKQA (nDCG@10, 26 languages) from that
of jina-reranker-v2. The Ettin rerankers were trained on parts of what MTEB and BEIR test."""

LAYOUTS = """## Layouts that load

- `config.json`, `model.safetensors`, `tokenizer.json`: what transformers writes. `architectures` and `id2label` may be
  missing; the family is decided by `model_type` and tensor names.
- Shards: `model.safetensors.index.json` and the files it names, in the same folder.
- sentence-transformers' modules (`modules.json`): Transformer alone, or Transformer, Pooling, Dense, LayerNorm, Dense
  as the Ettin rerankers have them. Pooling is then the module's, whatever `config.json` says.
- ModernBERT's config as transformers 4 writes it (two rope thetas, every n-th layer global) and as 5 does
  (`rope_parameters`, `layer_types`).
- jina-reranker-v2's own tensor names. Its code is never run.
- A classifier with two labels, if its `id2label` calls one `relevant` and the other `irrelevant` or `not_relevant`, or
  if `Reranker(…, relevant_label=1)` says so: the logit is then the difference of the two. Otherwise it is refused.
- Renamed repositories (`cross-encoder/ms-marco-MiniLM-L6-v2` and `-L-6-v2`) are found in the cache under either name.

Refused, with what to do instead: pickles, folders with ONNX files alone, embedding models, decoders.""".splitlines()


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
