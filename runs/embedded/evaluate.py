"""nDCG@10 over BM25's top candidates: BM25 itself, the bi-encoder the student came from, and the student.

``--model`` is a folder with model.safetensors, float32 (recover.py, train.py) or int8 with scales (ship.py).
One JSON line for each set and system goes to ``--out``; run files go beside it.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import data
import ir_measures
import lists
import numpy as np
import student
import torch
from safetensors.numpy import load_file
from tokenizers import Tokenizer

from turborank import engines
from turborank.engines import Engine
from turborank.types import PackedBatch

CONFIG = student.student_config()
Run = dict[str, dict[str, float]]
# Sets of data/eval: split of the qrels, and whether the candidates are a run file that comes with the set.
SETS = {
    "scifact": "test",
    "scifact-train": "train",
    "cranfield": "test",
    "med": "test",
    "cisi": "test",
    "npl": "test",
    "time": "test",
    "trec-dl21-pool": "test",
    "qmsum": "test",
    "qmsum-val": "val",
}


DEFAULT = ["scifact", "cranfield", "med", "cisi", "npl", "time", "trec-dl21-pool"]


class Collection(NamedTuple):
    documents: dict[str, str]
    queries: dict[str, str]
    qrels: dict[str, dict[str, int]]
    candidates: Run


def read(folder: Path, name: str, depth: int, sample: int, seed: int) -> Collection:
    """One set with BM25's top ``depth``; ``sample`` > 0 keeps that many judged queries, drawn with ``seed``."""
    split = SETS[name]
    here = folder / "eval" / name.removesuffix("-train").removesuffix("-val")
    documents = {row["_id"]: f"{row.get('title', '')} {row['text']}".strip() for row in _rows(here / "corpus.jsonl")}
    qrels: dict[str, dict[str, int]] = {}
    for line in (here / "qrels" / f"{split}.tsv").read_text(encoding="utf-8").splitlines()[1:]:
        query, document, relevance = line.split("\t")
        qrels.setdefault(query, {})[document] = int(relevance)
    queries = {row["_id"]: row["text"] for row in _rows(here / "queries.jsonl") if row["_id"] in qrels}
    if sample:
        kept = np.random.default_rng(seed).permutation(sorted(queries))[:sample]
        queries = {query: queries[query] for query in kept}
    given = here / "runs" / "bm25.txt"
    candidates = _run_file(given, queries, depth) if given.exists() else first_stage(documents, queries, depth)
    return Collection(documents, queries, {q: qrels[q] for q in queries}, candidates)


