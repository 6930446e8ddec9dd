"""Training a student on lists of documents, from teachers' scores, labels, or both.

    folder -> BatchSampler (lists by step) -> StudentModel (packed batch -> logits) -> Mix (losses) -> Run (loop)
                                              every few steps: evaluation by the serving engine -> nDCG@10 -> best/

The best student is the one with the highest nDCG@10 on held-out queries, ranked by the engine and in the precision that
will serve it.
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
from turborank.distill.batches import BatchOptions, BatchSampler
from turborank.distill.biencoder import BiEncoder
from turborank.distill.folder import TrainingFolder, run_path
from turborank.distill.losses import Mix, Targets, attention_relations, hidden_states, layer_map, mix, projection
from turborank.distill.recover import ReadingOptions, RecoveryLoss, Texts, check
from turborank.distill.students import Student, platt, scale_logits
from turborank.distill.teachers import WeightedTeacher, fuse, parse_weighted
from turborank.distill.trainer import Loss, Run, Schedule, StepCallback, StudentModel, tensors
from turborank.errors import InputError
from turborank.evaluate.measures import means, per_query
from turborank.scheduler import score
from turborank.tokens import PairEncoder, read_template
from turborank.types import Float32, ModelConfig, PackedBatch, Pair

MEASURE = "nDCG@10"


class RankingLoss:
    """The loss of :func:`train`, for :meth:`turborank.distill.trainer.Run.train`: a mix of losses on sampled lists."""

    def __init__(self, sampler: BatchSampler, mix: Mix, intermediate: Sequence[IntermediateLoss] = ()) -> None:
        self.sampler, self.mix, self.intermediate = sampler, mix, intermediate

    def __call__(self, model: StudentModel, step: int) -> Loss:
        lists = self.sampler.draw(step)
        device = next(model.parameters()).device
        batch = tensors(lists.batch, device)
        trace: list[Tensor] = []
        record: list[tuple[Tensor, ...]] = []
        flat = model(batch, trace, record) if self.intermediate else model(batch)
        real = lists.targets.real.to(device)
        logits = torch.zeros(real.shape, dtype=flat.dtype, device=device).masked_scatter(real, flat)
        total, parts = self.mix(logits, _moved(lists.targets, device))
        for term in self.intermediate:
            value = term(batch, trace, record)
            total, parts = total + value, parts | {term.spec.kind: value.item()}
        return Loss(total, parts, lists.batch.tokens)


def _moved(targets: Targets, device: torch.device) -> Targets:
    teacher, labels = (None if t is None else t.to(device) for t in (targets.teacher, targets.labels))
    return Targets(teacher, labels, targets.real.to(device), targets.trusted.to(device))


def teacher_scores(folder: TrainingFolder, teachers: Sequence[WeightedTeacher]) -> Float32 | None:
    """(N,) weighted sum of teachers' scores of all pool entries; None without teachers."""
    if not teachers:
        return None
    return fuse(teachers, {t.name: folder.scores(t.name) for t in teachers}, folder.bounds)


@dataclass(frozen=True)
class ServingOptions:
    """The engine that evaluates a student: the one that will serve it."""

    engine: str = "auto"
    precision: str = "auto"
    threads: int | None = None
    max_length: int = 512  # tokens of a pair
    queries: int = 200  # evaluated held-out queries per folder, at most


class DevEvaluation:
    """nDCG@10 of a student on the held-out queries of some folders, by the serving engine."""

    def __init__(self, folders: Mapping[str, TrainingFolder], serving: ServingOptions) -> None:
        self.serving = serving
        self.folders = {name: (folder, held_out(folder, serving.queries)) for name, folder in folders.items()}

    def __call__(self, student: Student) -> dict[str, float]:
        """Measure -> value: the mean over folders first, then, if there are several, each folder's."""
        found = {
            name: ndcg(folder, queries, serve(student, folder, pool_entries(folder, queries), self.serving).tolist())
            for name, (folder, queries) in self.folders.items()
        }
        mean = {MEASURE.lower(): float(np.mean(list(found.values())))}
        return mean | ({f"{MEASURE.lower()} {n}": v for n, v in found.items()} if len(found) > 1 else {})


