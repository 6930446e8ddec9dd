"""CPU benchmark of turborank and peers in one run: speed and error of each; rows that turborank loses are kept.

Stages can be resumed and are short, so that the machine must be idle only for minutes at a time:

    prepare   a random checkpoint of the turbo shape, the reference engine's logits, the peers' model formats
    tune      the best batch size and number of streams of each peer on each workload
    run       the workloads, all contestants alternating
    long      one pair of 8,192 tokens, one process at a time: speed and peak memory
    peaks     peak throughput of the processor's instructions (peak.c)
    gemms     each matrix product of the native engine on one core, compared with its instruction's peak
    families  the other architectures in the shapes of published rerankers, compared with transformers
    text      turborank from text to scores; load time; memory
    report    JSON, a Markdown table and docs/roofline.svg

``--cap avx512vnni`` or ``--cap avx2`` makes tune, run and long use no newer instructions (caps.py).
runs/bench.sh has the commands behind the committed results.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import caps
import peers
import report
from peers import PEERS

from turborank import benchmark
from turborank.benchmark import BATCH, LONG, WORKLOADS, Contestant, Process, Turn

HERE = Path(__file__).resolve().parent
SHORT = tuple(w for w in WORKLOADS if w != LONG)
SIZES = (1, 2, 4, 8, 16, 32)
GEMM_WORKLOAD = "32x128"  # short pairs, so that attention skips no block
FASTEST = 3  # tuned peers measured in turn with turborank; the table of tuning has the others
NEEDED_GB = {
    "ort": 23,
    "ort-int8": 23,
    "ort-int8-cls": 23,
    "torch": 9,
    "ov": 5,
    "ov-cls": 5,
    "ov-weights": 5,
}  # at 8,192


class State:
    """The results of all stages, in one JSON file to which each stage adds."""

    def __init__(self, work: Path) -> None:
        self.path = work / "state.json"
        self.model = work / "model"
        self.found: dict[str, Any] = json.loads(self.path.read_text()) if self.path.exists() else {}

    def part(self, *keys: str) -> dict[str, Any]:
        """The nested dictionary at ``keys``, created if missing."""
        at = self.found
        for key in keys:
            at = at.setdefault(key, {})
        return at

    def save(self) -> None:
        self.path.write_text(json.dumps(self.found, indent=1))


def environments(state: State, arguments: argparse.Namespace) -> dict[str, dict[str, str]]:
    """Environments in which contestants use no newer instructions than ``--cap``; peers without one are dropped."""
    held = caps.held(arguments.cap, state.path.parent, arguments.peers)
    arguments.peers = [name for name in arguments.peers if name in held.environments]
    notes = state.found.setdefault("notes", [])
    notes += [note for note in held.notes if note not in notes]
    return held.environments


def ours(cap: str, env: dict[str, str], wanted: list[str]) -> list[Contestant]:
    """The native engine in each requested precision that the instruction set supports."""
    from turborank.engines import native

    isa = native.isas()[0] if cap == "none" else cap
    return [
        Contestant(
            f"turborank-{precision}",
            f"turborank {precision} ({isa})",
            options={"engine": "native", "precision": precision},
            env=env | {"TURBORANK_ISA": isa},
        )
        for precision in native.precisions(isa)
        if precision in wanted
    ]


def theirs(names: list[str], envs: Mapping[str, dict[str, str]]) -> list[Contestant]:
    """The peers, once for every number of streams: "ov" and "ov/2"."""
    return [
        Contestant(
            name if streams == 1 else f"{name}/{streams}",
            PEERS[name].label,
            f"{HERE / 'peers.py'}:{PEERS[name].load.__name__}",
            PEERS[name].options | {"streams": streams},
            envs.get(name, {}),
        )
        for name in names
        for streams in PEERS[name].streams
    ]


def prepare(state: State, arguments: argparse.Namespace) -> None:
    if not (state.model / "model.safetensors").exists():
        benchmark.write_model(state.model, tokenizer_file(arguments.tokenizer))
    for name in arguments.peers:
        if PEERS[name].prepare is not None:  # in a separate process: exporters use gigabytes and leave threads running
            code = f"import pathlib, peers; p = peers.PEERS[{name!r}]; p.prepare(pathlib.Path({str(state.model)!r}), "
            code += "p.options)"
            subprocess.run([sys.executable, "-c", code], check=True, cwd=HERE)
    exact = state.part("exact")
    for workload in WORKLOADS:
        if workload not in exact:
            exact[workload] = benchmark.exact_logits(state.model, workload)
            state.save()


def tokenizer_file(given: Path | None) -> Path:
    """The embedded model's tokenizer, unless another is given."""
    if given is None:
        from turborank import catalog

        given = catalog.lookup(catalog.DEFAULT).folder / "tokenizer.json"
    return given


