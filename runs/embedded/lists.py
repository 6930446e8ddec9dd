"""Training lists: a query with eight passages, scored by the fused teacher (bi-encoder cosine and BM25).

Queries are the labelled ones of the short sources, and two kinds made from passages: a sentence (as claims and long
questions are), and a handful of its rarest words (as keyword queries are). Those carry no label, only the teacher.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import bm25s
import data
import loop
import numpy as np
import numpy.typing as npt
import Stemmer
import student
import torch
from tokenizers import Tokenizer

# Lucene's English stop words (an, and, … with), the list Anserini uses.
STOP_WORDS = [
    "a", "an", "and", "are", "as", "at", "be", "but", "by", "for", "if", "in", "into", "is", "it", "no", "not",
    "of", "on", "or", "such", "that", "the", "their", "then", "there", "these", "they", "this", "to", "was",
    "will", "with",
]  # fmt: skip
PASSAGE_WORDS, PASSAGE_TOKENS, QUERY_TOKENS = 200, 256, 64
DEPTH, LIST = 30, 8  # BM25 ranks that negatives come from; passages of a list
PSEUDO = {"sentence": 6_000, "keywords": 2_000}
HELD_OUT = 0.02  # of the labelled queries, by list


class BM25:
    """k1 0.9, b 0.4, Porter stemming, Lucene stop words."""

    def __init__(self, texts: list[str]) -> None:
        self.stemmer = Stemmer.Stemmer("porter")
        self.index = bm25s.BM25(method="lucene", k1=0.9, b=0.4)
        self.index.index(self.tokens(texts, ids=True), show_progress=False)

    def tokens(self, texts: list[str], *, ids: bool = False):
        return bm25s.tokenize(texts, stopwords=STOP_WORDS, stemmer=self.stemmer, return_ids=ids, show_progress=False)

    def scores(self, words: list[str]) -> npt.NDArray[np.float32]:
        """One query's tokens -> a score for each text."""
        known = [w for w in words if w in self.index.vocab_dict]
        if not known:
            return np.zeros(self.index.scores["num_docs"], dtype=np.float32)
        return np.asarray(self.index.get_scores(known), dtype=np.float32)


def embed(ids: list[list[int]], budget: int = 8192) -> npt.NDArray[np.float32]:
    """The bi-encoder's unit vectors, texts sorted by length and packed."""
    weights = {name: w.bfloat16() for name, w in student.minilm().items()}
    order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
    vectors = np.empty((len(ids), 384), dtype=np.float32)
    group: list[int] = []
    used = 0
    for place, i in enumerate(order):
        group.append(i)
        used += len(ids[i]) + 2
        if used >= budget or place == len(order) - 1:
            batch = data.pack_segments([ids[j] for j in group])
            means = student.pooled(student.teacher_layers(weights, batch)[-1], batch.cu_seqlens)
            vectors[group] = torch.nn.functional.normalize(means).numpy()
            group, used = [], 0
    return vectors


def pseudo_queries(passages: list[tuple[str, str]], rng: np.random.Generator) -> list[tuple[str, str]]:
    """(kind, text) made from random passages."""
    made: list[tuple[str, str]] = []
    counts: dict[str, int] = {}
    for _, text in passages:
        for word in set(text.lower().split()):
            counts[word] = counts.get(word, 0) + 1
    # spoken transcripts and fiction make poor queries: half their share
    weight = np.array([0.5 if source in data.LONG_SOURCES else 1.0 for source, _ in passages])
    for kind, wanted in PSEUDO.items():
        for at in rng.choice(len(passages), 4 * wanted, p=weight / weight.sum()):
            options = [s for s in data.sentences(passages[at][1]) if 6 <= len(s.split()) <= 40]
            if not options:
                continue
            words = options[rng.integers(len(options))].split()
            if kind == "keywords":
                rare = sorted({w.strip(".,;:?!()\"'").lower() for w in words} - {""}, key=lambda w: counts.get(w, 0))
                words = [w for w in rare if w.isalpha()][: int(rng.integers(2, 6))]
            if len(words) > 1:
                made.append((kind, " ".join(words)))
            wanted -= 1
            if wanted == 0:
                break
    return made


