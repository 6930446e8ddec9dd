"""The torch engine on a CUDA GPU compared with padded peers in one process: speed and error, measured alternately.

    python bench/gpu.py exact OUT.npz       reference logits, by the native engine in fp32 (on any fast machine)
    python bench/gpu.py run EXACT.npz [--out RESULT.json]
    python bench/gpu.py report RESULT.json                  a Markdown page in the same folder

The model is that of bench.py: the turbo shape with random weights. A call takes token ids in host memory and returns
logits in host memory. Peers pad, sort by length, and use their best batch size of ``SIZES``:

    sentence-transformers   scaled_dot_product_attention with the ALiBi bias as a mask, float32 as by default, and bf16
    padded FlexAttention    torch.nn.attention.flex_attention, compiled, the bias computed inside; bf16
    the same, compiled      torch.compile over the whole model
"""

from __future__ import annotations

import argparse
import functools
import importlib.metadata
import json
import math
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import peers

from turborank import benchmark, catalog, checkpoint
from turborank.benchmark import WORKLOADS, EngineScorer, error

DEVICE = "cuda"
SIZES = (8, 32, 128)  # pairs in a padded batch
ROUNDS, TURN = 5, 0.15  # turns of every contestant on a workload; seconds of a turn, one call at least

Scorer = Callable[..., np.ndarray]


def _ragged(mean: int, pairs: int = 100, spread: float = 0.6) -> benchmark.Workload:
    """Log-normal lengths like those of search results, around ``mean``, from 16 to 8,192."""
    median = mean / math.exp(spread**2 / 2)
    drawn = np.random.default_rng(11).lognormal(math.log(median), spread, pairs)
    return benchmark.Workload(
        f"{pairs} documents, about {mean:,} tokens", tuple(np.clip(drawn, 16, 8192).astype(int).tolist())
    )


WORKLOADS |= {f"ragged-{mean}": _ragged(mean) for mean in (128, 512, 2048)}
ORDER = ("ragged", "ragged-128", "32x128", "8x512", "2x2048", "1x8192", "1x64", "ragged-512", "ragged-2048")


def exact(out: Path, model: Path) -> None:
    score = benchmark.load_engine(model, 2, {"engine": "native", "precision": "fp32"})
    np.savez(out, **{name: score(benchmark.encodings(name, *benchmark.sizes(model))) for name in ORDER})


# ---------------------------------------------------------------------------------------------------- contestants


def ours(given: Any, precision: str) -> Scorer:
    from turborank.engines import torch as engine
    from turborank.scheduler import budget

    prepared = engine.prepare(given.weights, given.config, precision=precision, threads=1)
    return EngineScorer(prepared, budget(prepared))


def flexible(module: Any, slopes: Sequence[float]) -> Any:
    """The padded peer with flex_attention, which computes the bias and masks the padding in its score function."""
    import torch
    from torch.nn.attention.flex_attention import flex_attention

    table = torch.tensor(slopes, dtype=torch.float32, device=DEVICE)
    compiled = torch.compile(flex_attention, dynamic=True)

    def attend(q: Any, k: Any, v: Any, lengths: Any) -> Any:
        def alibi(score: Any, pair: Any, head: Any, query: Any, key: Any) -> Any:
            return torch.where(key < lengths[pair], score - table[head] * (query - key).abs(), -math.inf)

        return compiled(q, k, v, score_mod=alibi)

    def layer(self: Any, x: Any, lengths: Any, _first: bool) -> Any:
        heads = len(slopes)

        def split(y: Any) -> Any:
            return y.view(y.shape[0], y.shape[1], heads, -1).transpose(1, 2)

        context = attend(split(self.query(x)), split(self.key(x)), split(self.value(x)), lengths)
        y = self.norm1(self.out(context.transpose(1, 2).reshape(x.shape)) + x)
        gate, value = self.gate(y).chunk(2, dim=-1)
        return self.norm2(self.down(torch.nn.functional.gelu(gate) * value) + y)

    def forward(input_ids: Any, token_type_ids: Any, attention_mask: Any) -> Any:
        x = module.norm(module.words(input_ids) + module.types(token_type_ids))
        lengths = attention_mask.sum(dim=1)
        for each in module.layers:
            x = layer(each, x, lengths, False)
        return module.classifier(torch.tanh(module.pooler(x[:, 0])))[:, 0]

    return forward


