"""Reports the results of bench.py: a JSON file, a Markdown table and a roofline plot, including lost rows."""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import re
from pathlib import Path
from typing import Any

import peers
from peers import FAMILY_PEERS, PEERS

import turborank
from turborank import benchmark, catalog
from turborank.benchmark import BATCH, WORKLOADS, title

HERE = Path(__file__).resolve().parent
OURS, DEFAULTS = f"turborank-int8 b{BATCH}", f"torch b{BATCH}"
# Target speed-ups over the best peer with default settings, the best tuned peer and sentence-transformers' defaults.
TARGETS = {
    "ragged": (2.3, 1.6, 10.0), "32x128": (1.4, 1.25, 5.5), "8x512": (1.7, 1.5, 6.0), "2x2048": (3.0, 2.5, 8.0),
    "1x8192": (7.0, 6.0, 20.0), "1x64": (1.7, 1.5, 8.0),
}  # fmt: skip
MACHINES = {
    "none": "everything this processor has",
    "avx512vnni": "as if it had AVX-512 VNNI and BF16 but no AMX",
    "avx2": "as if it had AVX2 and nothing newer",
}
Rows = dict[str, dict[str, Any]]


def processor() -> str:
    """The processor's name and relevant features."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor() or platform.machine()
    found = re.search(r"model name\s*: (.+)", text)
    flags = set(text.split("flags")[1].split("\n")[0].split()) if "flags" in text else set()
    wanted = {"avx2": "AVX2", "avx512_vnni": "AVX-512 VNNI", "avx512_bf16": "BF16", "amx_int8": "AMX"}
    name = found[1].strip() if found else platform.machine()
    return f"{name} ({', '.join(text for flag, text in wanted.items() if flag in flags)})"


def operations(workload: str, *, attention: bool = True) -> float:
    """Operations that the logits need, a multiply-add counted as two: the last layer for token 0 only and without keys
    and values, no padding, all scores of attention, although the skip bound leaves many out."""
    config = benchmark.turbo_config()
    c, f, layers, heads = config.hidden_size, config.intermediate_size, config.num_hidden_layers, len(config.slopes)
    token = (layers - 1) * (4 * c * c + 3 * c * f) + 2 * heads * c
    total = 0.0
    for n in WORKLOADS[workload].lengths:
        total += n * token + 4 * c * c + 3 * c * f + c * c
        total += attention * (layers - 1) * 2 * n * n * c
    return 2 * total


def product_operations(workload: str) -> dict[str, float]:
    """Operations of each of the engine's products, by its names, and of attention on a workload."""
    config = benchmark.turbo_config()
    c, f, layers, heads = config.hidden_size, config.intermediate_size, config.num_hidden_layers, len(config.slopes)
    lengths = WORKLOADS[workload].lengths
    tokens = (layers - 1) * sum(lengths)
    rows = tokens + len(lengths)  # the last layer is for first tokens only
    products = {"qkv": 3 * c * c * tokens, "out": c * c * rows, "up": 2 * c * f * rows, "down": c * f * rows}
    attention = sum((layers - 1) * 2 * n * n * c + 2 * heads * c * n + 3 * c * c for n in lengths)
    return {name: 2.0 * n for name, n in (products | {"attention": attention}).items()}


def bytes_moved(workload: str) -> float:
    """Minimum bytes read from memory: int8 weights once, and each token's embedding row in 16 bits."""
    config = benchmark.turbo_config()
    c, f = config.hidden_size, config.intermediate_size
    return config.num_hidden_layers * (4 * c * c + 3 * c * f) + 2.0 * c * sum(WORKLOADS[workload].lengths)


def peer_of(key: str) -> str:
    """The key in PEERS of a result's key; "" for turborank."""
    name = key.split(" ")[0].split("/")[0]
    return name if name in PEERS else ""


def best(rows: Rows, *, tuned: bool, cut: bool = False) -> str | None:
    """The fastest peer: with default settings (batch 32, one stream) or with batch and streams ``tuned``; with the
    graph as libraries make it or, with ``cut``, also those whose last layer is computed for token 0 only."""
    keys = [key for key in rows if peer_of(key) and (cut or not PEERS[peer_of(key)].options.get("cls"))]
    if not tuned:
        keys = [key for key in keys if key == f"{peer_of(key)} b{BATCH}"]
    return min(keys, key=lambda key: rows[key]["min_s"]) if keys else None


