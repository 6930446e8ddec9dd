"""Does distillation distil? One student, taught by labels or by a teacher: in a world of known answers, and in earnest.

    python runs/distillation.py WORK              the little world; what is done is kept, a stopped run goes on
    python runs/distillation.py WORK REAL         and the table of what runs/distillation.sh has done in REAL

Writes runs/results/distillation.md and .json. The world and its lessons are proof.py's; everything is
trained by the library's own loop and measured by its serving engine. CPU, one thread; the little world takes about 35
seconds of a core for each seed of a row.
"""

import json
import os
import platform
import sys
import textwrap
import time
from pathlib import Path

import proof
from proof import TEACHER, World

from turborank.distill import train
from turborank.distill.folder import TrainingFolder
from turborank.distill.students import Student
from turborank.distill.teachers import parse_weighted
from turborank.distill.train import DevEvaluation, ServingOptions, held_out, pool_entries, teacher_scores

RESULTS = Path(__file__).resolve().parent / "results"
SEEDS = (0, 1, 2)
STEPS = 300
MARGIN = {"little": 0.05, "real": 0.01}  # what the teacher's lead must be, for every seed
LABELS, TAUGHT = "labels alone", "teacher's scores"
# name -> (losses, teacher, whether every document of the training queries is judged)
LESSONS = {
    LABELS: ("infonce:1", None, False),
    TAUGHT: ("kl:1", TEACHER, False),
    "both": ("infonce:1,kl:1", TEACHER, False),
    "labels of every document, without error": ("softmax:1", None, True),
    "labels alone, BCE": ("bce:1", None, False),
    "teacher, MarginMSE": ("margin_mse:1", TEACHER, False),
    "teacher, RankNet": ("ranknet:1", TEACHER, False),
    "teacher, ADR-MSE": ("adr_mse:1", TEACHER, False),
}
BASELINES = {"first stage: words in common": "candidates.trec", "the teacher itself": f"scores/{TEACHER}.trec"}
SETS = ("lists", "scifact", "med", "cisi", "cranfield")
TEACHERS = ("minilm:20", "bm25:0.9:z")
SERVING = ServingOptions(threads=1, max_length=256, queries=50)


def main(work: Path, real: Path | None) -> None:
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
    table(done, work, really(real) if real else {})


def table(done: dict, work: Path, found: dict) -> None:
    """Write runs/results/distillation.md and .json of what there is."""
    for name, run in BASELINES.items():
        for seed in SEEDS:
            folder = world(work, seed, False)
            done[f"{name} {seed}"] = {"curve": [proof.ndcg(folder, folder / run)]}
    (RESULTS / "distillation.json").write_text(json.dumps({"little": done, "real": found}, indent=1) + "\n")
    lines = ["# Does distillation distil?", "", "## In a world whose answer is known", "", *little_table(done)]
    lines += ["", "## On real data", "", *real_table(found)] if found else []
    lines += ["", f"{cpu()}, Python {platform.python_version()}; one thread.", ""]
    (RESULTS / "distillation.md").write_text("\n".join(lines), encoding="utf-8")


def world(work: Path, seed: int, complete: bool) -> Path:
    """The training folder of a seed, and beside it the student that has learnt nothing yet."""
    folder = work / f"world-{seed}{'-complete' if complete else ''}"
    if not folder.exists():
        words = proof.write(folder, World(complete=complete), seed)
        if not (work / f"novice-{seed}").exists():
            proof.novice(words, seed).save(work / f"novice-{seed}")
    return folder


def little_table(done: dict) -> list[str]:
    names = [name for name in (*BASELINES, *LESSONS) if all(f"{name} {seed}" in done for seed in SEEDS)]
    ends = {name: [done[f"{name} {seed}"]["curve"][-1] for seed in SEEDS] for name in names}
    bests = {name: [max(done[f"{name} {seed}"]["curve"]) for seed in SEEDS] for name in names if name in LESSONS}
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
        "Stated margin: for every seed the student of the teacher's scores, at its end, leads the student of labels "
        "alone, at its best evaluation, by"
    )
    lines = [*textwrap.wrap(about, 120), "", *verdict(claim, ends[TAUGHT], bests[LABELS], MARGIN["little"]), ""]
    lines += [f"| taught by | {seeds()} | mean at the end | mean at its best |", "|---|" + "--:|" * (len(SEEDS) + 2)]
    for name, values in ends.items():
        lines.append(
            f"| {name} | {numbers([*values, mean(values)])} | {numbers([mean(bests[name])]) if name in bests else ''} |"
        )
    seconds = mean([row["seconds"] for row in done.values() if "seconds" in row])
    return [*lines, "", f"`python runs/distillation.py WORK`; {seconds:.0f} seconds of a core for each training."]


