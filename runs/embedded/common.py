"""What the steps of runs/embedded.sh share: files, token ids, packing, teachers (on the native engine or a GPU)."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.numpy import load_file
from tokenizers import Tokenizer
from torch import Tensor

from turborank import checkpoint, engines
from turborank.architectures import ARCHITECTURES, bert
from turborank.checkpoint.tensors import dense
from turborank.distill.trainer import tensors
from turborank.ops import torch as torch_ops
from turborank.types import ModelConfig, PackedBatch

CLS, SEP = 101, 102  # of the WordPiece vocabulary that both teachers and the student share
LONGEST = 512  # tokens that bge reads
QUERY_TOKENS, DOCUMENT_TOKENS = 64, 300  # maximum tokens of a training query and passage
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


class NativeModel:
    """A BERT's hidden states after every layer, and logits, by the int8 engine."""

    def __init__(self, weights: Mapping[str, NDArray], config: ModelConfig, threads: int = 1) -> None:
        numbers = {name: np.asarray(value, np.float32) for name, value in weights.items()}
        self.config = config
        self.engine = engines.prepare(numbers, config, name="native", precision="int8", threads=threads)
        names = ("pooler.dense.weight", "pooler.dense.bias", "classifier.weight", "classifier.bias")
        self.head = [torch.from_numpy(numbers[name].copy()) for name in names]

    def __call__(self, batch: PackedBatch) -> tuple[list[Tensor], Tensor]:
        """Embeddings and each layer's states (T, C), the last layer's of first tokens only (P, C); logits (P,)."""
        states = [torch.from_numpy(np.array(state)) for state in self.engine.layers(batch)]
        dense, dense_bias, classifier, bias = self.head
        return states, (torch.tanh(states[-1] @ dense.T + dense_bias) @ classifier.T + bias)[:, 0]


class TorchModel:
    """The same model in torch, for a GPU machine, which has no native engine."""

    def __init__(
        self, weights: Mapping[str, NDArray], config: ModelConfig, device: str, dtype: torch.dtype = torch.bfloat16
    ) -> None:
        self.config, self.device = config, device
        self.weights = {name: torch.from_numpy(np.array(w)).to(device, dtype) for name, w in weights.items()}

    @torch.no_grad()
    def __call__(self, batch: PackedBatch) -> tuple[list[Tensor], Tensor]:
        """As :meth:`NativeModel.__call__`, on the device."""
        trace: list[Tensor] = []
        architecture = ARCHITECTURES[self.config.architecture]
        logits = architecture.forward(self.weights, self.config, tensors(batch, self.device), torch_ops, trace)
        return trace, logits.float()


Model = NativeModel | TorchModel


def cross_encoder(folder: Path) -> tuple[dict[str, NDArray], ModelConfig]:
    """Dequantised weights and config of a cross-encoder's folder."""
    loaded = checkpoint.load(folder)
    return dense(loaded.weights), loaded.config


def bi_encoder(folder: Path) -> tuple[dict[str, NDArray], ModelConfig]:
    """Weights and config of a BERT encoder's folder, with a placeholder head: only the hidden states are used."""
    raw = json.loads((folder / "config.json").read_text())
    c = raw["hidden_size"]
    weights = load_file(folder / "model.safetensors") | {
        "pooler.dense.weight": np.eye(c, dtype=np.float32), "pooler.dense.bias": np.zeros(c, np.float32),
        "classifier.weight": np.zeros((1, c), np.float32), "classifier.bias": np.zeros(1, np.float32),
    }  # fmt: skip
    raw |= {"architectures": ["BertForSequenceClassification"], "num_labels": 1}
    return weights, bert.recognise(raw, {name: value.shape for name, value in weights.items()})


class BiEncoder:
    """bge-small: a text's vector is the last state of its first token, normalised."""

    def __init__(self, model: Model, tokenizer: Path) -> None:
        self.model = model
        self.tokenizer = Tokenizer.from_file(str(tokenizer))
        self.tokenizer.no_padding()
        self.tokenizer.no_truncation()
        self.prefix: list[int] = self.tokenizer.encode(QUERY_PREFIX, add_special_tokens=False).ids

    def cosines(self, pairs: Sequence[IdPair]) -> NDArray[np.float32]:
        """(P,) cosine of query and document of each pair, of token ids."""
        distinct = list(dict.fromkeys(tuple(query) for query, _ in pairs))
        rows = {query: at for at, query in enumerate(distinct)}
        vectors = self._vectors([*([*self.prefix, *query] for query in distinct), *(document for _, document in pairs)])
        asked = vectors[[rows[tuple(query)] for query, _ in pairs]]
        return (asked * vectors[len(distinct) :]).sum(1)

    def _vectors(self, ids: Sequence[Sequence[int]]) -> NDArray[np.float32]:
        """Unit vectors (N, C) of token ids without the template."""
        flat = [token for some in ids for token in (CLS, *some[: LONGEST - 2], SEP)]
        sizes = [min(len(some) + 2, LONGEST) for some in ids]
        bounds = np.cumsum([0, *sizes]).astype(np.int32)
        batch = PackedBatch(np.asarray(flat, np.int32), np.zeros(len(flat), np.int32), bounds, max(sizes))
        states = self.model(batch)[0][-1].float().cpu().numpy()
        return states / np.linalg.norm(states, axis=1, keepdims=True)

    def embed(
        self, texts: Sequence[str], tokens: int, *, prefix: str = "", told: Callable[[int, int], None] | None = None
    ) -> NDArray[np.float16]:
        """Unit vectors (N, C) of the first ``tokens`` tokens of each text."""
        out = np.empty((len(texts), self.model.config.hidden_size), np.float16)
        for start in range(0, len(texts), 4096):
            some = [prefix + text for text in texts[start : start + 4096]]
            ids = [e.ids[:tokens] for e in self.tokenizer.encode_batch_fast(some, add_special_tokens=False)]
            order = sorted(range(len(ids)), key=lambda at: len(ids[at]))
            for first in range(0, len(order), 64):
                group = order[first : first + 64]
                out[[start + at for at in group]] = self._vectors([ids[at] for at in group])
            if told is not None:
                told(min(start + 4096, len(texts)), len(texts))
        return out


