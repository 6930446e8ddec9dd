"""The committed table: one row a collection and system, from the results.json files under a folder.

python runs/evaluate_table.py build/evaluation runs/results
"""

import json
import sys
from pathlib import Path

KEPT = (
    "queries_evaluated", "queries_scored", "depth", "sample_seed", "engine", "precision", "isa", "threads",
    "max_length", "length", "pairs", "tokens", "longest_pair", "pairs_truncated", "tokens_truncated", "seconds",
    "tokens_per_second",
)  # fmt: skip
COLUMNS = ("nDCG@10", "R@100", "MRR@10", "MAP", "Success@1", "Success@5", "Success@10")
PARTS = (
    "science", "trec-dl21", "passages", "aerodynamics", "articles", "saturated", "rag",
    "meetings-512", "meetings-truncated", "meetings-windows",
)  # fmt: skip


def results(folder: Path) -> list[tuple[str, dict]]:
    found = {path.parent.name: json.loads(path.read_text()) for path in folder.glob("*/results.json")}
    return [(part, found[part]) for part in (*PARTS, *sorted(set(found) - set(PARTS))) if part in found]


def summarised(part: str, dataset: dict) -> dict:
    """Everything but runs and per-query values: measures, differences, what they depend on."""
    systems = []
    for system in dataset["systems"]:
        manifest = system["manifest"]
        row = {key: system[key] for key in ("name", "measures", "curve", "compared_with")}
        row |= {key: manifest[key] for key in KEPT if key in manifest}
        if "model" in manifest:
            model = manifest["model"]
            row["revision"], row["weights_sha256"] = model["revision"], model["sha256"]["model.safetensors"]
        systems.append(row)
    about = dataset["systems"][0]["manifest"]
    row = {key: dataset[key] for key in ("name", "measure", "remarks")}
    return {"part": part, **row, "dataset": about["dataset"], "first_stage": about["first_stage"], "systems": systems}


def difference(system: dict, first: str) -> str:
    found = system["compared_with"].get(first)
    if found is None:
        return ""
    interval = f"[{found['low']:+.4f}, {found['high']:+.4f}]"
    return f"{found['measure']} {found['difference']:+.4f} {interval}, {found['p_value']:.4f}"


def read(system: dict) -> str:
    """How much of a pair the model read, where that is not all of every pair."""
    if system.get("length") == "windows":
        return f", windows of {system['max_length']:,}"
    return f", first {system['max_length']:,} tokens" if system.get("pairs_truncated") else ""


def lines_of(row: dict) -> list[str]:
    first = row["systems"][0]
    lines = []
    for system in row["systems"]:
        where = f"{row['name']} ({first['queries_evaluated']} queries, top {first['depth']})" if system is first else ""
        values = (f"{system['measures'][name]:.4f}" if name in system["measures"] else "–" for name in COLUMNS)
        cells = [where, system["name"] + read(system), *values, difference(system, first["name"])]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def length_line(row: dict, system: dict) -> str:
    return (
        f"- {row['name']} ({row['part']}): {system['pairs_truncated']} of {system['pairs']} pairs cut, "
        f"{system['tokens_truncated']:,} of {system['tokens'] + system['tokens_truncated']:,} tokens not read, "
        f"longest pair {system['longest_pair']:,}"
    )


def table(rows: list[dict], about: dict) -> str:
    scored = [system for row in rows for system in row["systems"] if "tokens" in system]
    tokens, minutes = sum(system["tokens"] for system in scored), sum(system["seconds"] for system in scored) / 60
    heads = ["collection", "system", *COLUMNS, "difference from the first stage [95 %], p"]
    lines = [
        "# Results", "",
        "Written by `runs/evaluate.sh`; `evaluation.json` has the summarised manifests. "
        f"{about['created'][:10]}, {about['cpu']}, {about['cores']} cores, turborank {about['versions']['turborank']}. "
        f"{tokens / 1e6:,.1f} million tokens took {minutes:,.0f} minutes; other work may have shared the machine.", "",
        "| " + " | ".join(heads) + " |", "|---|---|" + "---:|" * len(COLUMNS) + "---|",
        *(line for row in rows for line in lines_of(row)), "",
        "Differences are paired bootstraps over queries (10,000 resamples); p-values are not adjusted.",
    ]  # fmt: skip
    models = {system["weights_sha256"]: system for row in rows for system in row["systems"] if "engine" in system}
    for digest, system in models.items():
        how = f"{system['engine']}, {system['precision']}, {system['isa']}, {system['threads']} threads"
        lines += ["", f"{system['name']}: weights sha256 `{digest}`; engine {how}."]
    lines += ["", "## Length, where a pair reached the model's limit", ""]
    reached = (
        (row, s) for row in rows for s in row["systems"] if s.get("longest_pair", 0) >= s.get("max_length", 1 << 40)
    )
    lines += [length_line(row, system) for row, system in reached] or ["Nowhere."]
    lines += ["", "## Remarks", ""]
    lines += [f"- {row['name']} ({row['part']}): {remark}" for row in rows for remark in row["remarks"]]
    return "\n".join(lines) + "\n"


def main(folder: Path, out: Path) -> None:
    parts = results(folder)
    if not parts:
        sys.exit(f"no results.json under {folder}")
    rows = [summarised(part, dataset) for part, found in parts for dataset in found["datasets"]]
    system = parts[-1][1]["system"]
    out.mkdir(parents=True, exist_ok=True)
    (out / "evaluation.md").write_text(table(rows, system), encoding="utf-8")
    (out / "evaluation.json").write_text(
        json.dumps({"system": system, "rows": rows}, indent=1, ensure_ascii=False) + "\n"
    )
    print(out / "evaluation.md")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
