"""The stages ``prepare-families``, ``families`` and ``catalog``: models with random weights in the catalog's shapes."""

from __future__ import annotations

import argparse
import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from contestants import NEEDED_GB, NEEDED_HEADS, State, convert, elsewhere, free_gb, ours, theirs, tokenizer_file

from turborank import benchmark, catalog, checkpoint, engines
from turborank.benchmark import BATCH, LONG, WORKLOADS, Contestant, Process, Turn
from turborank.errors import EngineError

# Architecture -> (prefix of transformers' classes, what their configuration says beyond the sizes of the catalog).
CLASSES: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("Bert", {"vocab_size": 30522}),
    "electra": ("Electra", {"vocab_size": 30522}),
    "xlm_roberta": ("XLMRoberta", {"vocab_size": 250002, "type_vocab_size": 1, "layer_norm_eps": 1e-5}),
    "deberta": ("DebertaV2", {
        "vocab_size": 128100, "type_vocab_size": 0, "layer_norm_eps": 1e-7, "relative_attention": True,
        "position_buckets": 256, "max_relative_positions": -1, "share_att_key": True, "norm_rel_ebd": "layer_norm",
        "pos_att_type": "p2c|c2p", "position_biased_input": False, "pooler_hidden_act": "gelu", "pooler_dropout": 0}),
    "modernbert": ("ModernBert", {"vocab_size": 50368}),
}  # fmt: skip
# Heads, where they have not 64 channels each, and poolings, where they are not of the first token.
HEADS = {"ms-marco-TinyBERT-L-4": 12, **dict.fromkeys(
    ("ms-marco-MiniLM-L-2-v2", "ms-marco-MiniLM-L-4-v2", "ms-marco-MiniLM-L-6-v2", "ms-marco-MiniLM-L-12-v2",
     "mmarco-mMiniLMv2-L12-H384-v1"), 12)}  # fmt: skip
POOLING = {"gte-reranker-modernbert-base": "mean"}
# The released models, and those of them that transformers' classes run.
RELEASED = tuple(row for row in catalog.MODELS.values() if row.embedded or row.repo)
SHAPED = tuple(row.name for row in RELEASED if row.architecture in CLASSES)


def configuration(row: catalog.Model) -> dict[str, Any]:
    """What transformers' configuration class of the row's architecture is given."""
    values = {
        "num_labels": 1, "hidden_size": row.hidden_size, "num_hidden_layers": row.layers,
        "intermediate_size": row.intermediate_size, "max_position_embeddings": row.max_length,
        "num_attention_heads": HEADS.get(row.name, row.hidden_size // 64),
    } | CLASSES[row.architecture][1]  # fmt: skip
    if row.architecture == "electra":
        values["embedding_size"] = row.hidden_size
    if row.architecture == "xlm_roberta":
        values["max_position_embeddings"] += 2  # the first two positions are for padding
    if row.architecture == "modernbert":
        values["classifier_pooling"] = POOLING.get(row.name, "cls")
    return values


def network(row: catalog.Model) -> Any:
    """The row's model as transformers' class, with its initial weights."""
    import transformers

    prefix = CLASSES[row.architecture][0]
    config = getattr(transformers, f"{prefix}Config")(**configuration(row))
    return getattr(transformers, f"{prefix}ForSequenceClassification")(config)


def write(row: catalog.Model, folder: Path, tokenizer: Path, *, half: bool = False) -> None:
    """A checkpoint of the row's shape in ``folder``, in bfloat16 if ``half``. The tokenizer is not used.

    Sets torch's default type and its seed, so call it in a process of its own.
    """
    if row.architecture == "jinabert":
        benchmark.write_model(folder, tokenizer, layers=row.layers)
        return
    import torch

    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16 if half else torch.float32)
    network(row).save_pretrained(folder)
    shutil.copyfile(tokenizer, folder / "tokenizer.json")


def write_shape(row: catalog.Model, folder: Path, arguments: argparse.Namespace, *, half: bool = False) -> None:
    """A checkpoint of the row's shape with random weights."""
    tokenizer = tokenizer_file(arguments.tokenizer)
    code = "import pathlib, catalog_models as models; from turborank import catalog; "
    code += f"models.write(catalog.lookup({row.name!r}), pathlib.Path({str(folder)!r}), "
    code += f"pathlib.Path({str(tokenizer)!r}), half={half})"
    elsewhere(code)


