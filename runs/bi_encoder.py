"""A bi-encoder over BM25's candidates: the opponent a reranker grown from it has to beat. One JSON line a set.

python runs/bi_encoder.py FOLDER [SET …]      FOLDER in sentence-transformers' layout, read to its published length

The candidates are those of runs/evaluate.sh: BM25's best 100, or the run that comes with the set.
"""

import argparse
import json
import os
from pathlib import Path

from turborank.data import datasets
from turborank.data.bm25 import bm25_run
from turborank.data.trec import Scored, read_run
from turborank.distill.biencoder import BiEncoder
from turborank.evaluate.measures import means, per_query

SETS = ("med", "npl", "trec-dl21-pool", "cisi", "cranfield", "time", "scifact")
GIVEN = {"trec-dl21-pool": "runs/bm25.txt"}
DEPTH, MEASURE = 100, "nDCG@10"


def rerank(model: BiEncoder, dataset: datasets.Dataset, candidates: dict[str, list[Scored]]) -> dict[str, list[Scored]]:
    """The same documents by cosine; a query without candidates stays without."""
    wanted = sorted({scored.doc_id for row in candidates.values() for scored in row})
    place = {doc_id: at for at, doc_id in enumerate(wanted)}
    documents = model.embed([dataset.corpus.text(doc_id) for doc_id in wanted])
    queries = model.embed([dataset.queries[query] for query in candidates])
    return {
        query: [Scored(row.doc_id, float(vector @ documents[place[row.doc_id]])) for row in candidates[query]]
        for query, vector in zip(candidates, queries, strict=True)
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("sets", nargs="*", default=SETS)
    parser.add_argument("--cache", type=Path, default=Path("build/bi-encoder"))
    args = parser.parse_args()
    data = Path(os.environ.get("DATA", "../shared/data/eval"))
    model = BiEncoder.load(args.folder)
    for name in args.sets:
        dataset = datasets.load(name, data_dir=data, offline=True)
        if name in GIVEN:
            found = read_run(data / name / GIVEN[name])
            first = {query: found.get(query, [])[:DEPTH] for query in dataset.queries}
        else:
            first = bm25_run(dataset, DEPTH, args.cache / name)[0]
        row = {"set": name, "queries": len(dataset.queries), "tokens": model.max_tokens}
        for system, run in (("bm25", first), (model.name, rerank(model, dataset, first))):
            row[system] = round(means(per_query(run, dataset.qrels, (MEASURE,), dataset.relevant_from))[MEASURE], 4)
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
