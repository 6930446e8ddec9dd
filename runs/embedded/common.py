"""What the steps of runs/embedded.sh share: files, token ids, packing, and the two teachers on the native engine."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.numpy import load_file
from tokenizers import Tokenizer
from torch import Tensor

from turborank import checkpoint, engines
from turborank.architectures import bert
from turborank.checkpoint.tensors import dense
from turborank.distill.trainer import tensors
from turborank.ops import torch as torch_ops
from turborank.types import PackedBatch

CLS, SEP = 101, 102  # of the WordPiece vocabulary that both teachers and the student share
HELD_OUT = 600  # the last questions: never trained on
QUERY_PREFIX = "Represent this sentence for searching relevant passages: "  # bge's, for questions only

IdPair = tuple[list[int], list[int]]  # token ids of query and document, without the template


def lines(path: Path) -> list:
    """The values of a file of JSON lines."""
    with path.open(encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def write_lines(path: Path, values: Iterable) -> None:
    """A file of JSON lines, whole or not at all."""
    partial = path.with_name(f".{path.name}.partial")
    with partial.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(value, ensure_ascii=False) + "\n" for value in values)
    partial.rename(path)


def save(path: Path, **arrays: NDArray) -> None:
    """An npz file, whole or not at all, also where several processes write it."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial.npz")
    np.savez(partial, **arrays)
    partial.rename(path)


def load(path: Path) -> dict[str, NDArray]:
    """All arrays of an npz file. (An open NpzFile reads an array anew at each access.)"""
    with np.load(path) as file:
        return {name: file[name] for name in file.files}


def pack(pairs: Sequence[IdPair]) -> PackedBatch:
    """``[CLS] q [SEP] d [SEP]`` of every pair, without padding."""
    ids: list[int] = []
    types: list[int] = []
    bounds = [0]
    for query, document in pairs:
        ids += [CLS, *query, SEP, *document, SEP]
        types += [0] * (len(query) + 2) + [1] * (len(document) + 1)
        bounds.append(len(ids))
    arrays = (np.asarray(values, dtype=np.int32) for values in (ids, types, bounds))
    return PackedBatch(*arrays, max(np.diff(bounds), default=0))


class CrossEncoder:
    """ms-marco-MiniLM-L-12: hidden states after every layer, and logits, by the int8 engine."""

    def __init__(self, folder: Path, threads: int = 1) -> None:
        loaded = checkpoint.load(folder)
        weights = {name: np.asarray(value, np.float32) for name, value in loaded.weights.items()}
        self.engine = engines.prepare(weights, loaded.config, name="native", precision="int8", threads=threads)
        names = ("pooler.dense.weight", "pooler.dense.bias", "classifier.weight", "classifier.bias")
        self.head = [torch.from_numpy(weights[name].copy()) for name in names]

    def __call__(self, batch: PackedBatch) -> tuple[list[Tensor], Tensor]:
        """Embeddings and each layer's states (T, C), the last layer's of first tokens only (P, C); logits (P,)."""
        states = [torch.from_numpy(np.array(state)) for state in self.engine.layers(batch)]
        dense, dense_bias, classifier, bias = self.head
        return states, (torch.tanh(states[-1] @ dense.T + dense_bias) @ classifier.T + bias)[:, 0]


class TorchCrossEncoder:
    """The same in torch, on a GPU, where the native engine is not."""

    def __init__(self, folder: Path, device: str, dtype: torch.dtype = torch.bfloat16) -> None:
        loaded = checkpoint.load(folder)
        self.config, self.device = loaded.config, device
        self.weights = {name: torch.from_numpy(w.copy()).to(device, dtype) for name, w in dense(loaded.weights).items()}

    @torch.no_grad()
    def __call__(self, batch: PackedBatch) -> tuple[list[Tensor], Tensor]:
        """As :meth:`CrossEncoder.__call__`, on the device."""
        trace: list[Tensor] = []
        logits = bert.forward(self.weights, self.config, tensors(batch, self.device), torch_ops, trace)
        return trace, logits.float()


class BiEncoder:
    """bge-small: the first token's last state, normalised. A BERT classifier that nobody asks for its logit."""

    def __init__(self, folder: Path, threads: int = 1) -> None:
        raw = json.loads((folder / "config.json").read_text())
        c = raw["hidden_size"]
        weights = load_file(folder / "model.safetensors") | {
            "pooler.dense.weight": np.eye(c, dtype=np.float32), "pooler.dense.bias": np.zeros(c, np.float32),
            "classifier.weight": np.zeros((1, c), np.float32), "classifier.bias": np.zeros(1, np.float32),
        }  # fmt: skip
        raw |= {"architectures": ["BertForSequenceClassification"], "num_labels": 1}
        config = bert.recognise(raw, {name: value.shape for name, value in weights.items()})
        self.engine = engines.prepare(weights, config, name="native", precision="int8", threads=threads)
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.tokenizer.no_padding()
        self.tokenizer.no_truncation()
        self.width = c

    def embed(
        self, texts: Sequence[str], tokens: int, *, prefix: str = "", told: Callable[[int, int], None] | None = None
    ) -> NDArray[np.float16]:
        """Unit vectors (N, C) of the first ``tokens`` tokens of each text."""
        out = np.empty((len(texts), self.width), np.float16)
        for start in range(0, len(texts), 4096):
            some = [prefix + text for text in texts[start : start + 4096]]
            ids = [e.ids[:tokens] for e in self.tokenizer.encode_batch_fast(some, add_special_tokens=False)]
            order = sorted(range(len(ids)), key=lambda at: len(ids[at]))
            for first in range(0, len(order), 64):
                group = order[first : first + 64]
                flat = [token for at in group for token in (CLS, *ids[at], SEP)]
                sizes = [len(ids[at]) + 2 for at in group]
                bounds = np.cumsum([0, *sizes]).astype(np.int32)
                batch = PackedBatch(np.asarray(flat, np.int32), np.zeros(len(flat), np.int32), bounds, max(sizes))
                states = self.engine.layers(batch)[-1]
                out[[start + at for at in group]] = states / np.linalg.norm(states, axis=1, keepdims=True)
            if told is not None:
                told(min(start + 4096, len(texts)), len(texts))
        return out
