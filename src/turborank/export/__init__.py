"""Models in other programs' formats. EXPORTS has a row per format: a checkpoint in, a folder out.

:func:`from_onnx` is the way back from an ONNX graph, quantised or not.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors.numpy import save_file
from tokenizers import Tokenizer

from turborank import checkpoint
from turborank.checkpoint import Checkpoint
from turborank.checkpoint.tensors import dense
from turborank.checkpoint.verify import CONFIG, TOKENIZER, WEIGHTS
from turborank.data.files import os_errors, write_json
from turborank.errors import CheckpointError, InputError, UnknownKeyError
from turborank.tokens import read_template
from turborank.types import Float32, ModelConfig

ONNX = "model.onnx"


class Export(NamedTuple):
    """One format."""

    write: Callable[[Checkpoint, Path], str]  # returns a remark for the user
    note: str


class Exported(NamedTuple):
    """The files written, and a remark for the user."""

    folder: Path
    files: tuple[str, ...]
    remark: str


def export(model: str | None, to: str, out: Path, *, offline: bool | None = None) -> Exported:
    """Write a model (name or folder) in the format ``to`` to ``out``, a new or empty folder.

    Raises UnknownKeyError for a format not in EXPORTS, InputError where the folder is not empty or a library is
    missing, CheckpointError where the format cannot represent the model. A failed export leaves no files.
    """
    if to not in EXPORTS:
        raise UnknownKeyError("a format", to, EXPORTS)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"expected a new or empty folder, got one with files at {out}", hint="choose another --out")
    loaded = checkpoint.load(model, offline=offline)
    fresh = not out.exists()
    out.mkdir(parents=True, exist_ok=True)
    try:
        remark = EXPORTS[to].write(loaded, out)
    except BaseException:
        for path in out.iterdir():
            path.unlink()
        if fresh:
            out.rmdir()
        raise
    return Exported(out, tuple(sorted(path.name for path in out.iterdir())), remark)


def to_onnx(source: Checkpoint, folder: Path) -> str:
    """Write ``model.onnx`` and the tokenizer.

    Inputs are ``input_ids``, ``attention_mask`` and, for models with segments, ``token_type_ids``, all int64
    (batch, length), padded on the right; the output is ``logits``, float32 (batch, 1). Batch size and length (up to the
    model's maximum) are free. If ONNX Runtime is installed, its logits are compared with turborank's.
    """
    missing = [name for name in ("torch", "onnx", "onnxscript") if importlib.util.find_spec(name) is None]
    if missing:
        raise InputError(
            f"expected torch, onnx and onnxscript for an export to ONNX, got no {' and no '.join(missing)}",
            hint="pip install 'turborank[torch,onnx]'",
        )
    from turborank.export import onnx as onnx_export

    weights = dense(source.weights)
    about = {
        "model": source.name,
        "max_length": str(source.config.max_length),
        "turborank": version("turborank"),
    }
    onnx_export.write(weights, source.config, folder / ONNX, about)
    write_json(folder / CONFIG, source.raw_config)
    _write_tokenizer(source, folder)
    worst = onnx_export.check(weights, source.config, folder / ONNX)
    if worst is None:
        return "not compared with our logits: onnxruntime is not installed (pip install 'turborank[onnx]')"
    return f"logits of ONNX Runtime and ours differ by at most {worst:.1e}"


# architecture -> prefix of the encoder's tensors and class name in transformers
_THEIRS = {
    "bert": ("bert.", "BertForSequenceClassification"),
    "xlm_roberta": ("roberta.", "XLMRobertaForSequenceClassification"),
    "deberta": ("deberta.", "DebertaV2ForSequenceClassification"),
}
_ROBERTA = "RobertaForSequenceClassification"  # model_type "roberta"


def to_sentence_transformers(source: Checkpoint, folder: Path) -> str:
    """Write a folder that ``sentence_transformers.CrossEncoder`` and transformers load.

    Weights are float32 under transformers' names. ``predict`` returns the sigmoid of the logit, as turborank does. One
    difference remains: transformers reads the name of a special token inside a text, such as "[SEP]", as that token;
    turborank reads it as text.
    """
    architecture = source.config.architecture
    if architecture not in _THEIRS:
        raise CheckpointError(
            f"expected a model that transformers can run without remote code ({', '.join(_THEIRS)}), "
            f"got {architecture} in {source.folder}",
            hint="export it to onnx, or use turborank.compat.CrossEncoder, which has the same methods",
        )
    prefix, cls = _THEIRS[architecture]
    tensors = {
        name if name.startswith("classifier.") or _is_pooler_of_deberta(name, architecture) else prefix + name: value
        for name, value in dense(source.weights).items()
    }
    with os_errors(folder / WEIGHTS):
        save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    raw = {name: value for name, value in source.raw_config.items() if name not in ("auto_map", "quantization_config")}
    pad = _pad(source.tokenizer, source.raw_config)[1]
    config = {
        **raw,
        "architectures": [_ROBERTA if raw.get("model_type") == "roberta" else cls],
        "num_labels": 1,
        "id2label": {"0": "LABEL_0"},
        "label2id": {"LABEL_0": 0},
        "pad_token_id": pad,
        "torch_dtype": "float32",
        "sentence_transformers": {"activation_fn": "torch.nn.modules.activation.Sigmoid"},
    }
    write_json(folder / CONFIG, config)
    _write_tokenizer(source, folder)
    return "CrossEncoder(folder).predict gives sigmoid scores"


def _is_pooler_of_deberta(name: str, architecture: str) -> bool:
    return architecture == "deberta" and name.startswith("pooler.")


EXPORTS: dict[str, Export] = {
    "onnx": Export(to_onnx, "a graph over padded batches, for ONNX Runtime and others; any model"),
    "sentence-transformers": Export(to_sentence_transformers, "for its CrossEncoder; BERT, XLM-RoBERTa, DeBERTa"),
}


# ---------------------------------------------------------------- shared by both formats


def _pad(tokenizer: Tokenizer, raw: Mapping[str, Any]) -> tuple[str, int]:
    """(name, id) of the padding token: the config's, else [PAD] or <pad>, else token 0."""
    number = raw.get("pad_token_id")
    if number is None:
        number = next((i for name in ("[PAD]", "<pad>") if (i := tokenizer.token_to_id(name)) is not None), 0)
    name = tokenizer.id_to_token(number)
    if name is None:
        raise CheckpointError(f"expected pad_token_id {number} of config.json to be a token of tokenizer.json")
    return name, number


def _write_tokenizer(source: Checkpoint, folder: Path) -> None:
    """Copy ``tokenizer.json``, and write a ``tokenizer_config.json`` that makes transformers use it unchanged."""
    tokenizer = source.tokenizer
    shutil.copyfile(source.folder / TOKENIZER, folder / TOKENIZER)
    template = read_template(tokenizer)
    model = json.loads(tokenizer.to_str())["model"]
    unknown = model.get("unk_token")
    if unknown is None and isinstance(model.get("unk_id"), int):  # SentencePiece's unigram model has its id
        unknown = model["vocab"][model["unk_id"]][0]
    tokens = {
        "pad_token": _pad(tokenizer, source.raw_config)[0],
        "cls_token": tokenizer.id_to_token(template.prefix[0]) if template.prefix else None,
        "sep_token": tokenizer.id_to_token(template.suffix[-1]) if template.suffix else None,
        "unk_token": unknown,
    }
    write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": source.config.max_length,
            "model_input_names": list(_names(source.config)),
            "clean_up_tokenization_spaces": False,
            **{name: token for name, token in tokens.items() if token is not None},
        },
    )


