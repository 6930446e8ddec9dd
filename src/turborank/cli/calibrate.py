"""``turborank calibrate``: fit probabilities and thresholds to judged pairs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from turborank.cli import options
from turborank.errors import InputError

if TYPE_CHECKING:
    from turborank.evaluate.calibrate import Findings, Share
    from turborank.reranker import Reranker

EXAMPLES = (
    (
        "your own model; the calibration is written to its folder",
        "turborank calibrate judged.jsonl --model my-model/",
    ),
    (
        "the embedded model; the calibration is written to a file",
        "turborank calibrate judged.csv --out calibration.json",
    ),
    ("graded judgements: 2 and 3 are relevant", "turborank calibrate judged.tsv -m my-model/ --relevant-from 2"),
)
TARGETS = ("precision=0.8", "precision=0.9", "precision=0.95", "recall=0.8", "recall=0.9", "recall=0.95")


def calibrate(
    pairs: Annotated[
        Path,
        typer.Argument(
            help="Judged pairs: JSON lines, CSV or TSV with the fields query, document and label (relevance).",
            show_default=False,
        ),
    ],
    model: options.Model = None,
    out: Annotated[
        Path | None, typer.Option(help="Calibration file to write.", show_default="calibration.json of the model")
    ] = None,
    target: Annotated[
        list[str] | None,
        typer.Option(help="Threshold to report, for example precision=0.9; repeatable.", show_default="six"),
    ] = None,
    relevant_from: Annotated[float, typer.Option(help="Minimum label of a relevant document.")] = 1,
    as_json: options.AsJson = False,
    length: options.Length = "truncate",
    max_length: options.MaxLength = None,
    engine: options.Engine = "auto",
    precision: options.Precision = "auto",
    threads: options.Threads = None,
    offline: options.Offline = False,
) -> None:
    """Fit probabilities and thresholds to judged pairs, and write them to the model's folder.

    `rank --threshold precision=0.9`, the server and the adapters then use them. Judge the results of your first stage
    without selecting them: the probabilities hold for data like the judged data. A reliability plot (SVG) is written
    next to the file.
    """
    from turborank import calibration as calibrations
    from turborank.evaluate.calibrate import as_json as in_json
    from turborank.evaluate.calibrate import calibrate as fit
    from turborank.evaluate.calibrate import plot, read_judged
    from turborank.reranker import Reranker

    wanted = tuple(target or TARGETS)
    for text in wanted:
        calibrations.parse_target(text)
    judged = read_judged(pairs, relevant_from)
    reranker = Reranker(
        model, engine=engine, precision=precision, length=length, max_length=max_length, threads=threads,
        offline=offline or None,
    )  # fmt: skip
    path = _path(reranker, out)
    findings = fit(reranker, judged, targets=wanted, about={"judged": pairs.name, "relevant_from": relevant_from})
    calibrations.write(findings.calibration, path)
    plot(findings, path.with_suffix(".svg"))
    if as_json:
        print(in_json(findings))
    else:
        _print(findings, path)


def _path(reranker: Reranker, out: Path | None) -> Path:
    from turborank.calibration import FILE

    if out is not None:
        if not out.absolute().parent.is_dir() or out.is_dir():
            raise InputError(f"expected --out to be a file in a folder that exists, got {out}")
        return out
    if reranker.checkpoint.origin != "local":
        raise InputError(
            f"expected --out, got none: {reranker.name} is not a folder of yours",
            hint="name a file, and give it to rank and serve as --calibration",
        )
    return reranker.checkpoint.folder / FILE


def _share(share: Share | None) -> str:
    return "–" if share is None else f"{share.value:.3f} ({share.low:.3f}–{share.high:.3f})"


def _print(findings: Findings, path: Path) -> None:
    from rich.console import Console
    from rich.table import Table

    from turborank.calibration import sigmoid

    made = findings.calibration
    print(f"{made.pairs:,} pairs of {findings.queries:,} queries, {made.relevant:,} relevant")
    print(f"probability = sigmoid({made.slope:.4g} · logit {made.intercept:+.4g})")
    print(
        f"out of fold: Brier score {findings.brier:.4f} (uncalibrated {findings.brier_uncalibrated:.4f}), "
        f"calibration error {findings.error:.4f}"
    )
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    for column in ("threshold", "score", "precision (95 %)", "recall (95 %)"):
        table.add_column(column, justify="left" if column == "threshold" else "right")
    for one in findings.targets:
        score = "not reached" if one.logit is None else f"{sigmoid(one.logit):.4f}"
        table.add_row(one.target, score, _share(one.precision), _share(one.recall))
    Console(width=options.width(), highlight=False, markup=False).print(table)
    print("precision and recall are measured on queries that the threshold was not chosen on")
    print(f"{path}, {path.with_suffix('.svg').name}")
