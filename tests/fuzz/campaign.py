"""Fuzz one format after the other: `make fuzz`.

python tests/fuzz/campaign.py FOLDER SECONDS [TARGET…]

Each target gets SECONDS in all: what earlier runs with the same FOLDER have spent counts, and their corpus is used, so
that the same command continues an interrupted run. FOLDER/progress.json keeps the counts, log-TARGET.txt the output,
found-TARGET-… what failed. Exit code 1 if anything was found.
"""

import json
import re
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
COUNTS = {"inputs": "number_of_executed_units", "MiB": "peak_rss_mb"}  # ours -> libFuzzer's
PATIENCE = 300  # seconds beyond the time given, to import and to end, on a busy machine
FOUND = ("crash", "timeout", "oom", "leak")  # what libFuzzer names its findings

Counts = dict[str, dict[str, float]]


def fuzz(target: str, seconds: float, folder: Path) -> dict[str, float]:
    """Fuzz a target for some seconds; seconds spent, inputs and peak memory. Ctrl-C ends it, with its counts so far."""
    words = [sys.executable, str(HERE / "fuzz.py"), target, str(max(1, round(seconds))), str(folder)]
    log, started, stopped = folder / f"log-{target}.txt", time.monotonic(), False
    with log.open("w", encoding="utf-8") as file:
        process = subprocess.Popen(words, stdout=file, stderr=subprocess.STDOUT)
        try:
            process.wait(seconds + PATIENCE)
        except KeyboardInterrupt:
            stopped = True
        except subprocess.TimeoutExpired:
            process.kill()
        try:
            process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    text = log.read_text(encoding="utf-8", errors="replace")
    if "INITED" not in text and not stopped:
        raise SystemExit(f"{target} did not start:\n{text[-3000:]}")
    counted = {ours: re.findall(rf"stat::{name}:\s+(\d+)", text) for ours, name in COUNTS.items()}
    if not counted["inputs"]:  # libFuzzer prints no statistics after an interruption: the last line of progress
        counted["inputs"] = re.findall(r"^#(\d+)\s", text, re.MULTILINE)
    if not counted["MiB"]:
        counted["MiB"] = re.findall(r"rss: (\d+)Mb", text)
    numbers = {ours: float(found[-1]) if found else 0.0 for ours, found in counted.items()}
    inside = re.findall(r"^Done \d+ runs in (\d+) second", text, re.MULTILINE)  # without the imports
    spent = float(inside[-1]) if inside else min(seconds, time.monotonic() - started)
    return {"seconds": spent, **numbers, "stopped": float(stopped)}


def findings(target: str, folder: Path) -> list[str]:
    """Names of the inputs that failed."""
    return sorted(path.name for kind in FOUND for path in folder.glob(f"found-{target}-{kind}-*"))


def row(target: str, spent: dict[str, float], found: list[str]) -> str:
    return (
        f"{target:12} {spent['seconds']:8,.0f} s {spent['inputs']:12,.0f} inputs {spent['MiB']:7,.0f} MiB"
        f"  {', '.join(found) or 'nothing found'}"
    )


def main() -> int:
    folder, seconds, names = Path(sys.argv[1]), float(sys.argv[2]), sys.argv[3:]
    folder.mkdir(parents=True, exist_ok=True)
    state = folder / "progress.json"
    counts: Counts = json.loads(state.read_text()) if state.is_file() else {}
    stopped = False
    for target in names:
        spent = counts.setdefault(target, {"seconds": 0.0, "inputs": 0.0, "MiB": 0.0})
        if not stopped and seconds - spent["seconds"] >= 1:
            new = fuzz(target, seconds - spent["seconds"], folder)
            stopped = bool(new["stopped"])
            spent["seconds"] += new["seconds"]
            spent["inputs"] += new["inputs"]
            spent["MiB"] = max(spent["MiB"], new["MiB"])
            state.write_text(json.dumps(counts, indent=2) + "\n")
        print(row(target, spent, findings(target, folder)), flush=True)
    found = [name for target in names for name in findings(target, folder)]
    total = sum(counts[target]["inputs"] for target in names)
    print(f"{total:,.0f} inputs of {len(names)} formats, {len(found)} failed{'; interrupted' if stopped else ''}")
    return 1 if found else 130 if stopped else 0


if __name__ == "__main__":
    sys.exit(main())
