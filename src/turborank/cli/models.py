"""``turborank models``, ``export`` and ``import``: the catalog, and models in the formats of other programs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from turborank import cli

SHORT = {"English": "en", "English, Chinese": "en zh", "multilingual": "many"}  # for a narrow table

EXAMPLES = (
    ("list the models, and which of them are on this machine", "turborank models"),
    ("JSON output", 'turborank models --json | jq -r ".[].name"'),
)


def models(as_json: cli.AsJson = False) -> None:
    """List the models known by name: size, speed, length, languages, licence, published quality, location.

    A model folder or a Hugging Face id can be used instead of a name. docs/models.md has the sources of the quality
    figures.
    """
    from turborank import catalog

    rows: list[dict[str, Any]] = [
        {
            "name": row.name,
            "architecture": row.architecture,
            "parameters": row.parameters,
            "work": round(row.work, 2),
            "speed": row.speed,
            "max_length": row.max_length,
            "languages": row.languages,
            "licence": row.licence,
            "noncommercial": row.noncommercial,
            "mteb": row.mteb,
            "nanobeir": row.nanobeir,
            "beir": row.beir,
            "mkqa": row.mkqa,
            "where": where(row),
            "default": row.name == catalog.DEFAULT,
            "note": row.note,
        }
        for row in catalog.MODELS.values()
    ]
    if as_json:
        import json

        print(json.dumps(rows, ensure_ascii=False))
        return
    _print(rows)


def _print(rows: list[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    from turborank import catalog

    table = Table(box=None, padding=(0, 1, 0, 0), header_style="bold")
    table.add_column("name", no_wrap=True)
    for column in ("size", "speed", "tokens", "texts", "MTEB", "licence", "where"):
        justify: Literal["left", "right"] = "right" if column in ("size", "tokens", "MTEB") else "left"
        table.add_column(column, justify=justify, overflow="fold")
    for row in rows:
        cells = [
            f"{row['name']} *" if row["default"] else row["name"],
            size(row["parameters"]),
            row["speed"],
            f"{row['max_length']:,}",
            SHORT.get(row["languages"], row["languages"]),
            "" if row["mteb"] is None else f"{row['mteb']:.1f}",
            f"{row['licence']} †" if row["noncommercial"] else row["licence"],
            row["where"],
        ]
        table.add_row(*cells)
    Console(width=cli.width(), highlight=False, markup=False).print(table)
    print("\n* the default. A folder or a Hugging Face id can be used instead of a name.")
    print("† no commercial use.")
    print("speed: by operations per token; fast: like MiniLM-L6. MTEB: published nDCG@10, English.\n")
    print("Where to begin:")
    for need, name in catalog.PICKS:
        print(f"  {need}: {name}")


def size(parameters: int) -> str:
    """A number of parameters in millions, such as "33.2 M"."""
    return f"{parameters / 1e6:,.1f} M" if parameters < 1e8 else f"{parameters / 1e6:,.0f} M"


def where(row: object) -> str:
    """``embedded``, ``cache`` (downloaded), ``hub`` (not yet downloaded), or why the model is unavailable."""
    from turborank.architectures import ARCHITECTURES
    from turborank.catalog import Model
    from turborank.checkpoint import hub

    assert isinstance(row, Model)
    if row.architecture not in ARCHITECTURES:
        return f"not yet: {row.architecture} is missing"
    if row.embedded:
        return "embedded" if (row.folder / "model.safetensors").is_file() else "embedded, but its files are missing"
    if row.repo is None:
        return "not public"
    folder, missing = hub.cached(row.repo, row.revision, [alias for alias in row.aliases if "/" in alias])
    return "cache" if folder is not None and not missing else "hub"


EXPORT_EXAMPLES = (
    (
        "an ONNX graph, whose logits are compared with turborank's",
        "turborank export my-model --to onnx --out my-model-onnx",
    ),
    (
        "a folder for sentence-transformers' CrossEncoder",
        "turborank export my-bert-student --to sentence-transformers --out for-python",
    ),
)

Model = Annotated[str, typer.Argument(help="Name from `turborank models`, folder, or Hugging Face id.")]
To = Annotated[
    str, typer.Option(help="Format: onnx (any model) or sentence-transformers (BERT, XLM-RoBERTa, DeBERTa).")
]
Out = Annotated[Path, typer.Option(help="Folder to write; must be new.")]


def export(model: Model, to: To, out: Out, offline: cli.Offline = False) -> None:
    """Convert a model to the format of another program.

    onnx needs torch; if ONNX Runtime is installed, the graph's logits are compared with turborank's.
    """
    from turborank.export import export as write

    written = write(model, to, out, offline=offline or None)
    print(f"{written.folder}: {', '.join(written.files)}")
    print(written.remark)


IMPORT_EXAMPLES = (
    (
        "a cross-encoder quantised to int8, with config.json and tokenizer.json in the same folder",
        "turborank import models/model.onnx --out my-reranker",
    ),
    (
        "config and tokenizer from another folder",
        "turborank import model.onnx --config bert/config.json --tokenizer bert/tokenizer.json --out my-reranker",
    ),
)

Graph = Annotated[Path, typer.Argument(help="ONNX file, in floating point or dynamically quantised to int8.")]
Config = Annotated[
    Path | None, typer.Option(help="config.json of the model.", show_default="in the folder of the ONNX file")
]
Tokens = Annotated[
    Path | None,
    typer.Option("--tokenizer", help="tokenizer.json of the model.", show_default="in the folder of the ONNX file"),
]


def import_model(graph: Graph, out: Out, config: Config = None, tokenizer: Tokens = None) -> None:
    """Write the weights of an ONNX file as a model folder.

    Needs the package onnx. Quantised weights keep their int8 values, so the folder ranks like the ONNX graph and not
    like the model before quantisation.
    """
    from turborank.export import import_onnx

    made = import_onnx(graph, out, config=config, tokenizer=tokenizer)
    count = sum(value.size for value in made.weights.values())
    print(f"{out}: {made.config.architecture}, {count:,} parameters in {len(made.weights)} tensors")
