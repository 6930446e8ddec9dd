"""One stage of the same training in a quarter of an hour of a GPU.

    python runs/embedded/gpu.py pack WORK PARTS --first V1     inputs in files of at most 38 MB
    python runs/embedded/gpu.py run PARTS OUT --seconds 780 [--device cuda] [--student FOLDER]
    python runs/embedded/gpu.py unpack OUT FOLDER        the student, from files of at most 16 MiB

``run`` needs torch, safetensors, tokenizers, numpy and scipy, no native engine and no network. It trains as train.py
does, with tokens per second, memory and losses in OUT/log.jsonl as it goes; it writes the student every --save seconds,
in int8 and in parts, and stops by itself. The first twenty steps are repeated in float32 on the same batches, so that
bf16's losses can be compared with them.

Not run on a GPU so far. Rehearsed on a CPU (`--device cpu --budget 512`: one list a step) for twenty steps in bf16 and
eighteen in float32, then stopped: the losses differ by at most .013. The training after that was not rehearsed.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from pathlib import Path

import numpy as np
import torch
from common import Corpus, TorchModel, load
from safetensors.numpy import load_file, save_file
from student import BGE, L12, make
from train import STAGES, HiddenAndLists, Student, Teachers

from turborank.distill.students import write_int8
from turborank.distill.trainer import Run, Schedule

PART, RESULT = 38_000_000, 16 * 2**20
WEIGHTS = "model.safetensors"
MODEL_FILES = ("config.json", "tokenizer.json", WEIGHTS)


def cut(path: Path, out: Path, size: int) -> None:
    """A file as ``NAME.000``, ``NAME.001`` …, each of at most ``size`` bytes, the last one written last."""
    data = path.read_bytes()
    for old in out.glob(f"{path.name}.[0-9][0-9][0-9]"):
        old.unlink()
    for number, start in enumerate(range(0, len(data), size)):
        (out / f"{path.name}.{number:03}").write_bytes(data[start : start + size])


def joined(folder: Path, out: Path) -> None:
    """Every file that :func:`cut` has cut, whole again."""
    for first in sorted(folder.glob("*.000")):
        parts = sorted(folder.glob(f"{first.stem}.[0-9][0-9][0-9]"))
        (out / first.stem).write_bytes(b"".join(part.read_bytes() for part in parts))


def pack(work: Path, out: Path, first: Path) -> None:
    """Token ids, pools, two teachers in float16 and the first model, in parts."""
    out.mkdir(parents=True, exist_ok=True)
    Corpus(work, work / "teachers" / L12)
    shards = [load(path) for path in sorted(work.glob("pools-[0-9]*.npz"))]
    whole = work / "gpu"
    whole.mkdir(exist_ok=True)
    np.savez_compressed(whole / "pools-000.npz", **{n: np.concatenate([s[n] for s in shards]) for n in shards[0]})
    for path in (*sorted(work.glob("tokens-*.npz")), work / "pool.npz"):
        np.savez_compressed(whole / path.name, **load(path))
    for name in ("queries.jsonl", "long-queries.jsonl"):  # sources, which choose the weights of the teachers; places
        shutil.copyfile(work / name, whole / name)
    for teacher in (work / "teachers" / L12, work / "teachers" / BGE):
        for name in ("config.json", "tokenizer.json"):
            shutil.copyfile(teacher / name, whole / f"{teacher.name}.{name}")
        half = {name: w.astype(np.float16) for name, w in load_file(teacher / WEIGHTS).items()}
        save_file(half, whole / f"{teacher.name}.{WEIGHTS}", metadata={"format": "pt"})
    for name in MODEL_FILES:
        shutil.copyfile(first / name, whole / f"first.{name}")
    for path in whole.iterdir():
        cut(path, out, PART)
    print(f"{len(list(out.iterdir()))} parts, {sum(p.stat().st_size for p in out.iterdir()) / 1e6:.0f} MB")


def unpack(parts: Path, work: Path) -> None:
    """The work folder of a run, from the parts."""
    work.mkdir(parents=True, exist_ok=True)
    joined(parts, work)
    teachers = work / "teachers"
    for model, folder in ((L12, teachers / L12), (BGE, teachers / BGE), ("first", work / "first")):
        folder.mkdir(parents=True, exist_ok=True)
        for name in MODEL_FILES:
            shutil.move(work / f"{model}.{name}", folder / name)


class Clock:
    """Ends a run in time: schedules need a number of steps, a GPU is had for a number of seconds."""

    def __init__(self, seconds: float) -> None:
        self.end = time.monotonic() + seconds

    @property
    def left(self) -> float:
        return self.end - time.monotonic()


def stage(name: str, student: Student, loss, out: Path, seconds: float, args) -> Student:
    """Measure the speed over 20 steps, plan as many steps as fit, train, write the student as it goes."""
    clock, rows = Clock(seconds), []
    started = time.monotonic()
    probe = Run(student, out / f"{name}-probe", Schedule(20, learning_rate=args.lr, save_every=10**9), dtype=args.dtype)
    probe.train(loss, None, lambda row, steps: rows.append(row))
    each = (time.monotonic() - started) / len(rows)
    steps = max(20, int(0.92 * clock.left / each))
    note(out, {"stage": name, "seconds_a_step": each, "steps": steps, "losses": [row["loss"] for row in rows]})
    if args.dtype != torch.float32:
        exact = Run(
            student, out / f"{name}-fp32", Schedule(20, learning_rate=args.lr, save_every=10**9), dtype=torch.float32
        )
        exact.train(loss, None, lambda row, steps: note(out, {"stage": name, "fp32": row["step"], "loss": row["loss"]}))
    run = Run(
        student,
        out / name,
        Schedule(steps, learning_rate=args.lr, warmup=40, decay="linear", save_every=10**9),
        dtype=args.dtype,
    )
    saved = time.monotonic()

    def told(row: dict, of: int) -> None:
        nonlocal saved
        if row["step"] % 20 == 0 or row["step"] == of:
            memory = torch.cuda.max_memory_allocated() if args.device == "cuda" else 0
            note(out, {"stage": name, **row, "memory": memory})
        if time.monotonic() - saved > args.save or row["step"] == of:
            saved = time.monotonic()
            write(run.current(), out)
        if clock.left < 0:
            raise TimeoutError

    try:
        run.train(loss, None, told)
    except TimeoutError:
        write(run.current(), out)
    return run.current()


def note(out: Path, row: dict) -> None:
    with (out / "log.jsonl").open("a") as file:
        file.write(json.dumps(row) + "\n")


def write(student: Student, out: Path) -> None:
    """The student in int8, in parts."""
    write_int8(student, out / "student")
    (out / "parts").mkdir(exist_ok=True)
    for path in (out / "student").iterdir():
        cut(path, out / "parts", RESULT)


def run(args) -> None:
    work = args.out / "work"
    unpack(args.parts, work)
    l12, first = work / "teachers" / L12, work / "first"
    corpus = Corpus(work, l12)
    if not (work / "student").is_dir():
        make(l12, first, corpus.probes(), work)
    teachers = Teachers.load(work, first, lambda *given: TorchModel(*given, args.device, args.dtype), "torch")
    folder = args.student or work / "student"
    loss = HiddenAndLists(work, corpus, teachers, STAGES[args.stage], budget=args.budget)
    stage("train", Student.load(folder), loss, args.out, args.seconds, args)


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    kinds = parser.add_subparsers(dest="what", required=True)
    for name in ("pack", "unpack", "run"):
        kind = kinds.add_parser(name)
        kind.add_argument("source", type=Path)
        kind.add_argument("out", type=Path)
        if name == "pack":
            kind.add_argument("--first", type=Path, required=True, help="the folder of turborank-embedded-v1")
        if name == "run":
            kind.add_argument("--seconds", type=float, default=780)
            kind.add_argument("--save", type=float, default=120, help="seconds between two copies of the student")
            kind.add_argument("--device", default="cuda")
            kind.add_argument("--budget", type=int, default=65_536, help="tokens of a step")
            kind.add_argument("--lr", type=float, default=6e-4)
            kind.add_argument("--student", type=Path, help="begin with this folder")
            kind.add_argument("--stage", choices=STAGES, default="first", help="weights of the losses")
            kind.add_argument("--dtype", type=lambda name: getattr(torch, name), default=torch.bfloat16)
    return parser.parse_args()


def main() -> None:
    args = options()
    if args.what == "pack":
        pack(args.source, args.out, args.first)
    elif args.what == "unpack":
        args.out.mkdir(parents=True, exist_ok=True)
        joined(args.source / "parts", args.out)
    else:
        args.parts = args.source
        args.out.mkdir(parents=True, exist_ok=True)
        run(args)


if __name__ == "__main__":
    main()
