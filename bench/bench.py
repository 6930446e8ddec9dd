"""CPU benchmark of turborank and peers in one run: speed and error of each; rows that turborank loses are kept.

Stages can be resumed and are short, so that the machine must be idle only for minutes at a time:

    prepare   a random checkpoint of the turbo shape, the reference engine's logits, the peers' model formats
    tune      the best batch size and number of streams of each peer on each workload
    run       the workloads, all contestants alternating
    long      one pair of 8,192 tokens, one process at a time: speed and peak memory
    peaks     peak throughput of the processor's instructions (peak.c)
    gemms     each matrix product of the native engine on one core, compared with its instruction's peak
    prepare-families  random checkpoints in the shapes of --families, transformers' logits, the peers' formats
    families  those shapes, ours and the peers of peers.FAMILY_PEERS, each with batches of 32 and of --sizes
    catalog   the speed of ours on every model of the catalog, in its shape
    text      turborank from text to scores; load time; memory
    report    JSON, a Markdown table and docs/roofline.svg

prepare-families, families and catalog keep what they have found and continue there when they are called again.
``--cap avx512vnni`` or ``--cap avx2`` makes tune, run and long use no newer instructions (caps.py).
runs/bench.sh has the commands behind the committed results.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import caps
import peers
import report
from catalog_models import FAMILIES, FAMILY_SIZES, FAMILY_WORKLOADS, SHAPED, catalog_speed, families, prepare_families
from contestants import NEEDED_GB, State, convert, free_gb, ours, theirs, tokenizer_file
from peers import FAMILY_PEERS, PEERS

from turborank import benchmark
from turborank.benchmark import BATCH, LONG, WORKLOADS, Process, Turn

HERE = Path(__file__).resolve().parent
SHORT = tuple(w for w in WORKLOADS if w != LONG)
SIZES = (1, 2, 4, 8, 16, 32)
GEMM_WORKLOAD = "32x128"  # short pairs, so that attention skips no block
FASTEST = 3  # tuned peers measured in turn with turborank; the table of tuning has the others


def environments(state: State, arguments: argparse.Namespace) -> dict[str, dict[str, str]]:
    """Environments in which contestants use no newer instructions than ``--cap``; peers without one are dropped."""
    held = caps.held(arguments.cap, state.path.parent, arguments.peers)
    arguments.peers = [name for name in arguments.peers if name in held.environments]
    notes = state.found.setdefault("notes", [])
    notes += [note for note in held.notes if note not in notes]
    return held.environments


def prepare(state: State, arguments: argparse.Namespace) -> None:
    if not (state.model / "model.safetensors").exists():
        benchmark.write_model(state.model, tokenizer_file(arguments.tokenizer))
    for name in arguments.peers:
        convert(name, state.model)
    exact = state.part("exact")
    for workload in WORKLOADS:
        if workload not in exact:
            exact[workload] = benchmark.exact_logits(state.model, workload)
            state.save()


def tune(state: State, arguments: argparse.Namespace) -> None:
    """Minimum seconds of at least two calls for every batch size, as {workload: {contestant: {size: s}}}.

    The minimum excludes the cost of the first call of a shape, for which some libraries compile a kernel.
    """
    envs = environments(state, arguments)
    for contestant in theirs(arguments.peers, envs):
        with benchmark.processes([contestant], state.model, arguments.threads) as running:
            for workload in arguments.workloads:
                sizes = [b for b in arguments.sizes or SIZES if b <= len(WORKLOADS[workload].lengths)]
                found = state.part("tuned", arguments.cap, workload, contestant.name)
                for size in sizes:
                    first = running[contestant.name].time(workload, size, 0.0)
                    again = running[contestant.name].time(workload, size, 0.1)
                    found[str(size)] = min(first + again)
        state.save()
        print(f"tuned {contestant.name}", flush=True)


def best(state: State, cap: str, workload: str, name: str) -> tuple[float, Turn]:
    """Seconds of a peer's best batch size and number of streams, and (contestant, batch size)."""
    tuned = state.part("tuned", cap, workload)
    pairs = len(WORKLOADS[workload].lengths)
    tried = [
        (seconds, (contestant.name, BATCH if int(size) == pairs else int(size)))  # one batch, as users run it
        for contestant in theirs([name], {})
        for size, seconds in tuned.get(contestant.name, {}).items()
    ]
    return min(tried, default=(float("inf"), (name, BATCH)))


