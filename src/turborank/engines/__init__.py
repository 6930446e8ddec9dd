"""ENGINES: the implementations of the forward pass, and the rule that chooses one.

An engine is prepared once from a checkpoint's weights and then computes the logits of packed batches.
``TURBORANK_ENGINE`` replaces ``engine="auto"``; an explicit engine takes precedence over it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, NoReturn, Self

from turborank.engines import cores, native, reference, torch
from turborank.errors import EngineUnavailableError, InputError, UnknownKeyError
from turborank.types import Engine, ModelConfig, PackedBatch


@dataclass(frozen=True)
class ClosedEngine:
    """The engine of a closed reranker: it describes the one that was closed and refuses to compute."""

    name: str
    precision: str
    isa: str
    threads: int

    def logits(self, batch: PackedBatch, /) -> NoReturn:
        """Raise InputError."""
        raise InputError("expected an open reranker, got one that was closed", hint="make a new one, or close it later")

    def with_threads(self, threads: int) -> Self:
        """Itself: there is nothing to compute with."""
        return self

    def shrink(self) -> None:
        """Do nothing: the work space is released."""


class EngineRow(NamedTuple):
    """One engine: what it supports and how to prepare it."""

    precisions: tuple[str, ...]
    automatic: Callable[[], str]  # the precision that "auto" selects on this machine
    available: Callable[[], str | None]  # None if usable on this machine, else the reason
    supports: Callable[[ModelConfig], bool]
    prepare: Callable[..., Engine]
    note: str


ENGINES: dict[str, EngineRow] = {
    "native": EngineRow(
        native.PRECISIONS,
        native.automatic,
        native.available,
        native.supports,
        native.prepare,
        "C++, int8: the fast one on CPUs",
    ),
    "torch": EngineRow(
        torch.PRECISIONS,
        torch.automatic,
        torch.available,
        torch.supports,
        torch.prepare,
        "PyTorch: CUDA where there is one",
    ),
    "reference": EngineRow(
        reference.PRECISIONS,
        reference.automatic,
        reference.available,
        reference.supports,
        reference.prepare,
        "numpy: the reference implementation, slow",
    ),
}
VARIABLE = "TURBORANK_ENGINE"
AUTOMATIC = ("native", "reference")  # torch only on request: importing it takes seconds and much memory


def allowed_cores() -> int:
    """Cores this process may use: see :mod:`turborank.engines.cores`."""
    return cores.allowed()


def choose(name: str = "auto", precision: str = "auto", config: ModelConfig | None = None) -> tuple[str, str]:
    """The names of the engine and the precision to use.

    Args:
        name: a key of ENGINES, or ``auto``: the first of AUTOMATIC that supports the model and the precision.
        precision: one of the engine's precisions, or ``auto``.
        config: the model, if known; without it no engine is excluded for its architecture.

    Raises:
        UnknownKeyError: no such engine or precision.
        EngineUnavailableError: the engine cannot run on this machine, with the reason, or not this model.

    """
    wanted, asked, instead = name, "engine", "use engine='auto'"
    if wanted == "auto" and (forced := os.environ.get(VARIABLE)):
        wanted, asked, instead = forced, VARIABLE, f"unset {VARIABLE}"
    if wanted == "auto":
        wanted = _automatic(precision, config)
    if wanted not in ENGINES:
        raise UnknownKeyError(asked, wanted, ("auto", *ENGINES))
    row = ENGINES[wanted]
    reason = row.available()
    if reason is not None:
        raise EngineUnavailableError(f"expected {asked} {wanted!r} to be usable, got: {reason}")
    if config is not None and not row.supports(config):
        raise EngineUnavailableError(
            f"expected {asked} {wanted!r} to support {config.architecture}, which it does not", hint=instead
        )
    if precision not in ("auto", *row.precisions):
        raise UnknownKeyError(f"precision of {asked} {wanted!r}", precision, ("auto", *row.precisions))
    return wanted, row.automatic() if precision == "auto" else precision


def _automatic(precision: str, config: ModelConfig | None) -> str:
    """The first engine of AUTOMATIC that supports the model in this precision."""
    able = {
        name: row
        for name, row in ENGINES.items()
        if row.available() is None and (config is None or row.supports(config))
    }
    rows = {name: ("auto", *able[name].precisions) for name in AUTOMATIC if name in able}
    for name, precisions in rows.items():
        if precision in precisions:
            return name
    others = [name for name, row in able.items() if precision in row.precisions]
    hint = f"engine {' or '.join(map(repr, others))} has {precision}" if others else None
    raise UnknownKeyError("precision", precision, set().union(*rows.values()), hint=hint)


def prepare(
    weights: Mapping[str, Any], config: ModelConfig, *, name: str, precision: str, threads: int | None = None
) -> Engine:
    """Prepare the engine ``name`` with a checkpoint's weights. ``threads``: by default :func:`allowed_cores`."""
    return ENGINES[name].prepare(weights, config, precision=precision, threads=threads or allowed_cores())