def _names(config: ModelConfig) -> tuple[str, ...]:
    """Names of the model's inputs; ``token_type_ids`` only for models with segments."""
    return ("input_ids", "token_type_ids", "attention_mask")[:: 1 if config.type_vocab_size > 1 else 2]


_PRODUCTS = ("MatMul", "MatMulInteger", "Gemm")
_BETWEEN = ("Cast", "Mul")  # nodes between an integer product and the addition of its bias
_QUANTISED = "_quantized"


def import_onnx(
    model: str | Path, out: str | Path, *, config: str | Path | None = None, tokenizer: str | Path | None = None
) -> Checkpoint:
    """Write the published layout (float32 ``model.safetensors``, ``config.json``, ``tokenizer.json``) to ``out``.

    ``config`` and ``tokenizer`` default to ``config.json`` and ``tokenizer.json`` in the folder of the ONNX file.
    Returns the checkpoint, read back from ``out`` and verified.

    Raises InputError if a file is missing or ``out`` is not empty, and CheckpointError if the graph's tensors are not
    those of the model that ``config.json`` describes. After an error, ``out`` is empty.
    """
    source, folder = Path(model).expanduser(), Path(out).expanduser()
    found = {
        CONFIG: Path(config or source.with_name(CONFIG)).expanduser(),
        TOKENIZER: Path(tokenizer or source.with_name(TOKENIZER)).expanduser(),
    }
    for name, path in {"model.onnx": source, **found}.items():
        if not path.is_file():
            raise InputError(f"expected {name}, got no file at {path}", hint="give it with --config or --tokenizer")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"expected a new or empty folder, got one with files at {folder}", hint="choose another --out")
    tensors = read_onnx(source)
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with os_errors(folder / WEIGHTS):
            save_file(dict(tensors), folder / WEIGHTS, metadata={"format": "pt"})
        for name, path in found.items():
            shutil.copyfile(path, folder / name)
        return checkpoint.read(folder)
    except BaseException:
        for name in (WEIGHTS, CONFIG, TOKENIZER):
            (folder / name).unlink(missing_ok=True)
        raise