def run(state: State, arguments: argparse.Namespace) -> None:
    """Measure alternately every contestant with default settings (batch 32, one stream) and the fastest ones tuned."""
    envs = environments(state, arguments)
    us = ours(arguments.cap, envs[caps.OURS], arguments.precisions)
    turns: dict[str, list[Turn]] = {}
    for workload in arguments.workloads:
        turns[workload] = [(c.name, BATCH) for c in us] + [(name, BATCH) for name in arguments.peers]
        tuned = sorted(best(state, arguments.cap, workload, name) for name in arguments.peers)
        turns[workload] += [turn for _, turn in tuned[:FASTEST] if turn not in turns[workload]]
    wanted = {name for each in turns.values() for name, _ in each}
    contestants = [c for c in us + theirs(arguments.peers, envs) if c.name in wanted]
    with benchmark.processes(contestants, state.model, arguments.threads) as running:
        about = {c.name: running[c.name].about | {"label": c.label} for c in contestants}
        state.part("about", arguments.cap).update(about)
        for workload, each in turns.items():
            took = benchmark.in_turns(running, {workload: each}, arguments.rounds)[workload]
            found = state.part("runs", arguments.cap, workload)
            found.clear()
            for (name, batch), seconds in took.items():
                logits = running[name].logits(workload, batch)
                found[f"{name} b{batch}"] = benchmark.speed(workload, seconds) | {"logits": logits}
            state.save()
            print(f"{workload}: done", flush=True)


def long(state: State, arguments: argparse.Namespace) -> None:
    """8,192 tokens, each contestant alone in a process; three calls, or one if a call takes over ten seconds."""
    envs = environments(state, arguments)
    found = state.part("runs", arguments.cap, LONG)
    for contestant in [
        *ours(arguments.cap, envs[caps.OURS], arguments.precisions),
        *(c for c in theirs(arguments.peers, envs) if "/" not in c.name),
    ]:
        key = f"{contestant.name} b{BATCH}"
        needed = NEEDED_GB.get(contestant.name, 1)
        if free_gb() < needed:
            print(f"left out {contestant.name}: {needed} GB needed, {free_gb():.1f} GB free", flush=True)
            continue
        process = Process(contestant, state.model, arguments.threads)
        try:
            logits = process.logits(LONG, BATCH)
            took = process.time(LONG, BATCH, 5.0)
            found[key] = benchmark.speed(LONG, took) | {"logits": logits, "peak_bytes": process.peak()}
            state.part("about", arguments.cap)[contestant.name] = process.about | {"label": contestant.label}
        finally:
            process.close()
        state.save()
        print(f"{key}: {found[key]['tokens_s']:.0f} tokens/s, {found[key]['peak_bytes'] / 1e6:.0f} MB", flush=True)


def peaks(state: State, arguments: argparse.Namespace) -> None:
    """Instruction peaks of one core and memory read bandwidth."""
    program = state.path.parent / "peak"
    subprocess.run(["gcc", "-O2", "-o", program, HERE / "peak.c"], check=True)
    state.part("peaks").update(json.loads(subprocess.run([program], check=True, capture_output=True).stdout))
    state.save()
    print(state.part("peaks"))


# int8 kernel -> peak.c's name.
PEAK_OF = {
    "tdpbssd": "tdpbssd", "vpdpbusd": "vpdpbusd", "vpdpbusd ymm": "vpdpbusd_ymm", "vpmaddwd": "vpmaddwd_ymm",
    "vpmaddubsw": "vpmaddubsw_ymm",
}  # fmt: skip
# Instruction set and type of attention -> peak.c's name.
ATTENTION_PEAK = {
    ("amx", "bf16"): "tdpbf16ps", ("avx512vnni", "bf16"): "vdpbf16ps", ("avx512vnni", "fp32"): "fma_zmm",
    ("avxvnni", "fp32"): "fma_ymm", ("avx2", "fp32"): "fma_ymm",
}  # fmt: skip