def ratio(rows: Rows, peer: str | None, target: float | None) -> str:
    """Speed-up by minimum times (by medians), and whether it reaches the target."""
    if peer is None or peer not in rows or OURS not in rows:
        return "–"
    least, middle = (rows[peer][k] / rows[OURS][k] for k in ("min_s", "median_s"))
    asked = "" if target is None else f"; target {target:g}: {'yes' if least >= target else '**no**'}"
    return f"{least:.2f} ({middle:.2f}{asked})"


def label(key: str, about: dict[str, Any]) -> str:
    name, batch = key.split(" b")
    text = about.get(name, {}).get("label", name)
    if name.startswith("turborank"):
        return f"**{text}**"
    streams = f", {name.split('/')[1]} streams" if "/" in name else ""
    return f"{text}, batch {batch}{streams}"


def ratios(runs: dict[str, Rows], about: dict[str, Any], *, targets: bool) -> list[str]:
    lines = [
        "| workload | ours, tokens/s | × best peer as users run it | × best peer tuned | × tuned, last layer cut "
        "| × sentence-transformers' way | the best peers |",
        "|---|---:|---|---|---|---|---|",
    ]
    for workload in WORKLOADS:
        rows = runs.get(workload, {})
        if OURS not in rows:
            continue
        asked = TARGETS[workload] if targets else (None, None, None)
        as_run, tuned, cut = best(rows, tuned=False), best(rows, tuned=True), best(rows, tuned=True, cut=True)
        who = "; ".join(dict.fromkeys(label(key, about) for key in (as_run, tuned, cut) if key))
        lines.append(
            f"| {title(workload)} | {rows[OURS]['tokens_s']:,.0f} | {ratio(rows, as_run, asked[0])} | "
            f"{ratio(rows, tuned, None)} | {ratio(rows, cut, asked[1])} | {ratio(rows, DEFAULTS, asked[2])} | {who} |"
        )
    return lines


def tuning(tuned: dict[str, dict[str, dict[str, float]]]) -> list[str]:
    """Best tokens/s of every peer, with its batch size (and streams); 8,192 tokens are one pair."""
    names = [name for name in PEERS if any(name == key.split("/")[0] for rows in tuned.values() for key in rows)]
    lines = ["| tokens/s (batch) | " + " | ".join(map(title, tuned)) + " |", "|---|" + "---:|" * len(tuned)]
    for name in names:
        cells = []
        for workload, rows in tuned.items():
            tried = [(s, key, b) for key, sizes in rows.items() if key.split("/")[0] == name for b, s in sizes.items()]
            seconds, key, batch = min(tried, default=(0.0, "", ""))
            streams = f", {key.split('/')[1]} streams" if "/" in key else ""
            cells.append(f"{sum(WORKLOADS[workload].lengths) / seconds:,.0f} ({batch}{streams})" if tried else "–")
        lines.append(f"| {PEERS[name].label} | " + " | ".join(cells) + " |")
    return lines


def number(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)


def every_row(workload: str, rows: Rows, about: dict[str, Any]) -> list[str]:
    """One workload, fastest first."""
    peak = any("peak_bytes" in row for row in rows.values())
    head = "| | tokens/s | least ms | median ms | max error | rms error, share of std | Spearman |"
    lines = [f"### {title(workload)}", "", head + (" peak memory |" if peak else ""), "|---|" + "---:|" * (6 + peak)]
    for key in sorted(rows, key=lambda k: rows[k]["min_s"]):
        row = rows[key]
        share = number(row["rms_share"], ".2%")
        lines.append(
            f"| {label(key, about)} | {row['tokens_s']:,.0f} | {1e3 * row['min_s']:,.2f} | {1e3 * row['median_s']:,.2f}"
            f" | {row['max']:.1e} | {share} | {number(row['spearman'], '.4f')} |"
            + (f" {row['peak_bytes'] / 1e6:,.0f} MB |" if "peak_bytes" in row else " – |" if peak else "")
        )
    return [*lines, ""]