def really(work: Path) -> dict:
    """Row -> set -> nDCG@10, of what runs/distillation.sh left; BM25, the teachers and the untrained student beside."""
    folders = {name: TrainingFolder.load(work / name) for name in SETS}
    found = {
        "BM25": {name: ndcg(folder, folder.scores("bm25")) for name, folder in folders.items()},
        "the teachers, fused": {
            name: ndcg(folder, teacher_scores(folder, [parse_weighted(text) for text in TEACHERS]))
            for name, folder in folders.items()
        },
        "the student, untrained": by_set(DevEvaluation(folders, SERVING)(Student.load(work / "four-layers"))),
    }
    for name, run in ((LABELS, "labels"), (TAUGHT, "teacher")):
        for seed in SEEDS:
            rows = (work / f"real-{run}-{seed}" / "curve.jsonl").read_text(encoding="utf-8").splitlines()
            found[f"{name} {seed}"] = by_set(json.loads(rows[-1]))
    return found


def by_set(row: dict) -> dict[str, float]:
    return {name: row[f"ndcg@10 {name}"] for name in SETS}


def ndcg(folder: TrainingFolder, scores) -> float:
    """nDCG@10 of scores of all pool entries, over the very queries that DevEvaluation asks."""
    queries = held_out(folder, SERVING.queries)
    return train.ndcg(folder, queries, scores[pool_entries(folder, queries)].tolist())


def real_table(found: dict) -> list[str]:
    average = {name: mean(list(row.values())) for name, row in found.items()}
    about = (
        "nDCG@10 of 50 held-out queries each (med: 30), pools as in runs/distillation.sh, documents cut at 256 tokens, "
        "measured by the serving engine; three seeds of the drawing. Four layers of the recovered student "
        "(layers 1, 3, 4 and 6) take 100 steps of 3,072 tokens over its training lists: by InfoNCE on "
        "labels alone (queries made from passages have none, and are left out), or by KL to the two teachers' fused "
        "scores, without a label. `lists` are held-out queries of the training sources; nobody trains on the others."
    )
    claim = "Stated margin: for every seed, on the mean of the five sets, the student of the teachers leads by"
    taught, labels = ([average[f"{name} {seed}"] for seed in SEEDS] for name in (TAUGHT, LABELS))
    lines = [*textwrap.wrap(about, 120), "", *verdict(claim, taught, labels, MARGIN["real"]), ""]
    lines += ["| | " + " | ".join(SETS) + " | mean |", "|---|" + "--:|" * (len(SETS) + 1)]
    for name, row in found.items():
        lines.append(f"| {name} | {numbers([*row.values(), average[name]])} |")
    for name in (LABELS, TAUGHT):
        rows = [found[f"{name} {seed}"] for seed in SEEDS]
        values = [mean([row[each] for row in rows]) for each in SETS]
        lines.append(f"| **{name}, mean** | {numbers([*values, mean(values)])} |")
    return [*lines, "", "`runs/distillation.sh DATA REAL && python runs/distillation.py WORK REAL`"]


def verdict(claim: str, taught: list[float], labels: list[float], margin: float) -> list[str]:
    leads = [t - s for t, s in zip(taught, labels, strict=True)]
    word = "It holds" if min(leads) >= margin else "It does not hold"
    return textwrap.wrap(f"**{claim} {margin}. {word}**: {', '.join(f'{lead:+.4f}' for lead in leads)}.", 120)


def seeds() -> str:
    return " | ".join(f"seed {seed}" for seed in SEEDS)


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def numbers(values: list[float]) -> str:
    return " | ".join(f"{value:.4f}" for value in values)


def cpu() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return f"{line.partition(':')[2].strip()}, {os.cpu_count()} cores"
    return platform.processor()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]) if len(sys.argv) > 2 else None)
