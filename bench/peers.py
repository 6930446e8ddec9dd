"""PEERS: other libraries that run the same model on a CPU, one row each.

``prepare`` converts the checkpoint to the peer's format once (export, quantisation); ``load`` returns a scorer.
Checkpoints of the turbo shape are run as the torch module below, the others (FAMILY_PEERS) as transformers' class.
A row is used if the distributions it ``needs`` are installed. All peers pad, so all sort by length and batch.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import inspect
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

OPSET = 17
CALIBRATION = 32  # random pairs for NNCF's calibration
TOLERANCE = 1e-3  # of a float32 graph's logits


class Peer(NamedTuple):
    """One peer: a library, how to prepare the model for it and how to load it."""

    label: str
    needs: tuple[str, ...]  # distributions; their versions go into the report
    load: Callable[[Path, int, dict[str, Any]], Callable[..., np.ndarray]]
    prepare: Callable[[Path, dict[str, Any]], None] | None = None
    options: dict[str, Any] = {}  # noqa: RUF012 - a NamedTuple's default
    streams: tuple[int, ...] = (1,)  # numbers of concurrent batches to try when tuning


def padded(encodings: Sequence[Any], pad: int = 1) -> dict[str, np.ndarray]:
    """Token ids, segments and mask, (B, longest) int64."""
    shape = (len(encodings), max(len(e) for e in encodings))
    ids, types, mask = np.full(shape, pad, np.int64), np.zeros(shape, np.int64), np.zeros(shape, np.int64)
    for row, encoding in enumerate(encodings):
        n = len(encoding)
        ids[row, :n], types[row, :n], mask[row, :n] = encoding.input_ids, encoding.type_ids, 1
    return {"input_ids": ids, "token_type_ids": types, "attention_mask": mask}


def sorted_batches(encodings: Sequence[Any], size: int) -> list[list[int]]:
    """Indices of the pairs in batches of ``size`` of similar length, longest first."""
    order = sorted(range(len(encodings)), key=lambda i: -len(encodings[i]))
    return [order[first : first + size] for first in range(0, len(order), size)]


def by_batches(run: Callable[[dict[str, np.ndarray]], np.ndarray]) -> Callable[..., np.ndarray]:
    """A scorer from a function of one padded batch."""

    def score(encodings: Sequence[Any], batch: int = 32) -> np.ndarray:
        out = np.empty(len(encodings), np.float32)
        for places in sorted_batches(encodings, batch):
            out[places] = np.asarray(run(padded([encodings[i] for i in places]))).reshape(-1)
        return out

    return score


# --- the model as a plain torch module, from its specification ---------------------------------------------------


def jinabert(checkpoint: Any, *, cls: bool, fused: bool) -> Any:
    """JinaBERT with its classifier (docs/model.md) over padded inputs and a mask, as libraries implement it.

    ``cls``: compute the last layer for token 0 only, which changes no logit. ``fused``: use torch's
    scaled_dot_product_attention instead of separate products and softmax, which exporters support best.
    """
    import torch
    from torch import nn

    config = checkpoint.config
    c, heads = config.hidden_size, config.num_attention_heads

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.query, self.key, self.value, self.out = (nn.Linear(c, c) for _ in range(4))
            self.norm1, self.norm2 = (nn.LayerNorm(c, eps=config.layer_norm_eps) for _ in range(2))
            self.gate = nn.Linear(c, 2 * config.intermediate_size, bias=False)
            self.down = nn.Linear(config.intermediate_size, c)

        def forward(self, x: Any, bias: Any, first: bool) -> Any:
            asked = x[:, :1] if first else x

            def split(y: Any) -> Any:
                return y.view(y.shape[0], y.shape[1], heads, c // heads).transpose(1, 2)

            q, k, v = split(self.query(asked)), split(self.key(x)), split(self.value(x))
            bias = bias[:, :, :1] if first else bias
            if fused:
                context = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=bias)
            else:
                context = torch.softmax(q @ k.transpose(2, 3) / math.sqrt(c // heads) + bias, dim=-1) @ v
            context = context.transpose(1, 2).reshape(asked.shape[0], asked.shape[1], c)
            y = self.norm1(self.out(context) + asked)
            gate, value = self.gate(y).split(config.intermediate_size, dim=-1)
            return self.norm2(self.down(nn.functional.gelu(gate) * value) + y)

    class JinaBert(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words = nn.Embedding(config.vocab_size, c)
            self.types = nn.Embedding(config.type_vocab_size, c)
            self.norm = nn.LayerNorm(c, eps=config.layer_norm_eps)
            self.layers = nn.ModuleList(Layer() for _ in range(config.num_hidden_layers))
            self.pooler, self.classifier = nn.Linear(c, c), nn.Linear(c, 1)
            slopes = torch.tensor(config.slopes, dtype=torch.float32)[None, :, None, None]
            self.register_buffer("slopes", slopes, persistent=False)

        def forward(self, input_ids: Any, token_type_ids: Any, attention_mask: Any) -> Any:
            x = self.norm(self.words(input_ids) + self.types(token_type_ids))
            place = torch.arange(input_ids.shape[1], device=input_ids.device)
            distance = (place[:, None] - place[None, :]).abs().to(x.dtype)
            padding = (1.0 - attention_mask[:, None, None, :].to(x.dtype)) * -30000.0
            bias = padding - self.slopes * distance  # (B, H, n, n)
            for layer in self.layers[:-1]:
                x = layer(x, bias, False)
            x = self.layers[-1](x, bias, cls)
            return self.classifier(torch.tanh(self.pooler(x[:, 0])))[:, 0]

    model = JinaBert()
    model.load_state_dict(_state(checkpoint.weights, config.num_hidden_layers))
    return model.eval()


def _state(weights: Any, layers: int) -> dict[str, Any]:
    """The checkpoint's tensors by the module's parameter names."""
    import torch

    names = {
        "embeddings.word_embeddings.": "words.", "embeddings.token_type_embeddings.": "types.",
        "embeddings.LayerNorm.": "norm.", "pooler.dense.": "pooler.", "classifier.": "classifier.",
    }  # fmt: skip
    parts = {
        "attention.self.query.": "query.", "attention.self.key.": "key.", "attention.self.value.": "value.",
        "attention.output.dense.": "out.", "attention.output.LayerNorm.": "norm1.", "mlp.gated_layers.": "gate.",
        "mlp.wo.": "down.", "mlp.layernorm.": "norm2.",
    }  # fmt: skip
    for layer in range(layers):
        names |= {f"encoder.layer.{layer}.{theirs}": f"layers.{layer}.{ours}" for theirs, ours in parts.items()}
    state = {}
    for name in weights:
        prefix = next(p for p in names if name.startswith(p))
        state[names[prefix] + name.removeprefix(prefix)] = torch.from_numpy(weights[name].copy())
    return state


def example(pairs: int, longest: int, vocabulary: int, types: int = 2, seed: int = 1) -> dict[str, np.ndarray]:
    """A padded batch of random ids."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(longest // 2, longest + 1, pairs)
    lengths[0] = longest
    mask = (np.arange(longest)[None, :] < lengths[:, None]).astype(np.int64)
    ids = np.where(mask == 1, rng.integers(5, vocabulary, mask.shape), 1)
    second = ((np.arange(longest)[None, :] >= lengths[:, None] // 3) & (mask == 1)).astype(np.int64)
    return {"input_ids": ids, "token_type_ids": second * (types > 1), "attention_mask": mask}


class Network(NamedTuple):
    """A checkpoint as a torch module from the named inputs to logits, and what bounds its token ids."""

    module: Any
    inputs: tuple[str, ...]
    vocabulary: int
    types: int

    def example(self, pairs: int, longest: int, seed: int = 1) -> dict[str, np.ndarray]:
        batch = example(pairs, longest, self.vocabulary, self.types, seed)
        return {name: batch[name] for name in self.inputs}


def transformers_module(model: Path, **options: Any) -> tuple[Any, tuple[str, ...]]:
    """transformers' class of the checkpoint, and those of our inputs that it takes: ModernBERT has no token types."""
    from transformers import AutoModelForSequenceClassification

    module = AutoModelForSequenceClassification.from_pretrained(model, dtype="float32", **options).eval()
    known = inspect.signature(module.forward).parameters
    return module, tuple(name for name in ("input_ids", "token_type_ids", "attention_mask") if name in known)


def network(model: Path, *, cls: bool) -> Network:
    """The module to export: without fused attention, which exporters support less well."""
    from torch import nn

    from turborank import benchmark, checkpoint

    given = checkpoint.read(model)
    vocabulary, types, _ = benchmark.sizes(model)
    if given.config.architecture == "jinabert":
        every = ("input_ids", "token_type_ids", "attention_mask")
        return Network(jinabert(given, cls=cls, fused=False), every, vocabulary, types)
    inner, inputs = transformers_module(model, attn_implementation="eager")

    class Logits(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, *values: Any) -> Any:
            return self.inner(**dict(zip(inputs, values, strict=True))).logits[:, 0]

    return Network(Logits().eval(), inputs, vocabulary, types)


# --- torch, as sentence-transformers runs it -----------------------------------------------------------------------


def load_torch(model: Path, threads: int, options: dict[str, Any]) -> Callable[..., np.ndarray]:
    """CrossEncoder.predict after tokenisation: float32, sorted by length, padded to the longest of the batch."""
    import torch

    from turborank import checkpoint

    torch.set_num_threads(threads)
    module = jinabert(checkpoint.read(model), cls=options.get("cls", False), fused=True)

    def run(batch: dict[str, np.ndarray]) -> np.ndarray:
        with torch.inference_mode():
            return module(**{name: torch.from_numpy(value) for name, value in batch.items()}).numpy()

    return by_batches(run)


def load_transformers(model: Path, threads: int, options: dict[str, Any]) -> Callable[..., np.ndarray]:
    """Like ``load_torch``, with transformers' class of the checkpoint's architecture."""
    import torch

    torch.set_num_threads(threads)
    module, inputs = transformers_module(model)

    def run(batch: dict[str, np.ndarray]) -> np.ndarray:
        given = {name: torch.from_numpy(batch[name]) for name in inputs}
        with torch.inference_mode():
            return module(**given).logits.numpy()

    return by_batches(run)


# --- ONNX Runtime --------------------------------------------------------------------------------------------------


def onnx_path(model: Path, options: dict[str, Any]) -> Path:
    parts = ["model", "cls" if options.get("cls") else "full", "int8" if options.get("int8") else "fp32"]
    return model / ("-".join(parts) + ".onnx")


def export_onnx(model: Path, options: dict[str, Any]) -> None:
    """Export the module to ONNX with dynamic batch and length; int8 by ONNX Runtime's dynamic quantisation."""
    path = onnx_path(model, options | {"int8": False})
    if not path.exists():
        import torch

        given = network(model, cls=options.get("cls", False))
        batch = {name: torch.from_numpy(value) for name, value in given.example(3, 24).items()}
        torch.onnx.export(
            given.module, tuple(batch.values()), str(path), input_names=list(batch), output_names=["logits"],
            dynamic_axes={name: {0: "pairs", 1: "length"} for name in batch} | {"logits": {0: "pairs"}},
            opset_version=OPSET, dynamo=False,
        )  # fmt: skip
        try:
            check(given, path)
        except Exception:
            path.unlink()
            raise
    if options.get("int8") and not onnx_path(model, options).exists():
        from onnxruntime.quantization import QuantType, quantize_dynamic

        quantize_dynamic(str(path), str(onnx_path(model, options)), weight_type=QuantType.QInt8)


def check(given: Network, path: Path) -> None:
    """Raise unless the graph has the module's logits on a batch of another shape than that of the export."""
    import torch

    batch = given.example(5, 150)  # distances beyond ModernBERT's window and DeBERTa's exact buckets
    with torch.inference_mode():
        want = given.module(*(torch.from_numpy(value) for value in batch.values())).numpy()
    got = session(path, 1)(batch)
    if (worst := float(np.abs(want - got).max())) > TOLERANCE:
        raise ValueError(
            f"expected the graph's logits to differ from the module's by at most {TOLERANCE}, got {worst:.1e}"
        )


def session(path: Path, threads: int) -> Callable[[dict[str, np.ndarray]], np.ndarray]:
    """A function of one padded batch that runs the graph on the inputs it has."""
    import onnxruntime

    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = threads
    running = onnxruntime.InferenceSession(str(path), settings, providers=["CPUExecutionProvider"])
    names = [each.name for each in running.get_inputs()]
    return lambda batch: np.asarray(running.run(None, {name: batch[name] for name in names})[0])


def load_onnx(model: Path, threads: int, options: dict[str, Any]) -> Callable[..., np.ndarray]:
    return by_batches(session(onnx_path(model, options), threads))


# --- OpenVINO ------------------------------------------------------------------------------------------------------


def openvino_path(model: Path, options: dict[str, Any]) -> Path:
    return model / f"openvino-{'cls' if options.get('cls') else 'full'}-{options.get('scheme', 'fp32')}.xml"


def export_openvino(model: Path, options: dict[str, Any]) -> None:
    """Convert the ONNX graph: ``int8`` quantises weights and activations by NNCF, ``weights`` only weights."""
    target = openvino_path(model, options)
    if target.exists():
        return
    import nncf
    import openvino

    from turborank import benchmark

    export_onnx(model, {"cls": options.get("cls", False)})
    graph = openvino.convert_model(onnx_path(model, {"cls": options.get("cls", False)}))
    if options.get("scheme") == "int8":
        vocabulary, types, _ = benchmark.sizes(model)
        names = [each.any_name for each in graph.inputs]
        examples = [example(1, 48 + 8 * (seed % 24), vocabulary, types, seed) for seed in range(CALIBRATION)]
        batches = [{name: batch[name] for name in names} for batch in examples]
        graph = nncf.quantize(
            graph, nncf.Dataset(batches), model_type=nncf.ModelType.TRANSFORMER, subset_size=CALIBRATION
        )
    elif options.get("scheme") == "weights":
        graph = nncf.compress_weights(graph, mode=nncf.CompressWeightsMode.INT8_SYM)
    openvino.save_model(graph, str(target), compress_to_fp16=False)


def load_openvino(model: Path, threads: int, options: dict[str, Any]) -> Callable[..., np.ndarray]:
    """Run ``streams`` batches at once, which share the threads; bf16 if the processor has it and --cap allows it."""
    import openvino

    core = openvino.Core()
    streams = options.get("streams", 1)
    hint = "f32" if os.environ.get("ONEDNN_MAX_CPU_ISA") == "AVX2" else "bf16"  # OpenVINO would use bf16 otherwise
    settings: dict[str, Any] = {
        "INFERENCE_NUM_THREADS": threads, "NUM_STREAMS": streams, "INFERENCE_PRECISION_HINT": hint,
    }  # fmt: skip
    compiled = core.compile_model(core.read_model(openvino_path(model, options)), "CPU", settings)
    names = [each.any_name for each in compiled.inputs]
    if streams == 1:
        request = compiled.create_infer_request()
        return by_batches(lambda batch: request.infer({name: batch[name] for name in names})[0])

    def score(encodings: Sequence[Any], size: int = 32) -> np.ndarray:
        out = np.empty(len(encodings), np.float32)
        queue = openvino.AsyncInferQueue(compiled, streams)
        queue.set_callback(
            lambda request, places: out.__setitem__(places, request.get_output_tensor(0).data.reshape(-1))
        )
        for places in sorted_batches(encodings, size):
            batch = padded([encodings[i] for i in places])
            queue.start_async({name: batch[name] for name in names}, places)
        queue.wait_all()
        return out

    return score


OV = ("openvino", "nncf", "onnx", "torch")
ORT = ("onnxruntime", "onnx", "torch")
INT8, CLS, NNCF = {"int8": True}, {"cls": True}, {"scheme": "int8"}
PEERS: dict[str, Peer] = {  # those of the turbo shape
    "torch": Peer("torch fp32, as sentence-transformers runs it", ("torch",), load_torch),
    "ort": Peer("ONNX Runtime fp32", ORT, load_onnx, export_onnx),
    "ort-int8": Peer("ONNX Runtime dynamic int8", ORT, load_onnx, export_onnx, INT8),
    "ort-int8-cls": Peer("ONNX Runtime dynamic int8, last layer cut", ORT, load_onnx, export_onnx, INT8 | CLS),
    "ov": Peer("OpenVINO, NNCF int8 + bf16", OV, load_openvino, export_openvino, NNCF, (1, 2)),
    "ov-cls": Peer(
        "OpenVINO, NNCF int8 + bf16, last layer cut", OV, load_openvino, export_openvino, NNCF | CLS, (1, 2)
    ),
    "ov-weights": Peer(  # one stream: with two, this graph's logits were wrong by hundreds (OpenVINO 2026.4.1)
        "OpenVINO, int8 weights, dynamic activations + bf16", OV, load_openvino, export_openvino, {"scheme": "weights"}
    ),
}  # fmt: skip

# Those that run transformers' classes: every family that the catalog has.
FAMILY_PEERS: dict[str, Peer] = {
    "transformers": Peer("transformers, torch fp32", ("torch", "transformers"), load_transformers),
    **{name: PEERS[name] for name in ("ort", "ort-int8", "ov", "ov-weights")},
}


def installed(peer: Peer) -> dict[str, str] | None:
    """Versions of the distributions that the peer needs; None if one is missing."""
    if any(importlib.util.find_spec(name) is None for name in peer.needs):
        return None
    return {name: importlib.metadata.version(name) for name in peer.needs}
