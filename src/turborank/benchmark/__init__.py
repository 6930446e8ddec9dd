"""How fast, and how exact: every contestant in its own process, in turns, on the same tokens.

The model has the shape of jina-reranker-v1-turbo-en (37,771,777 parameters, its slopes) and random weights: speed does
not depend on the weights, except that ALiBi skipping sees logits of ordinary width. Speed is in real tokens per
second, padding not counted. Error is against the reference engine. All waiting processes are stopped while one works.
"""

from turborank.benchmark.comparison import compare, engines_here, error, exact_logits, speed
from turborank.benchmark.processes import (
    BATCH,
    Contestant,
    EngineScorer,
    Process,
    Turn,
    in_turns,
    load_engine,
    peak_memory,
    processes,
    worker,
)  # fmt: skip
from turborank.benchmark.workloads import (
    LONG,
    TURBO,
    WORKLOADS,
    encodings,
    random_weights,
    title,
    turbo_config,
    write_model,
)  # fmt: skip

__all__ = [
    "BATCH", "LONG", "TURBO", "WORKLOADS", "Contestant", "EngineScorer", "Process", "Turn", "compare", "encodings",
    "engines_here", "error", "exact_logits", "in_turns", "load_engine", "peak_memory", "processes", "random_weights",
    "speed", "title", "turbo_config", "worker", "write_model",
]  # fmt: skip
