"""``report.html``: one file, nothing fetched, light and dark."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from html import escape
from importlib.resources import files
from typing import Any

import numpy as np

from turborank.data.dataset_table import PUBLISHED, Published
from turborank.evaluate.measures import RESAMPLES, SEED, Comparison
from turborank.evaluate.record import Evaluation, Result, System, TableLine

EXTREMES = 5  # queries shown at either end
MAX_QUERY = 240  # characters of a query shown
FOOTER = (
    "Every query of the judgements counts; one without results counts as zero. Measures by ir-measures and trec_eval, "
    "ties broken by document id, descending, as trec_eval does. Differences: paired bootstrap over queries, "
    f"{RESAMPLES:,} resamples, seed {SEED}, 95 % intervals; p-values are two-sided and not adjusted for the number of "
    'comparisons. Rows marked <span class="tag">published</span> are other people\'s figures: their runs, '
    "their machines, sometimes another first stage."
)


def page(
    evaluation: Evaluation, lines: Sequence[TableLine], heads: Sequence[str], averages: Sequence[tuple[str, Published]]
) -> str:
    """The whole page."""
    css = files("turborank.evaluate").joinpath("report.css").read_text(encoding="utf-8")
    system = evaluation.system
    links = "".join(f'<a href="#{escape(r.dataset.name)}">{escape(r.dataset.name)}</a>' for r in evaluation.results)
    body = "".join(_section(result) for result in evaluation.results)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1"><title>turborank evaluation</title>'
        f'<style>{css}</style></head>\n<body><header class="top"><h1>{escape(_title(evaluation))}</h1>'
        f'<p class="quiet">{escape(system["created"][:16].replace("T", " "))} UTC · {escape(system["cpu"])} '
        f"· {system['cores']} cores · turborank {escape(system['versions']['turborank'])}</p>"
        f"<nav>{links}</nav></header>\n"
        f"<main><h2>Summary</h2>{_summary(lines, heads)}{_overview(evaluation)}{_published_averages(averages)}"
        f"{body}</main>\n"
        f"<footer>{FOOTER}</footer></body></html>\n"
    )


def _title(evaluation: Evaluation) -> str:
    results = evaluation.results
    models = dict.fromkeys(system.name for result in results for system in result.systems[1:])
    what = ", ".join(models) if models else results[0].systems[0].name
    where = results[0].dataset.name if len(results) == 1 else f"{len(results)} datasets"
    return f"{what} on {where}"


def _dot(place: int) -> str:
    return f'<span class="dot" style="background: var(--series-{place % SERIES})"></span>'


def table(heads: Iterable[str], rows: str) -> str:
    """A table of these column heads (text; < before one puts it to the left) and rows (HTML)."""
    head = "".join(
        f'<th class="left">{escape(cell[1:])}</th>' if cell.startswith("<") else f"<th>{escape(cell)}</th>"
        for cell in heads
    )
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>'


def _summary(lines: Sequence[TableLine], heads: Sequence[str]) -> str:
    ours = [line for line in lines if not line.source]
    rows = []
    for place, line in enumerate(lines):
        if line.source:
            rows.append(_published_row(line.system, line.source, [_number(value) for value in line.values]))
            continue
        cells = []
        for column, value in enumerate(line.values):
            known = [other.values[column] for other in ours if other.values[column] is not None]
            base = ours[0].values[column]
            delta = _delta(value - base) if place and value is not None and base is not None else ""
            cells.append(f'<td class="{_best(value, known)}">{_number(value)}{delta}</td>')
        rows.append(f"<tr><td>{_dot(place)}{escape(line.system)}</td>{''.join(cells)}</tr>")
    return table(["", *heads], "".join(rows))


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"


def _best(value: float | None, known: Sequence[float | None]) -> str:
    """The class of the best of several different values."""
    numbers = [number for number in known if number is not None]
    return "best" if value is not None and value == max(numbers) > min(numbers) else ""


def _published_row(system: str, source: str, cells: Sequence[str]) -> str:
    tag = f'<span class="tag" title="{escape(source)}">published</span>'
    return f'<tr class="published"><td>{escape(system)}{tag}</td>{"".join(f"<td>{cell}</td>" for cell in cells)}</tr>'


def _delta(value: float) -> str:
    return f'<small class="{"up" if value > 0 else "down" if value < 0 else ""}">{value:+.4f}</small>'


def _overview(evaluation: Evaluation) -> str:
    """All datasets in one picture, where there are several."""
    if len(evaluation.results) < 2 or all(len(result.systems) < 2 for result in evaluation.results):
        return ""
    title, caption = (
        "Difference from the first stage",
        "Point: mean over queries. Line: 95 % interval, paired bootstrap.",
    )
    picture = differences(evaluation.results).replace("<svg", labelled(title), 1)
    return (
        f'<div class="plots"><figure class="wide"><h3>{title}</h3><figcaption>{caption}</figcaption>{picture}'
        "</figure></div>"
    )


def _published_averages(averages: Sequence[tuple[str, Published]]) -> str:
    if not averages:
        return ""
    rows = "".join(
        f'<tr class="published"><td>{escape(figure.system)}</td><td class="left">{escape(group)} '
        f'{escape(figure.measure)}</td><td>{figure.value:.4f}</td><td class="left">{escape(figure.source)}</td></tr>'
        for group, figure in averages
    )
    return (
        "<details><summary>Averages the models' authors have published for whole groups</summary>"
        f"{table(['model', '<group', 'value', '<source'], rows)}</details>"
    )


def _section(result: Result) -> str:
    about, name = result.systems[0].manifest, result.dataset.name
    counts, first = about["dataset"], about["first_stage"]
    stage = f"{first['method']} k1 {first['k1']}, b {first['b']}" if "k1" in first else f"the run {first['file']}"
    facts = {
        "queries": f"{about['queries_evaluated']:,}", "documents": f"{counts['documents']:,}",
        "judgements": f"{counts['judgements']:,}", "split": counts["split"], "candidates": f"{result.depth:,}",
        "first stage": stage, "its sha256": first["sha256"][:12], "licence": counts["licence"],
    }  # fmt: skip
    items = "".join(f"<li>{escape(fact)} <b>{escape(value)}</b></li>" for fact, value in facts.items())
    remarks = "".join(f'<p class="remark">{escape(remark)}</p>' for remark in result.remarks)
    figures = "".join(
        f'<figure class="{"wide" if len(result.systems) > 2 and title in ("Gains and losses", "Scores") else ""}">'
        f"<h3>{escape(title)}</h3><figcaption>{escape(caption)}</figcaption>"
        f"{svg.replace('<svg', labelled(title), 1)}</figure>"
        for title, caption, svg in all_plots(result)
    )
    return (
        f'<h2 id="{escape(name)}">{escape(name)}</h2><ul class="facts">{items}</ul>{remarks}'
        f'{_measures(result)}{_comparisons(result)}<div class="plots">{figures}</div>'
        f"{''.join(_extremes(result, system) for system in result.systems[1:])}{_manifests(result)}"
    )


def labelled(title: str) -> str:
    """The start of an SVG element that says what it shows."""
    return f'<svg role="img" aria-label="{escape(title)}"'


def _measures(result: Result) -> str:
    names = list(result.systems[0].means)
    rows = []
    for place, system in enumerate(result.systems):
        cells = [
            f'<td class="{_best(system.means[name], [other.means[name] for other in result.systems])}">'
            f"{_number(system.means[name])}</td>"
            for name in names
        ]
        speed = system.manifest.get("tokens_per_second")
        cells.append(f"<td>{f'{speed:,.0f}' if speed else '–'}</td>")
        rows.append(f"<tr><td>{_dot(place)}{escape(system.name)}</td>{''.join(cells)}</tr>")
    figures = PUBLISHED.get(result.dataset.name, ())
    for name in dict.fromkeys(figure.system for figure in figures):
        values = {figure.measure: figure for figure in figures if figure.system == name}
        source = next(iter(values.values())).source
        numbers = [_number(values[measure].value if measure in values else None) for measure in names]
        rows.append(_published_row(name, source, [*numbers, "–"]))
    return table(["", *names, "tokens/s"], "".join(rows))


def _comparisons(result: Result) -> str:
    found = [(system.name, other, c) for system in result.systems for other, c in system.comparisons.items()]
    if not found:
        return ""
    reach = max(max(abs(c.low), abs(c.high)) for _, _, c in found) or 1.0
    rows = "".join(
        f'<tr><td>{escape(ours)}</td><td class="left">{escape(theirs)}</td>'
        f'<td class="{_sign(c)}">{c.difference:+.4f}</td>'
        f"<td>{_forest(c, reach)}</td><td>{c.low:+.4f} … {c.high:+.4f}</td><td>{c.p_value:.4f}</td>"
        f"<td>{c.better} / {c.worse} / {c.equal}</td></tr>"
        for ours, theirs, c in found
    )
    heads = ["system", "<against", f"{result.measure} gained", "", "95 % interval", "p", "better/worse/equal"]
    return table(heads, rows)


def _sign(found: Comparison) -> str:
    return "up" if found.low > 0 else "down" if found.high < 0 else ""


def _forest(found: Comparison, reach: float) -> str:
    """The interval on a line with zero in the middle."""
    low, middle, high = (95 + 90 * value / reach for value in (found.low, found.difference, found.high))
    ink = {"up": "var(--good)", "down": "var(--bad)", "": "var(--ink-3)"}[_sign(found)]
    return (
        '<svg class="forest" viewBox="0 0 190 18" role="img" aria-label="interval">'
        '<line x1="95" y1="1" x2="95" y2="17" stroke="var(--ink-3)" stroke-width="1"/>'
        f'<line x1="{low:.1f}" y1="9" x2="{high:.1f}" y2="9" stroke="{ink}" stroke-width="3" stroke-linecap="round"/>'
        f'<circle cx="{middle:.1f}" cy="9" r="4.5" fill="{ink}"/></svg>'
    )


def _extremes(result: Result, system: System) -> str:
    """The queries that gained and lost most."""
    base = result.systems[0].values[result.measure]
    gains = {query_id: value - base[query_id] for query_id, value in system.values[result.measure].items()}
    best = sorted(gains, key=lambda query_id: -gains[query_id])
    shown = [q for q in best[:EXTREMES] if gains[q] > 0] + [q for q in best[-EXTREMES:] if gains[q] < 0]
    if not shown:
        return ""
    rows = "".join(
        f'<tr><td class="query">{escape(result.dataset.queries[q][:MAX_QUERY])}</td><td>{base[q]:.3f}</td>'
        f"<td>{system.values[result.measure][q]:.3f}</td>"
        f'<td class="{"up" if gains[q] > 0 else "down"}">{gains[q]:+.3f}</td></tr>'
        for q in shown
    )
    heads = ["query", result.systems[0].name, system.name, "gain"]
    return (
        f"<details><summary>Queries that {escape(system.name)} helped and hurt most</summary>"
        f"{table(heads, rows)}</details>"
    )


def _manifests(result: Result) -> str:
    parts = (
        f"<details><summary>Manifest: {escape(system.name)}</summary>"
        f"<pre>{escape(json.dumps(dict(system.manifest), indent=2, ensure_ascii=False))}</pre></details>"
        for system in result.systems
    )
    return "".join(parts)


# The pictures of a report, as SVG that takes its colours from the page (so dark pages get dark pictures).
#
# matplotlib draws with placeholder colours; :func:`_svg` puts CSS variables in their place.

SERIES = 8  # colours of systems; further ones repeat
_INK, _GRID, _GOOD, _BAD, MUTED = "#0a0a01", "#0a0a02", "#0a0a03", "#0a0a04", "#0a0a05"
_VARIABLES = {
    _INK: "var(--ink-2)", _GRID: "var(--line)", _GOOD: "var(--good)", _BAD: "var(--bad)", MUTED: "var(--ink-3)",
    **{f"#0b0b0{n}": f"var(--series-{n})" for n in range(SERIES)},
}  # fmt: skip
_STYLE: Any = {
    "svg.fonttype": "none", "font.family": "sans-serif", "font.size": 9.5, "axes.spines.top": False,
    "axes.spines.right": False, "axes.edgecolor": _GRID, "axes.labelcolor": _INK, "axes.titlecolor": _INK,
    "axes.titlesize": 10, "axes.titlelocation": "left", "axes.titlepad": 8, "text.color": _INK, "xtick.color": _GRID,
    "ytick.color": _GRID, "xtick.labelcolor": _INK, "ytick.labelcolor": _INK, "axes.grid": True, "axes.axisbelow": True,
    "grid.color": _GRID, "grid.linewidth": 0.6, "figure.facecolor": "none", "axes.facecolor": "none",
    "legend.frameon": False, "savefig.facecolor": "none", "xtick.major.size": 0, "ytick.major.size": 0,
}  # fmt: skip

ABOVE: Any = {
    "loc": "lower left",
    "bbox_to_anchor": (0, 1.0),
    "borderaxespad": 0.3,
    "fontsize": 8.5,
    "handlelength": 1.4,
}


def colour(place: int) -> str:
    """The placeholder of the ``place``-th system."""
    return f"#0b0b0{place % SERIES}"


def marker(place: int) -> str:
    """The shape of the ``place``-th system's points, so that colour is never the only difference."""
    return "osD^vPX*"[place % SERIES]