def tune(state: State, arguments: argparse.Namespace) -> None:
    """Minimum seconds of at least two calls for every batch size, as {workload: {contestant: {size: s}}}.

    The minimum excludes the cost of the first call of a shape, for which some libraries compile a kernel.
    """
    envs = environments(state, arguments)
    for contestant in theirs(arguments.peers, envs):
        with benchmark.processes([contestant], state.model, arguments.threads) as running:
            for workload in arguments.workloads:
                sizes = [b for b in arguments.sizes if b <= len(WORKLOADS[workload].lengths)]
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


def free_gb() -> float:
    """Memory available now."""
    with contextlib.suppress(OSError, IndexError):
        return int(Path("/proc/meminfo").read_text().split("MemAvailable:")[1].split()[0]) / 2**20
    return float("inf")


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
PEAK_OF = {"tdpbssd": "tdpbssd", "vpdpbusd": "vpdpbusd", "vpmaddwd": "vpmaddwd_ymm", "vpmaddubsw": "vpmaddubsw_ymm"}
# Instruction set and type of attention -> peak.c's name.
ATTENTION_PEAK = {
    ("amx", "bf16"): "tdpbf16ps", ("avx512vnni", "bf16"): "vdpbf16ps", ("avx512vnni", "fp32"): "fma_zmm",
    ("avx2", "fp32"): "fma_ymm",
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


# The rerankers of these architectures in the catalog, as transformers' configuration names them.
FAMILIES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "ms-marco-MiniLM-L-6-v2": ("BertConfig", "BertForSequenceClassification", {
        "vocab_size": 30522, "hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12,
        "intermediate_size": 1536}),
    "bge-reranker-base": ("XLMRobertaConfig", "XLMRobertaForSequenceClassification", {
        "vocab_size": 250002, "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12,
        "intermediate_size": 3072, "max_position_embeddings": 514, "type_vocab_size": 1, "layer_norm_eps": 1e-5}),
    "mxbai-rerank-xsmall-v1": ("DebertaV2Config", "DebertaV2ForSequenceClassification", {
        "vocab_size": 128100, "hidden_size": 384, "num_hidden_layers": 12, "num_attention_heads": 6,
        "intermediate_size": 1536, "max_position_embeddings": 512, "type_vocab_size": 0, "layer_norm_eps": 1e-7,
        "relative_attention": True, "position_buckets": 256, "max_relative_positions": -1, "share_att_key": True,
        "norm_rel_ebd": "layer_norm", "pos_att_type": "p2c|c2p", "position_biased_input": False,
        "pooler_hidden_act": "gelu", "pooler_dropout": 0}),
    "ettin-reranker-17m-v1": ("ModernBertConfig", "ModernBertForSequenceClassification", {
        "vocab_size": 50368, "hidden_size": 256, "num_hidden_layers": 7, "num_attention_heads": 4,
        "intermediate_size": 384, "max_position_embeddings": 7999, "classifier_pooling": "cls"}),
    "gte-reranker-modernbert-base": ("ModernBertConfig", "ModernBertForSequenceClassification", {
        "vocab_size": 50368, "hidden_size": 768, "num_hidden_layers": 22, "num_attention_heads": 12,
        "intermediate_size": 1152, "classifier_pooling": "mean"}),
}  # fmt: skip
FAMILY_WORKLOADS = ("32x128", "8x512", "1x64", "2x2048")  # those that fit the model's positions
POSITIONS = {"BertConfig": 512, "XLMRobertaConfig": 512, "ModernBertConfig": 8192}  # if the shape has none
FAMILY_BATCHES = (BATCH, 4)


