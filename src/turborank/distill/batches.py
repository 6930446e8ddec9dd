"""Lists of documents for a training step, drawn by the step's number: the same step draws the same lists, always.

A list is one query with K documents of its pool: a labelled one where there is any, some of those the teacher puts
highest, the rest at random. Documents are cut to a length drawn for the step. Every so many steps is a *long* one: each
document is hidden among passages of other queries, so that the student learns to find it there.
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
class Drawing:
    """What a step's lists look like."""

    budget: int = 6144  # tokens of a step
    documents: int = 8  # K
    hard: int = 4  # of them from the teacher's best
    hard_depth: int = 12  # how many are its best
    query_tokens: int = 128
    document_tokens: tuple[int, ...] = (96, 160, 256)  # one is drawn for each step
    long_every: int = 16  # 0: never
    long_tokens: tuple[int, ...] = (512, 1024, 2048)
    shares: Mapping[str, float] = field(default_factory=dict)  # draws per list, by source; 1 where not named
    margin: float = 0.0  # an unlabelled document this far above the labelled one, for the teacher, is not a negative


@dataclass(frozen=True)
class Lists:
    """A step's batch: Q lists of K documents, pair by pair, and what is known of them."""

    batch: PackedBatch
    targets: Targets
    queries: list[int]  # places in the folder


class Drawer:
    """Draws lists from a training folder, for one process of possibly several."""

    def __init__(
        self,
        folder: TrainingFolder,
        encoder: PairEncoder,
        teacher: Float32 | None,
        drawing: Drawing,
        *,
        seed: int = 0,
        rank: int = 0,
    ) -> None:
        self.folder, self.drawing, self.seed, self.rank = folder, drawing, seed, rank
        self.teacher = teacher  # (N,) of every pool place
        self.template = encoder.template
        self.room = encoder.max_length - encoder.template.size  # for both texts: the student's positions end there
        self.queries = _ids(encoder, folder.queries, min(drawing.query_tokens, self.room // 2))
        self.documents = _ids(encoder, folder.texts, max(drawing.document_tokens))
        unknown = sorted(set(drawing.shares) - set(folder.sources))
        if unknown:
            raise InputError(f"expected shares of the sources in {folder.path}, got one of {unknown[0]!r}")
        weight = np.array([drawing.shares.get(source, 1.0) for source in folder.sources], dtype=np.float64)
        weight *= ~folder.held_out & (np.diff(folder.bounds) > 1)
        if teacher is None:  # only labels speak
            weight *= [bool((folder.labels[folder.pool(q)] > 0).any()) for q in range(len(folder))]
        if not weight.sum():
            raise InputError(
                f"expected queries to train on, got none in {folder.path}",
                hint="without a teacher each needs a label; held-out queries and pools of one document do not count",
            )
        self.weight = weight / weight.sum()

    def draw(self, step: int) -> Lists:
        """The lists of a step: about ``budget`` tokens."""
        d = self.drawing
        rng = np.random.default_rng((self.seed, step, self.rank))
        long = int(rng.choice(d.long_tokens)) if d.long_every and step % d.long_every == d.long_every - 1 else 0
        cut = int(rng.choice(d.document_tokens))
        k = d.documents if not long else int(np.clip(d.budget // long, 2, d.documents))
        chosen: list[int] = []
        places: list[Int32] = []
        encodings: list[Encoding] = []
        while not chosen or sum(map(len, encodings)) < d.budget:
            query = int(rng.choice(len(self.weight), p=self.weight))
            drawn = self._list(query, k, rng)
            chosen.append(query)
            places.append(drawn)
            encodings += [self._pair(query, int(self.folder.places[at]), cut, long, rng) for at in drawn]
        return Lists(pack(encodings), self._targets(places, k), chosen)

    def _list(self, query: int, k: int, rng: np.random.Generator) -> Int32:
        """Pool places (≤ K,): a labelled one first, then hard and random ones."""
        pool = self.folder.pool(query)
        members = np.arange(pool.start, pool.stop, dtype=np.int32)
        good = members[self.folder.labels[pool] > 0]
        first = rng.permutation(good)[:1]
        rest = np.setdiff1d(members, good)
        if self.teacher is not None and len(rest):
            best = rest[np.argsort(-self.teacher[rest], kind="stable")[: self.drawing.hard_depth]]
        else:
            best = rest[: self.drawing.hard_depth]  # the first stage's
        hard = rng.permutation(best)[: min(self.drawing.hard, k - len(first))]
        others = rng.permutation(np.setdiff1d(rest, hard))[: k - len(first) - len(hard)]
        out: Int32 = np.concatenate([first, hard, others]).astype(np.int32)
        return out

    def _pair(self, query: int, document: int, cut: int, long: int, rng: np.random.Generator) -> Encoding:
        room = self.room - len(self.queries[query])
        ids = self.documents[document][: min(cut, room)]
        if long:
            ids = self._hidden(ids, min(long, room), rng)
        t = self.template
        parts = (t.prefix, self.queries[query], t.middle, ids, t.suffix)
        types = np.repeat(np.asarray(t.types, dtype=np.int32), [len(part) for part in parts])
        flat = np.concatenate(parts, dtype=np.int32, casting="unsafe")
        return Encoding(input_ids=flat, type_ids=types, read=len(flat))

    def _hidden(self, ids: Int32, long: int, rng: np.random.Generator) -> Int32:
        """The document somewhere among strangers, ``long`` tokens in all."""
        around: list[Int32] = []
        while sum(map(len, around)) + len(ids) < long:
            around.append(self.documents[int(rng.integers(len(self.documents)))])
        around.insert(int(rng.integers(len(around) + 1)), ids)
        start = sum(map(len, around)) - long  # what is too much comes off a stranger's end
        flat = np.concatenate(around)
        out: Int32 = flat[:long] if start <= 0 or around[-1] is not ids else flat[start:]
        return out

    def _targets(self, lists: Sequence[Int32], k: int) -> Targets:
        shape = (len(lists), k)
        teacher = np.full(shape, np.nan, dtype=np.float32)
        labels = np.full(shape, UNKNOWN, dtype=np.float32)
        real = np.zeros(shape, dtype=np.bool_)
        for row, places in enumerate(lists):
            real[row, : len(places)] = True
            labels[row, : len(places)] = self.folder.labels[places]
            if self.teacher is not None:
                teacher[row, : len(places)] = self.teacher[places]
        good = np.where(labels > 0, teacher, np.inf).min(axis=1, keepdims=True)
        trusted = ~((labels == UNKNOWN) & (teacher > good + self.drawing.margin))
        return Targets(
            None if self.teacher is None else torch.from_numpy(teacher),
            torch.from_numpy(labels),
            torch.from_numpy(real),
            torch.from_numpy(trusted),
        )


def _ids(encoder: PairEncoder, texts: Sequence[str], limit: int) -> list[Int32]:
    """Token ids of each text without the template."""
    from turborank.text import plain

    out: list[Int32] = []
    for start in range(0, len(texts), 10_000):
        encoded = encoder.tokenizer.encode_batch_fast(
            [plain(t) for t in texts[start : start + 10_000]], add_special_tokens=False
        )
        out += [np.asarray(e.ids[:limit], dtype=np.int32) for e in encoded]
    return out
