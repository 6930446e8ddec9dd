"""Overhead of Ray and Spark over the library on one machine: both score the same pairs, alternately, on all cores.

    python bench/scale.py ray --pairs 20000 --repeats 5
    python bench/scale.py spark --pairs 20000 --repeats 5

Prints wall seconds of each run and the ratio of each pair of runs, with its median and range; the machine must have no
other work. The cluster is started, and a small run made, before the clock starts. Each engine has as many workers of
one thread as the machine has cores; the library has one process of as many threads.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from turborank import Reranker
from turborank.engines import allowed_cores

WORDS = Path(__file__).parents[1] / "examples" / "texts"
Pairs = list[dict[str, Any]]
Scorer = Callable[[Pairs], bytes]


def make_pairs(count: int) -> Pairs:
    """Passages of 40 to 120 words from the example texts, and questions of eight."""
    words = " ".join(path.read_text(encoding="utf-8") for path in sorted(WORDS.glob("*.md"))).split()
    rng = np.random.default_rng(0)
    pairs = []
    for number in range(count):
        start, length, query = rng.integers(len(words) - 120), rng.integers(40, 120), rng.integers(len(words) - 8)
        document = " ".join(words[start : start + length])
        pairs.append({"id": number, "query": " ".join(words[query : query + 8]), "document": document})
    return pairs


def bits(ids: Any, logits: Any) -> bytes:
    """Logits in the order of ids, as bytes."""
    return np.asarray(logits, np.float32)[np.argsort(np.asarray(ids))].tobytes()


def ray_scorer(cores: int) -> Scorer:
    """A pool of actors, one for each core."""
    import ray

    from turborank.integrations.ray import BatchReranker

    ray.init(num_cpus=cores, include_dashboard=False, log_to_driver=False)
    ray.data.DataContext.get_current().enable_progress_bars = False

    def score(pairs: Pairs) -> bytes:
        data = ray.data.from_items(pairs, override_num_blocks=4 * cores)
        table = data.map_batches(BatchReranker, concurrency=cores, num_cpus=1, batch_size=2048).to_pandas()
        return bits(table["id"], table["logit"])

    return score


def spark_scorer(cores: int) -> Scorer:
    """A local executor, one task a core."""
    import pandas
    from pyspark.sql import SparkSession

    from turborank.integrations.spark import score as score_frame

    os.environ.setdefault("PYSPARK_PYTHON", sys.executable)
    session = (
        SparkSession.builder.master(f"local[{cores}]").config("spark.ui.enabled", "false")
        .config("spark.driver.host", "127.0.0.1")
        .config("spark.sql.execution.arrow.pyspark.enabled", "true").getOrCreate()
    )  # fmt: skip
    session.sparkContext.setLogLevel("OFF")

    def score(pairs: Pairs) -> bytes:
        frame = session.createDataFrame(pandas.DataFrame(pairs)).repartition(2 * cores)
        table = score_frame(frame).select("id", "logit").toPandas()
        return bits(table["id"], table["logit"])

    return score


def main() -> None:
    """Run both in turn."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("engine", choices=("ray", "spark"))
    parser.add_argument("--pairs", type=int, default=20_000)
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    cores = allowed_cores()
    pairs = make_pairs(arguments.pairs)
    reranker = Reranker()
    scorer = ray_scorer(cores) if arguments.engine == "ray" else spark_scorer(cores)
    scorer(pairs[: 64 * cores])

    def library(pairs: Pairs) -> bytes:
        return reranker.score([(pair["query"], pair["document"]) for pair in pairs]).tobytes()

    ratios = []
    for _ in range(arguments.repeats):
        seconds, found = [], []
        for score in (library, scorer):
            started = time.monotonic()
            found.append(score(pairs))
            seconds.append(time.monotonic() - started)
        ratios.append(seconds[1] / seconds[0])
        same = "same bits" if found[0] == found[1] else "DIFFERENT BITS"
        print(
            f"library {seconds[0]:.1f} s, {arguments.engine} {seconds[1]:.1f} s, {ratios[-1]:.3f}, {same}", flush=True
        )
    print(
        f"{reranker!r}: {arguments.engine} takes {statistics.median(ratios):.3f} times as long as the library "
        f"({min(ratios):.3f} to {max(ratios):.3f}; {len(ratios)} pairs of runs, {len(pairs):,} pairs, {cores} cores)"
    )


if __name__ == "__main__":
    main()
