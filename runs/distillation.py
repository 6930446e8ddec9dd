"""Does distillation distil? One student, taught by labels or by a teacher, in a world where the right answer is known.

    python runs/distillation.py [WORK]     WORK keeps what is done; a stopped run goes on

Writes runs/results/distillation.md and .json. The world and the training are turborank.distill.proof's; everything
is made by the library's own training loop and measured by its serving engine. CPU, one thread; a line takes about
40 seconds of a core for each seed.
"""

import json
import os
import platform
import sys
import textwrap
import time
from pathlib import Path

from turborank.distill import proof
from turborank.distill.proof import TEACHER, World

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "runs/results"
SEEDS = (0, 1, 2)
STEPS = 300
MARGIN = 0.05  # what the teacher's lead must be, for every seed
# name -> (losses, teacher, whether every document of the training queries is judged)
LESSONS = {
    "labels alone": ("infonce:1", None, False),
    "teacher's scores": ("kl:1", TEACHER, False),
    "both": ("infonce:1,kl:1", TEACHER, False),
    "every document judged, by nobody's error": ("softmax:1", None, True),
    "labels alone, BCE": ("bce:1", None, False),
    "teacher, MarginMSE": ("margin_mse:1", TEACHER, False),
    "teacher, RankNet": ("ranknet:1", TEACHER, False),
    "teacher, ADR-MSE": ("adr_mse:1", TEACHER, False),
}
BASELINES = {"first stage: words in common": "candidates.trec", "the teacher itself": f"scores/{TEACHER}.trec"}


def main(work: Path) -> None:
    work.mkdir(parents=True, exist_ok=True)
    store = work / "results.json"
    done = json.loads(store.read_text()) if store.exists() else {}
    for name, (loss, teacher, complete) in LESSONS.items():
        for seed in SEEDS:
            key = f"{name} {seed}"
            if key in done:
                continue
            folder = world(work, seed, complete)
            started = time.process_time()
            out = work / f"run-{seed}-{loss}-{complete}"
            curve = proof.learn(folder, work / f"novice-{seed}", out, loss, teacher, steps=STEPS, seed=seed)
            done[key] = {"curve": curve, "seconds": round(time.process_time() - started, 1)}
            store.write_text(json.dumps(done, indent=1))
            print(key, [f"{value:.4f}" for value in curve], flush=True)
    for name, run in BASELINES.items():
        for seed in SEEDS:
            folder = world(work, seed, False)
            done[f"{name} {seed}"] = {"curve": [proof.ndcg(folder, folder / run)]}
    write(done)


def world(work: Path, seed: int, complete: bool) -> Path:
    """The training folder of a seed, and beside it the student that has learnt nothing yet."""
    folder = work / f"world-{seed}{'-complete' if complete else ''}"
    if not folder.exists():
        words = proof.write(folder, World(complete=complete), seed)
        if not (work / f"novice-{seed}").exists():
            proof.novice(words, seed).save(work / f"novice-{seed}")
    return folder


def write(done) -> None:
    ends = {name: [done[f"{name} {seed}"]["curve"][-1] for seed in SEEDS] for name in (*BASELINES, *LESSONS)}
    bests = {name: [max(done[f"{name} {seed}"]["curve"]) for seed in SEEDS] for name in LESSONS}
    leads = [t - s for t, s in zip(ends["teacher's scores"], bests["labels alone"], strict=True)]
    verdict = "holds" if min(leads) >= MARGIN else "DOES NOT HOLD"
    w = World()
    about = (
        f"nDCG@10 of {w.held_out} held-out queries, all of whose documents are judged by the true grade, measured by "
        f"the serving engine; {len(SEEDS)} seeds of the world, the student and the drawing. The same random student "
        f"of four layers takes {STEPS} steps over lists of the same queries; only what it is told differs. "
        f"{w.queries} queries to learn from, each about {w.asked} of {w.concepts} concepts, which have {w.names} "
        f"names each; {w.pool} documents a query. Labels: one relevant document of each query, the others unjudged. "
        f"Teacher: the true grade + N(0, {w.noise})."
    )
    claim = (
        "**Stated margin: for every seed the student of the teacher's scores, at its end, leads the student of labels "
        f"alone, at its best evaluation, by {MARGIN}. It {verdict}**: {', '.join(f'{lead:+.4f}' for lead in leads)}."
    )
    lines = [
        "# Does distillation distil?",
        *("", *textwrap.wrap(about, 120), "", *textwrap.wrap(claim, 120), ""),
        "| taught by | " + " | ".join(f"seed {seed}" for seed in SEEDS) + " | mean at the end | mean at its best |",
        "|---|" + "--:|" * (len(SEEDS) + 2),
    ]
    for name, values in ends.items():
        best = f"{sum(bests[name]) / len(SEEDS):.4f}" if name in bests else ""
        cells = [*(f"{value:.4f}" for value in values), f"{sum(values) / len(SEEDS):.4f}", best]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    lines += ["", f"`python runs/distillation.py`, {cpu()}, Python {platform.python_version()}; one thread.", ""]
    (RESULTS / "distillation.md").write_text("\n".join(lines), encoding="utf-8")
    (RESULTS / "distillation.json").write_text(json.dumps(done, indent=1) + "\n", encoding="utf-8")


def cpu() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return f"{line.partition(':')[2].strip()}, {os.cpu_count()} cores"
    return platform.processor()


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "distillation-work"))
