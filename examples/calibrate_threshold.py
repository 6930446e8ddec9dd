"""Choose the score from which you show a document: calibrate on judged pairs, for a precision or a recall.

A relevance score is not a probability on your data. Judge the results of your first stage for some queries; use pairs
that were not used to train or choose the model. docs/calibration.md explains the figures; `turborank calibrate` does
the same with a file of judged pairs.

python examples/calibrate_threshold.py [precision=0.9]
"""

import json
import sys
from pathlib import Path

from evaluate_your_data import FAQ, QUESTIONS

from turborank import Reranker
from turborank.calibration import sigmoid
from turborank.evaluate.calibrate import JudgedPair, calibrate
from turborank.types import Pair


def main(target: str = "precision=0.9") -> None:
    documents = {row["id"]: row for row in map(json.loads, Path(FAQ).read_text(encoding="utf-8").splitlines())}
    judged = [
        JudgedPair(Pair(question, f"{row['title']} {row['text']}"), relevant=name == answer)
        for question, answer in QUESTIONS.items()
        for name, row in documents.items()
    ]
    findings = calibrate(Reranker(), judged, targets=[target])
    found = findings.targets[0]
    if found.logit is None or found.precision is None or found.recall is None:
        print(f"no threshold reaches {target} on {len(judged)} pairs")
        return
    precision, recall = (f"{x.value:.2f} [{x.low:.2f}, {x.high:.2f}]" for x in (found.precision, found.recall))
    print(f"{target}: show scores from {sigmoid(found.logit):.3f}  precision {precision}  recall {recall}")


if __name__ == "__main__":
    main(*sys.argv[1:2])
