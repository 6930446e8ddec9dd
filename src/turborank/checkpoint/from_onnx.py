"""Convert an ONNX file, float or dynamically quantised to 8 bits, to a model folder.

Exporters keep the names of embeddings, norms and biases, but the weight of a linear layer becomes an unnamed constant
of a ``MatMul`` or ``MatMulInteger`` node, stored (in, out). Its name is recovered from the bias that is added to the
product. ONNX Runtime's dynamic quantisation stores a tensor W as ``NAME_quantized``, ``NAME_scale`` and
``NAME_zero_point``, W = (q - zero point)·scale, with one scale for the tensor or one for each output column
(onnxruntime.quantization, per_channel).
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from turborank import checkpoint
from turborank.checkpoint import Checkpoint
from turborank.checkpoint.verify import CONFIG, TOKENIZER, WEIGHTS
from turborank.errors import CheckpointError, InputError
from turborank.types import Float32

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
