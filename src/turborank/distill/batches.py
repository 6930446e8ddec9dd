"""Training batches: lists of documents, sampled by step number, so that a step always gets the same lists.

A list is one query with K documents of its pool: one labelled document if there is one, some of those with the highest
teacher scores, the rest at random. Documents are cut to a length sampled per step. Some steps are *long*: each document
is placed among passages of other queries, so that the student learns to find the relevant part of a long document.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from turborank.distill.folder import UNKNOWN, TrainingFolder
from turborank.distill.losses import Targets
from turborank.errors import InputError
from turborank.tokens import PairEncoder, pack
from turborank.types import Encoding, Float32, Int32, PackedBatch


@dataclass(frozen=True)
class BatchOptions:
    """Size and composition of a step's lists."""

    budget: int = 6144  # tokens per step
    documents: int = 8  # K, per list
    hard: int = 4  # of these, sampled from the documents with the highest teacher scores
    hard_depth: int = 12  # number of documents these are sampled from
    query_tokens: int = 128
    document_tokens: tuple[int, ...] = (96, 160, 256)  # lengths; one is sampled per step
    long_every: int = 16  # every n-th step is long; 0: none
    long_tokens: tuple[int, ...] = (512, 1024, 2048)
    shares: Mapping[str, float] = field(default_factory=dict)  # sampling weight of queries by source; 1 where not named
    margin: float = 0.0  # unlabelled documents with teacher scores this far above the labelled one are no negatives


@dataclass(frozen=True)
class ListBatch:
    """The batch of a step: Q lists of K documents as packed pairs, and their targets."""

    batch: PackedBatch
    targets: Targets
    queries: list[int]  # (Q,) indices in the folder


