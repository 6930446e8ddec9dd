"""Averages of weights: the second stage's student, and the model as it ships.

    python runs/embedded/ship.py second WORK V1 FIRST LAST OUT
    python runs/embedded/ship.py final WORK V1 FIRST LAST OUT

Both average the weights before a stage (folder FIRST) and after it (LAST). ``second`` then averages the result with
turborank-embedded-v1 (V1), in the six layers that it has, and adds a cosine to the head (sum, docs/model.md §3.5).
``final`` calibrates the scores and writes matrices in int8. runs/results/students.md tells how SHARES were chosen.

Platt scaling on held-out questions whose passage is known: pools of that passage and the candidates of both first
stages, both classes weighted alike, so that a score of .5 is where the passage and a candidate are equally likely.
The factor is positive: no order changes.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import torch
from common import HELD_OUT, lines, load
from student import KEPT, mix
from tokenizers import Tokenizer

from turborank import engines
from turborank.distill.students import COSINE_SCALE, FOCUS, WORDS, Student, platt, scale_logits, write_int8
from turborank.scheduler import score
from turborank.tokens import PairEncoder
from turborank.types import Pair

MAX_LENGTH, CANDIDATES = 384, 15
SHARES = {"second": (0.8, 0.4), "final": (0.4, 0.0)}  # of the last weights of training, and of v1's
COSINE = 0.48  # mean cosine of query and document before the second stage


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


def averaged(v1: Path, first: Path, last: Path, trained: float, v1_share: float) -> Student:
    """The mean of the weights before and after training, and of v1's in its six layers."""
    student, start = Student.load(last), Student.load(first).weights
    student.weights = {name: torch.lerp(start[name], w, trained) for name, w in student.weights.items()}
    mix(student.weights, Student.load(v1).weights, v1_share, kept=KEPT, embeddings=False)
    return student


def add_cosine(student: Student) -> None:
    """Turn a classifier into the sum head, in place; the mean of its logits stays."""
    student.weights["classifier.bias"] = student.weights["classifier.bias"] - COSINE_SCALE * COSINE
    student.weights["head.scale"], student.weights["head.focus"] = torch.tensor([COSINE_SCALE]), torch.tensor([FOCUS])


def without_unused(student: Student) -> Student:
    """The same without the [unused] rows of the vocabulary (994, .4 MB), which are in no text."""
    data = json.loads(student.tokenizer.to_str())
    kept = [piece for piece in sorted(data["model"]["vocab"], key=data["model"]["vocab"].get) if "[unused" not in piece]
    rows = torch.tensor([data["model"]["vocab"][piece] for piece in kept])
    data["model"]["vocab"] = place = {piece: at for at, piece in enumerate(kept)}
    for token in data["added_tokens"]:
        token["id"] = place[token["content"]]
    for token in data["post_processor"]["special_tokens"].values():
        token["ids"] = [place[piece] for piece in token["tokens"]]
    weights = student.weights | {WORDS: student.weights[WORDS][rows]}
    raw = student.raw_config | {"vocab_size": len(kept), "pad_token_id": place["[PAD]"]}
    return Student(weights, raw, Tokenizer.from_str(json.dumps(data)))


def main() -> None:
    kind, (work, v1, first, last, out) = sys.argv[1], map(Path, sys.argv[2:])
    student = averaged(v1, first, last, *SHARES[kind])
    if kind == "second":
        add_cosine(student)
        return student.save(out)
    student = without_unused(student)
    weights = {name: w.detach().numpy() for name, w in student.weights.items()}
    engine = engines.prepare(weights, student.config, name="native", precision="int8")
    pairs, labels = held_out_pairs(work)
    encoder = PairEncoder(student.tokenizer, max_length=min(MAX_LENGTH, student.config.max_length))
    factor, bias = platt(score(pairs, encoder, engine).logits, labels)
    print(f"{len(pairs):,} pairs, {int(labels.sum())} known passages: logit = {factor:.4f} x {bias:+.4f}")
    scale_logits(student, factor, bias)
    write_int8(student, out)


if __name__ == "__main__":
    main()
