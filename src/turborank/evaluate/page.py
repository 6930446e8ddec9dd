"""``report.html``: one file, nothing fetched, light and dark."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from html import escape
from importlib.resources import files

from turborank.evaluate.measures import RESAMPLES, SEED, Comparison
from turborank.evaluate.plots import SERIES, all_plots, differences
from turborank.evaluate.results import Evaluation, Line, Result, System
from turborank.evaluate.table import PUBLISHED, Published

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
    evaluation: Evaluation, lines: Sequence[Line], heads: Sequence[str], averages: Sequence[tuple[str, Published]]
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


def _summary(lines: Sequence[Line], heads: Sequence[str]) -> str:
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
