"""``turborank export`` and ``turborank import``: convert a model to the format of another program, or from ONNX."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from turborank.cli import options

EXAMPLES = (
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


def export(model: Model, to: To, out: Out, offline: options.Offline = False) -> None:
    """Convert a model to the format of another program.

    onnx needs torch; if ONNX Runtime is installed, the graph's logits are compared with turborank's.
    """
    from turborank.export.folder import export as write

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
    from turborank.checkpoint.from_onnx import import_onnx

    made = import_onnx(graph, out, config=config, tokenizer=tokenizer)
    count = sum(value.size for value in made.weights.values())
    print(f"{out}: {made.config.architecture}, {count:,} parameters in {len(made.weights)} tensors")
