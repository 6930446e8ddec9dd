"""The committed table: one row a collection and system, from the results.json files under a folder.

python runs/evaluate_table.py build/evaluation runs/results
"""

import json
import sys
from pathlib import Path

KEPT = ("queries_evaluated", "depth", "sample_seed", "engine", "precision", "isa", "threads", "max_length", "length",
        "pairs", "tokens", "longest_pair", "pairs_truncated", "tokens_truncated", "seconds", "tokens_per_second")  # fmt: skip
COLUMNS = ("nDCG@10", "R@100", "MRR@10", "MAP", "Success@1", "Success@5", "Success@10")
PARTS = ("passages", "trec-dl21", "rag", "saturated", "articles", "meetings-truncated", "meetings-windows")


def results(folder: Path) -> list[tuple[str, dict]]:
    found = {path.parent.name: json.loads(path.read_text()) for path in folder.glob("*/results.json")}
    return [(part, found[part]) for part in (*PARTS, *sorted(set(found) - set(PARTS))) if part in found]


def summarised(part: str, dataset: dict) -> dict:
    """Everything but runs and per-query values: measures, differences, what they depend on."""
    systems = []
    for system in dataset["systems"]:
        manifest = system["manifest"]
        kept = {key: manifest[key] for key in KEPT if key in manifest}
        if "model" in manifest:
            model = manifest["model"]
            kept["model"] = {
                "name": model["name"],
                "revision": model["revision"],
                "weights_sha256": model["sha256"]["model.safetensors"],
            }
        systems.append({"name": system["name"], "measures": system["measures"], "curve": system["curve"],
                        "compared_with": system["compared_with"], **kept})  # fmt: skip
    about = dataset["systems"][0]["manifest"]
    return {"part": part, "name": dataset["name"], "measure": dataset["measure"], "remarks": dataset["remarks"],
            "dataset": about["dataset"], "first_stage": about["first_stage"], "systems": systems}  # fmt: skip


def table(rows: list[dict], system: dict) -> str:
    lines = [
        "# Results", "",
        "Written by `runs/evaluate.sh`; summarised manifests are in `evaluation.json`. "
        f"{system['created'][:10]}, {system['cpu']}, {system['cores']} cores, turborank {system['versions']['turborank']}. "
        "The machine was shared, so seconds are no benchmark (those are in `bench/`).", "",
        "| collection | system | " + " | ".join(COLUMNS) + " | difference [95 %], p |", "|---|---|" + "---:|" * len(COLUMNS) + "---|",
    ]  # fmt: skip
    remarks = []
    for number, row in enumerate(rows, 1):
        first = row["systems"][0]
        where = f"{row['name']} ({first['queries_evaluated']} queries, top {first['depth']})"
        for system_row in row["systems"]:
            length = f", {system_row['length']}" if system_row.get("length", "truncate") != "truncate" else ""
            cells = [
                f"{system_row['measures'][name]:.4f}" if name in system_row["measures"] else "–" for name in COLUMNS
            ]
            base = system_row["compared_with"].get(first["name"])
            gain = (
                ""
                if base is None
                else (
                    f"{base['measure']} {base['difference']:+.4f} [{base['low']:+.4f}, {base['high']:+.4f}], {base['p_value']:.4f}"
                )
            )
            lines.append(
                f"| {where if system_row is first else ''} | {system_row['name']}{length} | {' | '.join(cells)} | {gain} |"
            )
        remarks += [f"- **{row['name']}** ({row['part']}): {remark}" for remark in row["remarks"]]
    models = {s["model"]["name"]: s for row in rows for s in row["systems"] if "model" in s}
    for name, facts in models.items():
        lines += ["", f"{name}: weights sha256 `{facts['model']['weights_sha256']}`, engine {facts['engine']}, "
                  f"{facts['precision']}, {facts['isa']}, {facts['threads']} threads."]  # fmt: skip
    cut = [f"{row['name']} ({row['part']}): {s['pairs_truncated']} of {s['pairs']} pairs cut, {s['tokens_truncated']:,} tokens unread, "
           f"longest {s['longest_pair']:,}" for row in rows for s in row["systems"] if s.get("longest_pair", 0) >= s.get("max_length", 9**9)]  # fmt: skip
    lines += ["", "Length: " + ("; ".join(cut) if cut else "no pair reached the model's limit") + "."]
    lines += [
        "",
        "Differences are paired bootstraps over queries (10,000 resamples); p-values are not adjusted.",
        "",
        "## Remarks",
        "",
    ]
    return "\n".join([*lines, *remarks]) + "\n"


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
