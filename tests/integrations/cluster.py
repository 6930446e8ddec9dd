"""Shared by the tests of Ray and Spark: a model with the same bits in every process, and pairs to score."""

import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
from helpers import native_config, write_checkpoint

from turborank import Reranker
from turborank.engines import native

PAIRS = 100_000 if native.available() is None else 2_000  # numpy is slow
# of the workers, which import the package and this module
PYTHONPATH = os.pathsep.join([str(Path(__file__).parents[2] / "src"), str(Path(__file__).parent), *sys.path])
WORDS = ("a bee", "the trees", "of the hive", "in the sun", "naïve 🐝", "and one")


def make_model(folder: Path) -> Path:
    """A small random model."""
    return write_checkpoint(folder / "model", native_config(num_hidden_layers=1))


def make_pairs(count: int = PAIRS) -> list[dict[str, Any]]:
    """Distinct pairs with ids."""
    rng = np.random.default_rng(0)
    words = rng.integers(0, len(WORDS), (count, 4))
    return [
        {"id": n, "query": WORDS[n % 5], "document": f"{n} " + " ".join(WORDS[word] for word in row)}
        for n, row in enumerate(words.tolist())
    ]


def expected_bits(folder: Path, pairs: list[dict[str, Any]]) -> bytes:
    """Logits of the library in this process, in the order of the pairs."""
    return Reranker(folder).score([(pair["query"], pair["document"]) for pair in pairs]).tobytes()


def bits(rows: list[dict[str, Any]]) -> bytes:
    """Logits of rows that came back in any order, each pair once."""
    rows = sorted(rows, key=lambda row: row["id"])
    assert [row["id"] for row in rows] == list(range(len(rows)))
    return np.array([row["logit"] for row in rows], dtype=np.float32).tobytes()
