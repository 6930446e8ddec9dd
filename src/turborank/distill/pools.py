"""Candidate pools: the labelled documents of a query, samples of BM25's and a bi-encoder's best, random documents."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from turborank.data.bm25 import BM25, best
from turborank.data.corpus import MemoryCorpus
from turborank.errors import InputError
from turborank.types import Float32, Int32, Progress

MAX_SCORES = 1 << 23  # cosines in memory at once: 32 MiB
REPORT_EVERY = 200  # queries between two reports of progress


@dataclass(frozen=True)
class PoolPlan:
    """How many documents of each kind a pool gets; ``…_depth`` is how many of the best they are sampled from.

    Raises InputError for a negative number, and for a depth smaller than its number.
    """

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
        """Whether pools get other documents than those their queries came with."""
        return bool(self.bm25 or self.dense or self.random)


class Pools(NamedTuple):
    """``doc_index[bounds[q]:bounds[q + 1]]`` are the documents of query q; ``scores`` are BM25's."""

    bounds: npt.NDArray[np.int64]
    doc_index: Int32
    scores: Float32


def text_hash(text: str, seed: int = 0) -> int:
    """A 64-bit hash of text and seed; sampling by it stays the same when data are added."""
    digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8, salt=seed.to_bytes(16, "little"))
    return int.from_bytes(digest.digest(), "little")


def index(texts: Sequence[str], *, progress: Progress | None = None) -> BM25:
    """A BM25 index of texts (N,), with the parameters of :mod:`turborank.data.bm25`."""
    return BM25(MemoryCorpus({str(i): text for i, text in enumerate(texts)}), progress=progress)


def nearest(queries: Float32, documents: Float32, depth: int) -> Iterator[npt.NDArray[np.intp]]:
    """Per query (Q, C): indices of the ``depth`` documents (N, C) with the highest dot products, best first."""
    depth = min(depth, len(documents))
    step = max(1, MAX_SCORES // len(documents))
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
    """The document indices of one pool, without repeats: ``known``, then samples of BM25's, the bi-encoder's, all."""
    pool = dict.fromkeys(int(document) for document in known)
    for ranking, size in ((lexical, plan.bm25), (dense, plan.dense)):
        fresh = [int(document) for document in ranking if int(document) not in pool]
        pool.update(dict.fromkeys(int(document) for document in rng.permutation(fresh)[:size]))
    wanted = min(len(pool) + plan.random, documents)
    while len(pool) < wanted:
        pool[int(rng.integers(documents))] = None
    return list(pool)


def mine(
    queries: Sequence[str],
    known: Sequence[Sequence[int]],
    held_out: Sequence[bool],
    bm25: BM25,
    plan: PoolPlan,
    *,
    vectors: tuple[Float32, Float32] | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> Pools:
    """The pools of Q queries over N documents.

    Args:
        queries: (Q,) texts.
        known: (Q,) per query, indices of documents that must be in its pool.
        held_out: (Q,) per query, whether it is held out. Its pool is then what a first stage retrieves: BM25's best
            ``bm25_depth``, which may lack the labelled document (``known``, where the plan has no BM25 documents).
        bm25: an index of the documents.
        plan: composition of a pool.
        vectors: unit vectors of queries (Q, C) and documents (N, C), for dense candidates.
        seed: of the samples; a query's sample depends on it and on the query's text.
        progress: called with (queries done, Q).

    """
    bounds, doc_index, scores = [0], array("i"), array("f")
    nothing: npt.NDArray[np.intp] = np.zeros(0, dtype=np.intp)
    near = nearest(*vectors, plan.dense_depth) if vectors is not None and plan.dense else None
    for at, query in enumerate(queries):
        dense = next(near) if near is not None else nothing
        all_scores = bm25.scores(query)
        lexical = best(all_scores, plan.bm25_depth)
        if held_out[at]:
            pool = lexical.tolist() if plan.bm25 else list(known[at])
        else:
            rng = np.random.default_rng(text_hash(query, seed))
            pool = draw(rng, known[at], lexical, dense, len(all_scores), plan)
        doc_index.extend(pool)
        scores.extend(all_scores[pool].tolist())
        bounds.append(len(doc_index))
        if progress is not None and ((at + 1) % REPORT_EVERY == 0 or at + 1 == len(queries)):
            progress(at + 1, len(queries))
    return Pools(
        np.array(bounds, dtype=np.int64),
        np.frombuffer(doc_index, dtype=np.int32),
        np.frombuffer(scores, dtype=np.float32),
    )