def ndcg(folder: TrainingFolder, queries: Sequence[int], logits: Sequence[float]) -> float:
    """nDCG@10 of some held-out queries, given the logits of their pool entries (see :func:`pool_entries`).

    Relevant documents outside the pools lower it, as documents the first stage misses do.
    """
    run: dict[str, list[Scored]] = {folder.query_ids[q]: [] for q in queries}
    for at, logit in zip(pool_entries(folder, queries), logits, strict=True):
        run[folder.query_ids[folder.query_index[at]]].append(Scored(folder.doc_ids[folder.doc_index[at]], logit))
    judged = read_qrels(folder.path / "qrels" / "dev.tsv")[0]
    return means(per_query(run, {query: judged[query] for query in run}, (MEASURE,)))[MEASURE]


def held_out(folder: TrainingFolder, maximum: int) -> list[int]:
    """Up to ``maximum`` held-out queries, chosen by a hash of their ids, so that adding queries changes little.

    Raises InputError where there are none.
    """
    held = np.flatnonzero(folder.held_out).tolist()
    if not held:
        raise InputError(f"expected held-out queries (qrels/dev.tsv), got none in {folder.path}")
    return sorted(held, key=lambda q: hashlib.sha256(folder.query_ids[q].encode()).digest())[:maximum]


def pool_entries(folder: TrainingFolder, queries: Sequence[int]) -> list[int]:
    """Indices of all pool entries of some queries."""
    return [at for q in queries for at in range(int(folder.bounds[q]), int(folder.bounds[q + 1]))]


def serve(student: Student, folder: TrainingFolder, members: Sequence[int], serving: ServingOptions) -> Float32:
    """Logits of pool entries, by the engine that would serve the student."""
    config = student.config
    name, precision = engines.choose(serving.engine, serving.precision, config)
    weights = {n: w.detach().numpy() for n, w in student.weights.items()}
    engine = engines.prepare(weights, config, name=name, precision=precision, threads=serving.threads)
    encoder = PairEncoder(
        student.tokenizer, max_length=min(serving.max_length, config.max_length), threads=engines.allowed_cores()
    )
    pairs = [Pair(folder.queries[folder.query_index[at]], folder.texts[folder.doc_index[at]]) for at in members]
    return score(pairs, encoder, engine).logits


def held_out_logits(
    student: Student, folder: TrainingFolder, serving: ServingOptions
) -> tuple[Float32, npt.NDArray[np.int16]]:
    """(logits, labels) of all pool entries of the held-out queries."""
    members = pool_entries(folder, held_out(folder, serving.queries))
    return serve(student, folder, members, serving), folder.labels[members]


# Losses on a teacher's hidden states and attention, for a teacher that reads the same tokens as the student.

KINDS = ("hidden", "relations")


def calibrate(student: Student, folder: TrainingFolder, serving: ServingOptions) -> tuple[float, float]:
    """Fit Platt scaling on the held-out queries of ``folder``, apply it to the head in place; (factor, bias)."""
    logits, labels = held_out_logits(student, folder, serving)
    factor, bias = platt(logits, labels > 0)
    scale_logits(student, factor, bias)
    return factor, bias


class IntermediateSpec(NamedTuple):
    """One intermediate loss: KIND:MODEL[:WEIGHT]."""

    kind: str
    model: str
    weight: float = 1.0


def parse_intermediate(text: str) -> IntermediateSpec:
    """Parse KIND:MODEL[:WEIGHT], as in ``hidden:teacher-folder:0.5``. Raises InputError for anything else."""
    kind, _, rest = text.partition(":")
    model, colon, number = rest.rpartition(":")
    try:
        weight = float(number) if colon else 1.0
    except ValueError:
        model, weight = rest, 1.0  # the colon is part of the model's name
    if not colon:
        model = rest
    if kind not in KINDS or not model or not math.isfinite(weight):
        raise InputError(f"expected hidden:MODEL[:WEIGHT] or relations:MODEL[:WEIGHT], got {text!r}")
    return IntermediateSpec(kind, model, weight)


