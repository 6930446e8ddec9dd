"""``turborank doctor`` and ``turborank bench``: check the installation and the scores; measure speed."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from turborank import cli
from turborank.errors import TurborankError

if TYPE_CHECKING:
    from turborank.reranker import Reranker
    from turborank.types import Engine, ModelConfig

EXAMPLES = (
    ("check the installation, and show which engine is used", "turborank doctor"),
    ("check your own model with the reference engine", "turborank doctor --model ./my-model --engine reference"),
)


def doctor(
    model: cli.Model = None,
    engine: cli.Engine = "auto",
    precision: cli.Precision = "auto",
    as_json: cli.AsJson = False,
) -> int:
    """Check this installation: versions, CPU, engines, model files, and the scores of two documents.

    The exit code is 1 if a check fails. Include the output in problem reports.
    """
    findings = list(examine(model, engine=engine, precision=precision))
    broken = [finding for finding in findings if not finding.well]
    if as_json:
        import json

        print(json.dumps([finding._asdict() for finding in findings], ensure_ascii=False))
        return 1 if broken else 0
    topic = ""
    for finding in findings:
        if finding.topic != topic:
            topic = finding.topic
            print(f"{topic}")
        print(f"  {'ok    ' if finding.well else 'BROKEN'}  {finding.what:<24} {finding.value}")
    print(
        f"\n{len(broken)} broken: {', '.join(finding.what for finding in broken)}" if broken else "\nall checks passed"
    )
    return 1 if broken else 0


# The checks. They yield findings and print nothing.

LIBRARIES = ("turborank", "numpy", "tokenizers", "safetensors", "huggingface-hub", "typer", "rich")
OPTIONAL = ("torch", "starlette", "msgspec", "ir-measures", "bm25s")
# CPU features that the native kernels use, by their names in /proc/cpuinfo.
CPU_FLAGS = (
    "avx2", "fma", "f16c", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8", "amx_bf16",
    "asimd", "asimddp", "i8mm", "bf16",
)  # fmt: skip
# A query with a relevant and an irrelevant document; a working reranker separates them clearly.
QUERY = "What is the capital of France?"
DOCUMENTS = ("Paris is the capital and largest city of France.", "Yeast makes bread rise by giving off gas.")
MAX_DIFFERENCE = 0.5  # maximum distance from the reference engine's logits; int8 usually stays below a tenth of it


class Finding(NamedTuple):
    """The result of one check. ``well`` is False when the check fails."""

    topic: str
    what: str
    value: str
    well: bool = True


def examine(model: str | None = None, *, engine: str = "auto", precision: str = "auto") -> Iterator[Finding]:
    """All findings: versions, machine, engines, then the model and its scores."""
    yield from versions()
    yield from machine()
    yield from available_engines()
    yield from ranking(model, engine, precision)


def versions() -> Iterator[Finding]:
    yield Finding("versions", "python", f"{platform.python_version()} on {platform.platform()}")
    for name in (*LIBRARIES, *OPTIONAL):
        try:
            yield Finding("versions", name, importlib.metadata.version(name))
        except importlib.metadata.PackageNotFoundError:
            needed = name in LIBRARIES and name != "turborank"  # a source tree on the path has no version but works
            yield Finding("versions", name, "not installed" + ("" if needed else " (optional)"), well=not needed)


def machine() -> Iterator[Finding]:
    from turborank.engines import cores

    name, flags = _cpu()
    yield Finding("machine", "cpu", name)
    yield Finding("machine", "features", " ".join(flag for flag in CPU_FLAGS if flag in flags) or "unknown")
    found = cores.limits()
    yield Finding("machine", "cores", f"{cores.allowed(found)} of {os.cpu_count()} may be used")
    for limit in found:
        yield Finding("machine", "", f"{limit.cores:g} by the {limit.source}")
    yield from threads()


def threads() -> Iterator[Finding]:
    """Threads of the libraries (tokenizers, numpy, torch), each with the variable that sets them."""
    from turborank.engines import cores
    from turborank.tokens import PARALLELISM, library_parallelism

    ours = "threads of the engine, started for each large list"
    others = f"the library's own, one per core ({PARALLELISM}={os.environ.get(PARALLELISM)})"
    yield Finding("machine", "tokenizer threads", others if library_parallelism() else ours)
    for what, variable in (("numpy threads", "OPENBLAS_NUM_THREADS"), ("torch threads", "OMP_NUM_THREADS")):
        value = os.environ.get(variable)
        default = f"at most {cores.allowed()}" if what.startswith("torch") else "one per core of the affinity mask"
        yield Finding("machine", what, f"{value} by {variable}" if value else f"{default}; {variable} is not set")


def _cpu() -> tuple[str, set[str]]:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return platform.processor() or platform.machine(), set()
    facts = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    flags = facts.get("flags") or facts.get("Features") or ""
    return facts.get("model name") or platform.machine(), set(flags.split())


def available_engines() -> Iterator[Finding]:
    from turborank import engines
    from turborank.engines import native

    yield Finding("engines", "compiled by", native.build())
    for name, row in engines.ENGINES.items():
        reason = row.available()
        usable = f"usable: {', '.join(row.precisions)}; {row.note}"
        yield Finding("engines", name, usable if reason is None else f"not usable: {reason}")


def ranking(model: str | None, engine: str, precision: str) -> Iterator[Finding]:
    """The model's files, the chosen engine with the reason, and two scores compared with the reference engine's."""
    from turborank import checkpoint as checkpoints
    from turborank.reranker import Reranker

    try:
        reranker = Reranker(model, engine=engine, precision=precision)
    except TurborankError as error:
        yield Finding("model", "loading", str(error), well=False)
        return
    checkpoint, chosen = reranker.checkpoint, reranker.engine
    yield Finding("model", "name", f"{reranker.name} ({checkpoint.origin}, revision {checkpoint.revision or 'none'})")
    yield Finding("model", "folder", str(checkpoint.folder))
    for name, digest in checkpoints.hashes(checkpoint).items():
        yield Finding("model", name, f"sha256 {digest}")
    isa = f", {chosen.isa}" if chosen.isa else ""
    yield Finding("engine", "chosen", f"{chosen.name}, {chosen.precision}{isa}, {chosen.threads} threads")
    yield Finding("engine", "because", _why(engine, chosen.name, checkpoint.config))
    yield from _instruction_set(chosen)
    try:
        yield from _scores(reranker)
    except TurborankError as error:
        yield Finding("score", "ranking", str(error), well=False)


def _instruction_set(engine: Engine) -> Iterator[Finding]:
    """The native engine's instruction set, and the faster ones with the reason why they are not used."""
    from turborank.engines import native

    if not isinstance(engine, native.NativeEngine):
        return
    runs = f"{engine.isa}: products by {engine.kernel}, attention in {engine.attention}"
    yield Finding("engine", "instruction set", runs)
    for row, reason in native.better(engine.isa, engine.precision).items():
        yield Finding("engine", f"not {row}", reason)


