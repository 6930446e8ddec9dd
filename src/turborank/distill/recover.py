"""Recovery: an ALiBi student learns, layer by layer, the hidden states of the BERT it was made from.

The student reads a pair, `[CLS] q [SEP] d [SEP]`; the source reads q and d separately. The target of each of the
student's tokens, after each layer, is the source's state of the same token. Positions, segments and the pair template
are thus learnt in one stage, from text without labels, and a student with the cosine head starts with the bi-encoder's
ranking. The loss is the mean over layers of MSE / variance (FitNets, arXiv 1412.6550, on every layer), plus
2·(1 - cosine of the pooled segments).

The source reads documents that exceed its length in windows; the student reads them whole.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from turborank.distill.biencoder import BiEncoder
from turborank.distill.trainer import Loss, StudentModel, tensors
from turborank.errors import InputError
from turborank.ops import torch_training
from turborank.types import Int32, ModelConfig, PackedBatch

IdPair = tuple[Sequence[int], Sequence[int]]  # token ids of query and document, without the template


@dataclass(frozen=True)
class ReadingOptions:
    """What a step reads. Raises InputError for long steps without lengths."""

    budget: int = 4096  # tokens per step
    query_tokens: int = 96
    document_tokens: int = 400
    long_every: int = 12  # every n-th step reads one part of a long document; 0: none
    long_tokens: tuple[int, ...] = (1024, 2048, 4096)

    def __post_init__(self) -> None:
        if self.long_every and min(self.long_tokens, default=0) < 1:
            raise InputError(f"expected tokens of long documents, each 1 or more, got {list(self.long_tokens)}")


class Texts:
    """Token ids of queries, passages and long documents, and batches sampled from them by step number."""

    def __init__(
        self,
        source: BiEncoder,
        queries: Sequence[str],
        passages: Sequence[str],
        long: Sequence[str],
        reading: ReadingOptions,
        seed: int,
    ) -> None:
        self.reading, self.seed = reading, seed
        self.queries = source.token_ids(queries, reading.query_tokens)
        self.passages = source.token_ids(passages, reading.document_tokens)
        self.long = source.token_ids(long, 10**6)

    def batch(self, step: int, rank: int = 0) -> list[IdPair]:
        """(query, document) token ids of about ``budget`` tokens."""
        rng = np.random.default_rng((self.seed, step, rank))
        every = self.reading.long_every
        if self.long and every and step % every == every - 1:
            size = int(rng.choice(self.reading.long_tokens))
            text = self.long[rng.integers(len(self.long))]
            first = int(rng.integers(max(1, len(text) - size)))
            return [(self._query(rng), text[first : first + size])]
        drawn: list[IdPair] = []
        used = 0
        while used < self.reading.budget:
            query, document = self._pair(rng)
            drawn.append((query, document))
            used += len(query) + len(document) + 3
        return drawn

    def _query(self, rng: np.random.Generator) -> Sequence[int]:
        return self.queries[rng.integers(len(self.queries))]

    def _pair(self, rng: np.random.Generator) -> IdPair:
        """A passage, and a random query or a part of a passage (half the time of the same one)."""
        document = self.passages[rng.integers(len(self.passages))]
        if self.queries and rng.random() < 0.6:
            return self._query(rng), document
        source = document if rng.random() < 0.5 else self.passages[rng.integers(len(self.passages))]
        first = int(rng.integers(max(1, len(source) - 10)))
        return source[first : first + int(rng.integers(5, self.reading.query_tokens))], document


def joint_batch(source: BiEncoder, pairs: Sequence[IdPair]) -> tuple[PackedBatch, list[Sequence[int]], Tensor]:
    """The student's batch (T tokens); the texts the source reads; (T,) rows of the tokens in its states."""
    room = source.max_tokens - 2
    ids: list[int] = []
    types: list[int] = []
    bounds = [0]
    texts: list[Sequence[int]] = []
    rows: list[int] = []
    at = 0
    for query, document in pairs:
        ids += [*source.prefix, *query, *source.suffix, *document, *source.suffix]
        types += [0] * (len(query) + 2) + [1] * (len(document) + 1)
        bounds.append(len(ids))
        rows += range(at, at + len(query) + 2)
        at += len(query) + 2
        windows = [document[i : i + room] for i in range(0, max(1, len(document)), room)]
        for window in windows:
            rows += range(at + 1, at + 1 + len(window))
            at += len(window) + 2
        rows.append(at - 1)  # the last window's [SEP]
        texts += [query, *windows]
    longest = max(b - a for a, b in itertools.pairwise(bounds))
    packed = PackedBatch(_int32(ids), _int32(types), _int32(bounds), longest)
    return packed, texts, torch.tensor(rows)


def _int32(values: Sequence[int]) -> Int32:
    return np.asarray(values, dtype=np.int32)


def check(student: ModelConfig, source: ModelConfig) -> None:
    """Raises InputError for a student whose positions, width or vocabulary do not match the source."""
    have, wanted = ((config.hidden_size, config.vocab_size) for config in (student, source))
    if not student.slopes or have != wanted:
        kind = "ALiBi" if student.slopes else f"{student.architecture} without ALiBi"
        raise InputError(
            "expected a student of ALiBi, {} wide, with {:,} pieces, as its source; "
            "got one of {}, {} wide, with {:,}".format(*wanted, kind, *have),
            hint="make one with turborank distill student alibi",
        )


class RecoveryLoss:
    """The loss of recovery. ``layers[l]`` is the source's layer that the student's layer l learns from."""

    def __init__(
        self, source: BiEncoder, texts: Texts, *, layers: Sequence[int], dtype: torch.dtype, rank: int = 0
    ) -> None:
        self.source, self.texts, self.rank = source, texts, rank
        self.layers = list(layers)  # (L,) the source's layer of each of the student's
        self.weights = {name: w.to(dtype) for name, w in source.weights.items()}

    def __call__(self, model: StudentModel, step: int) -> Loss:
        return self.loss(model, self.texts.batch(step, self.rank))

    def loss(self, model: StudentModel, pairs: Sequence[IdPair]) -> Loss:
        """Mean MSE / variance over layers, plus 2·(1 - cosine of the pooled segments), of given pairs."""
        packed, texts, rows = joint_batch(self.source, pairs)
        wanted = self.source.layers(self.source.pack(texts), self.weights)
        batch = tensors(packed)
        trace: list[Tensor] = []
        logits = model(batch, trace)
        layers = []
        for have, number in zip(trace[1:], self.layers, strict=True):
            target = wanted[number + 1][rows].float()
            layers.append(F.mse_loss(have.float(), target) / target.var())
        types: Any = batch.type_ids
        bounds: Any = batch.cu_seqlens
        have_q, have_d = torch_training.segment_means(trace[-1], types, bounds)
        want_q, want_d = torch_training.segment_means(wanted[-1][rows], types, bounds)
        pooled = 1 - torch.cat([F.cosine_similarity(have_q, want_q), F.cosine_similarity(have_d, want_d)]).mean()
        hidden = torch.stack(layers).mean()
        parts = {"hidden": hidden.item(), "last_layer": layers[-1].item(), "pooled": pooled.item()}
        # Distributed training waits for a gradient of every parameter; the head's is zero.
        return Loss(hidden + 2 * pooled + 0 * logits.sum(), parts, packed.tokens)
