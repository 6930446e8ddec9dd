"""``turborank distill lists``, ``score`` and ``suspects``: training lists, teacher scores, doubtful labels."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from turborank import cli
from turborank.types import RerankerOptions

LISTS_EXAMPLES = (
    ("queries with their passages, one JSON object per line", "turborank distill lists faq=pairs.jsonl.gz --out lists"),
    (
        "a collection in BEIR layout, with candidates from your own first stage only",
        "turborank distill lists mine=my-data/ --candidates mine=first.trec --bm25 0 --random 0",
    ),
    (
        "documents without queries: queries are generated from them",
        "turborank distill lists --passages wiki=wiki.jsonl --sentences 5000 --keywords 2000",
    ),
    (
        "also candidates of a bi-encoder; 2 % of the queries are held out for evaluation",
        "turborank distill lists faq=pairs.jsonl --dense-model all-MiniLM-L6-v2/ --held-out 0.02",
    ),
)
SCORE_EXAMPLES = (
    (
        "BM25 and a bi-encoder as teachers",
        "turborank distill score lists -t bm25 -t minilm=biencoder:all-MiniLM-L6-v2/",
    ),
    ("a cross-encoder", "turborank distill score lists -t base=checkpoint:BAAI/bge-reranker-base --precision bf16"),
    (
        "an HTTP endpoint with an API key, two requests per second",
        "turborank distill score lists -t jina=http:jina:https://api.jina.ai/v1/rerank "
        "--http-model jina-reranker-v2-base-multilingual --key-env JINA_API_KEY --rate 2",
    ),
)
SUSPECTS_EXAMPLES = (
    (
        "passages that a teacher scores above the labelled passage",
        "turborank distill suspects lists -t minilm --margin 0.05",
    ),
    ("the same, with the fused scores of two teachers", "turborank distill suspects lists -t minilm:20 -t bm25:0.9:z"),
)

Out = Annotated[Path, typer.Option(help="Training folder to write.")]
Sources = Annotated[
    list[str] | None,
    typer.Argument(help="NAME=PATH: JSON lines (also .gz) or a folder; see docs/distillation.md.", show_default=False),
]
Candidates = Annotated[
    list[str] | None,
    typer.Option(help="NAME=RUN: TREC run with candidates for the BEIR folder NAME.", show_default=False),
]
Depth = Annotated[
    int | None, typer.Option(help="Candidates of each query to read from these runs.", show_default="all")
]
Long = Annotated[
    list[str] | None,
    typer.Option("--passages", help="NAME=FILE: long documents, which are cut into passages.", show_default=False),
]
Caps = Annotated[
    list[str] | None,
    typer.Option("--cap", help="NAME=NUMBER: maximum examples (or passages) of a source.", show_default=False),
]
Clean = Annotated[
    list[str] | None,
    typer.Option(
        help="RULE,… for all texts, or NAME=RULE,… for one source; rules: treebank, transcript, alternatives, spaces.",
        show_default=False,
    ),
]
Words = Annotated[int | None, typer.Option(help="Maximum words of a passage; the rest is cut.", show_default="all")]
MinWords = Annotated[int, typer.Option(help="Minimum words of a passage; shorter ones are left out.")]
Sentences = Annotated[int, typer.Option(help="Number of queries to generate from one sentence each.")]
Spans = Annotated[int, typer.Option(help="Number of queries to generate from two or three consecutive sentences each.")]
Keywords = Annotated[int, typer.Option(help="Number of queries to generate from the rarest words of a sentence each.")]
HeldOut = Annotated[float, typer.Option(help="Share of the labelled queries held out for evaluation, 0 to 1.")]
Bm25 = Annotated[int, typer.Option(help="Documents of each pool that are drawn from BM25's results.")]
Bm25Depth = Annotated[int, typer.Option(help="Number of BM25 results to draw from.")]
DenseModel = Annotated[
    Path | None, typer.Option(help="Bi-encoder (sentence-transformers folder) that retrieves further candidates.")
]
Dense = Annotated[int, typer.Option(help="Documents of each pool that are drawn from the bi-encoder's results.")]
DenseDepth = Annotated[int, typer.Option(help="Number of bi-encoder results to draw from.")]
Random = Annotated[int, typer.Option(help="Documents of each pool that are drawn from all documents.")]
Seed = Annotated[int, typer.Option(help="Seed of all random choices.")]

Folder = Annotated[Path, typer.Argument(help="The training folder.")]
Teachers = Annotated[
    list[str],
    typer.Option(
        "--teacher",
        "-t",
        help="bm25, or NAME=TEACHER with biencoder:FOLDER, checkpoint:MODEL, http:DIALECT:URL or run:FILE; repeatable.",
        show_default=False,
    ),
]
Cache = Annotated[
    Path | None, typer.Option(help="Folder of the cache of teacher scores.", show_default="cache/ in the folder")
]

HttpModel = Annotated[str | None, typer.Option(help="HTTP: model name to send.", show_default="none")]
KeyEnv = Annotated[str, typer.Option(help="HTTP: environment variable with the API key, if one is required.")]
Scale = Annotated[str, typer.Option(help="HTTP: auto, logit (convert probabilities to logits) or raw.")]
Documents = Annotated[int, typer.Option(help="HTTP: documents per request.")]
Parallel = Annotated[int, typer.Option(help="HTTP: maximum concurrent requests.")]
Rate = Annotated[float | None, typer.Option(help="HTTP: maximum requests per second.", show_default="no limit")]
Timeout = Annotated[float, typer.Option(help="HTTP: seconds to wait for a response.")]
Attempts = Annotated[int, typer.Option(help="HTTP: maximum attempts for each request.")]
Ensemble = Annotated[
    list[str],
    typer.Option(
        "--teacher",
        "-t",
        help="NAME[:WEIGHT[:NORM]] with NORM raw, z or minmax; several are fused.",
        show_default=False,
    ),
]
Margin = Annotated[float, typer.Option(help="Minimum difference to the labelled document, in the teacher's scores.")]
Table = Annotated[
    Path | None, typer.Option("--out", help="Table (TSV) to write.", show_default="suspects.tsv in the folder")
]


def lists(
    sources: Sources = None,
    out: Out = Path("lists"),
    passages: Long = None,
    candidates: Candidates = None,
    depth: Depth = None,
    cap: Caps = None,
    clean: Clean = None,
    words: Words = None,
    min_words: MinWords = 1,
    sentences: Sentences = 0,
    spans: Spans = 0,
    keywords: Keywords = 0,
    held_out: HeldOut = 0.0,
    bm25: Bm25 = 20,
    bm25_depth: Bm25Depth = 50,
    dense_model: DenseModel = None,
    dense: Dense = 12,
    dense_depth: DenseDepth = 30,
    random: Random = 6,
    seed: Seed = 0,
) -> None:
    """Write a training folder: queries, passages, and a pool of candidates for each query.

    Identical texts are merged; labels in the data are kept. The folder has BEIR layout and a TREC run, so that
    turborank evaluate can read it. The same command writes the same bytes.
    """
    from turborank.distill.batches import build_folder
    from turborank.distill.sources import ListOptions, PoolPlan, TrainingSource

    runs = {name: Path(path) for name, path in _named(candidates, "--candidates")}
    read = [TrainingSource(name, Path(path), run=runs.pop(name, None)) for name, path in _named(sources, "SOURCES")]
    read += [TrainingSource(name, Path(path), long=True) for name, path in _named(passages, "--passages")]
    if runs:
        raise typer.BadParameter(f"expected the name of a source, got {', '.join(runs)}", param_hint="--candidates")
    what = ListOptions(
        sources=tuple(read),
        caps={name: _number(value, "--cap") for name, value in _named(cap, "--cap")},
        clean=_cleaning(clean or ()),
        words=words,
        min_words=min_words,
        depth=depth,
        pseudo={"sentence": sentences, "span": spans, "keywords": keywords},
        held_out=held_out,
        seed=seed,
    )
    plan = PoolPlan(bm25, bm25_depth, dense if dense_model else 0, dense_depth, random)
    with cli.progress() as progress:
        manifest = build_folder(what, out, plan, dense=dense_model, progress=progress)
    counts = manifest["counts"]
    print(
        f"{out}: {counts['queries']:,} queries, {counts['passages']:,} passages, {counts['pool_places']:,} pool places"
    )
    for source, count in counts["queries_of_source"].items():
        print(f"  {count:>7,} queries of {source}")
    print(f"  {counts['held_out_queries']:>7,} of them held out (qrels/dev.tsv)")
    for what, count in manifest["left_out"].items():
        print(f"  left out: {count:,} {what}")


@cli.with_compute
def score(
    folder: Folder,
    teacher: Teachers,
    cache: Cache = None,
    compute: RerankerOptions = cli.DEFAULT,
    http_model: HttpModel = None,
    key_env: KeyEnv = "TURBORANK_TEACHER_KEY",
    scale: Scale = "auto",
    documents: Documents = 32,
    parallel: Parallel = 4,
    rate: Rate = None,
    timeout: Timeout = 60.0,
    attempts: Attempts = 6,
) -> None:
    """Score the pools of a training folder with teachers.

    Writes scores/NAME.trec and, with the provenance of the scores, scores/NAME.json. Scores are cached: an interrupted
    command continues, and no pair is scored twice.
    """
    from turborank.distill import http_teacher, teachers
    from turborank.distill.folder import TrainingFolder

    specs = [teachers.parse(text) for text in teacher]
    http = http_teacher.HttpOptions(http_model, key_env, scale, documents, parallel, rate, timeout, attempts)
    how = teachers.TeacherOptions(vars(compute), http)
    with cli.progress() as progress:
        lists = TrainingFolder.load(folder)
        for spec in specs:
            print(teachers.score(lists, spec, how, cache=cache, progress=progress))


def suspects(folder: Folder, teacher: Ensemble, margin: Margin = 0.0, out: Table = None) -> None:
    """Find unlabelled documents that a teacher scores above a labelled one: suspected false negatives.

    Writes them to a table (TSV), the largest difference first, and prints their number. Training does not use them as
    negatives.
    """
    from rich.console import Console
    from rich.table import Table as Printed

    from turborank.distill import scores as doubts
    from turborank.distill import teachers
    from turborank.distill.folder import TrainingFolder

    specs = [teachers.parse_weighted(text) for text in teacher]
    lists = TrainingFolder.load(folder)
    scores = teachers.fuse(specs, {spec.name: lists.scores(spec.name) for spec in specs}, lists.bounds)
    found = doubts.find_suspects(lists, scores, margin)
    path = out or folder / "suspects.tsv"
    doubts.write_suspects(lists, scores, found, path)
    table = Printed(box=None, padding=(0, 2, 0, 0), header_style="bold")
    for column in ("source", "labelled queries", "with suspects", "suspects", "of unlabelled"):
        table.add_column(column, justify="left" if column == "source" else "right", overflow="fold")
    for row in doubts.suspect_summaries(lists, found):
        share = row.suspects / row.unlabelled if row.unlabelled else 0.0
        counts = (f"{row.queries:,}", f"{row.with_suspects / row.queries:.1%}", f"{row.suspects:,}", f"{share:.1%}")
        table.add_row(row.source or "–", *counts)
    Console(width=cli.width(), highlight=False, markup=False).print(table)
    print(f"\n{path}")


def _named(values: Sequence[str] | None, option: str) -> list[tuple[str, str]]:
    """Parse NAME=VALUE arguments."""
    pairs = [value.partition("=") for value in values or ()]
    for name, equals, value in pairs:
        if not (name and equals and value):
            raise typer.BadParameter(f"expected NAME=VALUE, got {name + equals + value!r}", param_hint=option)
    return [(name, value) for name, _, value in pairs]


def _number(text: str, option: str) -> int:
    if not text.isdecimal():
        raise typer.BadParameter(f"expected a number, got {text!r}", param_hint=option)
    return int(text)


def _cleaning(values: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Source -> cleaning rules; rules under "" are for all sources without rules of their own."""
    rules: dict[str, tuple[str, ...]] = {}
    for value in values:
        name, equals, named = value.partition("=")
        source, chosen = (name, named) if equals else ("", value)
        rules[source] = (*rules.get(source, ()), *chosen.split(","))
    return rules