# Each family's best-known model, and of ModernBERT a small one too.
FAMILIES = (
    "ms-marco-MiniLM-L-6-v2", "ettin-reranker-17m-v1", "mxbai-rerank-xsmall-v1", "bge-reranker-base",
    "gte-reranker-modernbert-base",
)  # fmt: skip
FAMILY_WORKLOADS = ("ragged", "8x512", "1x64", LONG)
FAMILY_SIZES = (2, 8)
EXACT_BATCH = 8
FAMILY_PRECISIONS = 2  # of ours, the fastest first


def fitting(family: str, wanted: list[str]) -> list[str]:
    """The workloads whose longest pair is at most twice the model's positions, to which longer pairs are cut."""
    most = catalog.lookup(family).max_length
    return [w for w in FAMILY_WORKLOADS if w in wanted and 2 * most >= max(WORKLOADS[w].lengths)]


def prepare_families(state: State, arguments: argparse.Namespace) -> None:
    for family in arguments.families:
        folder = state.path.parent / family
        if not (folder / "model.safetensors").exists():
            write_shape(catalog.lookup(family), folder, arguments)
        left_out = state.part("families", family, "left_out")
        for name in arguments.family_peers:
            try:
                convert(name, folder)
                left_out.pop(name, None)
            except EngineError as error:
                left_out[name] = str(error)
                print(f"{family}: left out {name}: {error}", flush=True)
        exact = state.part("exact_families", family)
        missing = [w for w in fitting(family, arguments.family_workloads) if w not in exact]
        if missing:  # of transformers, because the reference engine takes minutes for the larger shapes
            with benchmark.processes(theirs(["transformers"], {}), folder, arguments.threads) as running:
                exact |= {workload: running["transformers"].logits(workload, EXACT_BATCH) for workload in missing}
        state.save()
        print(f"{family}: prepared", flush=True)


@contextlib.contextmanager
def started(
    contestants: list[Contestant], folder: Path, threads: int, left_out: dict[str, str]
) -> Iterator[dict[str, Process]]:
    """Like ``benchmark.processes``, of those that can be loaded; for the others ``left_out`` gets the reason."""
    running: dict[str, Process] = {}
    try:
        for contestant in contestants:
            try:
                running[contestant.name] = Process(contestant, folder, threads)
                running[contestant.name].signal("SIGSTOP")
            except EngineError as error:
                left_out[contestant.name] = str(error)
                print(f"left out {contestant.name}: {error}", flush=True)
        yield running
    finally:
        for process in running.values():
            process.close()


def family_turns(contestants: list[Contestant], workload: str, sizes: list[int]) -> list[Turn]:
    """Every contestant with batches of 32, and the peers also with smaller ones; streams only for many batches."""
    pairs = len(WORKLOADS[workload].lengths)
    turns = []
    for contestant in contestants:
        ours = contestant.name.startswith("turborank")
        tried = [] if ours else [size for size in sizes if size < min(pairs, BATCH)]
        if pairs > 1 or "/" not in contestant.name:
            turns += [(contestant.name, size) for size in (BATCH, *tried)]
    return turns


def measure_family(
    state: State, family: str, contestants: list[Contestant], workloads: list[str], arguments: argparse.Namespace
) -> None:
    """Measure the workloads that are not yet measured, the contestants alternating."""
    folder, found = state.path.parent / family, state.part("families", family, "runs")
    longest = catalog.lookup(family).max_length
    turns = {workload: family_turns(contestants, workload, arguments.sizes or FAMILY_SIZES) for workload in workloads}
    left_out = state.part("families", family, "left_out")
    turns = {
        workload: each
        for workload, each in turns.items()
        if any(f"{name} b{batch}" not in found.get(workload, {}) for name, batch in each if name not in left_out)
    }
    if not turns:
        return
    labels = {contestant.name: contestant.label for contestant in contestants}
    with started(contestants, folder, arguments.threads, left_out) as running:
        for workload, each in turns.items():
            each = [turn for turn in each if turn[0] in running]
            took = benchmark.in_turns(running, {workload: each}, arguments.rounds)[workload]
            errors: dict[str, dict[str, float | None]] = {}
            for name, batch in sorted(took, key=lambda turn: min(took[turn])):
                if name not in errors:  # once, because the batch changes only the padding
                    logits = running[name].logits(workload, batch)
                    errors[name] = benchmark.error(logits, state.part("exact_families", family)[workload])
                row = benchmark.speed(workload, took[name, batch], longest) | errors[name] | {"label": labels[name]}
                row["peak_bytes"] = running[name].peak()
                state.part("families", family, "runs", workload)[f"{name} b{batch}"] = row
            state.save()
            print(f"{family} {workload}: done, {', '.join(running)}", flush=True)


