"""Training lists: :func:`build_folder` writes pools, BatchSampler samples the lists of a step.

``turborank distill lists`` calls build_folder: sources -> queries, passages and candidate pools in a training folder.

A list is one query with K documents of its pool: one labelled document if there is one, some of those with the highest
teacher scores, the rest at random. Lists are sampled by step number, so that a step always gets the same ones.
Documents are cut to a length sampled per step. Some steps are *long*: each document is placed among passages of other
queries, so that the student learns to find the relevant part of a long document.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from turborank.data.bm25 import parameters
from turborank.data.files import check_folder, file_hash, read_manifest, replacing, write_json
from turborank.distill import biencoder
from turborank.distill.folder import (
    CACHE,
    CANDIDATES,
    CORPUS,
    DEV,
    MANIFEST,
    QUERIES,
    TRAIN,
    UNKNOWN,
    TrainingFolder,
    about_path,
    run_path,
    write_pools,
)
from turborank.distill.losses import Targets
from turborank.distill.sources import Collection, ListOptions, PoolPlan, Pools, collect, index, mine
from turborank.errors import InputError
from turborank.tokens import PairEncoder, pack
from turborank.types import Encoding, Float32, Int32, PackedBatch, StartProgress, no_progress

FORMAT = 1  # of the training folder's manifest
GIVEN = "given"  # name of the teacher whose scores the sources contain


def build_folder(
    options: ListOptions, out: Path, plan: PoolPlan, *, dense: Path | None = None, progress: StartProgress = no_progress
) -> dict[str, Any]:
    """Write a training folder to ``out``; its manifest.

    The manifest is written last: a folder with a manifest of the same inputs is complete and returned as it is.
    Raises InputError for malformed sources, with file and line, and where ``out`` was made from other inputs.
    """
    _check_out(out, options)
    about = _about(options, plan, dense)
    known = read_manifest(out / MANIFEST, about)
    if known is not None:
        return known
    made = collect(options, whole=plan.mines)
    embedded = _embed(dense, made, out / CACHE / "vectors", progress) if dense and plan.dense else None
    pools = mine(
        made.queries, [list(known) for known in made.known], made.held_out,
        index(made.texts, progress=progress("index passages")), plan,
        vectors=embedded, seed=options.seed, progress=progress("choose candidates"),
    )  # fmt: skip
    _clear(out)
    _write(out, made, pools)
    _write_given(out, made)
    manifest = {**about, "counts": _counts(made, pools), "left_out": dict(made.left_out)}
    write_json(out / MANIFEST, manifest)
    return manifest


def _check_out(out: Path, options: ListOptions) -> None:
    check_folder(out)
    if out.resolve() in [source.path.resolve() for source in options.sources]:
        raise InputError(f"expected another folder than a source to write to, got {out}")


def _clear(out: Path) -> None:
    """Delete optional files that an unfinished run may have left."""
    qrels = [out / "qrels" / f"{split}.tsv" for split in (TRAIN, DEV)]
    for path in (*qrels, run_path(out, GIVEN), about_path(out, GIVEN)):
        path.unlink(missing_ok=True)


def _about(options: ListOptions, plan: PoolPlan, dense: Path | None) -> dict[str, Any]:
    """Everything the folder depends on, with values as JSON stores them."""
    about: dict[str, Any] = {
        "format": FORMAT,
        "seed": options.seed,
        "sources": [
            {
                "name": source.name,
                "file": source.path.name,
                "sha256": _hashes(source.path),
                "candidates": _hashes(source.run) if source.run else None,
                "cut_into_passages": source.long,
                "cap": options.caps.get(source.name),
                "clean": options.clean.get(source.name, options.clean.get("", ())),
            }
            for source in options.sources
        ],
        "words": options.words,
        "min_words": options.min_words,
        "depth": options.depth,
        "made_queries": dict(options.pseudo),
        "held_out": options.held_out,
        "pools": asdict(plan),
        "bm25": parameters(),
        "bi_encoder": _weights_hash(dense) if dense is not None else None,
    }
    return dict(json.loads(json.dumps(about)))


def _hashes(path: Path) -> str | dict[str, str]:
    """SHA-256 of a file, or of each data file in a folder."""
    if not path.exists():
        raise InputError(f"expected a file or folder, got nothing at {path}")
    if path.is_file():
        return file_hash(path)
    files = sorted(one for one in (*path.glob("*.jsonl*"), path / "qrels" / f"{TRAIN}.tsv") if one.is_file())
    return {str(one.relative_to(path)): file_hash(one) for one in files}


def _weights_hash(dense: Path) -> str:
    return file_hash(biencoder.model_folder(dense) / "model.safetensors")


def _embed(dense: Path, made: Collection, cache: Path, progress: StartProgress) -> tuple[Float32, Float32]:
    model = biencoder.BiEncoder.load(dense)
    return (
        biencoder.embed(model, made.queries, cache, progress=progress("embed queries")),
        biencoder.embed(model, made.texts, cache, progress=progress("embed passages")),
    )


def _names(given: list[str | None], letter: str) -> list[str]:
    """The ids of the sources; missing ones become a letter and an index."""
    taken = {name for name in given if name is not None}
    while any(name.startswith(letter) for name in taken):
        letter += "_"
    return [f"{letter}{index}" if name is None else name for index, name in enumerate(given)]


def _write(out: Path, made: Collection, pools: Pools) -> None:
    query_ids, doc_ids = _names(made.query_ids, "q"), _names(made.doc_ids, "d")
    with replacing(out / CORPUS) as file:
        for name, text in zip(doc_ids, made.texts, strict=True):
            file.write(_line({"_id": name, "text": text}))
    with replacing(out / QUERIES) as file:
        for name, text, source, origin in zip(query_ids, made.queries, made.sources, made.made_from, strict=True):
            record = {"_id": name, "text": text, "source": source}
            file.write(_line(record if origin is None else {**record, "made_from": doc_ids[origin]}))
    for split, held_out in ((TRAIN, False), (DEV, True)):
        lines = [
            f"{query_ids[query]}\t{doc_ids[document]}\t{label}\n"
            for query, labels in enumerate(made.labels)
            if made.held_out[query] is held_out
            for document, label in labels.items()
        ]
        if lines:
            with replacing(out / "qrels" / f"{split}.tsv") as file:
                file.write("".join(["query-id\tcorpus-id\tscore\n", *lines]).encode())
    write_pools(out / CANDIDATES, query_ids, doc_ids, pools.bounds, pools.doc_index, pools.scores, "bm25")


def _write_given(out: Path, made: Collection) -> None:
    """Write the scores in the sources as a teacher's, if every pool entry has one."""
    if not made.scores:
        return
    folder = TrainingFolder.load(out)
    pairs = zip(folder.query_index.tolist(), folder.doc_index.tolist(), strict=True)
    values = np.array([made.scores.get(pair, np.nan) for pair in pairs], dtype=np.float32)
    absent = int(np.isnan(values).sum())
    if absent:
        made.left_out["scores that came with the data, because other pool entries have none"] = len(values) - absent
    else:
        folder.write_scores(GIVEN, values, {"kind": "came with the data"})


