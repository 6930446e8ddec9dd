"""``turborank score``: every pair of a file, into a folder of shards."""

from __future__ import annotations

import re
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from turborank.cli import options

if TYPE_CHECKING:
    from turborank.bulk import BulkSummary, Estimate, Progress

EXAMPLES = (
    ("each row has a query and a document", "turborank score pairs.jsonl --out scores/"),
    ("how many tokens and hours will it take?", "turborank score pairs.parquet --out scores/ --estimate"),
    (
        "each row has a query and ids of a corpus",
        "turborank score candidates.jsonl --corpus corpus.jsonl --out scores/",
    ),
    ("a quarter of the work on each of four machines", "turborank score pairs.jsonl --out scores/ --shard 1/4"),
    ("other columns", "turborank score pairs.csv --query question --field title --field body --out scores/"),
)

Pairs = Annotated[
    Path,
    typer.Argument(
        help=".jsonl, .csv, .tsv (each also .gz) or .parquet: rows of a query and a document, or of a query and "
        "candidates (ids of --corpus).",
        show_default=False,
    ),
]
Out = Annotated[Path, typer.Option(help="Folder of the shards; what is complete there is not computed again.")]
Corpus = Annotated[
    Path | None, typer.Option(help="corpus.jsonl in BEIR layout, for rows of candidates.", show_default="none")
]
Field = Annotated[
    list[str] | None,
    typer.Option(help="Column of the document's text; repeatable.", show_default="document, else title and text"),
]
Shard = Annotated[
    str | None, typer.Option(help="k/n: every n-th shard from the k-th on, for job arrays.", show_default="1/1")
]
ShardPairs = Annotated[int, typer.Option(help="Pairs of one shard; what is lost at most if the process is killed.")]
NoTexts = Annotated[bool, typer.Option("--no-texts", help="Leave the columns of texts out of the output.")]
EstimateOnly = Annotated[
    bool, typer.Option("--estimate", help="Score a sample, say what the whole will take, and write nothing.")
]


def score(
    pairs: Pairs,
    out: Out = Path("scores"),
    model: options.Model = None,
    corpus: Corpus = None,
    query: Annotated[str, typer.Option(help="Column of the query's text.")] = "query",
    field: Field = None,
    estimate: EstimateOnly = False,
    shard: Shard = None,
    shard_pairs: ShardPairs = 20_000,
    no_texts: NoTexts = False,
    length: options.Length = "truncate",
    max_length: options.MaxLength = None,
    engine: options.Engine = "auto",
    precision: options.Precision = "auto",
    threads: options.Threads = None,
    offline: options.Offline = False,
) -> int:
    """Score any number of pairs, in bounded memory.

    The output has the input's format and columns, and logit, score (0 to 1), tokens read and tokens truncated.
    It is written in shards, each whole or not at all; manifest.json appears when all are there.
    The same command goes on where an interrupted one stopped.
    """
    from turborank import bulk
    from turborank.reranker import Reranker

    asked = bulk.BulkOptions(query, tuple(field or ()), corpus, shard_pairs, _part(shard), not no_texts)
    reranker = Reranker(
        model, engine=engine, precision=precision, max_length=max_length, length=length, threads=threads,
        offline=offline or None,
    )  # fmt: skip
    if estimate:
        print(_estimated(bulk.estimate(reranker, pairs, asked), reranker.engine.threads))
        return 0
    report = _Report()
    try:
        summary = bulk.run(reranker, pairs, out, asked, progress=report)
    finally:
        report.clear()
    print(_told(summary, out, asked.part))
    return 0


def _part(text: str | None) -> tuple[int, int]:
    if text is None:
        return 1, 1
    found = re.fullmatch(r"(\d+)/(\d+)", text)
    if not found:
        raise typer.BadParameter(f"expected k/n, say 3/16, got {text!r}", param_hint="--shard")
    return int(found[1]), int(found[2])


def _estimated(estimate: Estimate, threads: int) -> str:
    lines = [
        f"{estimate.pairs:,} pairs in {estimate.rows:,} rows, about {estimate.tokens:,} tokens; "
        f"{estimate.truncated:.1%} of the pairs are longer than what is read",
        f"{duration(estimate.seconds)} on this machine ({threads} threads, {estimate.tokens_per_second:,.0f} tokens/s)",
        f"{estimate.memory / 2**20:,.0f} MiB of memory",
        f"from a random sample of {estimate.sampled:,} pairs; nothing was written",
    ]
    return "\n".join(lines)


def _told(summary: BulkSummary, out: Path, part: tuple[int, int]) -> str:
    speed = summary.tokens / summary.seconds if summary.seconds else 0.0
    lines = [
        f"{summary.pairs:,} pairs in {summary.shards:,} shards, {summary.tokens:,} tokens in "
        f"{duration(summary.seconds)} ({speed:,.0f} tokens/s)"
    ]
    if summary.found:
        lines.append(f"{summary.found:,} shards were there already")
    if summary.truncated:
        lines.append(f"{summary.truncated:,} pairs were longer than what is read; see the column truncated")
    if summary.complete:
        lines.append(f"{out / 'manifest.json'}: every shard of the input is there")
    else:
        lines.append(f"{out}: shards of part {part[0]}/{part[1]} are written; other parts are not complete")
    return "\n".join(lines)


def duration(seconds: float) -> str:
    """Two units at most: "3 h 20 min", "12 min 5 s", "8 s"."""
    whole = round(seconds)
    if whole >= 3600:
        return f"{whole // 3600:,} h {whole % 3600 // 60} min"
    return f"{whole // 60} min {whole % 60} s" if whole >= 60 else f"{seconds:.1f} s" if whole < 10 else f"{whole} s"


class _Report:
    """One line on standard error: rewritten on a terminal, elsewhere a new one now and then."""

    def __init__(self) -> None:
        self._terminal = sys.stderr.isatty()
        self._said = time.monotonic()
        self._first: Progress | None = None

    def __call__(self, progress: Progress) -> None:
        self._first = self._first or progress
        now = time.monotonic()
        if now - self._said < (0.2 if self._terminal else options.LOG_EVERY):
            return
        self._said = now
        done, first = progress.fraction - self._first.fraction, self._first
        left = (progress.seconds - first.seconds) * (1 - progress.fraction) / done if done > 0 else None
        line = (
            f"shard {progress.shard:,}: {progress.pairs:,} pairs, {progress.tokens / progress.seconds:,.0f} tokens/s, "
            f"{progress.fraction:.0%} of the input" + ("" if left is None else f", {duration(left)} left")
        )
        if self._terminal:
            print(f"\r\x1b[K{line}", end="", file=sys.stderr, flush=True)
        else:
            print(f"turborank: {line}", file=sys.stderr, flush=True)

    def clear(self) -> None:
        """Leave the terminal's line empty."""
        if self._terminal:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)