class IntermediateLoss:
    """A loss on hidden states (TinyBERT, arXiv 1909.10351) or attention relations (MiniLMv2, arXiv 2012.15828).

    Raises InputError where teacher and student tokenise a pair differently.
    """

    def __init__(self, spec: IntermediateSpec, student: Student, dtype: torch.dtype) -> None:
        self.spec = spec
        teacher = Student.load(spec.model)
        if _reading(teacher) != _reading(student):
            raise InputError(
                f"expected a teacher that reads the student's tokens, got another vocabulary in {spec.model}",
                hint="students of recipe layers or alibi share their source's; --teacher needs no shared tokens",
            )
        self.teacher = StudentModel(teacher, dtype=dtype, freeze_words=True).requires_grad_(False)
        ours, theirs = student.config, teacher.config
        self.layers = layer_map(ours.num_hidden_layers, theirs.num_hidden_layers)
        if not (ours.head in COSINES and theirs.head in COSINES):
            self.layers = self.layers[:-1]  # models with a classifier compute their last layer for first tokens only
        self.heads = math.gcd(ours.num_attention_heads, theirs.num_attention_heads)
        self.last_layers = _last_whole(ours), _last_whole(theirs)
        self.projections: list[torch.nn.Parameter | None] = [None] * len(self.layers)
        if spec.kind == "hidden" and ours.hidden_size != theirs.hidden_size:
            matrices = [projection(ours.hidden_size, theirs.hidden_size, seed) for seed in range(len(self.layers))]
            self.projections = [torch.nn.Parameter(matrix) for matrix in matrices]

    def __call__(self, batch: PackedBatch, trace: list[Tensor], record: list[tuple[Tensor, ...]]) -> Tensor:
        """The weighted loss (scalar); ``trace`` and ``record`` are filled by StudentModel.forward."""
        wanted: list[Tensor] = []
        kept: list[tuple[Tensor, ...]] = []
        with torch.no_grad():
            self.teacher(batch, wanted, kept)
        if self.spec.kind == "hidden":
            return self.spec.weight * hidden_states(trace, wanted, self.layers, self.projections)
        ours, theirs = record[self.last_layers[0]], kept[self.last_layers[1]]
        bounds = torch.as_tensor(batch.cu_seqlens)
        return self.spec.weight * attention_relations(ours, theirs, bounds, self.heads)


def _reading(student: Student) -> tuple[object, ...]:
    return student.tokenizer.get_vocab(), read_template(student.tokenizer)


def _last_whole(config: ModelConfig) -> int:
    """Index of the last layer whose queries are computed for all tokens."""
    last = config.num_hidden_layers - 1
    return last if config.head in COSINES else max(0, last - 1)


# Complete runs: what `turborank distill recover` and `train` call.

MANIFEST = "manifest.json"
WITH_TEACHER, LABELS_ALONE = "infonce:1,kl:1", "infonce:1"
# Fields of Schedule that may differ when a run is resumed: they do not change what a step computes.
RESUMABLE = ("stop", "save_every", "evaluate_every", "patience")


@dataclass(frozen=True)
class ComputeOptions:
    """How a run computes. ``threads`` does not change what it computes, the others do."""

    bf16: bool = True  # type of activations and products; weights and the optimiser stay float32
    recompute: bool = False  # gradient checkpointing (arXiv 1604.06174): less memory, more time
    threads: int | None = None  # of torch; None: torch's default
    seed: int = 0  # of everything that is sampled

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.bf16 else torch.float32


@dataclass(frozen=True)
class RecoverOptions(ComputeOptions):
    """Options of :func:`recover`."""

    long: Sequence[Path] = ()  # JSON lines with long documents
    budget: int = 4096  # tokens per step
    long_tokens: Sequence[int] = (1024, 2048, 4096)  # lengths of the long documents; one is drawn per long step


