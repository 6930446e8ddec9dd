"""``turborank distill lists``: sources into a training folder."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from turborank.distill import mine, vectors
from turborank.distill.collection import Collection, Recipe, collect
from turborank.distill.folder import CACHE, CANDIDATES, CORPUS, DEV, MANIFEST, QUERIES, TRAIN, write_pools
from turborank.errors import InputError
from turborank.evaluate.download import Told, _quiet
from turborank.evaluate.files import file_hash, replacing, write_json
from turborank.evaluate.first_stage import parameters
from turborank.types import Float32

FORMAT = 1


def build(
    recipe: Recipe, out: Path, plan: mine.PoolPlan, *, dense: Path | None = None, progress: Told = _quiet
) -> dict[str, Any]:
    """A training folder at ``out``; its manifest.

    The manifest is written last: a folder with one is complete, and made again only when something differs.
    Raises InputError for malformed sources, with file and line, and where ``out`` holds another folder.
    """
    about = _about(recipe, plan, dense)
    known = _known(out / MANIFEST, about)
    if known is not None:
        return known
    made = collect(recipe)
    texts, queries = list(made.texts), list(made.queries)
    embedded = _embed(dense, queries, texts, out / CACHE / "vectors", progress) if dense and plan.dense else None
    pools = mine.mine(
        queries, [list(places) for places in made.known], made.held_out,
        mine.index(texts, progress=progress("index passages")), len(texts), plan,
        vectors=embedded, seed=recipe.seed, progress=progress("choose candidates"),
    )  # fmt: skip
    _write(out, made, pools)
    manifest = {**about, "counts": _counts(made, pools), "left_out": dict(made.left_out)}
    write_json(out / MANIFEST, manifest)
    return manifest


def _about(recipe: Recipe, plan: mine.PoolPlan, dense: Path | None) -> dict[str, Any]:
    """Everything the folder depends on, as JSON keeps it."""
    about: dict[str, Any] = {
        "format": FORMAT,
        "seed": recipe.seed,
        "sources": [
            {
                "name": source.name,
                "file": source.path.name,
                "sha256": file_hash(source.path),
                "cut_into_passages": source.long,
                "cap": recipe.caps.get(source.name),
                "clean": recipe.clean.get(source.name, recipe.clean.get("", ())),
            }
            for source in recipe.sources
        ],
        "words": recipe.words,
        "min_words": recipe.min_words,
        "made_queries": dict(recipe.pseudo),
        "held_out": recipe.held_out,
        "pools": asdict(plan),
        "bm25": parameters(),
        "bi_encoder": file_hash(dense / "model.safetensors") if dense is not None else None,
    }
    return dict(json.loads(json.dumps(about)))


def _known(path: Path, about: dict[str, Any]) -> dict[str, Any] | None:
    """The manifest that is there, if it is one of the same thing."""
    if not path.exists():
        return None
    known: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    differing = [key for key in about if known.get(key) != about[key]]
    if differing:
        raise InputError(
            f"expected a folder made of the same, got another {', '.join(differing)} at {path}",
            hint="choose another --out, or delete the folder",
        )
    return known


def _embed(dense: Path, queries: list[str], texts: list[str], cache: Path, progress: Told) -> tuple[Float32, Float32]:
    from turborank.distill.biencoder import BiEncoder

    model = BiEncoder.load(dense)
    return (
        vectors.embed(model, queries, cache, progress=progress("embed queries")),
        vectors.embed(model, texts, cache, progress=progress("embed passages")),
    )


def _write(out: Path, made: Collection, pools: mine.Pools) -> None:
    query_ids = [f"q{place}" for place in range(len(made.queries))]
    doc_ids = [f"d{place}" for place in range(len(made.texts))]
    with replacing(out / CORPUS) as file:
        for text, place in made.texts.items():
            file.write(_line({"_id": doc_ids[place], "text": text}))
    with replacing(out / QUERIES) as file:
        for text, place in made.queries.items():
            record = {"_id": query_ids[place], "text": text, "source": made.sources[place]}
            origin = made.made_from[place]
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


def _line(record: dict[str, str]) -> bytes:
    return (json.dumps(record, ensure_ascii=False) + "\n").encode("utf-8", "replace")


def _counts(made: Collection, pools: mine.Pools) -> dict[str, Any]:
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