class Texts:
    """Token ids of many texts, in one array."""

    def __init__(self, ids: np.ndarray, bounds: np.ndarray) -> None:
        self.ids, self.bounds = ids, bounds

    @classmethod
    def read(cls, path: Path, teacher: Path, texts: Callable[[], list[str]]) -> Texts:
        """Read the file. If there is none, tokenize ``texts`` with the teacher's tokenizer and write it."""
        if not path.is_file():
            tokenizer = checkpoint.load(teacher).tokenizer
            tokenizer.no_padding()
            tokenizer.no_truncation()
            flat, sizes, values = list[np.ndarray](), [0], texts()
            for start in range(0, len(values), 5000):
                encoded = tokenizer.encode_batch_fast(values[start : start + 5000], add_special_tokens=False)
                flat += [np.asarray(e.ids, np.uint16) for e in encoded]
            sizes += map(len, flat)
            save(path, ids=np.concatenate(flat), bounds=np.cumsum(sizes))
        return cls(**load(path))

    def __len__(self) -> int:
        return len(self.bounds) - 1

    def get(self, at: int, start: int = 0, tokens: int | None = None) -> list[int]:
        """The ids of text ``at``, ``tokens`` of them from ``start``; by default all."""
        whole = self.ids[self.bounds[at] : self.bounds[at + 1]]
        return whole[start : None if tokens is None else start + tokens].tolist()


class Corpus:
    """Token ids of all questions and passages, BM25's candidates, and long texts with their questions."""

    def __init__(self, work: Path, teacher: Path) -> None:
        asked = lines(work / "long-queries.jsonl")
        parts = {
            "queries": lambda: [row["query"] for row in lines(work / "queries.jsonl")],
            "texts": lambda: lines(work / "texts.jsonl"),
            "long-queries": lambda: [row["query"] for row in asked],
            "long-texts": lambda: lines(work / "long-texts.jsonl"),
        }
        read = [Texts.read(work / f"tokens-{name}.npz", teacher, texts) for name, texts in parts.items()]
        self.queries, self.texts, self.long_queries, self.long_texts = read
        self.long_text_of = [row["text"] for row in asked]
        pool = load(work / "pool.npz")
        self.bounds, self.places = pool["bounds"], pool["places"]
        self.trained = len(self.queries) - HELD_OUT  # questions to train on

    def query(self, at: int) -> list[int]:
        return self.queries.get(at, tokens=QUERY_TOKENS)

    def document(self, at: int, tokens: int = DOCUMENT_TOKENS) -> list[int]:
        return self.texts.get(at, tokens=tokens)

    def among_others(self, at: int, tokens: int, rng: np.random.Generator, *, near: bool) -> list[int]:
        """A passage somewhere among those that follow it in the collection (``near``) or any, so many tokens in all."""
        parts = [self.document(at)]
        while sum(map(len, parts)) < tokens:
            other = (at + len(parts)) % len(self.texts) if near else int(rng.integers(len(self.texts)))
            parts.append(self.document(other))
        return [token for part in rng.permutation(len(parts)) for token in parts[part]][:tokens]

    def part_of(self, text: int, tokens: int, rng: np.random.Generator) -> list[int]:
        """``tokens`` consecutive tokens of a long text, from a random place."""
        last = int(np.diff(self.long_texts.bounds)[text]) - tokens
        return self.long_texts.get(text, int(rng.integers(max(1, last))), tokens)

    def probes(self, count: int = 24) -> list[IdPair]:
        """Pairs on which heads are matched to slopes."""
        rng = np.random.default_rng(0)
        drawn = rng.integers(0, self.trained, count)
        return [(self.query(q), self.document(int(self.places[self.bounds[q] + rng.integers(5)]), 250)) for q in drawn]