@dataclass(frozen=True)
class TrainOptions(ComputeOptions):
    """Options of :func:`train`."""

    teachers: Sequence[str] = ()  # NAME[:WEIGHT[:NORM]] of scores in the training folder
    loss: str | None = None  # see losses.mix; None: WITH_TEACHER or LABELS_ALONE
    dev: Sequence[Path] = ()  # training folders whose held-out queries are evaluated
    dev_queries: int = 200  # evaluated queries per folder, at most
    max_length: int = 512  # tokens of a pair in evaluations
    intermediate: Sequence[str] = ()  # KIND:MODEL[:WEIGHT]: losses on a teacher's hidden states or attention
    train_words: bool = False  # train the word embeddings, too


def recover(
    student: Path,
    source: Path,
    texts: Path,
    out: Path,
    schedule: Schedule,
    options: RecoverOptions | None = None,
    progress: StepCallback | None = None,
) -> Student:
    """Run :mod:`turborank.distill.recover`, resumably; the student is also written to ``out/final``.

    Args:
        student: model folder of a student made by the recipe ``alibi``.
        source: the bi-encoder folder it was made from.
        texts: training folder whose queries and passages are read.
        out: folder of the run; a run of the same inputs continues from its last checkpoint.
        schedule: steps, learning rate, checkpoints.
        options: compute and long documents.
        progress: called after each step with its row of the curve and the number of steps.

    Raises InputError for a run of other inputs in ``out`` and for a student that does not match the source.

    """
    options = options or RecoverOptions()
    _set_threads(options.threads)
    reading = ReadingOptions(budget=options.budget, long_tokens=tuple(options.long_tokens))
    folder, teacher, start = TrainingFolder.load(texts), BiEncoder.load(source), Student.load(student)
    check(start.config, teacher.config)
    facts = {
        "kind": "recover", "student": _hash(student), "source": teacher.revision, "texts": folder.fingerprint,
        "long": [_hash(path) for path in options.long], "reading": asdict(reading), "bf16": options.bf16,
        "seed": options.seed,
    }  # fmt: skip
    _manifest(out, facts, schedule)
    run = Run(start, out, schedule, dtype=options.dtype, recompute=options.recompute)
    run.resume()
    queries = [text for text, held in zip(folder.queries, folder.held_out, strict=True) if not held]
    read = Texts(teacher, queries, folder.texts, _long_documents(options.long), reading, options.seed)
    layers = _matching(start.config.num_hidden_layers, teacher.config.num_hidden_layers)
    loss = RecoveryLoss(teacher, read, layers=layers, dtype=options.dtype, rank=run.rank)
    trained = run.train(loss, progress=progress)
    run.finish(trained)
    return trained


def train(
    folder: Path,
    student: str | Path,
    out: Path,
    schedule: Schedule,
    batches: BatchOptions | None = None,
    options: TrainOptions | None = None,
    progress: StepCallback | None = None,
) -> Path:
    """Train a student on lists of documents, resumably.

    Args:
        folder: training folder.
        student: model folder or name that training starts from.
        out: folder of the run; a run of the same inputs continues from its last checkpoint.
        schedule: steps, learning rate, checkpoints, early stopping.
        batches: size and composition of each step's lists.
        options: teachers, losses, evaluation, compute.
        progress: called after each step with its row of the curve and the number of steps.

    Returns the folder of the best student, without ``options.dev`` of the last.
    Raises InputError for a run of other inputs in ``out``, unknown names and missing scores.

    """
    batches, options = batches or BatchOptions(), options or TrainOptions()
    _set_threads(options.threads)
    teachers = [parse_weighted(text) for text in options.teachers]
    losses = mix(options.loss or (WITH_TEACHER if teachers else LABELS_ALONE))
    lists, start = TrainingFolder.load(folder), Student.load(student)
    if "teacher" in losses.needs and not teachers:
        raise InputError("expected a teacher for these losses, got none", hint="name one with --teacher")
    fused = teacher_scores(lists, teachers)
    dev = {path: lists if path == folder else TrainingFolder.load(path) for path in options.dev}
    facts = _train_facts(start, lists, teachers, list(dev.values()), batches, options)
    terms = [IntermediateLoss(parse_intermediate(text), start, options.dtype) for text in options.intermediate]
    run = Run(
        start, out, schedule, dtype=options.dtype, freeze_words=not options.train_words, recompute=options.recompute
    )
    run.add([matrix for term in terms for matrix in term.projections if matrix is not None])
    encoder = PairEncoder(start.tokenizer, max_length=start.config.max_length, threads=engines.allowed_cores())
    sampler = BatchSampler(lists, encoder, fused, batches, seed=options.seed, rank=run.rank)
    _manifest(out, facts, schedule)  # after everything that may refuse an option, so that it can be corrected
    run.resume()
    evaluation = _evaluation(dev, options) if dev else None
    run.finish(run.train(RankingLoss(sampler, losses, terms), evaluation, progress))
    return out / ("best" if (out / "best").is_dir() else "final")


