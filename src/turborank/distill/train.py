"""Ranking: a student learns its teachers' judgement, and labels where there are any, from lists of documents.

    folder -> Drawer (lists by step number) -> Model (packed batch -> logits) -> Mix (losses) -> Run (loop)
                                                   every so many steps: the student, served -> nDCG@10 -> best/

What decides is nDCG@10 of held-out queries, ranked by the engine that will serve the student, in its precision.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from turborank import engines
from turborank.architectures.jinabert import COSINES
from turborank.checkpoint import verify
from turborank.data.files import file_hash, read_manifest, read_records, write_json
from turborank.data.trec import Scored, read_qrels
from turborank.distill.batches import Drawer, Drawing
from turborank.distill.biencoder import BiEncoder
from turborank.distill.folder import TrainingFolder, run_path
from turborank.distill.losses import Mix, Targets, attention_relations, hidden_states, layer_map, mix, projection
from turborank.distill.recover import Reading, Recovery, Texts, check
from turborank.distill.report import write_report
from turborank.distill.students import Student
from turborank.distill.teachers import TeacherSpec, fuse, parse_weighted
from turborank.distill.trainer import Loss, Model, Progress, Run, Schedule, tensors
from turborank.errors import InputError
from turborank.evaluate.measures import means, per_query
from turborank.scheduler import score
from turborank.tokens import PairEncoder, read_template
from turborank.types import Float32, ModelConfig, PackedBatch, Pair

MEASURE = "nDCG@10"


class Ranking:
    """A loss for :meth:`turborank.distill.trainer.Run.train`: a mix of list losses over drawn lists."""

    def __init__(self, drawer: Drawer, mix: Mix, inner: Sequence[Inner] = ()) -> None:
        self.drawer, self.mix, self.inner = drawer, mix, inner

    def __call__(self, model: Model, step: int) -> Loss:
        lists = self.drawer.draw(step)
        device = next(model.parameters()).device
        batch = tensors(lists.batch, device)
        trace: list[Tensor] = []
        record: list[tuple[Tensor, ...]] = []
        flat = model(batch, trace, record) if self.inner else model(batch)
        real = lists.targets.real.to(device)
        logits = torch.zeros(real.shape, dtype=flat.dtype, device=device).masked_scatter(real, flat)
        total, parts = self.mix(logits, _moved(lists.targets, device))
        for term in self.inner:
            value = term(batch, trace, record)
            total, parts = total + value, parts | {term.spec.kind: value.item()}
        return Loss(total, parts, lists.batch.tokens)


def _moved(targets: Targets, device: torch.device) -> Targets:
    teacher, labels = (None if t is None else t.to(device) for t in (targets.teacher, targets.labels))
    return Targets(teacher, labels, targets.real.to(device), targets.trusted.to(device))


def teacher_scores(folder: TrainingFolder, teachers: Sequence[TeacherSpec]) -> Float32 | None:
    """Fused scores (N,) of every pool place; None without teachers."""
    if not teachers:
        return None
    return fuse(teachers, {t.name: folder.scores(t.name) for t in teachers}, folder.bounds)


@dataclass(frozen=True)
class Serving:
    """How a student is measured while it learns: as it will be served."""

    engine: str = "auto"
    precision: str = "auto"
    threads: int | None = None
    max_length: int = 512  # tokens of a pair
    queries: int = 200  # of the held-out ones, at most, from each folder


class Examination:
    """nDCG@10 of a student over the held-out queries of some folders, by the serving engine."""

    def __init__(self, folders: Mapping[str, TrainingFolder], serving: Serving) -> None:
        self.serving = serving
        self.folders = {name: (folder, held_out(folder, serving.queries)) for name, folder in folders.items()}

    def __call__(self, student: Student) -> dict[str, float]:
        """Mean over the folders first, then each folder's."""
        found = {
            name: ndcg(folder, queries, serve(student, folder, pool_places(folder, queries), self.serving).tolist())
            for name, (folder, queries) in self.folders.items()
        }
        mean = {MEASURE.lower(): float(np.mean(list(found.values())))}
        return mean | ({f"{MEASURE.lower()} {n}": v for n, v in found.items()} if len(found) > 1 else {})


def ndcg(folder: TrainingFolder, queries: Sequence[int], logits: Sequence[float]) -> float:
    """nDCG@10 of some held-out queries by the logits of their pool places, in order.

    A relevant document that no pool holds is missed, as it would be by whoever searches.
    """
    run: dict[str, list[Scored]] = {folder.query_ids[q]: [] for q in queries}
    for at, logit in zip(pool_places(folder, queries), logits, strict=True):
        run[folder.query_ids[folder.query_of[at]]].append(Scored(folder.doc_ids[folder.places[at]], logit))
    judged = read_qrels(folder.path / "qrels" / "dev.tsv")[0]
    return means(per_query(run, {query: judged[query] for query in run}, (MEASURE,)))[MEASURE]


def held_out(folder: TrainingFolder, most: int) -> list[int]:
    """The first held-out queries by hash of their id: the same ones, whatever else is there."""
    held = np.flatnonzero(folder.held_out).tolist()
    if not held:
        raise InputError(f"expected held-out queries (qrels/dev.tsv), got none in {folder.path}")
    return sorted(held, key=lambda q: hashlib.sha256(folder.query_ids[q].encode()).digest())[:most]


