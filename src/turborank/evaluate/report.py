"""Reports: ``report.md`` and ``report.html`` for readers, ``results.json`` for programs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from turborank.data.dataset_table import FORUMS, PUBLISHED, PUBLISHED_MEANS, Published
from turborank.data.files import write_json, write_text
from turborank.evaluate.html import page
from turborank.evaluate.measures import RESAMPLES, SEED, Comparison
from turborank.evaluate.record import Evaluation, Result, TableLine, published_lines


def write(evaluation: Evaluation, out: Path, *, finished: bool = True) -> None:
    """Write all reports to ``out``, each atomically; the HTML page, with its plots, only if ``finished``."""
    write_json(out / "results.json", as_json(evaluation))
    write_text(out / "report.md", markdown(evaluation))
    if finished:
        write_text(
            out / "report.html", page(evaluation, summary(evaluation), columns(evaluation), averages(evaluation))
        )


def as_json(evaluation: Evaluation) -> dict[str, Any]:
    """All numbers of the report, with the manifests, as JSON values."""
    return {
        "system": dict(evaluation.system),
        "bootstrap": {"resamples": RESAMPLES, "seed": SEED, "confidence": 0.95},
        "datasets": [
            {
                "name": result.dataset.name,
                "measure": result.measure,
                "remarks": list(result.remarks),
                "published": [figure._asdict() for figure in PUBLISHED.get(result.dataset.name, ())],
                "systems": [
                    {
                        "name": system.name,
                        "measures": dict(system.means),
                        "curve": {str(depth): value for depth, value in system.curve.items()},
                        "compared_with": {name: asdict(found) for name, found in system.comparisons.items()},
                        "manifest": dict(system.manifest),
                    }
                    for system in result.systems
                ],
            }
            for result in evaluation.results
        ],
    }


def columns(evaluation: Evaluation) -> list[str]:
    """Column heads of the summary: dataset and measure, and the mean if several datasets have the same measure."""
    heads = [f"{result.dataset.name} {result.measure}" for result in evaluation.results]
    return [*heads, f"mean {evaluation.results[0].measure}"] if _averaged(evaluation) else heads


def _averaged(evaluation: Evaluation) -> list[int]:
    """Indices of the results that are averaged: those with the first one's measure, if there are at least two."""
    same = [i for i, result in enumerate(evaluation.results) if result.measure == evaluation.results[0].measure]
    return same if len(same) > 1 else []


def summary(evaluation: Evaluation) -> list[TableLine]:
    """Rows of the summary: the evaluated systems, then published ones."""
    names = dict.fromkeys(system.name for result in evaluation.results for system in result.systems)
    lines = []
    for name in names:
        values = [
            next((system.means[result.measure] for system in result.systems if system.name == name), None)
            for result in evaluation.results
        ]
        lines.append(TableLine(name, (*values, *_mean(evaluation, values))))
    figures = [PUBLISHED.get(result.dataset.name, ()) for result in evaluation.results]
    for system in dict.fromkeys(figure.system for row in figures for figure in row):
        cells = [
            next((f.value for f in row if f.system == system and f.measure == result.measure), None)
            for row, result in zip(figures, evaluation.results, strict=True)
        ]
        source = next(figure.source for row in figures for figure in row if figure.system == system)
        if any(value is not None for value in cells):
            lines.append(TableLine(system, (*cells, *_mean(evaluation, cells)), source))
    return lines


def _mean(evaluation: Evaluation, values: Sequence[float | None]) -> tuple[float | None, ...]:
    """(mean over datasets,), with CQADupStack's forums counted as one; (None,) if a value is missing."""
    averaged = _averaged(evaluation)
    if not averaged:
        return ()
    chosen = [(evaluation.results[i].dataset.name, values[i]) for i in averaged]
    if any(value is None for _, value in chosen):
        return (None,)
    forums = [value for name, value in chosen if name in FORUMS and value is not None]
    others = [value for name, value in chosen if name not in FORUMS and value is not None]
    return (float(np.mean([*others, *([float(np.mean(forums))] if forums else [])])),)


