"""The permitted training texts: reading, cleaning, cutting into passages, tokenising, packing.

Only sources whose licence allows a model for any use (README.md has the table). Nothing of SciFact, TREC DL or the
classic collections is read here.
"""

from __future__ import annotations

import gzip
import itertools
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from tokenizers import Tokenizer

from turborank.types import PackedBatch

SHORT_SOURCES = ("squad_nqg", "nq_oracle", "xquad", "pubmedqa", "medquad")
LONG_SOURCES = ("qmsum", "squality")
SHARE = {"squad_nqg": 11_000, "medquad": 6_000}  # pairs in the ranking lists
CHUNKS = 3_500
CLS, SEP = 101, 102  # of the uncased WordPiece vocabulary

_BRACKETS = {"-lrb-": "(", "-rrb-": ")", "-lsb-": "[", "-rsb-": "]", "``": '"', "''": '"'}


IdPair = tuple[Sequence[int], Sequence[int]]  # token ids of query and document, without the template


class Pair(NamedTuple):
    source: str
    query: str
    passage: str


def clean(text: str) -> str:
    """Undo treebank tokenisation (squad_nqg, qmsum), drop transcript marks and line breaks."""
    text = re.sub(r"\{[a-z]+\}", " ", text)
    for token, mark in _BRACKETS.items():
        text = text.replace(token, mark)
    text = re.sub(r"\s+", " ", text).strip()
    text = re.sub(r" ([.,;:?!%)\]])", r"\1", text)
    text = re.sub(r"([(\[]) ", r"\1", text)
    return re.sub(r" ('s|n't|'re|'ve|'ll|'d|'m)\b", r"\1", text)


def read(data: Path, source: str) -> Iterator[Pair]:
    """The pairs of one file of ``data``/train, cleaned; of a long source, the first pair of each document."""
    seen: set[str] = set()
    with gzip.open(data / "train" / f"{source}.jsonl.gz", "rt", encoding="utf-8") as lines:
        for line in lines:
            row = json.loads(line)
            if source in LONG_SOURCES and row["passage"] in seen:
                continue
            seen.add(row["passage"])
            yield Pair(source, clean(row["query"]).replace("What is (are)", "What is"), clean(row["passage"]))


def chunks(text: str, rng: np.random.Generator) -> Iterator[str]:
    """A long text as passages of whole sentences, 40 to 240 words each."""
    wanted, words = int(rng.integers(40, 240)), []
    for sentence in sentences(text):
        words += sentence.split()
        if len(words) >= wanted:
            yield " ".join(words[:300])
            wanted, words = int(rng.integers(40, 240)), []


def sentences(text: str) -> list[str]:
    return re.split(r"(?<=[.?!]) (?=[A-Z\"(])", text)


def long_documents(data: Path) -> list[Pair]:
    """One pair for each different document of the long sources."""
    return [pair for source in LONG_SOURCES for pair in read(data, source)]


def corpus(data: Path, seed: int = 0) -> tuple[list[Pair], list[tuple[str, str]]]:
    """(labelled pairs of the short sources, all passages as (source, text) without repeats)."""
    rng = np.random.default_rng(seed)
    pairs = [pair for source in SHORT_SOURCES for pair in read(data, source) if len(pair.passage) > 20]
    passages = {pair.passage: pair.source for pair in pairs}
    for document in long_documents(data):
        passages.update(dict.fromkeys(chunks(document.passage, rng), document.source))
    return pairs, [(source, text) for text, source in passages.items()]


def sample(folder: Path, seed: int = 0) -> tuple[list[Pair], list[tuple[str, str]]]:
    """:func:`corpus` with each source capped: what the ranking lists are made of."""
    rng = np.random.default_rng(seed)
    pairs, passages = corpus(folder, seed)
    kept: list[Pair] = []
    for source in SHORT_SOURCES:
        mine = [pair for pair in pairs if pair.source == source]
        kept += [mine[i] for i in rng.permutation(len(mine))[: SHARE.get(source, len(mine))]]
    spoken = [passage for passage in passages if passage[0] in LONG_SOURCES]
    texts = {pair.passage: pair.source for pair in kept}
    texts.update({spoken[i][1]: spoken[i][0] for i in rng.permutation(len(spoken))[:CHUNKS]})
    return kept, [(source, text) for text, source in texts.items()]


def token_ids(tokenizer: Tokenizer, texts: Sequence[str], limit: int) -> list[list[int]]:
    """Ids without the template, the first ``limit`` of each text."""
    return [e.ids[:limit] for e in tokenizer.encode_batch(list(texts), add_special_tokens=False)]


def pack(pairs: Sequence[IdPair]) -> PackedBatch:
    """(query ids, document ids) -> packed `[CLS] q [SEP]` of type 0, `d [SEP]` of type 1, as tensors."""
    ids: list[int] = []
    types: list[int] = []
    bounds = [0]
    for query, document in pairs:
        ids += [CLS, *query, SEP, *document, SEP]
        types += [0] * (len(query) + 2) + [1] * (len(document) + 1)
        bounds.append(len(ids))
    longest = max(b - a for a, b in itertools.pairwise(bounds))
    return PackedBatch(torch.tensor(ids), torch.tensor(types), torch.tensor(bounds), longest)  # type: ignore[arg-type]


def pack_segments(segments: Sequence[Sequence[int]]) -> PackedBatch:
    """Each text on its own, `[CLS] text [SEP]`, all of type 0: how the bi-encoder reads."""
    ids: list[int] = []
    bounds = [0]
    for segment in segments:
        ids += [CLS, *segment, SEP]
        bounds.append(len(ids))
    longest = max(b - a for a, b in itertools.pairwise(bounds))
    return PackedBatch(torch.tensor(ids), torch.zeros(len(ids), dtype=torch.long), torch.tensor(bounds), longest)  # type: ignore[arg-type]