@contextmanager
def figure(columns: int, height: float, salt: str, *, width: float = 4.6) -> Iterator[tuple[Any, list[Any], list[str]]]:
    """(figure, axes, result): a row of plots of so many inches; ``result`` holds the SVG afterwards.

    ``salt`` names the picture: ids in the SVG start with it, so that several stand in one page.
    """
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context({**_STYLE, "svg.hashsalt": salt}):
        figure = Figure(figsize=(width * columns, height), layout="constrained")
        axes = figure.subplots(1, columns, squeeze=False)[0]
        result: list[str] = []
        yield figure, list(axes), result
        result.append(_svg(figure, salt))


def _svg(figure: Any, salt: str) -> str:
    """The figure as an element to stand in a page: scalable, in the page's colours, with ids of its own."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.S)
    for size in ("width", "height"):  # of the element only: its viewBox makes it fill the column
        text = re.sub(rf'(<svg[^>]*?) {size}="[^"]*"', r"\1", text, count=1)
    for placeholder, variable in _VARIABLES.items():
        text = text.replace(placeholder, variable)
    prefix = re.sub(r"\W+", "-", salt)
    text = re.sub(r'\bid="', f'id="{prefix}-', text)
    text = re.sub(r"url\(#", f"url(#{prefix}-", text)
    return re.sub(r'href="#', f'href="#{prefix}-', text).strip()


def depth_curve(result: Result) -> str:
    """The measure when only the first d candidates are reranked; reranking one changes nothing."""
    with figure(1, 3.0, f"{result.dataset.name}-depth") as (_, (axis,), svg):
        first = result.systems[0].means[result.measure]
        axis.axhline(first, color=colour(0), linewidth=1.6, linestyle=(0, (4, 3)), label=result.systems[0].name)
        for place, system in enumerate(result.systems[1:], 1):
            curve = {1: first, **{depth: value for depth, value in system.curve.items() if depth}}
            axis.plot(
                list(curve), list(curve.values()), marker=marker(place), markersize=4.5, linewidth=1.8,
                color=colour(place), label=system.name,
            )  # fmt: skip
        deepest = max((depth for system in result.systems for depth in system.curve), default=1)
        axis.set_xscale("log")
        ticks = sorted(
            {tick for tick in (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000) if tick < 0.8 * deepest} | {deepest}
        )
        axis.set_xticks(ticks, [str(tick) for tick in ticks])
        axis.minorticks_off()
        axis.set_xlabel("candidates reranked")
        axis.set_ylabel(result.measure)
        axis.legend(**ABOVE, ncols=2)
    return svg[0]


def gains(result: Result) -> str:
    """Every query's gain or loss against the first stage, from best to worst."""
    models = result.systems[1:]
    base = result.systems[0].values[result.measure]
    deltas = [np.sort([s.values[result.measure][q] - base[q] for q in base])[::-1] for s in models]
    reach = max(0.1, *(float(np.abs(values).max(initial=0)) for values in deltas)) * 1.08
    with figure(len(models), 2.6, f"{result.dataset.name}-gains") as (_, axes, svg):
        for axis, system, values in zip(axes, models, deltas, strict=True):
            edges = np.arange(len(values) + 1) + 0.5
            axis.stairs(np.maximum(values, 0), edges, fill=True, color=_GOOD)
            axis.stairs(np.minimum(values, 0), edges, fill=True, color=_BAD)
            axis.axhline(0, color=MUTED, linewidth=0.8)
            counts = f"{int((values > 1e-12).sum())} better, {int((values < -1e-12).sum())} worse"
            axis.text(0.99, 0.97, counts, transform=axis.transAxes, ha="right", va="top", fontsize=8.5)
            axis.set_title(system.name)
            axis.set_xlabel("queries, best gain first")
            axis.set_ylabel(f"{result.measure} gained")
            axis.set_ylim(-reach, reach)
            axis.set_xlim(0.5, max(len(values), 1) + 0.5)
    return svg[0]