def averages(evaluation: Evaluation) -> list[tuple[str, Published]]:
    """(group, published average) for the groups that the datasets belong to."""
    groups = dict.fromkeys(result.dataset.row.group for result in evaluation.results if result.dataset.row)
    return [(group, figure) for group in groups for figure in PUBLISHED_MEANS.get(group, ())]


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    align = "|---|" + "---:|" * (len(heads) - 1)
    lines = ("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows)
    return "\n".join(("| " + " | ".join(heads) + " |", align, *lines))


def _cell(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"


def verdict(found: Comparison) -> str:
    """A difference with its interval and p-value, as text."""
    return f"{found.difference:+.4f} [{found.low:+.4f}, {found.high:+.4f}], p = {found.p_value:.4f}"


def markdown(evaluation: Evaluation) -> str:
    """The whole report as Markdown."""
    system = evaluation.system
    lines = [
        "# Evaluation", "",
        f"{system['created']} · {system['cpu']} · turborank {system['versions']['turborank']}", "",
        _table(
            ["system", *columns(evaluation)],
            [
                [line.system + (" (published)" if line.source else ""), *map(_cell, line.values)]
                for line in summary(evaluation)
            ],
        ), "",
        f"Differences: paired bootstrap over queries, {RESAMPLES:,} resamples, seed {SEED}; 95 % intervals; "
        "p-values are two-sided and not adjusted for the number of comparisons. "
        "Ties are ordered as trec_eval orders them. Queries without results count as zero.", "",
    ]  # fmt: skip
    for result in evaluation.results:
        lines += _dataset_markdown(result)
    found = averages(evaluation)
    if found:
        rows = [[f.system, f"{group} {f.measure}", _cell(f.value), f.source] for group, f in found]
        lines += ["## Published averages", "", "Published by the models' authors for whole groups of datasets.", ""]
        lines += [_table(["model", "group", "value", "source"], rows), ""]
    return "\n".join(lines)


def _dataset_markdown(result: Result) -> list[str]:
    about = result.systems[0].manifest
    counts = about["dataset"]
    lines = [
        f"## {result.dataset.name}", "",
        f"{counts['queries']:,} queries ({counts['split']}), {counts['documents']:,} documents, "
        f"{counts['judgements']:,} judgements; licence: {counts['licence']}. "
        f"First stage: {about['first_stage']['method']}, {result.depth} candidates, "
        f"sha256 {about['first_stage']['sha256'][:12]}.", "",
    ]  # fmt: skip
    lines += [f"> {remark}" for remark in result.remarks] + ([""] if result.remarks else [])
    names = list(result.systems[0].means)
    rows = [[system.name, *(_cell(system.means[name]) for name in names)] for system in result.systems]
    rows += published_rows(result, names)
    lines += [_table(["system", *names], rows), ""]
    for system in result.systems[1:]:
        facts = system.manifest
        speed = facts["tokens_per_second"]
        lines += [
            f"**{system.name}** on {facts['engine']} "
            f"({facts['precision']}, {facts['isa']}, {facts['threads']} threads): "
            f"{facts['pairs']:,} pairs, {facts['tokens']:,} tokens, {facts['seconds']:,.1f} s"
            f"{f', {speed:,.0f} tokens/s' if speed else ''}; "
            f"{facts['pairs_truncated']:,} pairs cut ({facts['tokens_truncated']:,} tokens not read).", "",
        ]  # fmt: skip
        lines += [
            f"- against {name}, {found.measure}: {verdict(found)}; better on {found.better}, worse on {found.worse}, "
            f"equal on {found.equal}"
            for name, found in system.comparisons.items()
        ]
        lines += [""]
    return lines


def published_rows(result: Result, names: Sequence[str]) -> list[list[str]]:
    """Table rows of the figures that others have published for this dataset and the measures ``names``."""
    return [[f"{line.system} (published)", *map(_cell, line.values)] for line in published_lines(result, names)]