def own(state: dict[str, Any]) -> list[str]:
    """turborank from text, and its share of the processor's peak."""
    lines = []
    if state.get("text"):
        t = state["text"]
        loss = 1 - t["compute_s"] / t["from_text_s"]
        lines += [
            "## From text, with the embedded model", "", "| | |", "|---|---:|",
            f"| 100 documents from text ({t['tokens']:,} tokens) | {1e3 * t['from_text_s']:.1f} ms |",
            f"| of which compute alone takes | {1e3 * t['compute_s']:.1f} ms |",
            f"| lost to tokenisation and bookkeeping (target: at most 10 %) | {loss:.1%} |",
            f"| importing turborank | {t['import_s']:.2f} s |",
            f"| loading to the first score, after import (target: at most 0.3 s) | {t['first_score_s']:.2f} s |",
            f"| peak memory of the process at 8,192 tokens (limit 250 MB) | {t['peak_8192_bytes'] / 1e6:.0f} MB |", "",
        ]  # fmt: skip
    peaks = state.get("peaks")
    if peaks:
        lines += ["## Instruction peaks of one core (bench/peak.c)", "", "| instruction | Gop/s |", "|---|---:|"]
        lines += [f"| `{name}` | {value:,.0f} |" for name, value in peaks.items() if name != "read_gb_s"]
        lines += ["", f"Reading memory: {peaks['read_gb_s']:.1f} GB/s.", ""]
    return lines + gemms(state)


def family_rows(rows: Rows) -> list[str]:
    """The keys to show, fastest first: ours, and of every peer batch 32 and the best batch and number of streams."""
    kept, peers_best = set(), {}
    for key in sorted(rows, key=lambda key: -rows[key]["min_s"]):
        name = key.split(" ")[0]
        peers_best[name.split("/")[0]] = key  # the last is the fastest
        if key == f"{name} b{BATCH}" and "/" not in name:
            kept.add(key)
    return sorted(kept | set(peers_best.values()), key=lambda key: rows[key]["min_s"])


def families(state: dict[str, Any]) -> list[str]:
    """The families' shapes compared with the peers, if measured. Rows that are slower than the best peer stay."""
    lines = []
    for family, found in state.get("families", {}).items():
        if not found.get("runs"):
            continue
        lines += [
            f"## The shape of {family}, random weights", "",
            "Errors are of the logits against transformers in float32. *Tuned*: the fastest of all peers' rows.", "",
            "| workload | | tokens/s | × best peer tuned | least ms | max error | rms error, share of std |",
            "|---|---|---:|---:|---:|---:|---:|",
        ]  # fmt: skip
        for workload, rows in found["runs"].items():
            about = {key.split(" ")[0]: row for key, row in rows.items()}
            theirs = [row["min_s"] for key, row in rows.items() if not key.startswith("turborank")]
            cut = f", cut to {found['longest']:,} tokens" if max(WORKLOADS[workload].lengths) > found["longest"] else ""
            for key in family_rows(rows):
                row = rows[key]
                ratio = number(min(theirs) / row["min_s"] if theirs else None, ".2f")
                lines.append(
                    f"| {title(workload)}{cut} | {label(key, about)} | {row['tokens_s']:,.0f} | {ratio} | "
                    f"{1e3 * row['min_s']:,.2f} | {row['max']:.1e} | {number(row['rms_share'], '.2%')} |"
                )
        lines += ["", *(f"- Left out: {name}: {reason}" for name, reason in found["left_out"].items()), ""]
    return lines


def quality(state: dict[str, Any]) -> list[str]:
    """The catalog's models by the measured speed of their shapes, with the published quality."""
    found = state.get("catalog")
    if not found:
        return []
    pairs = len(WORKLOADS["32x128"].lengths)
    lines = [
        "## Quality per millisecond", "",
        "Speed is of turborank int8 on 32 pairs of 128 tokens, on random weights in each model's shape (of the",
        "embedded model, on its own). A model that the native engine does not support has its engine and precision in",
        "brackets. Quality is the publisher's, × 100: nDCG@10 of MTEB(eng, v2) retrieval, of",
        "NanoBEIR and of BEIR. Figures of one column come from one publisher; columns do not compare with each other.",
        "",
        "| model | MTEB | NanoBEIR | BEIR | pairs/s | ms a pair |", "|---|---:|---:|---:|---:|---:|",
    ]  # fmt: skip
    for name, row in sorted(found["rows"].items(), key=lambda item: item[1]["min_s"]):
        known = catalog.lookup(name)
        figures = " | ".join(number(value, ".2f") for value in (known.mteb, known.nanobeir, known.beir))
        named = f"{name} ({row['engine']})" if "engine" in row else name
        lines.append(f"| {named} | {figures} | {pairs / row['min_s']:,.0f} | {1e3 * row['min_s'] / pairs:,.2f} |")
    return [*lines, "", *(f"- Left out: {name}: {reason}" for name, reason in found["left_out"].items()), ""]