def padded(given: Any, *, dtype: str, flex: bool = False, whole: bool = False) -> Scorer:
    """The model over padded batches, as libraries run it."""
    import torch

    module = peers.jinabert(given, cls=False, fused=True).to(DEVICE, getattr(torch, dtype))
    forward = flexible(module, given.config.slopes) if flex else module
    if whole:
        forward = torch.compile(forward, dynamic=True)

    def run(batch: dict[str, np.ndarray]) -> np.ndarray:
        with torch.inference_mode():
            moved = {name: torch.from_numpy(value).to(DEVICE) for name, value in batch.items()}
            return forward(**moved).float().cpu().numpy()

    return peers.by_batches(run)


def contestants(given: Any) -> dict[str, tuple[str, Scorer]]:
    """Name -> (label, scorer)."""
    make = functools.partial(padded, given)
    return {
        "turborank-bf16": ("turborank bf16", ours(given, "bf16")),
        "turborank-fp16": ("turborank fp16", ours(given, "fp16")),
        "st": ("sentence-transformers (padded SDPA), float32", make(dtype="float32")),
        "st-bf16": ("the same in bf16", make(dtype="bfloat16")),
        "flex": ("padded FlexAttention, bf16", make(dtype="bfloat16", flex=True)),
        "flex-whole": ("the same, whole model compiled", make(dtype="bfloat16", flex=True, whole=True)),
    }


# ---------------------------------------------------------------------------------------------------- measuring


def timed(score: Scorer, pairs: Sequence[Any], size: int) -> list[float]:
    """Seconds of each call of one turn."""
    took: list[float] = []
    while not took or (sum(took) < TURN and len(took) < 50):
        began = time.perf_counter()
        score(pairs, size)
        took.append(time.perf_counter() - began)
    return took


def measure(
    who: dict[str, tuple[str, Scorer]], pairs: Sequence[Any], expected: np.ndarray
) -> dict[str, dict[str, Any]]:
    """All contestants on one workload: finds each one's best batch size, then measures alternately."""
    import torch

    rows: dict[str, dict[str, Any]] = {}
    for name, (label, score) in who.items():
        sizes = [len(pairs)] if name.startswith("turborank") else sorted({min(size, len(pairs)) for size in SIZES})
        tried: dict[int, float] = {}
        for size in sizes:
            try:
                before = torch.cuda.memory_allocated()
                torch.cuda.reset_peak_memory_stats()
                began = time.perf_counter()
                logits = score(pairs, size)  # compiles kernels if needed
                first = {"first_s": time.perf_counter() - began, "bytes": torch.cuda.max_memory_allocated() - before}
                tried[size] = min(timed(score, pairs, size) + timed(score, pairs, size))
            except RuntimeError as failed:  # most often out of memory
                print(f"  {name}, {size} pairs a batch: {str(failed).splitlines()[0]:.80}", file=sys.stderr)
                torch.cuda.empty_cache()
                continue
            if tried[size] == min(tried.values()):
                rows[name] = {"label": label, "size": size, "tried": tried, **first, **error(logits, expected)}
    took: dict[str, list[float]] = {name: [] for name in rows}
    for _ in range(ROUNDS):
        for name in rows:
            took[name] += timed(who[name][1], pairs, rows[name]["size"])
    for name, row in rows.items():
        row |= {"min_s": min(took[name]), "median_s": float(np.median(took[name])), "calls": len(took[name])}
    return rows


def table(found: dict[str, Any]) -> str:
    lines = []
    for workload, rows in found.items():
        tokens = sum(WORKLOADS[workload].lengths)
        mine = rows["turborank-bf16"]["median_s"]
        lines += [f"\n{benchmark.title(workload)} ({tokens:,} tokens)"]
        for row in rows.values():
            median, least = row["median_s"], row["min_s"]
            lines.append(
                f"  {row['label']:<48} batch {row['size']:>3}  {median * 1e3:8.2f} ms (least {least * 1e3:.2f})"
                f"  {tokens / median / 1e6:6.2f} M tokens/s  {median / mine:5.2f}x  rms {row['rms']:.1e}"
                f"  max {row['max']:.1e}"
            )
    return "\n".join(lines)