def differences(results: Sequence[Result]) -> str:
    """How far every system is from the first stage, dataset by dataset, with the interval."""
    names = list(dict.fromkeys(system.name for result in results for system in result.systems[1:]))
    step = 0.8 / max(len(names), 1)
    with figure(1, 0.9 + 0.36 * len(results) * max(1.0, 0.55 * len(names)), "differences", width=9.2) as (
        _,
        (axis,),
        svg,
    ):
        axis.axvline(0, color=MUTED, linewidth=1)
        for place, name in enumerate(names):
            rows = [
                (row + (place - (len(names) - 1) / 2) * step, found)
                for row, result in enumerate(results)
                for system in result.systems[1:]
                if system.name == name and (found := system.comparisons.get(result.systems[0].name)) is not None
            ]
            ink, shape = colour(place + 1), marker(place + 1)
            for height, found in rows:
                axis.plot([found.low, found.high], [height] * 2, color=ink, linewidth=2.2, solid_capstyle="round")
            axis.plot(
                [f.difference for _, f in rows], [h for h, _ in rows], shape, color=ink, markersize=6.5, label=name
            )
        axis.set_yticks(range(len(results)), [f"{result.dataset.name}  {result.measure}" for result in results])
        axis.set_ylim(len(results) - 0.5, -0.5)
        axis.grid(visible=False, axis="y")
        axis.set_xlabel(f"difference from {results[0].systems[0].name}")
        axis.legend(**ABOVE, ncols=3)
    return svg[0]