def _line(record: dict[str, str]) -> bytes:
    return (json.dumps(record, ensure_ascii=False) + "\n").encode("utf-8", "replace")


def _counts(made: Collection, pools: Pools) -> dict[str, Any]:
    sizes = np.diff(pools.bounds)
    return {
        "passages": len(made.texts),
        "queries": len(made.queries),
        "queries_of_source": dict(Counter(made.sources)),
        "labels": sum(map(len, made.labels)),
        "held_out_queries": sum(made.held_out),
        "pool_places": len(pools.doc_index),
        "pool_sizes": {"min": int(sizes.min()), "median": float(np.median(sizes)), "max": int(sizes.max())},
    }


# ---------------------------------------------------------------- lists of a step


@dataclass(frozen=True)
class BatchOptions:
    """Size and composition of a step's lists."""

    budget: int = 6144  # tokens per step
    documents: int = 8  # K, per list
    hard: int = 4  # of these, sampled from the documents with the highest teacher scores
    hard_depth: int = 12  # number of documents these are sampled from
    query_tokens: int = 128
    document_tokens: tuple[int, ...] = (96, 160, 256)  # lengths; one is sampled per step
    long_every: int = 16  # every n-th step is long; 0: none
    long_tokens: tuple[int, ...] = (512, 1024, 2048)
    shares: Mapping[str, float] = field(default_factory=dict)  # sampling weight of queries by source; 1 where not named
    margin: float = 0.0  # unlabelled documents with teacher scores this far above the labelled one are no negatives


@dataclass(frozen=True)
class ListBatch:
    """The batch of a step: Q lists of K documents as packed pairs, and their targets."""

    batch: PackedBatch
    targets: Targets
    queries: list[int]  # (Q,) indices in the folder