HEADER = """# {device}, {date}

Written by `bench/gpu.py report`; the commands are `python bench/gpu.py exact exact.npz` and `python bench/gpu.py run
exact.npz`. The model has the shape of jina-reranker-v1-turbo-en (37,771,777 parameters) and random weights. All
contestants are measured alternately in one process; a call takes token ids in host memory and returns logits in host
memory, and its time is the median of all turns (in brackets the minimum). Padding is not counted in tokens. Peers pad,
sort by length and use their best batch size of {sizes}. Errors are those of the logits against the native engine in
fp32, which is within 1e-4 of the numpy reference; rms in per cent of the logits' standard deviation if there are more
than two pairs.

Two optimisations that turborank has and no peer has: the last layer is computed for the first token only (at most a
sixth of the time), and CUDA graphs (most of the difference on short workloads, where launching kernels takes longer
than running them).

Versions: {versions}, CUDA {cuda}.
"""


def page(about: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    sizes = ", ".join(map(str, SIZES))
    lines = [
        HEADER.format(device=about["device"], date=about["date"], cuda=about["cuda"], versions=versions, sizes=sizes)
    ]
    for workload, rows in about["workloads"].items():
        tokens = sum(WORKLOADS[workload].lengths)
        ours = {name: row for name, row in rows.items() if name.startswith("turborank")}
        theirs = [row["median_s"] for name, row in rows.items() if name not in ours]
        lines += [
            f"## {benchmark.title(workload)} ({tokens:,} tokens)\n",
            "| | pairs a batch | ms | tokens/s | our bf16 is faster by | rms error | largest error |",
            "|---|--:|--:|--:|--:|--:|--:|",
        ]
        for row in rows.values():
            size = "no padding" if row in ours.values() else row["size"]
            share = f"{row['rms_share']:.1%}" if row["rms_share"] is not None else "–"
            lines.append(
                f"| {row['label']} | {size} | {row['median_s'] * 1e3:.2f} ({row['min_s'] * 1e3:.2f}) "
                f"| {tokens / row['median_s']:,.0f} | {row['median_s'] / ours['turborank-bf16']['median_s']:.2f} "
                f"| {share} | {row['max']:.1e} |"
            )
        best = min(theirs) / ours["turborank-bf16"]["median_s"], min(theirs) / ours["turborank-fp16"]["median_s"]
        lines.append(f"\nOver the best peer: {best[0]:.2f} times in bf16, {best[1]:.2f} in fp16.\n")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=("exact", "run", "report"))
    parser.add_argument(
        "file", type=Path, help="reference logits (exact writes them, run reads them); results (report)"
    )
    parser.add_argument("--out", type=Path, help="file for the results of run")
    parser.add_argument("--only", nargs="*", default=list(ORDER), help="workloads")
    parser.add_argument("--who", nargs="*", help="contestants")
    arguments = parser.parse_args()
    if arguments.stage == "report":
        arguments.file.with_suffix(".md").write_text(page(json.loads(arguments.file.read_text())))
        return
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder)
        benchmark.write_model(model, catalog.lookup(catalog.DEFAULT).folder / "tokenizer.json")
        if arguments.stage == "exact":
            exact(arguments.file, model)
            return
        import torch

        expected = np.load(arguments.file)
        who = contestants(checkpoint.read(model))
        if arguments.who:
            who = {name: who[name] for name in arguments.who}
        versions = {name: importlib.metadata.version(name) for name in ("torch", "triton", "numpy")}
        about = {"device": torch.cuda.get_device_name(), "cuda": torch.version.cuda, "versions": versions}
        found: dict[str, Any] = {}
        about |= {"date": time.strftime("%Y-%m-%d"), "workloads": found}
        for workload in arguments.only:
            pairs = benchmark.encodings(workload, *benchmark.sizes(model))
            found[workload] = measure(who, pairs, expected[workload])
            print(table({workload: found[workload]}), flush=True)
            if arguments.out:
                arguments.out.write_text(json.dumps(about, indent=1))


if __name__ == "__main__":
    main()