def split_scores(result: Result, system: System) -> tuple[list[float], list[float]]:
    """Logits of the candidates judged relevant, and of all others."""
    relevant: list[float] = []
    other: list[float] = []
    for query_id in system.seconds:
        judged = result.qrels[query_id]
        for scored in system.run[query_id]:
            good = judged.get(scored.doc_id, 0) >= result.dataset.relevant_from
            (relevant if good else other).append(scored.score)
    return relevant, other


def distributions(result: Result) -> str:
    """Logits of relevant candidates against the others."""
    models = result.systems[1:]
    with figure(len(models), 2.6, f"{result.dataset.name}-scores") as (_, axes, svg):
        for axis, system in zip(axes, models, strict=True):
            relevant, other = split_scores(result, system)
            bins = np.histogram_bin_edges(np.asarray([*relevant, *other] or [0.0]), bins=40)
            for values, ink, name in ((other, MUTED, "not judged relevant"), (relevant, _GOOD, "relevant")):
                weights = np.full(len(values), 1 / max(1, len(values)))
                axis.hist(values, bins=bins, weights=weights, color=ink, alpha=0.5, label=f"{name} ({len(values):,})")
                axis.hist(values, bins=bins, weights=weights, color=ink, histtype="step", linewidth=1.2)
            axis.set_title(system.name, pad=26)
            axis.set_xlabel("logit")
            axis.set_ylabel("share")
            axis.legend(**ABOVE, ncols=2, columnspacing=1)
    return svg[0]


