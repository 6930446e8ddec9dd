"""Time import, load, first score, 100 documents from text and 8,192 tokens in one fresh process. Prints JSON.

    python bench/from_text.py THREADS [MODEL]

The documents are docstrings of the standard library, cut to the lengths of the ragged workload.
"""

from __future__ import annotations

import json
import sys
import time

start = time.perf_counter()
from turborank import Reranker  # noqa: E402 - the import is what is timed

imported = time.perf_counter()

ROUNDS = 7
MODULES = (
    "argparse", "asyncio", "collections", "decimal", "difflib", "doctest", "email", "json", "logging", "optparse", "os",
    "pathlib", "random", "shutil", "statistics", "string", "subprocess", "threading", "typing", "unittest",
)  # fmt: skip


def english() -> list[str]:
    """Words of docstrings, always in the same order."""
    import importlib

    out = []
    for name in MODULES:
        module = importlib.import_module(name)
        members = [module, *(value for key, value in sorted(vars(module).items()) if not key.startswith("_"))]
        out += [
            word
            for member in members
            if isinstance(doc := getattr(member, "__doc__", None), str)
            for word in doc.split()
        ]
    return out


def main() -> None:
    threads, model = int(sys.argv[1]), sys.argv[2] if len(sys.argv) > 2 else None
    reranker = Reranker(model, threads=threads)
    reranker.score([("how is a date written?", "As year, month and day.")])
    ready = time.perf_counter()

    from turborank import benchmark
    from turborank.types import Pair

    ids = benchmark.encodings(benchmark.LONG, reranker.checkpoint.config.vocab_size)
    scorer = benchmark.EngineScorer(reranker.engine, 16384)
    scorer(ids)
    peak = benchmark.peak_memory()

    words = english()
    pairs, at = [], 0
    for tokens in benchmark.WORKLOADS["ragged"].lengths:
        length = max(1, int((tokens - 12) / 1.5))  # this text has about 1.5 tokens per word
        pairs.append(Pair("how do I read the lines of a file?", " ".join(words[at : at + length])))
        at = (at + length) % (len(words) - 1000)
    encoded = [windows[0] for windows in reranker.encoder.encode(pairs)]
    whole, compute = [], []
    for _ in range(ROUNDS):
        began = time.perf_counter()
        reranker.score_detailed(pairs)
        between = time.perf_counter()
        scorer(encoded)
        whole.append(between - began)
        compute.append(time.perf_counter() - between)
    json.dump(
        {
            "import_s": imported - start, "first_score_s": ready - imported, "peak_8192_bytes": peak,
            "tokens": sum(map(len, encoded)), "from_text_s": min(whole), "compute_s": min(compute),
        },
        sys.stdout,
    )  # fmt: skip


main()
