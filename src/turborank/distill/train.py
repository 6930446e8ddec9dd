"""Ranking: a student learns its teachers' judgement, and labels where there are any, from lists of documents.

    folder -> Drawer (lists by step number) -> Model (packed batch -> logits) -> Mix (losses) -> Run (loop)
                                                   every so many steps: the student, served -> nDCG@10 -> best/

What decides is nDCG@10 of held-out queries, ranked by the engine that will serve the student, in its precision.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from turborank import engines
from turborank.distill.batches import Drawer
from turborank.distill.ensemble import TeacherSpec, fuse
from turborank.distill.folder import TrainingFolder
from turborank.distill.inner import Inner
from turborank.distill.loop import Loss
from turborank.distill.losses import Mix, Targets
from turborank.distill.model import Model, tensors
from turborank.distill.students import Student
from turborank.errors import InputError
from turborank.evaluate.measures import means, per_query
from turborank.evaluate.runs import Scored, read_qrels
from turborank.scheduler import score
from turborank.tokens import PairEncoder
from turborank.types import Float32, Pair

MEASURE = "nDCG@10"


class Ranking:
    """A loss for :meth:`turborank.distill.loop.Run.train`: a mix of list losses over drawn lists."""

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
