"""The development sets that choose between states of the student: TREC DL 2021 and SciFact's train split.

80 questions of SciFact over BM25's best 40, all of DL 2021 over the run that comes with the pool; nDCG@10 by the engine
that will serve the student, in int8, pairs cut at 384 tokens. Neither is a set the card reports a choice-free figure of
without saying so.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from common import lines, write_lines

from turborank import engines
from turborank.data.bm25 import best
from turborank.data.trec import Scored, read_qrels, read_run
from turborank.distill.sources import index, text_hash
from turborank.distill.students import Student
from turborank.evaluate.measures import means, per_query
from turborank.scheduler import score
from turborank.tokens import PairEncoder
from turborank.types import Pair

MEASURE, MAX_LENGTH = "nDCG@10", 384
QUESTIONS, DEPTH = 80, 40  # of SciFact


class DevSets:
    """A measure for the training loop; the mean comes first and decides."""

    def __init__(self, data: Path, work: Path, threads: int = 1) -> None:
        self.threads = threads
        dl21, scifact = data / "trec-dl21-pool", data / "scifact"
        run = {query: [s.doc_id for s in found][:100] for query, found in read_run(dl21 / "runs" / "bm25.txt").items()}
        self.sets = {
            "dl21": self._read(dl21, "test", run),
            "scifact": self._read(scifact, "train", self._bm25(scifact, work)),
        }

    @staticmethod
    def _texts(folder: Path) -> dict[str, str]:
        rows = lines(folder / "corpus.jsonl")
        return {str(row["_id"]): f"{row.get('title') or ''} {row['text']}".strip() for row in rows}

    def _bm25(self, folder: Path, work: Path) -> dict[str, list[str]]:
        kept = work / "scifact-dev.jsonl"
        if not kept.is_file():
            texts = self._texts(folder)
            ids, bm25 = list(texts), index(list(texts.values()))
            questions = {str(row["_id"]): row["text"] for row in lines(folder / "queries.jsonl")}
            chosen = sorted(read_qrels(folder / "qrels" / "train.tsv")[0], key=text_hash)[:QUESTIONS]
            write_lines(kept, ([q, [ids[at] for at in best(bm25.scores(questions[q]), DEPTH)]] for q in chosen))
        return dict(lines(kept))

    def _read(self, folder: Path, split: str, run: dict[str, list[str]]):
        qrels = read_qrels(folder / "qrels" / f"{split}.tsv")[0]
        questions = {str(row["_id"]): row["text"] for row in lines(folder / "queries.jsonl")}
        run = {query: found for query, found in run.items() if query in qrels}
        texts = self._texts(folder)
        pairs = [Pair(questions[query], texts[document]) for query, found in run.items() for document in found]
        return run, pairs, {query: qrels[query] for query in run}

    def __call__(self, student: Student) -> dict[str, float]:
        weights = {name: w.detach().numpy() for name, w in student.weights.items()}
        engine = engines.prepare(weights, student.config, name="native", precision="int8", threads=self.threads)
        encoder = PairEncoder(student.tokenizer, max_length=min(MAX_LENGTH, student.config.max_length))
        out: dict[str, float] = {}
        for name, (run, pairs, qrels) in self.sets.items():
            logits = iter(score(pairs, encoder, engine).logits.tolist())
            ranked = {query: [Scored(document, next(logits)) for document in found] for query, found in run.items()}
            out[f"ndcg {name}"] = means(per_query(ranked, qrels, (MEASURE,)))[MEASURE]
        return {"ndcg": float(np.mean(list(out.values()))), **out}


if __name__ == "__main__":
    for folder in sys.argv[3:]:
        print(folder, DevSets(Path(sys.argv[1]), Path(sys.argv[2]))(Student.load(folder)))
