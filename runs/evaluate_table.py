"""The committed table: one row a collection and system, from the results.json files under a folder.

python runs/evaluate_table.py build/evaluation-… runs/results

Rows already in the table stay where the folder has nothing newer of the same model; those of an earlier embedded model
are dropped. The small tables of README and of the model's card are updated too: the columns of BM25 and of the embedded
model.
"""

import hashlib
import json
import re
import sys
from pathlib import Path
from statistics import mean

from turborank import catalog

KEPT = (
    "queries_evaluated", "queries_scored", "depth", "sample_seed", "engine", "precision", "isa", "threads",
    "max_length", "length", "pairs", "tokens", "longest_pair", "pairs_truncated", "tokens_truncated", "seconds",
    "tokens_per_second",
)  # fmt: skip
COLUMNS = ("nDCG@10", "R@100", "MRR@10", "MAP", "Success@1", "Success@5", "Success@10")
PARTS = (
    "science", "trec-dl21", "passages", "aerodynamics", "articles", "open", "saturated", "rag",
    "meetings-512", "meetings-passages", "meetings-truncated", "meetings-windows",
)  # fmt: skip
# Rows of the small tables, and the collections whose nDCG@10 they show.
SHOWN = {
    "SciFact test": ("scifact",), "Cranfield": ("cranfield",), "MED": ("med",), "CISI": ("cisi",), "NPL": ("npl",),
    "TIME": ("time",), "TREC DL 2021 (judged pool)": ("trec-dl21-pool",),
}  # fmt: skip
# Figures of the publisher, for models whose own collections are not at hand.
PUBLISHED = {
    "ms-marco-MiniLM-L-12-v2": (
        " The weights went through 8 bits once before (`runs/teachers.py`). Published: TREC DL 2019 nDCG@10 .7431, "
        "MS MARCO dev MRR@10 .3902."
    )
}
FIGURE = r"(?:\d\.\d+|TODO\(figures\))"
SEVEN = tuple(name for names in SHOWN.values() for name in names)
SHOWN |= {
    "**mean of the seven**": SEVEN,
    "mean without TIME": tuple(name for name in SEVEN if name != "time"),
}
ROOT = Path(__file__).resolve().parent.parent
PAGES = (ROOT / "README.md", catalog.lookup(catalog.DEFAULT).folder / "README.md")


def results(folder: Path) -> list[tuple[str, dict]]:
    found = {path.parent.name: json.loads(path.read_text()) for path in folder.glob("*/results.json")}
    return [(part, found[part]) for part in (*PARTS, *sorted(set(found) - set(PARTS))) if part in found]


def summarised(part: str, dataset: dict, machine: dict) -> dict:
    """Everything but runs and per-query values: measures, differences, what they depend on."""
    systems = []
    for system in dataset["systems"]:
        manifest = system["manifest"]
        row = {key: system[key] for key in ("name", "measures", "curve", "compared_with")} | {"machine": machine}
        row |= {key: manifest[key] for key in KEPT if key in manifest}
        if "model" in manifest:
            model = manifest["model"]
            row["revision"], row["weights_sha256"] = model["revision"], model["sha256"]["model.safetensors"]
        systems.append(row)
    about = dataset["systems"][0]["manifest"]
    row = {"part": part, **{key: dataset[key] for key in ("name", "measure", "remarks")}}
    return {**row, "dataset": about["dataset"], "first_stage": about["first_stage"], "systems": systems}


def candidates(first: dict) -> tuple:
    """Equal for two first stages that gave the same candidates: queries, depth and rounded measures."""
    return first["queries_evaluated"], first["depth"], {name: round(x, 4) for name, x in first["measures"].items()}


def merged(path: Path, rows: list[dict]) -> list[dict]:
    """``rows`` with the other collections, and the other models over the same candidates, of an earlier table.

    Figures of an earlier embedded model are dropped. The embedded model comes right after the first stage.
    """
    earlier = json.loads(path.read_text())["rows"] if path.exists() else []
    default = catalog.lookup(catalog.DEFAULT)
    digest = hashlib.sha256((default.folder / "model.safetensors").read_bytes()).hexdigest()
    out = {(row["part"], row["name"]): row for row in rows}
    for row in earlier:
        first, *others = ({"machine": row.get("machine"), **system} for system in row["systems"])
        here = out.setdefault((row["part"], row["name"]), {**row, "systems": [first]})
        if candidates(here["systems"][0]) != candidates(first):
            continue
        known = {system["name"] for system in here["systems"]}
        current = (s for s in others if s["name"] != default.name or s["weights_sha256"] == digest)
        here["systems"] += [system for system in current if system["name"] not in known]
    for row in out.values():
        row["systems"][1:] = sorted(row["systems"][1:], key=lambda system: system["name"] != default.name)
    return [row for row in out.values() if len(row["systems"]) > 1]


