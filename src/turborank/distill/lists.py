"""``turborank distill lists``: sources into a training folder."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from turborank.data.bm25 import parameters
from turborank.data.download import Told, _quiet
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
from turborank.distill.pools import PoolPlan, Pools, index, mine
from turborank.distill.sources import Collection, Recipe, collect
from turborank.errors import InputError
from turborank.types import Float32

FORMAT = 1
GIVEN = "given"  # the teacher whose scores came with the data


def build(
    recipe: Recipe, out: Path, plan: PoolPlan, *, dense: Path | None = None, progress: Told = _quiet
) -> dict[str, Any]:
    """A training folder at ``out``; its manifest.

    The manifest is written last: a folder with one is complete, and made again only when something differs.
    Raises InputError for malformed sources, with file and line, and where ``out`` holds another folder.
    """
    _refuse(out, recipe)
    about = _about(recipe, plan, dense)
    known = read_manifest(out / MANIFEST, about)
    if known is not None:
        return known
    made = collect(recipe, whole=plan.mines)
    embedded = _embed(dense, made, out / CACHE / "vectors", progress) if dense and plan.dense else None
    pools = mine(
        made.queries, [list(places) for places in made.known], made.held_out,
        index(made.texts, progress=progress("index passages")), len(made.texts), plan,
        vectors=embedded, seed=recipe.seed, progress=progress("choose candidates"),
    )  # fmt: skip
    _clear(out)
    _write(out, made, pools)
    _write_given(out, made)
    manifest = {**about, "counts": _counts(made, pools), "left_out": dict(made.left_out)}
    write_json(out / MANIFEST, manifest)
    return manifest


def _refuse(out: Path, recipe: Recipe) -> None:
    check_folder(out)
    if out.resolve() in [source.path.resolve() for source in recipe.sources]:
        raise InputError(f"expected another folder than a source to write to, got {out}")


def _clear(out: Path) -> None:
    """Without what a run that did not finish may have left and this one may not write."""
    qrels = [out / "qrels" / f"{split}.tsv" for split in (TRAIN, DEV)]
    for path in (*qrels, run_path(out, GIVEN), about_path(out, GIVEN)):
        path.unlink(missing_ok=True)


def _about(recipe: Recipe, plan: PoolPlan, dense: Path | None) -> dict[str, Any]:
    """Everything the folder depends on, as JSON keeps it."""
    about: dict[str, Any] = {
        "format": FORMAT,
        "seed": recipe.seed,
        "sources": [
            {
                "name": source.name,
                "file": source.path.name,
                "sha256": _hashes(source.path),
                "candidates": _hashes(source.run) if source.run else None,
                "cut_into_passages": source.long,
                "cap": recipe.caps.get(source.name),
                "clean": recipe.clean.get(source.name, recipe.clean.get("", ())),
            }
            for source in recipe.sources
        ],
        "words": recipe.words,
        "min_words": recipe.min_words,
        "depth": recipe.depth,
        "made_queries": dict(recipe.pseudo),
        "held_out": recipe.held_out,
        "pools": asdict(plan),
        "bm25": parameters(),
        "bi_encoder": _weights_hash(dense) if dense is not None else None,
    }
    return dict(json.loads(json.dumps(about)))


def _hashes(path: Path) -> str | dict[str, str]:
    """sha256 of a file, or of the data in a folder."""
    if not path.exists():
        raise InputError(f"expected a file or folder, got nothing at {path}")
    if path.is_file():
        return file_hash(path)
    files = sorted(one for one in (*path.glob("*.jsonl*"), path / "qrels" / f"{TRAIN}.tsv") if one.is_file())
    return {str(one.relative_to(path)): file_hash(one) for one in files}


def _weights_hash(dense: Path) -> str:
    from turborank.distill.biencoder import found

    return file_hash(found(dense) / "model.safetensors")


def _embed(dense: Path, made: Collection, cache: Path, progress: Told) -> tuple[Float32, Float32]:
    from turborank.distill.biencoder import BiEncoder

    model = BiEncoder.load(dense)
    return (
        biencoder.embed(model, made.queries, cache, progress=progress("embed queries")),
        biencoder.embed(model, made.texts, cache, progress=progress("embed passages")),
    )


def _names(given: list[str | None], letter: str) -> list[str]:
    """The ids that came with the data; the others get a letter and their place."""
    taken = {name for name in given if name is not None}
    while any(name.startswith(letter) for name in taken):
        letter += "_"
    return [f"{letter}{place}" if name is None else name for place, name in enumerate(given)]


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
            f"{query_ids[query]}\t{doc_ids[place]}\t{label}\n"
            for query, labels in enumerate(made.labels)
            if made.held_out[query] is held_out
            for place, label in labels.items()
        ]
        if lines:
            with replacing(out / "qrels" / f"{split}.tsv") as file:
                file.write("".join(["query-id\tcorpus-id\tscore\n", *lines]).encode())
    write_pools(out / CANDIDATES, query_ids, doc_ids, pools.bounds, pools.places, pools.scores, "bm25")


def _write_given(out: Path, made: Collection) -> None:
    """The scores that came with the data, as those of a teacher, if they are there for all pool places."""
    if not made.scores:
        return
    folder = TrainingFolder.load(out)
    asked = zip(folder.query_of.tolist(), folder.places.tolist(), strict=True)
    values = np.array([made.scores.get(pair, np.nan) for pair in asked], dtype=np.float32)
    absent = int(np.isnan(values).sum())
    if absent:
        made.left_out["scores that came with the data, because other pool places have none"] = len(values) - absent
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
        "pool_places": len(pools.places),
        "pool_sizes": {"min": int(sizes.min()), "median": float(np.median(sizes)), "max": int(sizes.max())},
    }
