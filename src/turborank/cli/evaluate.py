"""``turborank evaluate`` and ``turborank calibrate``: reports on datasets; probabilities from judged pairs."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from turborank import cli
from turborank.errors import InputError
from turborank.types import RerankerOptions

if TYPE_CHECKING:
    from turborank.evaluate.calibrate import Findings, Share
    from turborank.evaluate.record import Evaluation
    from turborank.reranker import Reranker

EXAMPLES = (
    ("compare the embedded model with BM25", "turborank evaluate scifact"),
    ("your own data: a folder in BEIR layout, or a LlamaIndex JSON file", "turborank evaluate my-data/ --out results/"),
    ("compare two models", "turborank evaluate nfcorpus --models jina-reranker-v1-tiny-en,path/to/mine"),
    ("another first stage", "turborank evaluate trec-covid --run dense.trec --depth 50"),
    ("two first stages, fused by reciprocal rank", "turborank evaluate trec-covid --run dense.trec --run bm25.trec"),
    ("one third of the queries, on one of three machines", "turborank evaluate hotpotqa --shard 1/3"),
)


Datasets = Annotated[
    list[str] | None,
    typer.Argument(
        help="Dataset names (see --list), folders in BEIR layout, or LlamaIndex JSON files.", show_default=False
    ),
]
Models = Annotated[
    str | None,
    typer.Option(
        "--models",
        "-m",
        help="Models, separated by commas; bm25: the first stage only.",
        show_default="the embedded model",
    ),
]
Depth = Annotated[str, typer.Option(help="Candidates of each query to rerank; auto: early stopping, at most 100.")]
Run = Annotated[
    list[Path] | None,
    typer.Option(help="TREC run to rerank; repeat to fuse several by reciprocal rank.", show_default="BM25"),
]
Out = Annotated[Path, typer.Option(help="Folder of the results; continues an interrupted evaluation in it.")]
Shard = Annotated[
    str | None, typer.Option(help="k/n: evaluate the k-th of n parts of the queries.", show_default=False)
]
Measures = Annotated[
    str | None,
    typer.Option(
        help="Measures, separated by commas; the first one is used to compare systems.",
        show_default="nDCG@10, R@100, MRR@10, …",
    ),
]
Split = Annotated[str | None, typer.Option(help="Split of the judgements (qrels).", show_default="the dataset's")]
DataDir = Annotated[
    Path | None, typer.Option(help="Folder of the datasets.", show_default="TURBORANK_DATA, or the cache")
]
Sample = Annotated[int | None, typer.Option(help="Evaluate a sample of this many queries.", show_default="all")]
SkipConstant = Annotated[
    bool,
    typer.Option(
        "--skip-constant",
        help="Skip queries whose candidates all have the same relevance; reranking cannot change their measures.",
    ),
]
KeepUnknown = Annotated[
    bool,
    typer.Option(
        "--keep-unknown", help="Keep judged documents that are not in the corpus; they count as not retrieved."
    ),
]
Listed = Annotated[bool, typer.Option("--list", help="List the datasets known by name, and exit.")]


@cli.with_compute
def evaluate(
    datasets: Datasets = None,
    models: Models = None,
    depth: Depth = "100",
    run: Run = None,
    out: Out = Path("evaluation"),
    shard: Shard = None,
    measures: Measures = None,
    split: Split = None,
    data_dir: DataDir = None,
    sample: Sample = None,
    skip_constant: SkipConstant = False,
    keep_unknown: KeepUnknown = False,
    compute: RerankerOptions = cli.DEFAULT,
    listed: Listed = False,
) -> None:
    """Measure models on datasets: rerank the results of a first stage, compare, report.

    Writes TREC runs, per-query scores, manifests, report.md and report.html to --out. The same command continues an
    interrupted evaluation.
    """
    if listed:
        _list()
        return
    if not datasets:
        raise typer.BadParameter("give a dataset; --list shows the names", param_hint="DATASETS")
    from turborank.evaluate.pipeline import FIRST_STAGE, EvaluateOptions, evaluate
    from turborank.reranker import Reranker

    def load(name: str | None) -> Reranker:
        return Reranker(name, **vars(compute))

    names: list[str | None] = [name.strip() for name in (models or "").split(",") if name.strip()]
    wanted: list[str | Reranker] = [load(name) for name in (names or [None]) if name != FIRST_STAGE]
    how = EvaluateOptions(
        depth=_depth(depth), run=run, shard=_shard(shard), split=split, data_dir=data_dir,
        offline=bool(compute.offline), measures=[name.strip() for name in (measures or "").split(",") if name.strip()],
        sample=sample, skip_constant=skip_constant, keep_unknown=keep_unknown,
    )  # fmt: skip
    with cli.progress() as progress:
        evaluation = evaluate(datasets, wanted or [FIRST_STAGE], how, out=out, progress=progress)
    _print(evaluation, out, partial=shard is not None)


def _depth(text: str) -> int | str:
    return int(text) if re.fullmatch(r"-?\d+", text) else text


def _shard(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    found = re.fullmatch(r"(\d+)/(\d+)", text)
    if not found:
        raise typer.BadParameter(f"expected k/n, for example 3/16, got {text!r}", param_hint="--shard")
    return int(found[1]), int(found[2])


def _print(evaluation: Evaluation, out: Path, *, partial: bool) -> None:
    from rich.console import Console
    from rich.table import Table

    from turborank.evaluate.report import columns, summary

    if partial:
        print(f"{out}: wrote the run files of this part; run without --shard to join the parts and report")
        return
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    table.add_column("system", overflow="fold")
    for head in columns(evaluation):
        table.add_column(head, justify="right")
    for line in summary(evaluation):
        cells = ("–" if value is None else f"{value:.4f}" for value in line.values)
        table.add_row(f"{line.system} (published)" if line.source else line.system, *cells)
    Console(width=cli.width(), highlight=False, markup=False).print(table)
    for result in evaluation.results:
        for remark in result.remarks:
            print(f"{result.dataset.name}: {remark}")
    print(f"\n{out / 'report.html'}")


def _list() -> None:
    from rich.console import Console
    from rich.table import Table

    from turborank.data.dataset_table import DATASETS, GROUPS

    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    for column in ("name", "group", "queries", "documents", "licence", "from"):
        table.add_column(column, justify="right" if column in ("queries", "documents") else "left", overflow="fold")
    for row in DATASETS.values():
        counts = ("–" if count is None else f"{count:,}" for count in (row.queries, row.documents))
        table.add_row(row.name, row.group, *counts, row.licence, "download" if row.files else "manual")
    Console(width=cli.width(), highlight=False, markup=False).print(table)
    print(f"\ngroups: {', '.join(GROUPS)}")


CALIBRATE_EXAMPLES = (
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


@cli.with_compute
def calibrate(
    pairs: Annotated[
        Path,
        typer.Argument(
            help="Judged pairs: JSON lines, CSV or TSV with the fields query, document and label (relevance).",
            show_default=False,
        ),
    ],
    model: cli.Model = None,
    out: Annotated[
        Path | None, typer.Option(help="Calibration file to write.", show_default="calibration.json of the model")
    ] = None,
    target: Annotated[
        list[str] | None,
        typer.Option(help="Threshold to report, for example precision=0.9; repeatable.", show_default="six"),
    ] = None,
    relevant_from: Annotated[float, typer.Option(help="Minimum label of a relevant document.")] = 1,
    as_json: cli.AsJson = False,
    compute: RerankerOptions = cli.DEFAULT,
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
    reranker = Reranker(model, **vars(compute))
    path = _calibration_path(reranker, out)
    findings = fit(reranker, judged, targets=wanted, about={"judged": pairs.name, "relevant_from": relevant_from})
    calibrations.write(findings.calibration, path)
    plot(findings, path.with_suffix(".svg"))
    if as_json:
        print(in_json(findings))
    else:
        _print_findings(findings, path)


def _calibration_path(reranker: Reranker, out: Path | None) -> Path:
    from turborank.calibration import FILE

    if out is not None:
        if not out.absolute().parent.is_dir() or out.is_dir():
            raise InputError(f"expected --out to be a file in a folder that exists, got {out}")
        return out
    if reranker.checkpoint.origin != "local":
        raise InputError(
            f"expected --out, got none: {reranker.name} is not a local folder",
            hint="give a file, and pass it to rank and serve with --calibration",
        )
    return reranker.checkpoint.folder / FILE


def _share(share: Share | None) -> str:
    return "–" if share is None else f"{share.value:.3f} ({share.low:.3f}–{share.high:.3f})"


def _print_findings(findings: Findings, path: Path) -> None:
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
    Console(width=cli.width(), highlight=False, markup=False).print(table)
    print("precision and recall are measured out of fold, on queries that the threshold was not chosen on")
    print(f"{path}, {path.with_suffix('.svg').name}")