def read_onnx(path: str | Path) -> dict[str, Float32]:
    """Tensors of ``model.onnx`` by their PyTorch names, all float32; weights of linear layers have the shape (out, in).

    Raises InputError if the ``onnx`` package is missing or the file is not an ONNX model, and CheckpointError if the
    name of a product's weight cannot be recovered.
    """
    try:
        import onnx
        from google.protobuf.message import DecodeError
    except ImportError:
        raise InputError(
            "expected the package onnx to read an ONNX file, got none", hint="pip install 'turborank[onnx]'"
        ) from None
    try:
        graph = onnx.load(str(path)).graph
    except (DecodeError, OSError) as error:
        raise InputError(f"expected an ONNX model, got {error or 'another file'} at {path}") from None
    stored = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer}
    tensors: dict[str, Float32] = {}
    for name, value in stored.items():
        if name.startswith("onnx::"):
            continue  # a constant without a name; _linear_weights recovers it
        if name.endswith(_QUANTISED):
            whole = name.removesuffix(_QUANTISED)
            tensors[whole] = _float(stored, whole)
        elif "." in name and not name.endswith(("_scale", "_zero_point")) and value.dtype.kind == "f":
            tensors[name] = value.astype(np.float32)
    for name, weight in _linear_weights(graph, stored, path):
        tensors[name] = np.ascontiguousarray(weight.T)
    return tensors


def _float(stored: Mapping[str, Any], name: str) -> Float32:
    """A tensor as float32; a quantised one is dequantised as (q - zero point)·scale."""
    if name in stored:
        plain: Float32 = stored[name].astype(np.float32)
        return plain
    quantised = stored[name + _QUANTISED].astype(np.int32)
    zero, scale = stored[name + "_zero_point"].astype(np.int32), stored[name + "_scale"].astype(np.float32)
    whole: Float32 = ((quantised - zero) * scale).astype(np.float32)
    return whole


def _linear_weights(graph: Any, stored: Mapping[str, Any], path: str | Path) -> Iterator[tuple[str, Float32]]:
    """(name, weight) of every product with a constant; weights have the stored shape (in, out)."""
    readers: dict[str, list[Any]] = {}
    for node in graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    for node in graph.node:
        if node.op_type not in _PRODUCTS:
            continue
        constant = node.input[1].removesuffix(_QUANTISED)
        if constant not in stored and constant + _QUANTISED not in stored:
            continue  # a product of two activations
        yield _name(node, constant, readers, stored, path), _float(stored, constant)


def _name(node: Any, constant: str, readers: dict[str, list[Any]], stored: Mapping[str, Any], path: str | Path) -> str:
    if not constant.startswith("onnx::"):
        return constant
    output = node.output[0]
    while True:
        following = [reader for reader in readers.get(output, []) if reader.op_type in ("Add", *_BETWEEN)]
        if not following:
            raise CheckpointError(f"expected a named bias after the product with {constant}, got none at {path}")
        step = following[0]
        if step.op_type == "Add":
            biases = [name for name in step.input if name in stored and name.endswith(".bias")]
            if not biases:
                raise CheckpointError(f"expected a named bias beside {constant}, got {list(step.input)} at {path}")
            return str(biases[0]).removesuffix("bias") + "weight"
        output = step.output[0]