def random_checkpoint(folder: Path, family: str, tokenizer: Path) -> None:
    """A model of transformers' class with its initial weights, saved by transformers. The tokenizer is not used."""
    import torch
    import transformers

    torch.manual_seed(0)
    config, model, values = FAMILIES[family]
    getattr(transformers, model)(getattr(transformers, config)(num_labels=1, **values)).save_pretrained(folder)
    shutil.copyfile(tokenizer, folder / "tokenizer.json")


def families(state: State, arguments: argparse.Namespace) -> None:
    """Other architectures: turborank and transformers' class in float32, sorted by length, in two batch sizes."""
    theirs = Contestant("transformers", "transformers, torch fp32", f"{HERE / 'peers.py'}:load_transformers")
    for family in FAMILIES:
        folder = state.path.parent / family
        if not (folder / "model.safetensors").exists():
            random_checkpoint(folder, family, tokenizer_file(arguments.tokenizer))
        found = state.part("families", family)
        contestants = [*ours("none", {}, arguments.precisions), theirs]
        turns = [(c.name, BATCH) for c in contestants] + [(theirs.name, size) for size in FAMILY_BATCHES[1:]]
        with benchmark.processes(contestants, folder, arguments.threads) as running:
            for workload in FAMILY_WORKLOADS:
                lengths = benchmark.WORKLOADS[workload].lengths
                if max(lengths) > FAMILIES[family][2].get("max_position_embeddings", POSITIONS[FAMILIES[family][0]]):
                    continue
                pairs = len(lengths)
                each = [turn for turn in turns if turn[1] == BATCH or turn[1] < pairs]
                took = benchmark.in_turns(running, {workload: each}, arguments.rounds)[workload]
                exact = benchmark.exact_logits(folder, workload)
                found[workload] = {
                    f"{name} b{batch}": benchmark.speed(workload, seconds)
                    | benchmark.error(running[name].logits(workload, batch), exact)
                    | {"label": next(c.label for c in contestants if c.name == name)}
                    for (name, batch), seconds in took.items()
                }
                print(f"{family} {workload}: done", flush=True)
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
    "families": families, "text": text, "report": report.write,
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=tuple(STAGES), nargs="+")
    parser.add_argument("--work", type=Path, default=Path("build/bench"), help="exports and interim results")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--cap", choices=caps.CAPS, default="none")
    parser.add_argument("--peers", nargs="*", default=list(PEERS), choices=list(PEERS))
    parser.add_argument("--precisions", nargs="*", default=["int8", "bf16", "fp32"], help="of ours, for run and long")
    parser.add_argument("--sizes", nargs="*", type=int, default=list(SIZES), help="batch sizes that tune tries")
    parser.add_argument("--workloads", nargs="*", default=list(SHORT), choices=SHORT)
    parser.add_argument("--tokenizer", type=Path)
    parser.add_argument("--out", type=Path, help="results without their suffix; by default results/DATE-PROCESSOR")
    parser.add_argument("--plot", type=Path, default=HERE.parent / "docs" / "roofline.svg")
    parser.add_argument("--model", help="for the stage text: a model's folder; by default the embedded one")
    arguments = parser.parse_args()
    arguments.work = arguments.work.resolve()
    arguments.work.mkdir(parents=True, exist_ok=True)
    missing = [name for name in arguments.peers if peers.installed(PEERS[name]) is None]
    for name in missing:
        print(f"left out {name}: it needs {', '.join(PEERS[name].needs)}", file=sys.stderr)
    arguments.peers = [name for name in arguments.peers if name not in missing]
    state = State(arguments.work)
    for stage in arguments.stage:
        STAGES[stage](state, arguments)


if __name__ == "__main__":
    main()