def _why(asked: str, got: str, config: ModelConfig) -> str:
    from turborank import engines

    if asked != "auto":
        return "requested with --engine"
    if override := os.environ.get("TURBORANK_ENGINE"):
        return f"TURBORANK_ENGINE={override}"
    better = engines.AUTOMATIC[: engines.AUTOMATIC.index(got)]
    why_not = [f"{name} {_why_not(name, config)}" for name in better]
    return "; ".join([*why_not, f"{got} is the {'first' if not better else 'next'} choice"])


def _why_not(name: str, config: ModelConfig) -> str:
    from turborank import engines

    row = engines.ENGINES[name]
    if row.available() is not None:
        return "is not usable"
    return "does not have this precision" if row.supports(config) else "does not support this model's shape"


def _scores(reranker: Reranker) -> Iterator[Finding]:
    from turborank.reranker import Reranker

    pairs = [(QUERY, document) for document in DOCUMENTS]
    logits = reranker.score(pairs)
    reference = Reranker(str(reranker.checkpoint.folder), engine="reference").score(pairs)
    difference = float(abs(logits - reference).max())
    yield Finding("score", "answer", f"logit {logits[0]:+.4f} for {DOCUMENTS[0]!r}")
    yield Finding("score", "other", f"logit {logits[1]:+.4f} for {DOCUMENTS[1]!r}")
    yield Finding("score", "error", f"{difference:.4f} from the reference engine", well=difference <= MAX_DIFFERENCE)


BENCH_EXAMPLES = (
    ("compare the engines, precisions and instruction sets of this machine", "turborank bench"),
    ("compare with other libraries, from a checkout of turborank", "turborank bench --peers bench/peers.py"),
    ("JSON output", "turborank bench --workload 32x128 --json"),
)

Workloads = Annotated[
    list[str] | None,
    typer.Option(
        "--workload",
        "-w",
        help="Pairs × tokens: 32x128, 8x512, 2x2048, 1x64, 1x8192, or ragged (mixed lengths); repeatable.",
        show_default="ragged, 32x128, 8x512 and 1x64",
    ),
]
Rounds = Annotated[int, typer.Option(min=1, help="Rounds of measurement on each workload.")]
Peers = Annotated[
    Path | None,
    typer.Option(help="Python file with a table PEERS of other libraries; those not installed are skipped."),
]
Fast = Annotated[
    bool, typer.Option("--no-error", help="Do not measure the error, which needs the slow reference engine.")
]


def bench(
    workload: Workloads = None,
    rounds: Rounds = 3,
    threads: cli.Threads = None,
    peers: Peers = None,
    no_error: Fast = False,
    as_json: cli.AsJson = False,
) -> None:
    """Measure speed in tokens per second, and the error against the reference engine.

    The model has the shape of jina-reranker-v1-turbo-en and random weights. Each engine runs in its own process; they
    are measured in turns. Padding is not counted as tokens.
    """
    from turborank import benchmark

    found = benchmark.compare(
        workloads=workload or ["ragged", "32x128", "8x512", "1x64"], rounds=rounds, threads=threads,
        peers=peers, errors=not no_error,
    )  # fmt: skip
    if as_json:
        import json

        print(json.dumps(found))
        return
    from rich.console import Console
    from rich.table import Table

    console = Console(width=cli.width(), highlight=False, markup=False)
    for name, rows in found["workloads"].items():
        table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
        table.add_column(benchmark.title(name), overflow="fold")
        for column in ("tokens/s", "min ms", "median ms", "max error", "rms, of std"):
            table.add_column(column, justify="right")
        for row in sorted(rows, key=lambda row: float(row["min_s"])):
            table.add_row(*_cells(row))
        console.print(table)
        console.print()
    for name, reason in found["left_out"].items():
        console.print(f"left out {name}: {reason}")


def _cells(row: dict[str, Any]) -> list[str]:
    share = row.get("rms_share")
    return [
        str(row["label"]), f"{row['tokens_s']:,.0f}", f"{1e3 * row['min_s']:,.2f}", f"{1e3 * row['median_s']:,.2f}",
        f"{row['max']:.1e}" if "max" in row else "–", "–" if share is None else f"{share:.2%}",
    ]  # fmt: skip
