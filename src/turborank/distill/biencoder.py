"""A BERT bi-encoder (sentence-transformers) over packed batches: a teacher of cosines and of hidden states.

Loads the published folder (``config.json``, ``model.safetensors``, ``tokenizer.json``, ``1_Pooling/config.json``) of a
BERT with learned positions, mean pooling and normalised vectors (Sentence-BERT, arXiv 1908.10084).
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import Tensor

from turborank.architectures import bert, encoder
from turborank.checkpoint import verify
from turborank.data.files import file_hash, replacing
from turborank.errors import CheckpointError, InputError
from turborank.ops import torch_training
from turborank.scheduler import plan
from turborank.text import plain
from turborank.types import Float32, ModelConfig, PackedBatch, Progress

TOKEN_BUDGET = 8_192  # tokens per batch
MAX_TOKENS = 256  # per text, where the folder has no limit


class BiEncoder:
    """BERT with mean pooling.

    ``weights`` are float32 under canonical names; ``max_tokens`` limits a text, special tokens included.
    """

    def __init__(
        self,
        weights: Mapping[str, Tensor],
        config: ModelConfig,
        tokenizer: Tokenizer,
        max_tokens: int,
        *,
        name: str,
        revision: str,
    ) -> None:
        self.weights = dict(weights)
        self.config = config
        self.max_tokens = max_tokens
        self.name = name
        self.revision = revision  # SHA-256 of the weights
        tokenizer.no_padding()
        tokenizer.no_truncation()
        self.tokenizer = tokenizer
        ids = tokenizer.encode("").ids  # special tokens only
        self.prefix, self.suffix = ids[:1], ids[1:]

    @classmethod
    def load(cls, folder: str | Path) -> BiEncoder:
        """Load a folder. Raises CheckpointError where it is not a BERT bi-encoder with mean pooling."""
        path = model_folder(folder)
        pooling = path / "1_Pooling" / "config.json"
        if pooling.is_file() and not verify.json_object(pooling).get("pooling_mode_mean_tokens"):
            raise CheckpointError(f"expected mean pooling, got another kind at {pooling}")
        raw = verify.json_object(path / verify.CONFIG)
        stored = load_file(path / verify.WEIGHTS)
        weights = {verify.canonical(name): w.float() for name, w in stored.items() if w.is_floating_point()}
        config = bert.recognise(raw, {name: tuple(w.shape) for name, w in weights.items()})
        if config is None:
            raise CheckpointError(f"expected a BERT with learned positions, got {raw.get('model_type')!r} in {path}")
        faults = [
            f"{name}: expected {list(shape)}, got {list(weights[name].shape) if name in weights else 'none'}"
            for name, shape in encoder.body_shapes(config)
            if name not in weights or tuple(weights[name].shape) != shape
        ]
        if faults:
            raise CheckpointError(
                "\n  ".join([f"expected a BERT encoder, got {len(faults)} faults in {path}:", *faults])
            )
        limit = config.max_length
        sizes = path / "sentence_bert_config.json"
        if sizes.is_file():
            limit = min(limit, int(verify.json_object(sizes).get("max_seq_length") or MAX_TOKENS))
        revision = file_hash(path / verify.WEIGHTS)
        tokenizer = Tokenizer.from_file(str(path / verify.TOKENIZER))
        return cls(weights, config, tokenizer, limit, name=path.resolve().name, revision=revision)

    def token_ids(self, texts: Sequence[str], limit: int | None = None) -> list[list[int]]:
        """Token ids of each text without special tokens, cut at ``limit`` (default: what the model reads)."""
        room = self.max_tokens - len(self.prefix) - len(self.suffix) if limit is None else limit
        encoded = self.tokenizer.encode_batch_fast([plain(text) for text in texts], add_special_tokens=False)
        return [e.ids[:room] for e in encoded]

    def pack(self, ids: Sequence[Sequence[int]]) -> PackedBatch:
        """A batch of torch tensors of texts read separately: `[CLS] text [SEP]`, all of type 0."""
        flat: list[int] = []
        bounds = [0]
        for text in ids:
            flat += [*self.prefix, *text, *self.suffix]
            bounds.append(len(flat))
        longest = max((b - a for a, b in itertools.pairwise(bounds)), default=0)
        tensors: list[Any] = [torch.tensor(flat), torch.zeros(len(flat), dtype=torch.long), torch.tensor(bounds)]
        return PackedBatch(tensors[0], tensors[1], tensors[2], longest)

    def layers(self, batch: PackedBatch, weights: Mapping[str, Tensor] | None = None) -> list[Tensor]:
        """Embeddings and every layer's output of a batch from :meth:`pack`: L+1 tensors (T, C), without gradients."""
        chosen = weights or self.weights
        trace: list[Tensor] = []
        with torch.no_grad():
            x = encoder.embed(chosen, self.config, batch, torch_training)
            encoder.encode(chosen, self.config, x, batch.cu_seqlens, torch_training, first_only=False, trace=trace)
        return trace

    def embed(
        self, texts: Sequence[str], *, progress: Progress | None = None, dtype: torch.dtype | None = None
    ) -> Float32:
        """Unit vectors (N, C) of N texts, cut at ``max_tokens``; computed in ``dtype`` (default: bf16)."""
        weights = {name: w.to(dtype or torch.bfloat16) for name, w in self.weights.items()}
        ids = self.token_ids(texts)
        vectors = np.empty((len(ids), self.config.hidden_size), dtype=np.float32)
        done = 0
        for group in plan([len(text) + 2 for text in ids], TOKEN_BUDGET):
            batch = self.pack([ids[i] for i in group])
            offsets: Any = batch.cu_seqlens
            means = torch.segment_reduce(self.layers(batch, weights)[-1].float(), "mean", offsets=offsets, axis=0)
            vectors[group] = torch.nn.functional.normalize(means).numpy()
            done += len(group)
            if progress is not None:
                progress(done, len(ids))
        return vectors


def model_folder(folder: str | Path) -> Path:
    """The path of a model folder. Raises InputError where there is none, CheckpointError where a file is missing."""
    path = Path(folder).expanduser()
    if not path.is_dir():
        raise InputError(f"expected the folder of a bi-encoder, got none at {path}")
    verify.files(path)
    return path


# Cached vectors: files of BLOCK texts each, named by the hash of model and texts.

BLOCK = 1024  # texts per cache file; an interruption loses at most these


def embed(model: BiEncoder, texts: Sequence[str], cache: Path, *, progress: Progress | None = None) -> Float32:
    """Unit vectors (N, C) of texts; blocks of texts found in ``cache`` are not computed again."""
    found: list[Float32] = []
    for start in range(0, len(texts), BLOCK):
        block = texts[start : start + BLOCK]
        path = cache / f"{_key(model, block)}.npy"
        if path.is_file():
            found.append(np.load(path))
        else:
            vectors = model.embed(block)
            with replacing(path) as file:
                np.save(file, vectors)
            found.append(vectors)
        if progress is not None:
            progress(start + len(block), len(texts))
    return np.concatenate(found)


def _key(model: BiEncoder, texts: Sequence[str]) -> str:
    digest = hashlib.sha256(f"{model.revision}\0{model.max_tokens}".encode())
    for text in texts:
        raw = text.encode("utf-8", "surrogatepass")
        digest.update(len(raw).to_bytes(8, "little") + raw)
    return digest.hexdigest()[:40]
