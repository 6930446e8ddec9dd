"""Pools: of each query the labelled documents, some of BM25's best, some of a bi-encoder's best, some at random."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from turborank.data.bm25 import BM25, best
from turborank.data.corpus import MemoryCorpus, Step
from turborank.distill.folder import Places
from turborank.errors import InputError
from turborank.types import Float32

SCORES_AT_ONCE = 1 << 23  # cosines held at a time
REPORT_EVERY = 200  # queries


@dataclass(frozen=True)
class PoolPlan:
    """How many documents a pool gets of each kind, and from among how many of the best they are drawn."""

    bm25: int = 20
    bm25_depth: int = 50
    dense: int = 12
    dense_depth: int = 30
    random: int = 6

    def __post_init__(self) -> None:
        for kind in ("bm25", "dense", "random"):
            size = getattr(self, kind)
            if size < 0:
                raise InputError(f"expected {kind} documents of a pool to be 0 or more, got {size}")
            if getattr(self, f"{kind}_depth", size) < size:
                raise InputError(f"expected {kind} depth to be at least {size}, got {getattr(self, kind + '_depth')}")

    @property
    def mines(self) -> bool:
        """Whether pools hold more than what came with their queries."""
        return bool(self.bm25 or self.dense or self.random)


class Pools(NamedTuple):
    """``places[bounds[q]:bounds[q + 1]]`` are the documents of query q, with BM25's scores."""

    bounds: npt.NDArray[np.int64]
    places: Places
    scores: Float32


def text_hash(text: str, seed: int = 0) -> int:
    """64 bits that depend on the text and the seed alone: choices by it do not move when data are added."""
    digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8, salt=seed.to_bytes(16, "little"))
    return int.from_bytes(digest.digest(), "little")


def index(texts: Sequence[str], *, progress: Step | None = None) -> BM25:
    """BM25 over texts, with the first stage's parameters."""
    return BM25(MemoryCorpus({str(place): text for place, text in enumerate(texts)}), progress=progress)


def nearest(queries: Float32, documents: Float32, depth: int) -> Iterator[npt.NDArray[np.intp]]:
    """Of each query (Q, C) the places of the ``depth`` nearest documents (N, C) by dot product, best first."""
    depth = min(depth, len(documents))
    step = max(1, SCORES_AT_ONCE // len(documents))
    for start in range(0, len(queries), step):
        cosines = queries[start : start + step] @ documents.T
        top = np.argpartition(-cosines, depth - 1, axis=1)[:, :depth]
        order = np.argsort(-np.take_along_axis(cosines, top, axis=1), axis=1, kind="stable")
        yield from np.take_along_axis(top, order, axis=1)


def draw(
    rng: np.random.Generator,
    known: Sequence[int],
    lexical: npt.NDArray[np.intp],
    dense: npt.NDArray[np.intp],
    documents: int,
    plan: PoolPlan,
) -> list[int]:
    """The places of one pool, each once: all that is known, then samples of BM25's best, the bi-encoder's, of all."""
    pool = dict.fromkeys(int(place) for place in known)
    for ranking, size in ((lexical, plan.bm25), (dense, plan.dense)):
        fresh = [int(place) for place in ranking if int(place) not in pool]
        pool.update(dict.fromkeys(int(place) for place in rng.permutation(fresh)[:size]))
    wanted = min(len(pool) + plan.random, documents)
    while len(pool) < wanted:
        pool[int(rng.integers(documents))] = None
    return list(pool)


def mine(
    queries: Sequence[str],
    known: Sequence[Sequence[int]],
    held_out: Sequence[bool],
    bm25: BM25,
    documents: int,
    plan: PoolPlan,
    *,
    vectors: tuple[Float32, Float32] | None = None,
    seed: int = 0,
    progress: Step | None = None,
) -> Pools:
    """The pools of all queries.

    Args:
        queries: (Q,) texts.
        known: of each query the places of documents that must be in its pool.
        held_out: of each query whether it is one to measure with. Its pool is what a first stage would bring:
            BM25's best ``bm25_depth``, in which the labelled document may be missing (what came with the query,
            where the plan takes none of BM25's).
        bm25: an index of the documents.
        documents: how many there are.
        plan: what a pool is made of.
        vectors: unit vectors of queries (Q, C) and documents (N, C), for dense candidates.
        seed: of the samples; a query's sample depends on it and the query's text.
        progress: told (queries done, queries).

    """
    bounds, places, scores = [0], array("i"), array("f")
    nobody: npt.NDArray[np.intp] = np.zeros(0, dtype=np.intp)
    near = nearest(*vectors, plan.dense_depth) if vectors is not None and plan.dense else None
    for at, query in enumerate(queries):
        dense = next(near) if near is not None else nobody
        all_scores = bm25.scores(query)
        lexical = best(all_scores, plan.bm25_depth)
        if held_out[at]:
            pool = lexical.tolist() if plan.bm25 else list(known[at])
        else:
            rng = np.random.default_rng(text_hash(query, seed))
            pool = draw(rng, known[at], lexical, dense, documents, plan)
        places.extend(pool)
        scores.extend(all_scores[pool].tolist())
        bounds.append(len(places))
        if progress is not None and ((at + 1) % REPORT_EVERY == 0 or at + 1 == len(queries)):
            progress(at + 1, len(queries))
    return Pools(
        np.array(bounds, dtype=np.int64),
        np.frombuffer(places, dtype=np.int32),
        np.frombuffer(scores, dtype=np.float32),
    )
