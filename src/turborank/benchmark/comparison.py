"""Speed beside error, for everything that can run on this machine."""

from __future__ import annotations

import importlib.util
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from turborank.benchmark.processes import BATCH, Contestant, function, in_turns, load_engine, processes
from turborank.benchmark.workloads import WORKLOADS, encodings, sizes, write_model
from turborank.errors import InputError, UnknownKeyError


def speed(workload: str, took: Sequence[float]) -> dict[str, float]:
    """Seconds (least and median) and real tokens per second, from the least."""
    tokens = sum(WORKLOADS[workload].lengths)
    return {"min_s": min(took), "median_s": float(np.median(took)), "tokens_s": tokens / min(took), "calls": len(took)}


def error(logits: Sequence[float], exact: Sequence[float]) -> dict[str, float | None]:
    """Distance from the reference engine's logits; ``rms_share`` is the rms error over their standard deviation."""
    got, want = np.asarray(logits, np.float64), np.asarray(exact, np.float64)
    rms = float(np.sqrt(np.mean((got - want) ** 2)))
    many = len(want) > 2
    ranks = [np.argsort(np.argsort(x)) for x in (got, want)]
    return {
        "max": float(np.abs(got - want).max()), "rms": rms,
        "rms_share": rms / float(want.std()) if many else None,
        "spearman": float(np.corrcoef(ranks[0], ranks[1])[0, 1]) if many else None,
    }  # fmt: skip


def exact_logits(model: Path, workload: str) -> list[float]:
    """The reference engine's logits (P,); slow."""
    scorer = load_engine(model, 1, {"engine": "reference"})
    return [float(x) for x in scorer(encodings(workload, *sizes(model)))]


def engines_here() -> list[Contestant]:
    """Our engines that can run on this machine: every precision of every instruction set, and torch if installed."""
    from turborank.engines import ENGINES, native

    out = [
        Contestant(
            f"{isa}-{precision}",
            f"turborank {precision}, {isa}",
            options={"engine": "native", "precision": precision},
            env={native.ISA_VARIABLE: isa},
        )
        for isa in native.isas()
        for precision in native.precisions(isa)
    ]
    if ENGINES["torch"].available() is None:
        precision = ENGINES["torch"].automatic()
        label = f"turborank {precision}, torch"
        out.append(Contestant("torch", label, options={"engine": "torch", "precision": precision}))
    return out


def _peers(file: Path, model: Path) -> tuple[list[Contestant], dict[str, str]]:
    """Rows of a PEERS table (see bench/peers.py) that can run, prepared; and why others cannot."""
    file = file.resolve()
    if not file.is_file():
        raise InputError(f"expected a Python file with a table PEERS, got no file at {file}")
    ready, left_out = [], {}
    for name, row in function(f"{file}:PEERS").items():
        missing = [need for need in row.needs if importlib.util.find_spec(need) is None]
        if missing:
            left_out[name] = f"not installed: {', '.join(missing)}"
            continue
        try:
            if row.prepare is not None:
                row.prepare(model, row.options)
        except Exception as error:  # a peer's failure is a line of the report, whatever its library raises
            left_out[name] = f"{type(error).__name__}: {error}".splitlines()[0]
            continue
        ready.append(Contestant(name, row.label, f"{file}:{row.load.__name__}", row.options))
    return ready, left_out


def compare(
    *, workloads: Sequence[str], rounds: int, threads: int | None = None, peers: Path | None = None, errors: bool = True
) -> dict[str, Any]:
    """Everything that can run here, on each of ``workloads``: rows with speed and error; and what was left out, why."""
    from turborank import catalog
    from turborank.engines import allowed_cores
    from turborank.reranker import MAX_THREADS, whole

    threads = allowed_cores() if threads is None else whole("threads", threads, most=MAX_THREADS)
    for workload in workloads:
        if workload not in WORKLOADS:
            raise UnknownKeyError("workload", workload, tuple(WORKLOADS))
    with tempfile.TemporaryDirectory(prefix="turborank-bench-") as folder:
        model = Path(folder)
        write_model(model, catalog.lookup(catalog.DEFAULT).folder / "tokenizer.json")
        contestants = engines_here()
        others, left_out = _peers(peers, model) if peers is not None else ([], {})
        contestants += others
        if not contestants:
            contestants = [Contestant("reference", "turborank fp32, numpy", options={"engine": "reference"})]
        labels = {contestant.name: contestant.label for contestant in contestants}
        found: dict[str, list[dict[str, Any]]] = {workload: [] for workload in workloads}
        with processes(contestants, model, threads) as running:
            took = in_turns(running, {w: [(name, BATCH) for name in running] for w in workloads}, rounds)
            for workload, each in took.items():
                exact = exact_logits(model, workload) if errors else None
                for (name, batch), seconds in each.items():
                    row: dict[str, Any] = {"name": name, "label": labels[name], **speed(workload, seconds)}
                    if exact is not None:
                        row |= error(running[name].logits(workload, batch), exact)
                    found[workload].append(row)
    return {"workloads": found, "left_out": left_out}
