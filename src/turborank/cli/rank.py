"""``turborank rank`` and ``turborank score``: documents for one query, and every pair of a file."""

from __future__ import annotations

import re
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from turborank import cli
from turborank.errors import InputError, TooLongError
from turborank.text import sentences
from turborank.types import RerankerOptions

if TYPE_CHECKING:
    from turborank.bulk import BulkSummary, Estimate, Progress
    from turborank.cli.documents import Named
    from turborank.reranker import Reranker
    from turborank.types import Ranked

EXAMPLES = (
    ("each file is a document", 'turborank rank "how do bees choose a home?" examples/texts/*.md --top-n 3'),
    ("each row is a document", 'turborank rank "can I keep a book longer?" examples/texts/faq.jsonl'),
    ("choose the fields of a row", 'turborank rank "red wine" wines.csv --field name --field notes'),
    ("each line of standard input is a document", 'grep -i error app.log | turborank rank "disk full" --top-n 5'),
    ("JSON output", 'turborank rank "tides" examples/texts/*.md --json | jq -r ".results[].name"'),
    ("read long documents to their end", 'turborank rank "sun valve" examples/texts/lighthouses.md --length windows'),
)
MAX_NOTES = 5  # truncated or empty documents that are named; the rest are counted
PATIENCE = 0.5  # seconds before the progress bar appears


@cli.with_compute
def rank(
    query: Annotated[str, typer.Argument(help="The query, such as a question.", show_default=False)],
    files: Annotated[
        list[str] | None,
        typer.Argument(
            help="Text files, one document each; .jsonl, .csv or .tsv files, one document per row (fields may be in "
            'double quotes); "-" or no file: standard input, one document per line.',
            show_default=False,
        ),
    ] = None,
    model: cli.Model = None,
    top_n: Annotated[int | None, typer.Option("--top-n", "-n", help="Documents to show.", show_default="all")] = None,
    threshold: Annotated[
        str | None,
        typer.Option(
            help="Minimum score to show, 0 to 1; for a calibrated model also precision=0.9, recall=0.9 or "
            "probability=0.5.",
            show_default="none",
        ),
    ] = None,
    calibration: cli.Calibration = None,
    field: Annotated[
        list[str] | None, typer.Option(help="Field of a row to read; repeatable.", show_default="title, text")
    ] = None,
    as_json: cli.AsJson = False,
    compute: RerankerOptions = cli.DEFAULT,
) -> None:
    """Rank documents by their relevance to a query.

    The score, between 0 and 1, is the sigmoid of the model's logit for the whole document.
    The passage shown is the sentence that shares most words with the query; rare words count more, and words of up to
    three letters count only if the query has no longer ones.
    Truncated documents are listed below the table.
    """
    from turborank.reranker import Reranker

    documents = _documents(query, files or [], field, _checked(threshold), top_n)
    reranker = Reranker(model, **vars(compute))
    least = _least(reranker, calibration, threshold)
    started = time.perf_counter()
    ranking = _ranking(reranker, query, documents)
    seconds = time.perf_counter() - started
    _warn_of_blanks(documents)
    kept = [ranked for ranked in ranking if least is None or ranked.score >= least][:top_n]
    if as_json:
        print(_json(query, documents, kept, reranker, seconds))
        return
    _print_table(query_words(query), documents, kept)
    for line in _notes(documents, ranking, len(kept), f"{seconds:.2f} s · {reranker.name} · {described(reranker)}"):
        print(line)
    if compute.length != "windows" and any(ranked.span[1] < len(documents[ranked.index].text) for ranked in ranking):
        print("--length windows reads long documents to their end")


def _least(reranker: Reranker, calibration: Path | None, threshold: str | None) -> float | None:
    if calibration is not None:
        reranker.calibrate(calibration)
    return reranker.least_score(_checked(threshold))


def _checked(threshold: str | None) -> float | str | None:
    """The threshold as a number, or as a checked target string. Raises InputError for an invalid target."""
    try:
        return None if threshold is None else float(threshold)
    except ValueError:
        from turborank.calibration import parse_target

        parse_target(threshold or "")
        return threshold


