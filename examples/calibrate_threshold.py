"""Choose the score from which you show a document: the lowest threshold whose precision reaches a target.

A relevance score is not a probability on your data. Score some pairs whose relevance you know, sort them, and take the
longest prefix that is precise enough. Use pairs that were not used to train or choose the model.

python examples/calibrate_threshold.py [TARGET_PRECISION]
"""

import json
import sys
from pathlib import Path

import numpy as np
from evaluate_your_data import FAQ, QUESTIONS

from turborank import Reranker


def threshold(scores: np.ndarray, relevant: np.ndarray, target: float) -> tuple[float, float, float]:
    """(threshold, precision, recall): the lowest score at which precision is at least ``target``."""
    order = np.argsort(-scores, kind="stable")
    found = np.cumsum(relevant[order])
    precision = found / np.arange(1, len(scores) + 1)
    last_of_ties = np.append(scores[order][1:] != scores[order][:-1], True)  # equal scores are shown together
    enough = np.flatnonzero((precision >= target) & last_of_ties)
    if not len(enough):
        best = precision[last_of_ties].max()
        raise ValueError(f"expected a threshold with precision {target}, got at most {best:.2f}")
    last = enough[-1]
    return float(scores[order][last]), float(precision[last]), float(found[last] / relevant.sum())


def main(target: float = 0.9) -> None:
    documents = {row["id"]: row for row in map(json.loads, Path(FAQ).read_text(encoding="utf-8").splitlines())}
    pairs = [(question, f"{row['title']} {row['text']}") for question in QUESTIONS for row in documents.values()]
    relevant = np.array([document == answer for answer in QUESTIONS.values() for document in documents])
    scores = 1 / (1 + np.exp(-Reranker().score(pairs)))
    chosen, precision, recall = threshold(scores, relevant, target)
    print(f"threshold {chosen:.3f}  precision {precision:.2f}  recall {recall:.2f}  ({len(pairs)} pairs)")


if __name__ == "__main__":
    main(*map(float, sys.argv[1:2]))
