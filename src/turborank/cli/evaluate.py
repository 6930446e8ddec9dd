"""``turborank evaluate``: measure models on datasets and write reports."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from turborank.cli import options

if TYPE_CHECKING:
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
    engine: options.Engine = "auto",
    precision: options.Precision = "auto",
    length: options.Length = "truncate",
    max_length: options.MaxLength = None,
    threads: options.Threads = None,
    offline: options.Offline = False,
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
        return Reranker(
            name, engine=engine, precision=precision, length=length, max_length=max_length, threads=threads,
            offline=offline or None,
        )  # fmt: skip

    names: list[str | None] = [name.strip() for name in (models or "").split(",") if name.strip()]
    wanted: list[str | Reranker] = [load(name) for name in (names or [None]) if name != FIRST_STAGE]
    how = EvaluateOptions(
        depth=_depth(depth), run=run, shard=_shard(shard), split=split, data_dir=data_dir, offline=offline,
        measures=[name.strip() for name in (measures or "").split(",") if name.strip()], sample=sample,
        skip_constant=skip_constant, keep_unknown=keep_unknown,
    )  # fmt: skip
    with options.progress() as progress:
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
    Console(width=options.width(), highlight=False, markup=False).print(table)
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
    Console(width=options.width(), highlight=False, markup=False).print(table)
    print(f"\ngroups: {', '.join(GROUPS)}")
