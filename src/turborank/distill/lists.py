"""``turborank distill lists``: sources into a training folder."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

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
    TrainingFolder,
    about_path,
    run_path,
    write_pools,
)
from turborank.distill.sources import Collection, ListOptions, PoolPlan, Pools, collect, index, mine
from turborank.errors import InputError
from turborank.types import Float32, StartProgress, no_progress

FORMAT = 1
GIVEN = "given"  # name of the teacher whose scores the sources contain


def build(
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