def described(reranker: Reranker) -> str:
    """Engine, precision and instruction set, such as "native int8 avx2"."""
    engine = reranker.engine
    return " ".join(dict.fromkeys(part for part in (engine.name, engine.precision, engine.isa) if part))


def _documents(
    query: str, files: Sequence[str], fields: Sequence[str] | None, threshold: float | str | None, top_n: int | None
) -> list[Named]:
    """Read the documents and check all arguments before the model is loaded. Raises InputError."""
    from turborank.cli import documents

    if not query.strip():
        raise InputError("expected a question, got an empty one")
    if any("\ud800" <= character <= "\udfff" for character in query):
        raise InputError("expected the question in UTF-8, got bytes that are not")
    if top_n is not None and top_n < 1:
        raise InputError(f"expected --top-n to be a positive integer, got {top_n}")
    if isinstance(threshold, float) and not 0 <= threshold <= 1:
        raise InputError(f"expected --threshold between 0 and 1, got {threshold}")
    if not files and sys.stdin.isatty():
        raise InputError(
            "expected documents, got none", hint="name files, or pipe lines into it; see turborank rank --help"
        )
    return documents.read(files, sys.stdin.buffer, fields=fields)


def _ranking(reranker: Reranker, query: str, documents: Sequence[Named]) -> list[Ranked]:
    """All documents, best first. A TooLongError gets the document's name."""
    progress = _Progress()
    try:
        return reranker.rank(query, [document.text for document in documents], progress=progress)
    except TooLongError as error:
        raise error.at(error.place, printable(documents[error.place].name)) from None
    finally:
        progress.stop()