def _rows(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _run_file(path: Path, queries: dict[str, str], depth: int) -> Run:
    run: Run = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        query, _, document, rank, score, _ = line.split()
        if query in queries and int(rank) <= depth:
            run.setdefault(query, {})[document] = float(score)
    return run


def first_stage(documents: dict[str, str], queries: dict[str, str], depth: int) -> Run:
    names = list(documents)
    bm25 = lists.BM25(list(documents.values()))
    run: Run = {}
    for query, words in zip(queries, bm25.tokens(list(queries.values())), strict=True):
        scores = bm25.scores(words)
        best = sorted(np.argsort(-scores, kind="stable")[:depth], key=lambda i: (-scores[i], i))
        run[query] = {names[i]: float(scores[i]) for i in best if scores[i] > 0}
    return run


def engine_of(folder: Path, name: str, precision: str, threads: int) -> Engine:
    """The model of a folder, run by one of turborank's engines as it would be served."""
    return engines.prepare(
        load_file(folder / "model.safetensors"), CONFIG, name=name, precision=precision, threads=threads
    )


def ids_of(tokenizer: Tokenizer, texts: dict[str, str], limit: int) -> dict[str, list[int]]:
    return dict(zip(texts, data.token_ids(tokenizer, list(texts.values()), limit), strict=True))


def rerank(engine: Engine, collection: Collection, tokenizer: Tokenizer, limit: int, budget: int = 8192) -> Run:
    """Logits of every candidate, pairs cut at ``limit`` tokens, longest first in packed batches."""
    queries = ids_of(tokenizer, collection.queries, 512)
    wanted = sorted({d for row in collection.candidates.values() for d in row})
    documents = ids_of(tokenizer, {name: collection.documents[name] for name in wanted}, limit)
    pairs = [
        (q, d, documents[d][: limit - len(queries[q]) - 3]) for q, row in collection.candidates.items() for d in row
    ]
    pairs.sort(key=lambda pair: -len(pair[2]))
    run: Run = {query: {} for query in collection.candidates}
    group: list[tuple[str, str, list[int]]] = []
    for place, pair in enumerate(pairs):
        group.append(pair)
        if sum(len(d) for *_, d in group) >= budget or place == len(pairs) - 1:
            batch = data.pack([(queries[q], ids) for q, _, ids in group])
            parts = (batch.input_ids, batch.type_ids, batch.cu_seqlens)
            arrays = (np.asarray(part, dtype=np.int32) for part in parts)
            logits = engine.logits(PackedBatch(*arrays, batch.max_seqlen))
            for (query, document, _), logit in zip(group, logits.tolist(), strict=True):
                run[query][document] = logit
            group = []
    return run


def bi_encoder(collection: Collection, tokenizer: Tokenizer, limit: int) -> Run:
    queries = list(collection.queries)
    q = lists.embed(data.token_ids(tokenizer, [collection.queries[name] for name in queries], 254))
    wanted = sorted({d for row in collection.candidates.values() for d in row})
    d = lists.embed(data.token_ids(tokenizer, [collection.documents[name] for name in wanted], limit - 2))
    at = {name: i for i, name in enumerate(wanted)}
    return {
        query: {name: float(q[i] @ d[at[name]]) for name in collection.candidates[query]}
        for i, query in enumerate(queries)
        if query in collection.candidates
    }


def ndcg(collection: Collection, run: Run) -> tuple[float, dict[str, float]]:
    """Mean nDCG@10 over all judged queries (a query without candidates counts as 0), and each query's."""
    measure = ir_measures.nDCG @ 10
    each = {m.query_id: m.value for m in ir_measures.iter_calc([measure], collection.qrels, run)}
    values = {query: each.get(query, 0.0) for query in collection.queries}
    return float(np.mean(list(values.values()))), values


def write_run(path: Path, run: Run, tag: str) -> None:
    lines = []
    for query, row in run.items():
        for rank, (document, score) in enumerate(sorted(row.items(), key=lambda item: -item[1]), 1):
            lines.append(f"{query} Q0 {document} {rank} {score:.6f} {tag}\n")
    path.write_text("".join(lines), encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--model", type=Path, help="without it: BM25 and the bi-encoder only")
    parser.add_argument("--sets", nargs="+", choices=SETS, default=DEFAULT)
    parser.add_argument("--out", type=Path, required=True, help="a folder")
    parser.add_argument("--tag", default="student")
    parser.add_argument("--baselines", action="store_true", help="also BM25 and the bi-encoder (256 tokens)")
    parser.add_argument("--depth", type=int, default=100)
    parser.add_argument("--sample", type=int, default=0, help="judged queries of each set; 0: all")
    parser.add_argument("--limit", type=int, default=8192, help="tokens of a pair")
    parser.add_argument("--engine", default="native")
    parser.add_argument("--precision", default="int8", help="of the arithmetic")
    parser.add_argument("--threads", type=int, default=1, help="one a process: cores shared with others stall two")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(arguments)
    torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    tokenizer = Tokenizer.from_file(str(student.minilm_folder() / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.no_truncation()
    for name in args.sets:
        collection = read(args.data, name, args.depth, args.sample, args.seed)
        runs: dict[str, Run] = {}
        started = time.monotonic()
        if args.baselines:
            runs = {"bm25": collection.candidates, "bi-encoder": bi_encoder(collection, tokenizer, 256)}
        if args.model:
            runs[args.tag] = rerank(
                engine_of(args.model, args.engine, args.precision, args.threads), collection, tokenizer, args.limit
            )
        for system, run in runs.items():
            mean, _ = ndcg(collection, run)
            row = {"set": name, "system": system, "queries": len(collection.queries), "depth": args.depth}
            row |= {"limit": args.limit, "ndcg@10": round(mean, 4), "seconds": round(time.monotonic() - started)}
            write_run(args.out / f"{name}.{system}.txt", run, system)
            with (args.out / "results.jsonl").open("a", encoding="utf-8") as results:
                print(json.dumps(row), file=results)
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