class BatchSampler:
    """Samples lists from a training folder, for one process (``rank``) of a run.

    Raises InputError for shares of unknown sources, and where no query can be trained on.
    """

    def __init__(
        self,
        folder: TrainingFolder,
        encoder: PairEncoder,
        teacher: Float32 | None,
        options: BatchOptions,
        *,
        seed: int = 0,
        rank: int = 0,
    ) -> None:
        self.folder, self.options, self.seed, self.rank = folder, options, seed, rank
        self.teacher = teacher  # (N,) fused scores of all pool entries, or None
        self.template = encoder.template
        self.room = encoder.max_length - encoder.template.size  # tokens of query and document together
        self.queries = _ids(encoder, folder.queries, min(options.query_tokens, self.room // 2))
        self.documents = _ids(encoder, folder.texts, max(options.document_tokens))
        unknown = sorted(set(options.shares) - set(folder.sources))
        if unknown:
            raise InputError(f"expected shares of the sources in {folder.path}, got one of {unknown[0]!r}")
        weight = np.array([options.shares.get(source, 1.0) for source in folder.sources], dtype=np.float64)
        weight *= ~folder.held_out & (np.diff(folder.bounds) > 1)
        if teacher is None:  # only labels supervise
            weight *= [bool((folder.labels[folder.pool(q)] > 0).any()) for q in range(len(folder))]
        if not weight.sum():
            raise InputError(
                f"expected queries to train on, got none in {folder.path}",
                hint="without a teacher each needs a label; held-out queries and pools of one document do not count",
            )
        self.weight = weight / weight.sum()

    def draw(self, step: int) -> ListBatch:
        """The lists of a step: the first ones that reach ``budget`` tokens."""
        options = self.options
        rng = np.random.default_rng((self.seed, step, self.rank))
        long = (
            int(rng.choice(options.long_tokens))
            if options.long_every and step % options.long_every == options.long_every - 1
            else 0
        )
        cut = int(rng.choice(options.document_tokens))
        k = int(np.clip(options.budget // long, 2, options.documents)) if long else options.documents
        chosen: list[int] = []
        entries: list[Int32] = []
        encodings: list[Encoding] = []
        while not chosen or sum(map(len, encodings)) < options.budget:
            query = int(rng.choice(len(self.weight), p=self.weight))
            drawn = self._list(query, k, rng)
            chosen.append(query)
            entries.append(drawn)
            encodings += [self._pair(query, int(self.folder.doc_index[at]), cut, long, rng) for at in drawn]
        return ListBatch(pack(encodings), self._targets(entries, k), chosen)

    def _list(self, query: int, k: int, rng: np.random.Generator) -> Int32:
        """Up to ``k`` pool entries: a labelled one first, then hard and random ones."""
        pool = self.folder.pool(query)
        members = np.arange(pool.start, pool.stop, dtype=np.int32)
        good = members[self.folder.labels[pool] > 0]
        first = rng.permutation(good)[:1]
        rest = np.setdiff1d(members, good)
        if self.teacher is not None and len(rest):
            best = rest[np.argsort(-self.teacher[rest], kind="stable")[: self.options.hard_depth]]
        else:
            best = rest[: self.options.hard_depth]  # the best of the first stage
        hard = rng.permutation(best)[: min(self.options.hard, k - len(first))]
        others = rng.permutation(np.setdiff1d(rest, hard))[: k - len(first) - len(hard)]
        out: Int32 = np.concatenate([first, hard, others]).astype(np.int32)
        return out

    def _pair(self, query: int, document: int, cut: int, long: int, rng: np.random.Generator) -> Encoding:
        room = self.room - len(self.queries[query])
        ids = self.documents[document][: min(cut, room)]
        if long:
            ids = self._embedded(ids, min(long, room), rng)
        t = self.template
        parts = (t.prefix, self.queries[query], t.middle, ids, t.suffix)
        types = np.repeat(np.asarray(t.types, dtype=np.int32), [len(part) for part in parts])
        flat = np.concatenate(parts, dtype=np.int32, casting="unsafe")
        return Encoding(input_ids=flat, type_ids=types, read=len(flat))

    def _embedded(self, ids: Int32, long: int, rng: np.random.Generator) -> Int32:
        """The document at a random position among other passages, ``long`` tokens in total."""
        around: list[Int32] = []
        while sum(map(len, around)) + len(ids) < long:
            around.append(self.documents[int(rng.integers(len(self.documents)))])
        around.insert(int(rng.integers(len(around) + 1)), ids)
        start = sum(map(len, around)) - long  # the excess is cut from another passage, never from the document
        flat = np.concatenate(around)
        out: Int32 = flat[:long] if start <= 0 or around[-1] is not ids else flat[start:]
        return out

    def _targets(self, lists: Sequence[Int32], k: int) -> Targets:
        shape = (len(lists), k)
        teacher = np.full(shape, np.nan, dtype=np.float32)
        labels = np.full(shape, UNKNOWN, dtype=np.float32)
        real = np.zeros(shape, dtype=np.bool_)
        for row, entries in enumerate(lists):
            real[row, : len(entries)] = True
            labels[row, : len(entries)] = self.folder.labels[entries]
            if self.teacher is not None:
                teacher[row, : len(entries)] = self.teacher[entries]
        good = np.where(labels > 0, teacher, np.inf).min(axis=1, keepdims=True)
        trusted = ~((labels == UNKNOWN) & (teacher > good + self.options.margin))
        return Targets(
            None if self.teacher is None else torch.from_numpy(teacher),
            torch.from_numpy(labels),
            torch.from_numpy(real),
            torch.from_numpy(trusted),
        )


def _ids(encoder: PairEncoder, texts: Sequence[str], limit: int) -> list[Int32]:
    """Token ids of each text without special tokens, cut at ``limit``."""
    from turborank.text import plain

    out: list[Int32] = []
    for start in range(0, len(texts), 10_000):
        encoded = encoder.tokenizer.encode_batch_fast(
            [plain(t) for t in texts[start : start + 10_000]], add_special_tokens=False
        )
        out += [np.asarray(e.ids[:limit], dtype=np.int32) for e in encoded]
    return out
