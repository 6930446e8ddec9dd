"""``turborank export``: convert a model to the format of another program."""

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