def latency(result: Result) -> str:
    """The share of queries answered within a time, the median marked."""
    everything = [seconds for system in result.systems for seconds in system.seconds.values()] or [0.0]
    unit, scale = ("seconds", 1.0) if max(everything) > 3 else ("milliseconds", 1000.0)
    spread = max(everything) > 10 * float(np.median(everything)) > 0
    with figure(1, 3.0, f"{result.dataset.name}-latency") as (_, (axis,), svg):
        for place, system in enumerate(result.systems[1:], 1):
            times = np.sort(np.asarray([*system.seconds.values()] or [0.0])) * scale
            share = np.arange(1, len(times) + 1) / len(times)
            median, late = np.percentile(times, [50, 95])
            digits, short = (".2f", "s") if unit == "seconds" else (".0f", "ms")
            label = f"{system.name}: median {median:{digits}} {short}, 95 % in {late:{digits}} {short}"
            axis.step(times, share * 100, where="post", linewidth=1.8, color=colour(place), label=label)
            axis.plot([median], [50], marker(place), color=colour(place), markersize=6)
        axis.set_xlabel(f"{unit} to rerank a query's candidates (up to {result.depth})")
        axis.set_ylabel("% of queries")
        axis.set_ylim(0, 102)
        if spread:
            axis.set_xscale("log")
            axis.xaxis.set_major_formatter("{x:g}")
            axis.minorticks_off()
        else:
            axis.set_xlim(left=0)
        axis.legend(**ABOVE)
    return svg[0]


def all_plots(result: Result) -> Sequence[tuple[str, str, str]]:
    """(title, caption, SVG) of every picture of a dataset; none without a model."""
    if len(result.systems) < 2:
        return ()
    measure, first = result.measure, result.systems[0].name
    depth = "Only the first d candidates are reranked; the rest stay below in their order."
    speed = "Share of queries whose candidates were scored within a time, on the machine named above; the mark: half."
    shape = "Logits of candidates judged relevant, and of all others; each adds up to one."
    return (
        (f"{measure} against depth", depth, depth_curve(result)),
        ("Latency", speed, latency(result)),
        ("Gains and losses", f"{measure} of every query minus that of {first}.", gains(result)),
        ("Scores", shape, distributions(result)),
    )