class _Progress:
    """A progress bar on standard error, if that is a terminal, after PATIENCE seconds."""

    def __init__(self) -> None:
        self.started = time.perf_counter()
        self.update: Callable[[int, int], None] | None = None
        self.stop: Callable[[], None] = lambda: None

    def __call__(self, done: int, total: int) -> None:
        if self.update is None and sys.stderr.isatty() and time.perf_counter() - self.started > PATIENCE:
            self._start(total)
        if self.update is not None:
            self.update(done, total)

    def _start(self, total: int) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (TextColumn("ranking"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        bar = Progress(*columns, console=Console(stderr=True), transient=True)
        task = bar.add_task("", total=total)
        bar.start()
        self.update = lambda done, total: bar.update(task, completed=done, total=total)
        self.stop = bar.stop


def _json(query: str, documents: Sequence[Named], ranking: Sequence[Ranked], reranker: Reranker, seconds: float) -> str:
    import json

    calibration = reranker.calibration
    results = [
        {
            "index": ranked.index,
            "name": documents[ranked.index].name,
            "score": ranked.score,
            "logit": ranked.logit,
            "tokens": ranked.tokens,
            "truncated": ranked.truncated,
            **({} if calibration is None else {"probability": calibration.probability(ranked.logit)}),
        }
        for ranked in ranking
    ]
    answer = {
        "model": reranker.name,
        "engine": described(reranker),
        "query": query,
        "results": results,
        "seconds": round(seconds, 4),
    }
    return json.dumps(answer, ensure_ascii=False)


def _print_table(words: Sequence[str], documents: Sequence[Named], ranking: Sequence[Ranked]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    if not ranking:
        return
    width = cli.width()
    name_width = min(max(len(documents[ranked.index].name) for ranked in ranking), width // 3)
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    table.add_column("rank", justify="right")
    table.add_column("score", justify="right")
    table.add_column("document", overflow="fold", width=max(name_width, len("document")))
    table.add_column("passage", overflow="fold")
    for place, ranked in enumerate(ranking, 1):
        document = documents[ranked.index]
        best = passage(words, document.text[slice(*ranked.span)])
        shown = Text(shorten(best, 2 * (width - name_width - 24)))
        shown.highlight_regex(_any_word(words), "bold")
        table.add_row(str(place), f"{ranked.score:.3f}", Text(printable(document.name)), shown)
    Console(width=width, highlight=False).print(table)
    print()


def _notes(documents: Sequence[Named], ranking: Sequence[Ranked], shown: int, how: str) -> list[str]:
    """The lines below the table: number of documents, time, engine, and truncated documents."""
    count = f"{shown} of {len(documents)}" if shown < len(documents) else str(len(documents))
    lines = [f"{count} {'document' if len(documents) == 1 else 'documents'} · {how}"]
    if not shown:
        lines.insert(0, f"no document reaches the threshold; the best score is {ranking[0].score:.3f}")
    cut = sorted((ranked for ranked in ranking if ranked.truncated), key=lambda ranked: ranked.index)
    for ranked in cut[:MAX_NOTES]:
        name = printable(documents[ranked.index].name)
        lines.append(f"{name}: read {ranked.tokens:,} tokens, cut {ranked.truncated:,}")
    if len(cut) > MAX_NOTES:
        tokens = sum(ranked.truncated for ranked in cut[MAX_NOTES:])
        lines.append(f"and {len(cut) - MAX_NOTES} more: cut {tokens:,} tokens in all")
    return lines


def _warn_of_blanks(documents: Sequence[Named]) -> None:
    """Warn of documents without text, which are ranked but are probably a mistake."""
    blank = [printable(document.name) for document in documents if not document.text.strip()]
    for name in blank[:MAX_NOTES]:
        print(f"turborank: {name} has no text", file=sys.stderr)
    if len(blank) > MAX_NOTES:
        print(f"turborank: and {len(blank) - MAX_NOTES} more have no text", file=sys.stderr)


def query_words(query: str) -> list[str]:
    """Words of the query with four or more letters, and numbers; all words if there are none of these."""
    words = list(dict.fromkeys(re.findall(r"\w+", query.lower())))
    return [word for word in words if len(word) > 3 or word.isdigit()] or words


def _any_word(words: Sequence[str]) -> str:
    return r"(?i)\b(?:" + "|".join(re.escape(_stem(word)) for word in words) + r")\w*"


def _stem(word: str) -> str:
    """A simple stem (``bees``/``bee``, ``choosing``/``choose``), used only to select and highlight the passage."""
    if len(word) > 6:
        return word[:-3]
    return word.removesuffix("s").removesuffix("e") if len(word) > 3 else word


def passage(words: Sequence[str], text: str) -> str:
    """The sentence of ``text`` that shares most words with ``words``, weighted by rarity; ties go to the first."""
    pieces = [piece for piece in sentences(text) if piece.strip(" #*-=\n")] or [text]
    stems = [_stem(word) for word in words]
    found = [{stem for stem in stems if re.search(rf"\b{re.escape(stem)}", piece.lower())} for piece in pieces]
    frequency = Counter(stem for stems_here in found for stem in stems_here)
    weights = [sum(1 / frequency[stem] for stem in sorted(stems_here)) for stems_here in found]
    return pieces[max(range(len(pieces)), key=lambda i: (weights[i], -i))]


def printable(text: str) -> str:
    """The text as one line without control characters, which could change the terminal's state."""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())


def shorten(text: str, width: int) -> str:
    """The text as one line of at most ``width`` characters, cut between words with "…" at the end."""
    line = printable(text).lstrip("#*- ")
    if len(line) <= width:
        return line
    return line[: width - 1].rsplit(" ", 1)[0].rstrip(" ,;:") + "…"


BULK_EXAMPLES = (
    ("each row has a query and a document", "turborank score pairs.jsonl --out scores/"),
    ("estimate tokens, time and memory", "turborank score pairs.parquet --out scores/ --estimate"),
    (
        "each row has a query and document ids of a corpus",
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
Out = Annotated[Path, typer.Option(help="Folder of the shards; complete shards in it are not computed again.")]
Corpus = Annotated[
    Path | None, typer.Option(help="corpus.jsonl in BEIR layout, for rows with candidates.", show_default="none")
]
Field = Annotated[
    list[str] | None,
    typer.Option(help="Column of the document's text; repeatable.", show_default="document, else title and text"),
]
Shard = Annotated[
    str | None, typer.Option(help="k/n: every n-th shard, starting at the k-th; for job arrays.", show_default="1/1")
]
ShardPairs = Annotated[int, typer.Option(help="Pairs per shard; a killed process loses at most one shard.")]
NoTexts = Annotated[bool, typer.Option("--no-texts", help="Omit the text columns from the output.")]
EstimateOnly = Annotated[
    bool, typer.Option("--estimate", help="Score a sample and estimate the cost of all pairs; writes nothing.")
]


@cli.with_compute
def score(
    pairs: Pairs,
    out: Out = Path("scores"),
    model: cli.Model = None,
    corpus: Corpus = None,
    query: Annotated[str, typer.Option(help="Column of the query's text.")] = "query",
    field: Field = None,
    estimate: EstimateOnly = False,
    shard: Shard = None,
    shard_pairs: ShardPairs = 20_000,
    no_texts: NoTexts = False,
    compute: RerankerOptions = cli.DEFAULT,
) -> int:
    """Score all pairs of a file, in bounded memory.

    The output has the input's format and columns plus logit, score (0 to 1), tokens read and tokens truncated.
    It is written in shards, each of them atomically; manifest.json is written when all shards exist.
    The same command continues an interrupted run.
    """
    from turborank import bulk
    from turborank.reranker import Reranker

    asked = bulk.BulkOptions(query, tuple(field or ()), corpus, shard_pairs, _part(shard), not no_texts)
    reranker = Reranker(model, **vars(compute))
    if estimate:
        print(_estimated(bulk.estimate(reranker, pairs, asked), reranker.engine.threads))
        return 0
    report = _Report()
    try:
        summary = bulk.run(reranker, pairs, out, asked, progress=report)
    finally:
        report.clear()
    print(_summarised(summary, out, asked.part))
    return 0


def _part(text: str | None) -> tuple[int, int]:
    if text is None:
        return 1, 1
    found = re.fullmatch(r"(\d+)/(\d+)", text)
    if not found:
        raise typer.BadParameter(f"expected k/n, for example 3/16, got {text!r}", param_hint="--shard")
    return int(found[1]), int(found[2])


def _estimated(estimate: Estimate, threads: int) -> str:
    lines = [
        f"{estimate.pairs:,} pairs in {estimate.rows:,} rows, about {estimate.tokens:,} tokens; "
        f"{estimate.truncated:.1%} of the pairs will be truncated",
        f"{duration(estimate.seconds)} on this machine ({threads} threads, {estimate.tokens_per_second:,.0f} tokens/s)",
        f"{estimate.memory / 2**20:,.0f} MiB of memory",
        f"from a random sample of {estimate.sampled:,} pairs; nothing was written",
    ]
    return "\n".join(lines)


def _summarised(summary: BulkSummary, out: Path, part: tuple[int, int]) -> str:
    speed = summary.tokens / summary.seconds if summary.seconds else 0.0
    lines = [
        f"{summary.pairs:,} pairs in {summary.shards:,} shards, {summary.tokens:,} tokens in "
        f"{duration(summary.seconds)} ({speed:,.0f} tokens/s)"
    ]
    if summary.found:
        lines.append(f"{summary.found:,} shards existed already")
    if summary.truncated:
        lines.append(f"{summary.truncated:,} pairs were truncated; see the column truncated")
    if summary.complete:
        lines.append(f"{out / 'manifest.json'}: all shards of the input are complete")
    else:
        lines.append(f"{out}: shards of part {part[0]}/{part[1]} are complete; other parts are not")
    return "\n".join(lines)


def duration(seconds: float) -> str:
    """A duration in at most two units: "3 h 20 min", "12 min 5 s", "8 s"."""
    whole = round(seconds)
    if whole >= 3600:
        return f"{whole // 3600:,} h {whole % 3600 // 60} min"
    return f"{whole // 60} min {whole % 60} s" if whole >= 60 else f"{seconds:.1f} s" if whole < 10 else f"{whole} s"


class _Report:
    """Progress on standard error: one line that is rewritten on a terminal; elsewhere a line every LOG_EVERY s."""

    def __init__(self) -> None:
        self._terminal = sys.stderr.isatty()
        self._said = time.monotonic()
        self._first: Progress | None = None

    def __call__(self, progress: Progress) -> None:
        self._first = self._first or progress
        now = time.monotonic()
        if now - self._said < (0.2 if self._terminal else cli.LOG_EVERY):
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