def gemms(state: State, arguments: argparse.Namespace) -> None:
    """Operations per second of each product inside the engine on one core, fused operations included."""
    from turborank import checkpoint
    from turborank.engines import native

    given = checkpoint.read(state.model)
    needed = report.product_operations(GEMM_WORKLOAD)
    for isa in (isa for isa in native.isas() if isa != "portable"):
        os.environ[native.ISA_VARIABLE] = isa
        engine = native.prepare(given.weights, given.config, threads=1)
        scorer = benchmark.EngineScorer(engine, 1 << 20)
        pairs = benchmark.encodings(GEMM_WORKLOAD, given.config.vocab_size)
        least = dict.fromkeys(needed, float("inf"))
        for _ in range(arguments.rounds):
            before = engine.spent()
            scorer(pairs)
            least = {part: min(least[part], engine.spent()[part] - before[part]) for part in needed}
        os.environ.pop(native.ISA_VARIABLE)
        found = state.part("gemms", isa)
        for part, operations in needed.items():
            instruction = ATTENTION_PEAK[isa, engine.attention] if part == "attention" else PEAK_OF[engine.kernel]
            peak = state.part("peaks")[instruction]
            found[part] = {"gops": operations / least[part] * 1e-9, "share": operations / least[part] * 1e-9 / peak}
            print(f"{isa} {part}: {found[part]['gops']:.0f} Gop/s, {found[part]['share']:.0%}", flush=True)
    state.save()


def text(state: State, arguments: argparse.Namespace) -> None:
    """turborank from text, in fresh processes: the cost of tokenisation and the time to the first score."""
    rows = []
    for _ in range(arguments.rounds):
        done = subprocess.run(
            [
                sys.executable,
                HERE / "from_text.py",
                str(arguments.threads),
                *([arguments.model] if arguments.model else []),
            ],
            check=True,
            capture_output=True,
            text=True,
            env=os.environ | {"HF_HUB_OFFLINE": "1"},
        )
        rows.append(json.loads(done.stdout))
    state.part("text").update({key: min(row[key] for row in rows) for key in rows[0]})
    state.save()
    print(state.part("text"))


STAGES = {
    "prepare": prepare, "tune": tune, "run": run, "long": long, "peaks": peaks, "gemms": gemms,
    "prepare-families": prepare_families, "families": families, "catalog": catalog_speed, "text": text,
    "report": report.write,
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=tuple(STAGES), nargs="+")
    parser.add_argument("--work", type=Path, default=Path("build/bench"), help="exports and interim results")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--cap", choices=caps.CAPS, default="none")
    every = PEERS | FAMILY_PEERS
    parser.add_argument("--peers", nargs="*", default=list(every), choices=list(every))
    parser.add_argument(
        "--precisions", nargs="*", default=["int8", "bf16", "fp32"], help="of ours, for run, long and families"
    )
    parser.add_argument(
        "--sizes", nargs="*", type=int, help=f"batch sizes to try: tune {SIZES}, families {FAMILY_SIZES}"
    )
    parser.add_argument("--workloads", nargs="*", default=list(SHORT), choices=SHORT)
    parser.add_argument("--families", nargs="*", default=list(FAMILIES), choices=SHAPED)
    parser.add_argument("--family-workloads", nargs="*", default=list(FAMILY_WORKLOADS), choices=FAMILY_WORKLOADS)
    parser.add_argument("--tokenizer", type=Path)
    parser.add_argument("--out", type=Path, help="results without their suffix; by default results/DATE-PROCESSOR")
    parser.add_argument("--plot", type=Path, default=HERE.parent / "docs" / "roofline.svg")
    parser.add_argument("--model", help="for the stage text: a model's folder; by default the embedded one")
    arguments = parser.parse_args()
    arguments.work = arguments.work.resolve()
    arguments.work.mkdir(parents=True, exist_ok=True)
    missing = [name for name in arguments.peers if peers.installed(every[name]) is None]
    for name in missing:
        print(f"left out {name}: it needs {', '.join(every[name].needs)}", file=sys.stderr)
    ready = [name for name in arguments.peers if name not in missing]
    arguments.peers = [name for name in ready if name in PEERS]
    arguments.family_peers = [name for name in ready if name in FAMILY_PEERS]
    state = State(arguments.work)
    for stage in arguments.stage:
        STAGES[stage](state, arguments)


if __name__ == "__main__":
    main()