def pool_places(folder: TrainingFolder, queries: Sequence[int]) -> list[int]:
    """Every pool place of some queries."""
    return [at for q in queries for at in range(int(folder.bounds[q]), int(folder.bounds[q + 1]))]


def serve(student: Student, folder: TrainingFolder, members: Sequence[int], serving: Serving) -> Float32:
    """Logits of pool places by the engine that would serve the student."""
    config = student.config
    name, precision = engines.choose(serving.engine, serving.precision, config)
    weights = {n: w.detach().numpy() for n, w in student.weights.items()}
    engine = engines.prepare(weights, config, name=name, precision=precision, threads=serving.threads)
    encoder = PairEncoder(student.tokenizer, max_length=min(serving.max_length, config.max_length))
    pairs = [Pair(folder.queries[folder.query_of[at]], folder.texts[folder.places[at]]) for at in members]
    return score(pairs, encoder, engine).logits


def held_out_logits(
    student: Student, folder: TrainingFolder, serving: Serving
) -> tuple[Float32, npt.NDArray[np.int16]]:
    """(logits, labels) of the held-out queries' pools."""
    members = pool_places(folder, held_out(folder, serving.queries))
    return serve(student, folder, members, serving), folder.labels[members]


# Learning from inside a teacher: :mod:`turborank.distill.losses`, for a teacher that reads the same tokens.

KINDS = ("hidden", "relations")


class InnerSpec(NamedTuple):
    """One term, as KIND:MODEL[:WEIGHT] says it."""

    kind: str
    model: str
    weight: float = 1.0


def parse_inner(text: str) -> InnerSpec:
    """``hidden:teacher-folder:0.5`` -> InnerSpec. Raises InputError for anything else."""
    kind, _, rest = text.partition(":")
    model, colon, number = rest.rpartition(":")
    try:
        weight = float(number) if colon else 1.0
    except ValueError:
        model, weight = rest, 1.0  # a colon that belongs to the model's name
    if not colon:
        model = rest
    if kind not in KINDS or not model or not math.isfinite(weight):
        raise InputError(f"expected hidden:MODEL[:WEIGHT] or relations:MODEL[:WEIGHT], got {text!r}")
    return InnerSpec(kind, model, weight)


class Inner:
    """A teacher's hidden states or attention relations as one more loss on a step's batch.

    Raises InputError where teacher and student do not read a pair as the same tokens.
    """

    def __init__(self, spec: InnerSpec, student: Student, dtype: torch.dtype) -> None:
        self.spec = spec
        teacher = Student.load(spec.model)
        if _reading(teacher) != _reading(student):
            raise InputError(
                f"expected a teacher that reads the student's tokens, got another vocabulary in {spec.model}",
                hint="a student of recipe layers or alibi has its source's; scores (--teacher) need no shared tokens",
            )
        self.teacher = Model(teacher, dtype=dtype, freeze_words=True).requires_grad_(False)
        ours, theirs = student.config, teacher.config
        self.layers = layer_map(ours.num_hidden_layers, theirs.num_hidden_layers)
        if not (ours.head in COSINES and theirs.head in COSINES):
            self.layers = self.layers[:-1]  # a classifier computes its last layer for first tokens only
        self.heads = math.gcd(ours.num_attention_heads, theirs.num_attention_heads)
        self.places = _last_whole(ours), _last_whole(theirs)
        self.projections: list[torch.nn.Parameter | None] = [None] * len(self.layers)
        if spec.kind == "hidden" and ours.hidden_size != theirs.hidden_size:
            matrices = [projection(ours.hidden_size, theirs.hidden_size, seed) for seed in range(len(self.layers))]
            self.projections = [torch.nn.Parameter(matrix) for matrix in matrices]

    def __call__(self, batch: PackedBatch, trace: list[Tensor], record: list[tuple[Tensor, ...]]) -> Tensor:
        """The term, weighted; ``trace`` and ``record`` are the student's, of the same batch."""
        wanted: list[Tensor] = []
        kept: list[tuple[Tensor, ...]] = []
        with torch.no_grad():
            self.teacher(batch, wanted, kept)
        if self.spec.kind == "hidden":
            return self.spec.weight * hidden_states(trace, wanted, self.layers, self.projections)
        ours, theirs = record[self.places[0]], kept[self.places[1]]
        bounds = torch.as_tensor(batch.cu_seqlens)
        return self.spec.weight * attention_relations(ours, theirs, bounds, self.heads)


def _reading(student: Student) -> tuple[object, ...]:
    return student.tokenizer.get_vocab(), read_template(student.tokenizer)


def _last_whole(config: ModelConfig) -> int:
    """The last layer whose queries are computed for all tokens."""
    last = config.num_hidden_layers - 1
    return last if config.head in COSINES else max(0, last - 1)


# Whole runs, from folders to folders: what the command line calls, and a program may.

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
    specs = [parse_weighted(text) for text in teachers]
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
        return file_hash(path)
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
    if read_manifest(out / MANIFEST, facts) is None:
        write_json(out / MANIFEST, facts | {"versions": {"torch": torch.__version__}})