def machines(rows: list[dict]) -> list[str]:
    """A line for every machine and day, with what was done there."""
    lines: dict[str, dict] = {}
    for row in rows:
        for system in row["systems"]:
            if "tokens" not in system:
                continue
            about = system["machine"]
            how = f"{system['engine']}, {system['precision']}, {system['isa']}, {system['threads']} threads"
            when = f"{about['created'][:10]}, {about['cpu']}, {about['cores']} cores ({how})"
            line = lines.setdefault(when, {"names": {}, "tokens": 0, "seconds": 0.0})
            line["names"].setdefault(system["name"], {})[row["name"]] = None
            line["tokens"] += system["tokens"]
            line["seconds"] += system["seconds"]
    out = []
    for when, line in lines.items():
        done = "; ".join(f"{name}: {', '.join(sets)}" for name, sets in line["names"].items())
        cost = f"{line['tokens'] / 1e6:,.1f} million tokens in {line['seconds'] / 60:,.0f} minutes"
        out.append(f"- {when}. {done}; {cost}, beside whatever else ran there")
    return out


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


def table(rows: list[dict]) -> str:
    heads = ["collection", "system", *COLUMNS, "difference from the first stage [95 %], p"]
    lines = [
        "# Results", "",
        "Written by `runs/evaluate.sh`; `evaluation.json` has the summarised manifests.", "",
        "| " + " | ".join(heads) + " |", "|---|---|" + "---:|" * len(COLUMNS) + "---|",
        *(line for row in rows for line in lines_of(row)), "",
        "Differences are paired bootstraps over queries (10,000 resamples); p-values are not adjusted.", "",
    ]  # fmt: skip
    systems = [system for row in rows for system in row["systems"] if "weights_sha256" in system]
    models = {system["weights_sha256"]: system["name"] for system in systems}
    lines += [f"{name}: weights sha256 `{digest}`.{PUBLISHED.get(name, '')}" for digest, name in models.items()]
    lines += ["", *machines(rows)]
    lines += ["", "## Length, where a pair reached the model's limit", ""]
    reached = (
        (row, s) for row in rows for s in row["systems"] if s.get("longest_pair", 0) >= s.get("max_length", 1 << 40)
    )
    lines += [length_line(row, system) for row, system in reached] or ["Nowhere."]
    lines += ["", "## Remarks", ""]
    lines += [f"- {row['name']} ({row['part']}): {remark}" for row in rows for remark in row["remarks"]]
    return "\n".join(lines) + "\n"


def shown(text: str, rows: list[dict]) -> str:
    """A page with the figures of ``rows`` in its small table: | collection | queries | BM25 | other | model |.

    A collection that the embedded model was not evaluated on keeps its line.
    """
    evaluated = (row for row in rows if row["systems"][1]["name"] == catalog.DEFAULT)
    figures = {row["name"]: [system["measures"].get("nDCG@10") for system in row["systems"]] for row in evaluated}
    for label, names in SHOWN.items():
        if all(name in figures for name in names):
            first, model = (f"{mean(figures[name][at] for name in names):.4f}" for at in (0, 1))
            line = rf"^(\| {re.escape(label)} \|[^|]*\|) {FIGURE} (\|.*\|) (\**){FIGURE}(\**) \|$"
            text = re.sub(line, rf"\g<1> {first} \g<2> \g<3>{model}\g<4> |", text, flags=re.M)
    return text


def main(folder: Path, out: Path) -> None:
    parts = results(folder)
    if not parts:
        sys.exit(f"no results.json under {folder}")
    rows = [summarised(part, dataset, found["system"]) for part, found in parts for dataset in found["datasets"]]
    rows = merged(out / "evaluation.json", rows)
    rows.sort(key=lambda row: PARTS.index(row["part"]) if row["part"] in PARTS else len(PARTS))
    out.mkdir(parents=True, exist_ok=True)
    (out / "evaluation.md").write_text(table(rows), encoding="utf-8")
    (out / "evaluation.json").write_text(json.dumps({"rows": rows}, indent=1, ensure_ascii=False) + "\n")
    for page in PAGES:
        page.write_text(shown(page.read_text(encoding="utf-8"), rows), encoding="utf-8")
    print(out / "evaluation.md")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
