"""The trained student as it ships: scores calibrated, matrices in int8.

    python runs/embedded/ship.py WORK STUDENT [STUDENT ...] OUT

If several students are given, the mean of their weights ships.

Platt scaling on held-out questions whose passage is known: pools of that passage and the candidates of both first
stages, both classes weighted alike, so that a score of .5 is where the passage and a candidate are equally likely.
The factor is positive: no order changes.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from common import HELD_OUT, lines, load

from turborank import engines
from turborank.distill.students import average, platt, scale_logits, write_int8
from turborank.scheduler import score
from turborank.tokens import PairEncoder
from turborank.types import Pair

MAX_LENGTH, CANDIDATES = 384, 15


def held_out_pairs(work: Path) -> tuple[list[Pair], np.ndarray]:
    """Pairs of held-out questions, and which of them are the known passage."""
    texts, queries, pool = lines(work / "texts.jsonl"), lines(work / "queries.jsonl"), load(work / "pool.npz")
    pairs: list[Pair] = []
    labels: list[bool] = []
    for query in range(len(queries) - HELD_OUT, len(queries)):
        known = int(pool["known"][query])
        if known < 0 or queries[query]["source"].startswith("made"):
            continue
        places = pool["places"][pool["bounds"][query] : pool["bounds"][query + 1]].tolist()
        members = [known, *(place for place in places if place != known)][: CANDIDATES + 1]
        pairs += [Pair(queries[query]["query"], texts[place]) for place in members]
        labels += [place == known for place in members]
    return pairs, np.array(labels)


def main() -> None:
    work, *folders, out = map(Path, sys.argv[1:])
    student = average(folders)
    weights = {name: w.detach().numpy() for name, w in student.weights.items()}
    engine = engines.prepare(weights, student.config, name="native", precision="int8")
    pairs, labels = held_out_pairs(work)
    encoder = PairEncoder(student.tokenizer, max_length=min(MAX_LENGTH, student.config.max_length))
    factor, bias = platt(score(pairs, encoder, engine).logits, labels)
    print(f"{len(pairs):,} pairs, {int(labels.sum())} known passages: logit = {factor:.4f} x + {bias:.4f}")
    scale_logits(student, factor, bias)
    write_int8(student, out)


if __name__ == "__main__":
    main()