def families(state: State, arguments: argparse.Namespace) -> None:
    """Measure each family: 8,192 tokens with one process at a time, as in ``long``, the other workloads in turns."""
    for family in arguments.families:
        row, left_out = catalog.lookup(family), state.part("families", family, "left_out")
        state.part("families", family)["longest"] = row.max_length
        names = [name for name in arguments.family_peers if name not in left_out]
        contestants = [*ours("none", {}, arguments.precisions)[:FAMILY_PRECISIONS], *theirs(names, {})]
        workloads = fitting(family, arguments.family_workloads)
        measure_family(state, family, contestants, [w for w in workloads if w != LONG], arguments)
        for contestant in [c for c in contestants if LONG in workloads and "/" not in c.name]:
            heads = configuration(row)["num_attention_heads"]
            needed = NEEDED_GB.get(contestant.name, 1) * heads / NEEDED_HEADS
            key = f"{contestant.name} at {LONG}"
            try:
                if free_gb() < needed:
                    raise EngineError(f"{needed:.0f} GB needed, {free_gb():.0f} GB free")
                measure_family(state, family, [contestant], [LONG], arguments)
                left_out.pop(key, None)
            except EngineError as error:
                left_out[key] = str(error)
                print(f"{family}: left out {key}: {error}", flush=True)
        state.save()


CATALOG_WORKLOAD = "32x128"


def catalog_gb(row: catalog.Model) -> float:
    """Memory to write the shape in bfloat16 and to load it as int8, with some for the rest."""
    return 1 + 6e-9 * row.parameters


def catalog_speed(state: State, arguments: argparse.Namespace) -> None:
    """Measure every released model: the embedded one as it is, the others with random weights.

    The native engine computes in int8. A model that it does not support is measured with the engine and the precision
    that "auto" selects, and its row says so.
    """
    found, left_out = state.part("catalog", "rows"), state.part("catalog", "left_out")
    (native_int8,) = ours("none", {}, ["int8"])
    for row in RELEASED:
        if row.name in found:
            continue
        folder = row.folder if row.embedded else state.path.parent / "catalog" / row.name
        try:
            if free_gb() < catalog_gb(row):
                raise EngineError(f"{catalog_gb(row):.0f} GB needed, {free_gb():.0f} GB free")
            if not row.embedded:
                write_shape(row, folder, arguments, half=True)
            contestant, (engine, precision) = native_int8, engines.choose(config=checkpoint.read(folder).config)
            if engine != "native":
                contestant = Contestant(engine, engine, options={"engine": engine, "precision": precision})
            with benchmark.processes([contestant], folder, arguments.threads) as running:
                turn = (contestant.name, BATCH)
                took = benchmark.in_turns(running, {CATALOG_WORKLOAD: [turn]}, arguments.rounds)[CATALOG_WORKLOAD]
            found[row.name] = benchmark.speed(CATALOG_WORKLOAD, took[turn])
            found[row.name] |= {} if engine == "native" else {"engine": f"{engine}, {precision}"}
            left_out.pop(row.name, None)
            print(f"{row.name}: {found[row.name]['tokens_s']:,.0f} tokens/s", flush=True)
        except EngineError as error:
            left_out[row.name] = str(error)
            print(f"left out {row.name}: {error}", flush=True)
        finally:
            if not row.embedded:
                shutil.rmtree(folder, ignore_errors=True)
        state.save()