def gemms(state: dict[str, Any]) -> list[str]:
    """Each matrix product of the native engine compared with the instruction peak, if measured."""
    found = state.get("gemms")
    if not found:
        return []
    lines = [
        "## Products inside the native engine, int8, one core", "",
        "Gop/s and the share of the measured peak of the product's instruction, at work on 32 pairs of 128 tokens,",
        "with everything that is fused into it: scales and bias; qkv: rounding to the type of attention; out and down:",
        "the residual; up: GELU and gate. Attention: both products and the softmax, in bf16 or (AVX2) float.", "",
        "| instruction set | " + " | ".join(next(iter(found.values()))) + " |",
        "|---|" + "---:|" * len(next(iter(found.values()))),
    ]  # fmt: skip
    for isa, rows in found.items():
        lines.append(
            f"| {isa} | " + " | ".join(f"{row['gops']:,.0f} ({row['share']:.0%})" for row in rows.values()) + " |"
        )
    return [*lines, ""]


def markdown(state: dict[str, Any], arguments: argparse.Namespace, when: str, versions: dict[str, str]) -> str:
    lines = [
        f"# {processor()}, {arguments.threads} threads, {when}", "",
        "Written by `bench/bench.py report`; the commands are in runs/bench.sh. On each workload all contestants",
        "take turns in one run, each in its own process, the others stopped; workloads were measured one after",
        "another, and the 8,192 tokens one process at a time. Tokens are real ones, without padding; speed is of",
        "the least time, ratios are of the least times. Spearman and the errors' share of the logits' standard",
        "deviation stand only where there are more than two pairs. *As users run it*: sorted by length, batches of",
        "32. Weights are random.", "",
    ]  # fmt: skip
    if state.get("runs"):
        lines += [
            "The model has the shape of jina-reranker-v1-turbo-en (37,771,777 parameters); ratios of the medians",
            "stand in brackets. Errors are of the logits against the numpy engine. *Tuned*: the best of batch sizes 1",
            "to 32 and of 1 or 2 streams. *Last layer cut*: the same of graphs re-exported by hand so that the last",
            "layer computes token 0 alone, as ours does and no library offers. Older processors are imitated by",
            "trapping CPUID (bench/cap.c) or by the libraries' own switches (bench/caps.py); there fewer batch sizes",
            "were tried (see Tuning).", "",
        ]  # fmt: skip
    lines += ["Versions: " + ", ".join(f"{name} {version}" for name, version in versions.items()) + ".", ""]
    lines += [line for note in state.get("notes", []) for line in (note, "")]
    for cap, runs in state.get("runs", {}).items():
        about = state["about"][cap]
        lines += [f"## Ratios, {MACHINES[cap]}", "", *ratios(runs, about, targets=cap != "avx2"), ""]
    lines += own(state) + families(state) + quality(state)
    for cap, tuned in state.get("tuned", {}).items():
        lines += [f"## Tuning, {MACHINES[cap]}", "", *tuning(tuned), ""]
    for cap, runs in state.get("runs", {}).items():
        lines += [f"## Every row, {MACHINES[cap]}", ""]
        for workload in WORKLOADS:
            if workload in runs:
                lines += every_row(workload, runs[workload], state["about"][cap])
    return "\n".join(lines).rstrip() + "\n"