def choose(
    rng: np.random.Generator, bm25: npt.NDArray[np.float32], cosine: npt.NDArray[np.float32], positive: int
) -> list[int]:
    """Eight passages: the positive (or a BM25 hit), four BM25 hits, two of the bi-encoder's, the rest at random."""
    lexical = np.argpartition(-bm25, DEPTH)[:DEPTH]
    dense = np.argpartition(-cosine, 10)[:10]
    drawn = [positive] if positive >= 0 else []
    wanted = [*rng.permutation(lexical)[:5], *rng.permutation(dense)[:3]]
    for at in [*wanted[: 5 - len(drawn)], *wanted[5:7], *rng.integers(len(bm25), size=LIST)]:
        if at not in drawn and len(drawn) < LIST:
            drawn.append(int(at))
    return drawn


def build(folder: Path, out: Path, seed: int) -> None:
    rng = np.random.default_rng(seed)
    tokenizer = Tokenizer.from_file(str(student.minilm_folder() / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.no_truncation()
    pairs, passages = data.sample(folder, seed)
    texts = {" ".join(text.split()[:PASSAGE_WORDS]): source for source, text in passages}
    place = {text: i for i, text in enumerate(texts)}
    labelled = [(p.source, p.query, place[" ".join(p.passage.split()[:PASSAGE_WORDS])]) for p in pairs]
    queries = labelled + [(kind, text, -1) for kind, text in pseudo_queries(passages, rng)]
    print({"passages": len(texts), "labelled": len(labelled), "queries": len(queries)}, flush=True)

    passage_ids = data.token_ids(tokenizer, list(texts), PASSAGE_TOKENS)
    query_ids = data.token_ids(tokenizer, [q for _, q, _ in queries], QUERY_TOKENS)
    print({"passage tokens": sum(map(len, passage_ids))}, flush=True)
    passage_vectors = torch.from_numpy(embed(passage_ids))
    query_vectors = torch.from_numpy(embed(query_ids))
    print("embedded", flush=True)
    bm25 = BM25(list(texts))
    words = bm25.tokens([q for _, q, _ in queries])

    members = np.zeros((len(queries), LIST), dtype=np.int32)
    cosines = np.zeros((len(queries), LIST), dtype=np.float32)
    lexical = np.zeros((len(queries), LIST), dtype=np.float32)
    for at, (_, _, positive) in enumerate(queries):
        scores = bm25.scores(words[at])
        cosine = (passage_vectors @ query_vectors[at]).numpy()
        top = np.partition(scores, -2 * DEPTH)[-2 * DEPTH :]
        members[at] = choose(rng, scores, cosine, positive)
        cosines[at] = cosine[members[at]]
        lexical[at] = (scores[members[at]] - top.mean()) / max(float(top.std()), 1e-3)
        if at % 5000 == 0:
            print({"lists": at}, flush=True)
    held = (rng.random(len(queries)) < HELD_OUT) & (np.array([p for *_, p in queries]) >= 0)
    np.savez(
        out,
        source=np.array([s for s, *_ in queries]),
        labelled=np.array([p for *_, p in queries]) >= 0,
        held_out=held,
        members=members,
        cosine=cosines,
        bm25_z=lexical,
        **_flat("query", query_ids),
        **_flat("passage", passage_ids),
    )


def _flat(name: str, ids: list[list[int]]) -> dict[str, npt.NDArray[np.int32]]:
    bounds = np.cumsum([0, *map(len, ids)])
    return {f"{name}_ids": np.concatenate(ids).astype(np.int32), f"{name}_bounds": bounds.astype(np.int32)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True, help="an .npz file")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=loop.THREADS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    build(args.data, args.out, args.seed)


if __name__ == "__main__":
    main()
