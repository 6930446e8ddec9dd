"""HTML reports: Jinja2 templates and matplotlib plots, one file, nothing fetched, light and dark."""

from __future__ import annotations

import functools
import io
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from turborank.data.dataset_table import Published
from turborank.evaluate.measures import RESAMPLES, SEED
from turborank.evaluate.record import Evaluation, Result, System, TableLine, published_lines

if TYPE_CHECKING:
    import jinja2
    import markupsafe

EXTREMES = 5  # queries shown at either end
MAX_QUERY = 240  # characters of a query shown


class Plot(NamedTuple):
    """A figure of a page; ``wide``: over its full width."""

    title: str
    caption: str
    svg: str
    wide: bool = False


def render(template: str, values: Mapping[str, Any]) -> str:
    """The page that a file of ``templates/`` makes of these values. Every text is escaped but that of plots."""
    return str(_templates().get_template(template).render(values))


@functools.cache
def _templates() -> jinja2.Environment:
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("turborank.evaluate"), autoescape=True, undefined=jinja2.StrictUndefined,
        trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True,
    )  # fmt: skip
    environment.filters |= {
        "number": lambda value, spec=".4f": "–" if value is None or math.isnan(value) else format(value, spec),
        "best": _best,
        "labelled": _labelled,
        "pretty": lambda values: json.dumps(dict(values), indent=2, ensure_ascii=False),
    }
    environment.globals["SERIES"] = SERIES
    return environment


def _best(value: float | None, known: Iterable[float | None]) -> str:
    """The class of the best of several different values."""
    numbers = [number for number in known if number is not None]
    return "best" if value is not None and value == max(numbers) > min(numbers) else ""


def _labelled(svg: str, title: str) -> markupsafe.Markup:
    """An SVG element that says what it shows."""
    from markupsafe import Markup

    return Markup('<svg role="img" aria-label="{}"{}').format(title, Markup(svg.removeprefix("<svg")))


def page(
    evaluation: Evaluation, lines: Sequence[TableLine], heads: Sequence[str], averages: Sequence[tuple[str, Published]]
) -> str:
    """The page of an evaluation."""
    results = evaluation.results
    several = len(results) > 1 and any(len(result.systems) > 1 for result in results)
    caption = "Point: mean over queries. Line: 95 % interval, paired bootstrap."
    overview = [Plot("Difference from the first stage", caption, differences(results), True)] if several else []
    ours = (line.values for line in lines if not line.source)
    values = {
        "title": _title(evaluation), "system": evaluation.system, "sections": [_section(result) for result in results],
        "lines": lines, "heads": heads, "columns": [*zip(*ours, strict=True)],
        "overview": overview, "averages": averages, "resamples": RESAMPLES, "seed": SEED,
    }  # fmt: skip
    return render("evaluation.html", values)


def _title(evaluation: Evaluation) -> str:
    results = evaluation.results
    models = dict.fromkeys(system.name for result in results for system in result.systems[1:])
    what = ", ".join(models) if models else results[0].systems[0].name
    where = results[0].dataset.name if len(results) == 1 else f"{len(results)} datasets"
    return f"{what} on {where}"


def _section(result: Result) -> dict[str, Any]:
    """What the page says of a dataset."""
    about = result.systems[0].manifest
    counts, first = about["dataset"], about["first_stage"]
    measures = list(result.systems[0].means)
    compared = [(system.name, other, found) for system in result.systems for other, found in system.comparisons.items()]
    return {
        "name": result.dataset.name,
        "facts": {
            "queries": f"{about['queries_evaluated']:,}", "documents": f"{counts['documents']:,}",
            "judgements": f"{counts['judgements']:,}", "split": counts["split"], "candidates": f"{result.depth:,}",
            "first stage": f"{first['method']} k1 {first['k1']}, b {first['b']}" if "k1" in first
            else f"the run {first['file']}",
            "its sha256": first["sha256"][:12], "licence": counts["licence"],
        },
        "remarks": result.remarks, "measure": result.measure, "measures": measures, "systems": result.systems,
        "published": published_lines(result, measures), "comparisons": compared,
        "reach": max((max(abs(found.low), abs(found.high)) for _, _, found in compared), default=0) or 1.0,
        "plots": all_plots(result),
        "extremes": [(system.name, rows) for system in result.systems[1:] if (rows := _extremes(result, system))],
    }  # fmt: skip


def _extremes(result: Result, system: System) -> list[tuple[str, float, float]]:
    """(query, value of the first stage, of the system) of the queries that gained and lost most."""
    base, values = (one.values[result.measure] for one in (result.systems[0], system))
    best = sorted(values, key=lambda query_id: base[query_id] - values[query_id])
    shown = [q for q in best[:EXTREMES] if values[q] > base[q]] + [q for q in best[-EXTREMES:] if values[q] < base[q]]
    return [(result.dataset.queries[q][:MAX_QUERY], base[q], values[q]) for q in shown]


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
    "text.parse_math": False,  # a dollar sign in a name is a dollar sign
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


def all_plots(result: Result) -> tuple[Plot, ...]:
    """Every plot of a dataset; none without a model."""
    if len(result.systems) < 2:
        return ()
    measure, first = result.measure, result.systems[0].name
    depth = "Only the first d candidates are reranked; the rest stay below in their order."
    speed = "Share of queries whose candidates were scored within a time, on the machine named above; the mark: half."
    shape = "Logits of candidates judged relevant, and of all others; each adds up to one."
    wide = len(result.systems) > 2
    return (
        Plot(f"{measure} against depth", depth, depth_curve(result)),
        Plot("Latency", speed, latency(result)),
        Plot("Gains and losses", f"{measure} of every query minus that of {first}.", gains(result), wide),
        Plot("Scores", shape, distributions(result), wide),
    )