def plot(state: dict[str, Any], threads: int, path: Path) -> None:
    """Roofline plot: achieved operations per second over arithmetic intensity, with the processor's limits."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams.update({"svg.hashsalt": "turborank", "font.size": 9})
    from matplotlib import pyplot

    peaks, runs = state["peaks"], state["runs"]["none"]
    figure, axes = pyplot.subplots(figsize=(8.5, 5.2))
    xs = [1.0 * 10 ** (i / 40) for i in range(20, 200)]
    for name, text in (
        ("tdpbssd", "AMX int8"), ("tdpbf16ps", "AMX bf16"), ("vpdpbusd", "AVX-512 VNNI int8"),
        ("fma_zmm", "AVX-512 fp32"),
    ):  # fmt: skip
        if name in peaks:
            roof = [min(threads * peaks[name], x * peaks["read_gb_s"] * threads) for x in xs]
            axes.plot(xs, roof, color="0.6", linewidth=0.9)
            axes.text(250, roof[-1] * 1.05, f"{text}, {threads} cores", color="0.4", fontsize=8)
    marks = {
        OURS: ("turborank int8", "o", "#c0392b"), f"turborank-fp32 b{BATCH}": ("turborank fp32", "o", "#e6b0aa"),
        f"ov b{BATCH}": ("OpenVINO NNCF int8 + bf16", "s", "#2471a3"),
        f"ort-int8 b{BATCH}": ("ONNX Runtime int8", "^", "#1e8449"),
        f"ort b{BATCH}": ("ONNX Runtime fp32", "^", "#a9dfbf"), DEFAULTS: ("torch fp32", "D", "#7d3c98"),
    }  # fmt: skip
    points_at = []
    for key, (text, marker, colour) in marks.items():
        points = [
            (operations(w) / bytes_moved(w), operations(w) / runs[w][key]["min_s"] * 1e-9, w)
            for w in WORKLOADS if w in runs and key in runs[w]
        ]  # fmt: skip
        if points:
            points_at += [p[1] for p in points]
            axes.scatter(
                [p[0] for p in points], [p[1] for p in points], marker=marker, color=colour, label=text, s=28, zorder=3
            )
        if key == OURS:
            for x, y, w in points:
                axes.annotate(
                    w.replace("x", "×"), (x, y), textcoords="offset points", xytext=(1, 5), rotation=50, fontsize=7
                )
    axes.set(
        xscale="log",
        yscale="log",
        ylim=(10, 2.5 * max(points_at)),
        xlabel="operations per byte that must be read",
        ylabel="Gop/s",
    )
    axes.set_title(
        f"Operations the logits need, over time: {processor()}. Above a roof: blocks were skipped", fontsize=9
    )
    axes.legend(loc="lower left", fontsize=8, frameon=False)
    axes.grid(True, which="major", linewidth=0.3)
    figure.tight_layout()
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)
    path.write_text(re.sub(r"[ \t]+\n", "\n", path.read_text()))


def with_errors(state: dict[str, Any]) -> dict[str, Any]:
    """The results of the stages, with each row's logits replaced by their error."""
    found = {key: value for key, value in state.items() if key not in ("exact", "exact_families", "runs")}
    found["runs"] = {
        cap: {
            workload: {
                key: {name: value for name, value in row.items() if name != "logits"}
                | benchmark.error(row["logits"], state["exact"][workload])
                for key, row in rows.items()
            }
            for workload, rows in runs.items()
        }
        for cap, runs in state.get("runs", {}).items()
    }
    return found


def write(state: Any, arguments: argparse.Namespace) -> None:
    """The stage ``report``."""
    when = datetime.datetime.now(datetime.UTC).date().isoformat()
    versions = {"turborank": turborank.__version__, "python": platform.python_version()}
    for peer in (PEERS | FAMILY_PEERS).values():
        versions |= peers.installed(peer) or {}
    found = with_errors(state.found)
    slug = re.sub(r"[^a-z0-9]+", "-", re.sub(r"\(R\)|\(TM\)|\(|\)|,", " ", processor()).lower()).strip("-")
    out = arguments.out or HERE / "results" / f"{when}-{slug}"
    out.parent.mkdir(exist_ok=True)
    machine = {"processor": processor(), "system": platform.platform(), "threads": arguments.threads, "date": when}
    Path(f"{out}.json").write_text(json.dumps({"machine": machine, "versions": versions} | found, indent=1) + "\n")
    Path(f"{out}.md").write_text(markdown(found, arguments, when, versions))
    if "peaks" in found and "none" in found.get("runs", {}):
        plot(found, arguments.threads, arguments.plot)
    print(f"wrote {out}.md")