class BatchSampler:
    """Samples lists from a training folder, for one process (``rank``) of a run.

    Raises InputError for shares of unknown sources, and where no query can be trained on.
    """

    def __init__(
        self,
        folder: TrainingFolder,
        encoder: PairEncoder,
        teacher: Float32 | None,
        options: BatchOptions,
        *,
        seed: int = 0,
        rank: int = 0,
    ) -> None:
        self.folder, self.options, self.seed, self.rank = folder, options, seed, rank
        self.teacher = teacher  # (N,) fused scores of all pool entries, or None
        self.template = encoder.template
        self.room = encoder.max_length - encoder.template.size  # tokens of query and document together
        self.queries = _ids(encoder, folder.queries, min(options.query_tokens, self.room // 2))
        self.documents = _ids(encoder, folder.texts, max(options.document_tokens))
        unknown = sorted(set(options.shares) - set(folder.sources))
        if unknown:
            raise InputError(f"expected shares of the sources in {folder.path}, got one of {unknown[0]!r}")
        weight = np.array([options.shares.get(source, 1.0) for source in folder.sources], dtype=np.float64)
        weight *= ~folder.held_out & (np.diff(folder.bounds) > 1)
        if teacher is None:  # only labels supervise
            weight *= [bool((folder.labels[folder.pool(q)] > 0).any()) for q in range(len(folder))]
        if not weight.sum():
            raise InputError(
                f"expected queries to train on, got none in {folder.path}",
                hint="without a teacher each needs a label; held-out queries and pools of one document do not count",
            )
        self.weight = weight / weight.sum()

    def draw(self, step: int) -> ListBatch:
        """The lists of a step: the first ones that reach ``budget`` tokens."""
        options = self.options
        rng = np.random.default_rng((self.seed, step, self.rank))
        long = (
            int(rng.choice(options.long_tokens))
            if options.long_every and step % options.long_every == options.long_every - 1
            else 0
        )
        cut = int(rng.choice(options.document_tokens))
        k = int(np.clip(options.budget // long, 2, options.documents)) if long else options.documents
        chosen: list[int] = []
        entries: list[Int32] = []
        encodings: list[Encoding] = []
        while not chosen or sum(map(len, encodings)) < options.budget:
            query = int(rng.choice(len(self.weight), p=self.weight))
            drawn = self._list(query, k, rng)
            chosen.append(query)
            entries.append(drawn)
            encodings += [self._pair(query, int(self.folder.doc_index[at]), cut, long, rng) for at in drawn]
        return ListBatch(pack(encodings), self._targets(entries, k), chosen)

    def _list(self, query: int, k: int, rng: np.random.Generator) -> Int32:
        """Up to ``k`` pool entries: a labelled one first, then hard and random ones."""
        pool = self.folder.pool(query)
        members = np.arange(pool.start, pool.stop, dtype=np.int32)
        good = members[self.folder.labels[pool] > 0]
        first = rng.permutation(good)[:1]
        rest = np.setdiff1d(members, good)
        if self.teacher is not None and len(rest):
            best = rest[np.argsort(-self.teacher[rest], kind="stable")[: self.options.hard_depth]]
        else:
            best = rest[: self.options.hard_depth]  # the best of the first stage
        hard = rng.permutation(best)[: min(self.options.hard, k - len(first))]
        others = rng.permutation(np.setdiff1d(rest, hard))[: k - len(first) - len(hard)]
        out: Int32 = np.concatenate([first, hard, others]).astype(np.int32)
        return out

    def _pair(self, query: int, document: int, cut: int, long: int, rng: np.random.Generator) -> Encoding:
        room = self.room - len(self.queries[query])
        ids = self.documents[document][: min(cut, room)]
        if long:
            ids = self._embedded(ids, min(long, room), rng)
        t = self.template
        parts = (t.prefix, self.queries[query], t.middle, ids, t.suffix)
        types = np.repeat(np.asarray(t.types, dtype=np.int32), [len(part) for part in parts])
        flat = np.concatenate(parts, dtype=np.int32, casting="unsafe")
        return Encoding(input_ids=flat, type_ids=types, read=len(flat))

    def _embedded(self, ids: Int32, long: int, rng: np.random.Generator) -> Int32:
        """The document at a random position among other passages, ``long`` tokens in total."""
        around: list[Int32] = []
        while sum(map(len, around)) + len(ids) < long:
            around.append(self.documents[int(rng.integers(len(self.documents)))])
        around.insert(int(rng.integers(len(around) + 1)), ids)
        start = sum(map(len, around)) - long  # the excess is cut from another passage, never from the document
        flat = np.concatenate(around)
        out: Int32 = flat[:long] if start <= 0 or around[-1] is not ids else flat[start:]
        return out

    def _targets(self, lists: Sequence[Int32], k: int) -> Targets:
        shape = (len(lists), k)
        teacher = np.full(shape, np.nan, dtype=np.float32)
        labels = np.full(shape, UNKNOWN, dtype=np.float32)
        real = np.zeros(shape, dtype=np.bool_)
        for row, entries in enumerate(lists):
            real[row, : len(entries)] = True
            labels[row, : len(entries)] = self.folder.labels[entries]
            if self.teacher is not None:
                teacher[row, : len(entries)] = self.teacher[entries]
        good = np.where(labels > 0, teacher, np.inf).min(axis=1, keepdims=True)
        trusted = ~((labels == UNKNOWN) & (teacher > good + self.options.margin))
        return Targets(
            None if self.teacher is None else torch.from_numpy(teacher),
            torch.from_numpy(labels),
            torch.from_numpy(real),
            torch.from_numpy(trusted),
        )


def _ids(encoder: PairEncoder, texts: Sequence[str], limit: int) -> list[Int32]:
    """Token ids of each text without special tokens, cut at ``limit``."""
    from turborank.text import plain

    out: list[Int32] = []
    for start in range(0, len(texts), 10_000):
        encoded = encoder.tokenizer.encode_batch_fast(
            [plain(t) for t in texts[start : start + 10_000]], add_special_tokens=False
        )
        out += [np.asarray(e.ids[:limit], dtype=np.int32) for e in encoded]
    return out
