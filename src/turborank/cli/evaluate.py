"""``turborank evaluate``: measures of a model on a dataset, and the reports."""

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
    ("how much better than BM25 is the model that ships with turborank?", "turborank evaluate scifact"),
    ("on your own data: a folder in BEIR layout, or a LlamaIndex JSON", "turborank evaluate my-data/ --out results/"),
    ("two models side by side", "turborank evaluate nfcorpus --models jina-reranker-v1-tiny-en,path/to/mine"),
    ("another first stage", "turborank evaluate trec-covid --run dense.trec --depth 50"),
    ("two first stages, fused", "turborank evaluate trec-covid --run dense.trec --run bm25.trec"),
    ("a third of the work on each of three machines", "turborank evaluate hotpotqa --shard 1/3"),
)


Datasets = Annotated[
    list[str] | None,
    typer.Argument(help="Names (see --list), folders in BEIR layout, LlamaIndex JSON files.", show_default=False),
]
Models = Annotated[
    str | None,
    typer.Option(
        "--models", "-m", help="Models, separated by commas; bm25 for none.", show_default="the one that ships"
    ),
]
Depth = Annotated[
    str, typer.Option(help="Candidates of each query that are reranked; auto: of 100, as many as are needed.")
]
Run = Annotated[
    list[Path] | None,
    typer.Option(help="A TREC run to rerank; several are fused by reciprocal ranks.", show_default="BM25"),
]
Out = Annotated[Path, typer.Option(help="Folder of the results; what is there is continued.")]
Shard = Annotated[str | None, typer.Option(help="k/n: the k-th of n parts of the queries.", show_default=False)]
Measures = Annotated[
    str | None,
    typer.Option(help="Separated by commas; the first is compared.", show_default="nDCG@10, R@100, MRR@10, …"),
]
Split = Annotated[str | None, typer.Option(help="Of the judgements.", show_default="the dataset's")]
DataDir = Annotated[
    Path | None, typer.Option(help="Where datasets are kept.", show_default="TURBORANK_DATA, or the cache")
]
Sample = Annotated[int | None, typer.Option(help="Evaluate this many queries only.", show_default="all")]
SkipConstant = Annotated[
    bool,
    typer.Option("--skip-constant", help="Score no query whose candidates are judged alike: order is nothing to it."),
]
KeepUnknown = Annotated[
    bool, typer.Option("--keep-unknown", help="Count judged documents that are not in the corpus as not found.")
]
Listed = Annotated[bool, typer.Option("--list", help="List the datasets known by name.")]


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
    """Measure models on datasets: rerank a first stage, compare, report.

    Writes runs (TREC), per-query scores, manifests, report.md and report.html to --out. A run that was interrupted
    continues where it stopped.
    """
    if listed:
        _list()
        return
    if not datasets:
        raise typer.BadParameter("name a dataset, or --list them", param_hint="DATASETS")
    from turborank.evaluate.pipeline import FIRST_STAGE, evaluate
    from turborank.reranker import Reranker

    def load(name: str | None) -> Reranker:
        return Reranker(
            name, engine=engine, precision=precision, length=length, max_length=max_length, threads=threads,
            offline=offline or None,
        )  # fmt: skip

    names: list[str | None] = [name.strip() for name in (models or "").split(",") if name.strip()]
    wanted: list[str | Reranker] = [load(name) for name in (names or [None]) if name != FIRST_STAGE]
    with options.progress() as progress:
        evaluation = evaluate(
            datasets, wanted or [FIRST_STAGE], out=out, depth=_depth(depth), run=run, shard=_shard(shard), split=split,
            data_dir=data_dir, measures=[name.strip() for name in (measures or "").split(",") if name.strip()],
            offline=offline, sample=sample, skip_constant=skip_constant, keep_unknown=keep_unknown, progress=progress,
        )  # fmt: skip
    _print(evaluation, out, partial=shard is not None)


def _depth(text: str) -> int | str:
    return int(text) if re.fullmatch(r"-?\d+", text) else text


def _shard(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    found = re.fullmatch(r"(\d+)/(\d+)", text)
    if not found:
        raise typer.BadParameter(f"expected k/n, say 3/16, got {text!r}", param_hint="--shard")
    return int(found[1]), int(found[2])


def _print(evaluation: Evaluation, out: Path, *, partial: bool) -> None:
    from rich.console import Console
    from rich.table import Table

    from turborank.evaluate.report import columns, summary

    if partial:
        print(f"{out}: run files of this part are written; evaluate without --shard to join the parts and report")
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
        table.add_row(row.name, row.group, *counts, row.licence, "download" if row.files else "put it there yourself")
    Console(width=options.width(), highlight=False, markup=False).print(table)
    print(f"\ngroups: {', '.join(GROUPS)}")
