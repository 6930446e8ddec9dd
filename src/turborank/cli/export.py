"""``turborank export`` and ``turborank import``: models for other programs, and from ONNX files."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from turborank.cli import options

EXAMPLES = (
    ("a graph for ONNX Runtime, checked against our logits", "turborank export my-model --to onnx --out my-model-onnx"),
    (
        "a folder for sentence-transformers' CrossEncoder",
        "turborank export my-bert-student --to sentence-transformers --out for-python",
    ),
)

Model = Annotated[str, typer.Argument(help="A name that `turborank models` lists, a folder, or a Hugging Face id.")]
To = Annotated[str, typer.Option(help="onnx (any model), or sentence-transformers (BERT, XLM-RoBERTa, DeBERTa).")]
Out = Annotated[Path, typer.Option(help="A new folder.")]


def export(model: Model, to: To, out: Out, offline: options.Offline = False) -> None:
    """Write a model in another program's format.

    onnx needs torch, and compares the graph's logits with ours where ONNX Runtime is installed.
    """
    from turborank.export.folder import export as write

    written = write(model, to, out, offline=offline or None)
    print(f"{written.folder}: {', '.join(written.files)}")
    print(written.remark)


IMPORT_EXAMPLES = (
    (
        "a cross-encoder quantised to 8 bits, its config.json and tokenizer.json beside it",
        "turborank import models/model.onnx --out my-reranker",
    ),
    (
        "config and tokenizer from elsewhere",
        "turborank import model.onnx --config bert/config.json --tokenizer bert/tokenizer.json --out my-reranker",
    ),
)

Graph = Annotated[Path, typer.Argument(help="An ONNX file, float or dynamically quantised to 8 bits.")]
Config = Annotated[
    Path | None, typer.Option(help="The model's config.json.", show_default="the one beside the ONNX file")
]
Tokens = Annotated[
    Path | None, typer.Option("--tokenizer", help="Its tokenizer.json.", show_default="the one beside the ONNX file")
]


def import_model(graph: Graph, out: Out, config: Config = None, tokenizer: Tokens = None) -> None:
    """Write the weights of an ONNX file as a model folder.

    Needs the package onnx. Weights that were rounded to 8 bits stay rounded: the folder ranks like the graph, not like
    the model it was made from.
    """
    from turborank.checkpoint.from_onnx import import_onnx

    made = import_onnx(graph, out, config=config, tokenizer=tokenizer)
    count = sum(value.size for value in made.weights.values())
    print(f"{out}: {made.config.architecture}, {count:,} parameters in {len(made.weights)} tensors")
