"""What a number depends on, written beside it."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from turborank import checkpoint as checkpoints
from turborank.evaluate.datasets import Dataset
from turborank.evaluate.scores import Header, QueryScores
from turborank.reranker import Reranker

LIBRARIES = ("turborank", "numpy", "tokenizers", "ir-measures", "pytrec-eval-terrier", "bm25s", "PyStemmer")
TIE_RULE = "measures break ties as trec_eval does: by document id, descending"


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "a source tree" if name == "turborank" else "not installed"


def cpu_name() -> str:
    """The processor, as it calls itself."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def about_system() -> dict[str, Any]:
    """Software and machine."""
    return {
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "platform": platform.platform(terse=True),
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "versions": {name: _version(name) for name in LIBRARIES},
    }


def about_dataset(dataset: Dataset) -> dict[str, Any]:
    """The collection, with its counts, its licence and what was noticed about it."""
    return {
        "name": dataset.name,
        "split": dataset.split,
        "queries": len(dataset.qrels),
        "documents": len(dataset.corpus),
        "judgements": sum(map(len, dataset.qrels.values())),
        "fingerprint": dataset.fingerprint,
        "licence": dataset.row.licence if dataset.row else "the owner's",
        "relevant_from": dataset.relevant_from,
        "notes": list(dataset.notes),
    }


def score_header(model: Reranker, dataset: Dataset, first_stage: str, depth: int) -> dict[str, Any]:
    """Everything a score depends on; threads and batches are not among it."""
    return {
        "format": 1,
        "dataset": dataset.fingerprint,
        "first_stage": first_stage,
        "depth": depth,
        "model": model.name,
        "weights": checkpoints.hashes(model.checkpoint)["model.safetensors"],
        "engine": model.engine.name,
        "precision": model.engine.precision,
        "isa": model.engine.isa,
        "max_length": model.max_length,
        "length": model.encoder.policy,
    }


def about_scores(model: Reranker, header: Header, scored: Sequence[QueryScores]) -> dict[str, Any]:
    """The model, how it was run, and what it read in what time."""
    tokens = np.asarray([count for scores in scored for count in scores.tokens], dtype=np.int64)
    truncated = np.asarray([count for scores in scored for count in scores.truncated], dtype=np.int64)
    seconds = np.asarray([scores.seconds for scores in scored], dtype=np.float64)
    total = float(seconds.sum())
    tied = sum(len(set(scores.logits)) < len(scores.logits) for scores in scored)
    facts: Mapping[str, Any] = {
        "model": {
            "name": model.name,
            "origin": model.checkpoint.origin,
            "revision": model.checkpoint.revision,
            "sha256": checkpoints.hashes(model.checkpoint),
            "architecture": model.checkpoint.config.architecture,
        },
        **{key: header[key] for key in ("engine", "precision", "isa", "max_length", "length")},
        "threads": model.engine.threads,
        "queries_scored": len(scored),
        "pairs": int(tokens.size),
        "tokens": int(tokens.sum()),
        "longest_pair": int(tokens.max(initial=0)),
        "pairs_truncated": int(np.count_nonzero(truncated)),
        "tokens_truncated": int(truncated.sum()),
        "seconds": round(total, 3),
        "tokens_per_second": round(float(tokens.sum()) / total, 1) if total else None,
        "seconds_per_query": {
            "median": round(float(np.median(seconds)), 4) if seconds.size else None,
            "p95": round(float(np.percentile(seconds, 95)), 4) if seconds.size else None,
        },
        "queries_with_ties": tied,
        "tie_rule": TIE_RULE,
    }
    return dict(facts)