def _train_facts(
    start: Student,
    lists: TrainingFolder,
    teachers: Sequence[WeightedTeacher],
    dev: Sequence[TrainingFolder],
    batches: BatchOptions,
    options: TrainOptions,
) -> dict[str, Any]:
    """The inputs of a training run, as its manifest records them."""
    return {
        "kind": "train", "student": _hash(start.weights), "lists": _of(lists), "loss": options.loss,
        "bf16": options.bf16, "teachers": [[*one, _hash(run_path(lists.path, one.name))] for one in teachers],
        "drawing": asdict(batches), "inner": list(options.intermediate), "seed": options.seed,
        "train_words": options.train_words, "dev": [_of(one) for one in dev], "dev_queries": options.dev_queries,
        "max_length": options.max_length,
    }  # fmt: skip


def _evaluation(dev: Mapping[Path, TrainingFolder], options: TrainOptions) -> DevEvaluation:
    """An evaluation of folders by name, or by path where names repeat."""
    names = [path.name for path in dev]
    folders = {path.name if names.count(path.name) == 1 else str(path): one for path, one in dev.items()}
    serving = ServingOptions(threads=options.threads, max_length=options.max_length, queries=options.dev_queries)
    return DevEvaluation(folders, serving)


def _set_threads(threads: int | None) -> None:
    if threads is not None:
        torch.set_num_threads(threads)


def _matching(student: int, source: int) -> list[int]:
    """The source's layer for each of the student's: evenly spread, last to last."""
    return [round((layer + 1) * source / student) - 1 for layer in range(student)]


def _long_documents(paths: Sequence[Path]) -> list[str]:
    """The distinct texts (``text`` or ``passage``) of files of JSON lines."""
    found: dict[str, None] = {}
    for path in paths:
        for at, record in read_records(path):
            text = record.get("text", record.get("passage"))
            if not isinstance(text, str):
                raise InputError(f"expected a string at text or passage, got {type(text).__name__} at {at}")
            found[" ".join(text.split())] = None
    return list(found)


def _hash(what: Path | Mapping[str, torch.Tensor]) -> str:
    """SHA-256 of a file, of a model folder's weights, or of tensors."""
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
    """SHA-256 of a training folder's texts, pools and labels, by file name."""
    labels = sorted((folder.path / "qrels").glob("*.tsv"))
    return folder.fingerprint | {path.name: _hash(path) for path in labels}


def _manifest(out: Path, facts: dict[str, Any], schedule: Schedule) -> None:
    """Write the manifest of a run. Raises InputError where ``out`` holds a run of other inputs."""
    facts |= {"schedule": {name: value for name, value in asdict(schedule).items() if name not in RESUMABLE}}
    facts = json.loads(json.dumps(facts))  # as a manifest stores them: tuples become lists
    if read_manifest(out / MANIFEST, facts) is None:
        write_json(out / MANIFEST, facts | {"versions": {"torch": torch.__version__}})
