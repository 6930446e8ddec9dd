"""``turborank export``: a model for other programs."""

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
