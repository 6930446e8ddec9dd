"""Vectors of questions and passages, and of each question a pool of 16 candidates.

    python runs/embedded/lists.py WORK

A pool holds the known passage, bge-small's three nearest, BM25's two best, five more of bge's 25 nearest, four more of
BM25's 30 best, and random passages up to 16. Vectors are made of the passages that are among BM25's ten best of the
first QUESTIONS questions; pools are drawn from these. Each file is written whole; what is there is not made again.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import numpy as np
from common import HELD_OUT, QUERY_PREFIX, BiEncoder, NativeModel, bi_encoder, lines, load, save

QUESTIONS, BEST = 14_000, 10  # whose passages get vectors
QUESTION_TOKENS, PASSAGE_TOKENS = 60, 80
POOL, SHARD = 16, 1000


def vectors(work: Path, teacher: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Vectors of all questions (Q, C), of passages (N, C), and the places of those passages (N,)."""
    path = work / "vectors.npz"
    if not path.is_file():
        texts = lines(work / "texts.jsonl")
        queries = [row["query"] for row in lines(work / "queries.jsonl")]
        pool, started = load(work / "pool.npz"), time.monotonic()
        chosen = np.unique(np.concatenate([pool["places"][at : at + BEST] for at in pool["bounds"][:QUESTIONS]]))
        model = BiEncoder(NativeModel(*bi_encoder(teacher)), teacher / "tokenizer.json")

        def told(done: int, of: int) -> None:
            print(f"vectors: {done:,} of {of:,} in {time.monotonic() - started:.0f} s", flush=True)

        asked = model.embed(queries, QUESTION_TOKENS, prefix=QUERY_PREFIX, told=told)
        save(
            path,
            queries=asked,
            places=chosen,
            passages=model.embed([texts[p] for p in chosen], PASSAGE_TOKENS, told=told),
        )
    found = load(path)
    return found["queries"].astype(np.float32), found["passages"].astype(np.float32), found["places"]


def pool_of(
    known: int, lexical: np.ndarray, near: np.ndarray, chosen: np.ndarray, rng: np.random.Generator
) -> list[int]:
    """The places of one pool, each once."""
    pool: dict[int, None] = {}
    wanted = [
        [known] if known >= 0 else [],
        near[:3],
        lexical[:2],
        rng.permutation(near[3:25])[:5],
        rng.permutation(lexical[2:30])[:4],
    ]
    for places in wanted:
        pool.update(dict.fromkeys(int(place) for place in places))
    while len(pool) < POOL:
        pool[int(chosen[rng.integers(len(chosen))])] = None
    return list(pool)[:POOL]


def main() -> None:
    work = Path(sys.argv[1])
    queries, passages, chosen = vectors(work, work / "teachers" / "bge-small-en-v1.5")
    first_stage = load(work / "pool.npz")
    row_of = np.full(int(max(first_stage["places"].max(), chosen.max())) + 1, -1)
    row_of[chosen] = np.arange(len(chosen))
    last = len(queries) - HELD_OUT
    shards = {f"{start // SHARD:03}": range(start, min(start + SHARD, last)) for start in range(0, last, SHARD)}
    for name, members in shards.items():
        path = work / f"pools-{name}.npz"
        if path.is_file():
            continue
        rng = np.random.default_rng(sum(map(ord, name)))
        places = np.empty((len(members), POOL), np.int32)
        cosines = np.empty((len(members), POOL), np.float32)
        for start in range(0, len(members), 100):
            some = members[start : start + 100]
            similar = queries[some.start : some.stop] @ passages.T
            for at, query in enumerate(some):
                lexical = first_stage["places"][first_stage["bounds"][query] : first_stage["bounds"][query + 1]]
                near = np.argpartition(-similar[at], 25)[:25]
                near = chosen[near[np.argsort(-similar[at][near])]]
                known = int(first_stage["known"][query])
                known = known if known >= 0 and row_of[known] >= 0 else -1
                pool = pool_of(known, lexical[row_of[lexical] >= 0], near, chosen, rng)
                places[start + at], cosines[start + at] = pool, similar[at][row_of[pool]]
        save(path, q=np.arange(members.start, members.stop, dtype=np.int32), places=places, bge=cosines)
        print(f"pools {name}: {len(members)} questions", flush=True)


if __name__ == "__main__":
    main()
