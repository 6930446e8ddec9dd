"""Whole runs, from folders to folders: what the command line calls, and a program may."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from turborank.checkpoint import verify
from turborank.distill.batches import Drawer, Drawing
from turborank.distill.biencoder import BiEncoder
from turborank.distill.ensemble import parse
from turborank.distill.folder import TrainingFolder, run_path
from turborank.distill.inner import Inner
from turborank.distill.inner import parse as parse_inner
from turborank.distill.loop import Progress, Run, Schedule
from turborank.distill.losses import mix
from turborank.distill.records import read_records
from turborank.distill.recover import Reading, Recovery, Texts, check
from turborank.distill.report import write_report
from turborank.distill.students import Student
from turborank.distill.train import Examination, Ranking, Serving, teacher_scores
from turborank.errors import InputError
from turborank.evaluate.files import write_json
from turborank.tokens import PairEncoder

MANIFEST = "manifest.json"
WITH_TEACHER, LABELS_ALONE = "infonce:1,kl:1", "infonce:1"
# What may differ between the runs of one folder: how far it goes, not what it does.
FREE = ("stop", "save_every", "evaluate_every", "patience")


def recover(
    student: Path,
    source: Path,
    texts: Path,
    long: Sequence[Path],
    out: Path,
    schedule: Schedule,
    *,
    budget: int = 4096,
    long_tokens: Sequence[int] = (1024, 2048, 4096),
    bf16: bool = True,
    recompute: bool = False,
    threads: int | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> Student:
    """:mod:`turborank.distill.recover` as a resumable run; the student is written to ``out/final``."""
    _threads(threads)
    reading = Reading(budget=budget, long_tokens=tuple(long_tokens))
    folder, teacher, start = TrainingFolder.load(texts), BiEncoder.load(source), Student.load(student)
    check(start.config, teacher.config)
    facts = {
        "kind": "recover", "student": _hash(student), "source": teacher.revision, "texts": folder.fingerprint,
        "long": [_hash(path) for path in long], "reading": asdict(reading), "bf16": bf16, "seed": seed,
    }  # fmt: skip
    _manifest(out, facts, schedule)
    run = Run(start, out, schedule, dtype=_dtype(bf16), recompute=recompute)
    run.resume()
    queries = [text for text, held in zip(folder.queries, folder.held_out, strict=True) if not held]
    read = Texts(teacher, queries, folder.texts, _long_documents(long), reading, seed)
    layers = _matching(start.config.num_hidden_layers, teacher.config.num_hidden_layers)
    result = run.train(Recovery(teacher, read, layers=layers, dtype=_dtype(bf16), rank=run.rank), progress=progress)
    return _finish(run, result)


def train(
    folder: Path,
    student: str | Path,
    out: Path,
    schedule: Schedule,
    drawing: Drawing,
    *,
    teachers: Sequence[str] = (),
    loss: str | None = None,
    dev: Sequence[Path] = (),
    dev_queries: int = 200,
    max_length: int = 512,
    inner: Sequence[str] = (),
    bf16: bool = True,
    recompute: bool = False,
    train_words: bool = False,
    threads: int | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> Path:
    """Train on lists (:mod:`turborank.distill.train`); the folder of the best student, without ``dev`` of the last."""
    _threads(threads)
    specs = [parse(text) for text in teachers]
    losses = mix(loss or (WITH_TEACHER if specs else LABELS_ALONE))
    lists, start = TrainingFolder.load(folder), Student.load(student)
    if "teacher" in losses.needs and not specs:
        raise InputError("expected a teacher for these losses, got none", hint="name one with --teacher")
    fused = teacher_scores(lists, specs)
    examined = {path: lists if path == folder else TrainingFolder.load(path) for path in dev}
    facts = {
        "kind": "train", "student": _hash(start.weights), "lists": _of(lists), "loss": loss, "bf16": bf16,
        "teachers": [[*spec, _hash(run_path(folder, spec.name))] for spec in specs],
        "drawing": _plain(asdict(drawing)), "inner": list(inner), "seed": seed, "train_words": train_words,
        "dev": [_of(one) for one in examined.values()], "dev_queries": dev_queries, "max_length": max_length,
    }  # fmt: skip
    terms = [Inner(parse_inner(text), start, _dtype(bf16)) for text in inner]
    run = Run(start, out, schedule, dtype=_dtype(bf16), freeze_words=not train_words, recompute=recompute)
    run.add([matrix for term in terms for matrix in term.projections if matrix is not None])
    encoder = PairEncoder(start.tokenizer, max_length=start.config.max_length)
    drawer = Drawer(lists, encoder, fused, drawing, seed=seed, rank=run.rank)
    _manifest(out, facts, schedule)  # after whatever may refuse the options, so that they can be corrected
    run.resume()
    examination = None
    if dev:
        names = [path.name for path in examined]
        folders = {path.name if names.count(path.name) == 1 else str(path): one for path, one in examined.items()}
        serving = Serving(threads=threads, max_length=max_length, queries=dev_queries)
        examination = Examination(folders, serving)
    _finish(run, run.train(Ranking(drawer, losses, terms), examination, progress))
    return out / ("best" if (out / "best").is_dir() else "final")


def _finish(run: Run, student: Student) -> Student:
    run.finish(student)
    if run.accelerator.is_main_process:
        write_report(run.out)
    return student


def _threads(threads: int | None) -> None:
    if threads is not None:
        torch.set_num_threads(threads)


def _dtype(bf16: bool) -> torch.dtype:
    return torch.bfloat16 if bf16 else torch.float32


def _matching(student: int, source: int) -> list[int]:
    """The source's layer behind each of the student's: evenly, the last one for the last."""
    return [round((layer + 1) * source / student) - 1 for layer in range(student)]


def _long_documents(paths: Sequence[Path]) -> list[str]:
    """Each different ``text`` (or ``passage``) of some files of JSON lines."""
    found: dict[str, None] = {}
    for path in paths:
        for at, record in read_records(path):
            text = record.get("text", record.get("passage"))
            if not isinstance(text, str):
                raise InputError(f"expected a string at text or passage, got {type(text).__name__} at {at}")
            found[" ".join(text.split())] = None
    return list(found)


def _hash(what: Path | Mapping[str, torch.Tensor]) -> str:
    """sha256 of a file, of a model folder's weights, or of tensors."""
    if isinstance(what, Path):
        path = what / verify.WEIGHTS if what.is_dir() else what
        if not path.is_file():
            raise InputError(f"expected a file, got nothing at {path}")
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    digest = hashlib.sha256()
    for name in sorted(what):
        digest.update(name.encode())
        digest.update(what[name].contiguous().numpy().tobytes())
    return digest.hexdigest()


def _of(folder: TrainingFolder) -> dict[str, str]:
    """What a training folder holds: its texts, pools and labels."""
    labels = sorted((folder.path / "qrels").glob("*.tsv"))
    return folder.fingerprint | {path.name: _hash(path) for path in labels}


def _plain(value: Any) -> Any:
    return json.loads(json.dumps(value))


def _manifest(out: Path, facts: dict[str, Any], schedule: Schedule) -> None:
    """Write what the run is made of; refuse to continue another one."""
    facts = _plain(facts | {"schedule": {k: v for k, v in asdict(schedule).items() if k not in FREE}})
    path = out / MANIFEST
    if path.is_file():
        known = verify.json_object(path)
        differing = [key for key in facts if known.get(key) != facts[key]]
        if differing:
            raise InputError(
                f"expected the run that is there to be of the same, got another {', '.join(differing)} at {path}",
                hint="choose another --out, or delete the folder",
            )
        return
    facts["versions"] = {"torch": torch.__version__}
    write_json(path, facts)
