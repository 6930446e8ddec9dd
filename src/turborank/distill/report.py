"""The report of a training run: one self-contained HTML page with its losses, measures, learning rate and speed.

Read from the run's folder: ``curve.jsonl`` (a row per step) and, where present, ``manifest.json``. Every row has
``step`` and ``tokens``. Of the other columns, those in BOOKKEEPING are known by name; nDCG and columns that only some
rows have are measures (not every step is evaluated); the rest are losses. A report can be written during a run.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from turborank.data.files import read_manifest, write_text
from turborank.errors import InputError
from turborank.evaluate import html
from turborank.evaluate.html import ABOVE, SERIES, Plot, colour, figure

CURVE, MANIFEST, PAGE = "curve.jsonl", "manifest.json", "report.html"
BOOKKEEPING = ("step", "tokens", "loss", "lr", "grad_norm", "tokens_per_s", "log_scale")
POINTS = 200  # per line; longer runs are averaged to this many
PLAIN = "{x:,.6g}"  # number format of axes
Floats = npt.NDArray[np.float64]


class Curve(NamedTuple):
    """The columns of ``curve.jsonl``, (steps,) each; NaN where a row has no value."""

    columns: Mapping[str, Floats]
    losses: tuple[str, ...]
    measures: tuple[str, ...]

    @property
    def steps(self) -> Floats:
        return self.columns["step"]

    def seconds(self) -> float:
        """Time spent in steps, from tokens and tokens per second."""
        tokens = np.diff(self.columns["tokens"], prepend=0.0)
        return float(np.nansum(tokens / self.columns["tokens_per_s"])) if "tokens_per_s" in self.columns else math.nan


def read_curve(path: Path) -> Curve:
    """Read a curve. Raises InputError, with file and line, for a missing, empty or malformed file."""
    if not path.is_file():
        raise InputError(f"expected a training run's {CURVE}, got no such file at {path}")
    rows = [
        _row(line, number, path)
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if line.strip()
    ]
    if not rows:
        raise InputError(f"expected rows of a training run, got an empty file at {path}")
    names = dict.fromkeys(name for row in rows for name in row)
    columns = {name: np.asarray([row.get(name, math.nan) for row in rows]) for name in names}
    free = [name for name in names if name not in BOOKKEEPING]
    measures = tuple(name for name in free if any(name not in row for row in rows) or name.lower().startswith("ndcg@"))
    return Curve(columns, tuple(name for name in free if name not in measures), measures)


def _row(line: str, number: int, path: Path) -> dict[str, float]:
    try:
        row = json.loads(line)
        return {"step": float(row["step"]), "tokens": float(row["tokens"])} | {
            name: float(value) for name, value in row.items()
        }
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise InputError(
            f"expected a JSON object of numbers with step and tokens, got {line[:60]!r} at {path}:{number}"
        ) from error


def write_report(run: Path, target: Path | None = None) -> Path:
    """Write the report of a run to ``target`` (default: ``report.html`` in its folder); its path.

    Raises InputError where the folder's curve or manifest cannot be read.
    """
    curve = read_curve(run / CURVE)
    page = target or run / PAGE
    write_text(page, render(curve, read_manifest(run / MANIFEST, {}) or {}, run.resolve().name))
    return page


class Evaluated(NamedTuple):
    """An evaluated step: first, best, last or unnamed, with the values of all measures."""

    name: str
    step: float
    tokens: float
    values: tuple[float, ...]
    best: bool


def render(curve: Curve, manifest: Mapping[str, Any], name: str) -> str:
    """The whole page."""
    evaluated = _evaluated(curve)
    best = next((index for index, row in enumerate(evaluated) if row.best), 0)
    values = {
        "name": name, "numbers": _numbers(curve), "measures": list(curve.measures), "evaluated": evaluated,
        "after": len(evaluated) - 1 - best, "figures": list(_figures(curve, manifest)), "about": manifest,
    }  # fmt: skip
    return html.render("training.html", values)


def _numbers(curve: Curve) -> dict[str, str]:
    tokens = curve.columns["tokens"][-1]
    numbers = {"steps": f"{curve.steps[-1]:,.0f}", "tokens": f"{tokens:,.0f}"}
    seconds = curve.seconds()
    if seconds > 0:
        numbers |= {"time in steps": _duration(seconds), "tokens a second": f"{tokens / seconds:,.0f}"}
    if "lr" in curve.columns:
        numbers["highest learning rate"] = f"{np.nanmax(curve.columns['lr']):.2g}"
    return numbers


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _evaluated(curve: Curve) -> list[Evaluated]:
    """The steps that have the first measure; by it the best is chosen, the earliest of equals."""
    if not curve.measures:
        return []
    main = curve.columns[curve.measures[0]]
    rows = [int(row) for row in np.flatnonzero(~np.isnan(main))]
    best = max(rows, key=lambda row: (main[row], -row))
    names = {rows[0]: "first", rows[-1]: "last", best: "best"}
    return [
        Evaluated(
            names.get(row, ""), curve.steps[row], curve.columns["tokens"][row],
            tuple(curve.columns[measure][row] for measure in curve.measures), row == best,
        )
        for row in rows
    ]  # fmt: skip


# ---------------------------------------------------------------- figures


class PlotLine(NamedTuple):
    """A column reduced to at most POINTS points: mean, minimum and maximum of neighbouring steps."""

    steps: Floats
    mean: Floats
    low: Floats
    high: Floats


def thin(steps: Floats, values: Floats) -> PlotLine:
    """Reduce a column to at most POINTS points; NaN and infinities are left out."""
    known = np.isfinite(values)
    steps, values = steps[known], values[known]
    parts = np.array_split(np.arange(len(steps)), min(POINTS, max(1, len(steps))))
    chosen = [part for part in parts if part.size]
    return PlotLine(
        np.asarray([steps[part[-1]] for part in chosen]),
        np.asarray([values[part].mean() for part in chosen]),
        np.asarray([values[part].min() for part in chosen]),
        np.asarray([values[part].max() for part in chosen]),
    )


def _figures(curve: Curve, manifest: Mapping[str, Any]) -> Iterator[Plot]:
    """Every plot with data."""
    has = curve.columns
    if curve.measures:
        caption = "Measured by the serving engine on the held-out queries."
        yield Plot("Measures", caption, _measures(curve, manifest.get("baselines", {})), True)
    if curve.losses:
        yield Plot("Losses", "Each part before it is weighted.", _lines(curve, curve.losses, "loss"))
    if "loss" in has:
        yield Plot("Total loss", "The weighted sum that is minimised.", _lines(curve, ["loss"], "total loss"))
    if "lr" in has:
        yield Plot("Learning rate", "After warm-up and decay.", _lines(curve, ["lr"], "learning rate"))
    if "grad_norm" in has:
        yield Plot("Gradient", "Its norm before clipping.", _lines(curve, ["grad_norm"], "gradient norm"))
    if "tokens_per_s" in has:
        yield Plot("Speed", "Of forward, backward and update.", _lines(curve, ["tokens_per_s"], "tokens a second"))
    if "log_scale" in has:
        grown = Curve({**has, "scale": np.exp(has["log_scale"])}, (), ())
        yield Plot("Logit scale", "The learnt factor of all logits.", _lines(grown, ["scale"], "factor"))


def _lines(curve: Curve, names: Sequence[str], what: str) -> str:
    with figure(1, 2.7, f"training-{what}") as (_, (axis,), svg):
        lines = {name: thin(curve.steps, curve.columns[name]) for name in names}
        for index, (name, line) in enumerate(lines.items(), 1):
            ink = colour(1 + (index - 1) % (SERIES - 1))
            axis.fill_between(line.steps, line.low, line.high, color=ink, alpha=0.16, linewidth=0)
            axis.plot(line.steps, line.mean, color=ink, linewidth=1.6, label=name)
        drawn = np.concatenate([line.mean for line in lines.values()])
        if len(names) > 1 and drawn.size and drawn.min() > 0 and drawn.max() > 20 * drawn.min():
            axis.set_yscale("log")
        axis.xaxis.set_major_formatter(PLAIN)
        axis.yaxis.set_major_formatter(PLAIN)
        axis.set_xlabel("step")
        axis.set_ylabel(what)
        if len(names) > 1:
            axis.legend(**ABOVE, ncols=3, columnspacing=1)
    return svg[0]


def _measures(curve: Curve, baselines: Mapping[str, Mapping[str, float]]) -> str:
    """Measures by evaluation, the best marked; ``baselines`` {system: {measure: value}} as dashed lines."""
    tokens = curve.columns["tokens"]
    with figure(1, 3.0, "training-measures", width=9.6) as (_, (axis,), svg):
        for index, name in enumerate(curve.measures):
            values = curve.columns[name]
            known = np.flatnonzero(~np.isnan(values))
            ink = colour(1 + index % (SERIES - 1))
            axis.plot(curve.steps[known], values[known], color=ink, linewidth=2, marker="o", markersize=3.5, label=name)
            best = known[np.argmax(values[known])]
            axis.annotate(
                f"{values[best]:.4f}", (curve.steps[best], values[best]), textcoords="offset points", xytext=(0, 6),
                ha="center", fontsize=8.5, color=ink,
            )  # fmt: skip
        for system, known_values in baselines.items():
            for index, name in enumerate(curve.measures):
                if name in known_values:
                    ink = colour(1 + index % (SERIES - 1))
                    axis.axhline(known_values[name], color=ink, linewidth=1.3, linestyle=(0, (4, 3)))
                    axis.annotate(
                        f"{system} {known_values[name]:.4f}", (1, known_values[name]), va="center", fontsize=8.5,
                        xycoords=("axes fraction", "data"), textcoords="offset points", xytext=(5, 0), color=ink,
                    )  # fmt: skip
        axis.set_xlim(0, curve.steps[-1] * 1.02)
        axis.xaxis.set_major_formatter(
            lambda x, _: f"{x:,.0f}\n{_short(np.interp(x, [0, *curve.steps], [0, *tokens]))}"
        )
        axis.set_xlabel("step, and tokens read")
        axis.margins(y=0.18)
        axis.legend(**ABOVE, ncols=4)
    return svg[0]


def _short(count: float) -> str:
    """A number of tokens with an SI prefix."""
    power = max(0, min(3, int(math.log10(max(1.0, count)) // 3)))
    return f"{count / 1000**power:.3g}{('', ' k', ' M', ' G')[power]}"
