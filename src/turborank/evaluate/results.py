"""What an evaluation found, as plain values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from turborank.evaluate.datasets import Dataset
from turborank.evaluate.measures import Comparison, PerQuery
from turborank.evaluate.runs import Qrels, Run
from turborank.reranker import Reranker


@dataclass(frozen=True)
class System:
    """A first stage or a model, on one dataset."""

    name: str
    model: Reranker | None  # None: the first stage
    run: Run
    values: PerQuery
    means: Mapping[str, float]
    manifest: Mapping[str, Any]
    seconds: Mapping[str, float]  # query id -> seconds, of every query scored
    curve: Mapping[int, float]  # depth reranked -> the compared measure; depth 0 is the first stage
    comparisons: Mapping[str, Comparison]  # system -> how this one differs from it


@dataclass(frozen=True)
class Result:
    """All systems on one dataset, the first stage first."""

    dataset: Dataset
    systems: tuple[System, ...]
    qrels: Qrels  # of the queries evaluated
    measure: str  # the one compared
    depth: int
    sampled: bool
    notes: tuple[str, ...] = ()

    @property
    def remarks(self) -> tuple[str, ...]:
        """What has to be said beside the numbers."""
        sample = (f"a sample of {len(self.qrels)} of {len(self.dataset.qrels)} queries",) if self.sampled else ()
        return (*sample, *self.dataset.notes, *self.notes)


class Line(NamedTuple):
    """A row of the summary: a system with a value for every dataset, or none."""

    system: str
    values: tuple[float | None, ...]
    source: str = ""  # of published figures; empty for ours


@dataclass(frozen=True)
class Evaluation:
    """Everything, and the software and machine it was found with."""

    results: tuple[Result, ...]
    system: Mapping[str, Any]
