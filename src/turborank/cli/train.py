"""``turborank distill student``, ``recover``, ``train``, ``report`` and ``ship``: train a student model."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from turborank import cli

if TYPE_CHECKING:
    from turborank.distill.trainer import Schedule

STUDENT_EXAMPLES = (
    (
        "convert a BERT of 512 tokens to ALiBi and 8,192 tokens",
        "turborank distill student alibi --from all-MiniLM-L6-v2/",
    ),
    (
        "keep four layers of a cross-encoder",
        "turborank distill student layers --from ms-marco-MiniLM-L-6-v2 --layers 4",
    ),
    ("random weights and a new vocabulary", "turborank distill student scratch --shape tiny --texts lists/"),
)
RECOVER_EXAMPLES = (
    (
        "train an ALiBi student to reproduce the hidden states of its source",
        "turborank distill recover student/ --source all-MiniLM-L6-v2/ --texts lists/ --steps 600 --out recovered/",
    ),
)
TRAIN_EXAMPLES = (
    (
        "labels and two teachers",
        "turborank distill train lists/ --student recovered/final -t minilm:20 -t bm25:0.9:z --loss infonce:1,kl:1",
    ),
    ("labels only", "turborank distill train lists/ --student student/ --loss infonce"),
    ("four GPUs", "torchrun --nproc-per-node 4 -m turborank distill train lists/ --student student/ -t ce"),
)
REPORT_EXAMPLES = (("write the report of a run in progress", "turborank distill report run"),)
SHIP_EXAMPLES = (
    (
        "average two runs, calibrate scores on held-out queries, store as int8",
        "turborank distill ship run-0/best run-1/best --calibrate lists/ --int8 --out my-reranker/",
    ),
)

Out = Annotated[Path, typer.Option(help="Folder of the run; a run found there is continued.")]
Steps = Annotated[int, typer.Option(help="Optimiser steps of the schedule.")]
Stop = Annotated[
    int | None, typer.Option(help="Stop at this step; the same command without --stop continues.", show_default=False)
]
Budget = Annotated[int, typer.Option(help="Maximum tokens of a step.")]
Rate = Annotated[float, typer.Option("--learning-rate", "--lr", help="Peak learning rate.")]
Warmup = Annotated[int, typer.Option(help="Warm-up steps to the peak learning rate.")]
Average = Annotated[
    float,
    typer.Option(help="Decay of the moving average of the weights, which becomes the final model; 0: no average."),
]
Save = Annotated[int, typer.Option("--save-every", min=1, help="Steps between checkpoints.")]
Seed = Annotated[int, typer.Option(min=0, help="Seed of all random choices.")]
Bf16 = Annotated[bool, typer.Option("--bf16/--fp32", help="Precision of matrix products; weights stay in fp32.")]
Recompute = Annotated[
    bool, typer.Option("--recompute", help="Gradient checkpointing: less memory, about a third slower.")
]
TrainWords = Annotated[bool, typer.Option("--train-words", help="Also train the word embeddings.")]

Folder = Annotated[Path, typer.Argument(help="Training folder, from turborank distill lists.")]
StudentModel = Annotated[str, typer.Option(help="Initial model: folder or name.")]
Teachers = Annotated[
    list[str] | None,
    typer.Option(
        "--teacher",
        "-t",
        help="NAME[:WEIGHT[:NORM]] of teacher scores in the folder; several are fused.",
        show_default=False,
    ),
]
Losses = Annotated[
    str | None, typer.Option(help="Losses, as NAME:WEIGHT,…", show_default="infonce:1,kl:1; without a teacher infonce")
]
Dev = Annotated[
    list[Path] | None,
    typer.Option(help="Folder with held-out queries; repeatable.", show_default="the training folder"),
]
Documents = Annotated[int, typer.Option(min=2, help="Documents of each list.")]
QueryTokens = Annotated[int, typer.Option(help="Maximum tokens of a query.")]
DocumentTokens = Annotated[str, typer.Option(help="Maximum tokens of a document; each step draws one of these values.")]
LongTokens = Annotated[
    str,
    typer.Option(
        help="Document tokens of the long steps, which embed documents in longer texts; empty: no long steps."
    ),
]
LongEvery = Annotated[int, typer.Option(help="Every how many steps a long step takes place.")]
Shares = Annotated[
    list[str] | None,
    typer.Option(
        help="SOURCE=NUMBER: relative frequency with which a source's queries are drawn.", show_default="1 each"
    ),
]
EvaluateEvery = Annotated[int, typer.Option(help="Steps between evaluations of nDCG@10.")]
Patience = Annotated[
    int, typer.Option(help="Early stopping: evaluations without improvement before training ends; 0: off.")
]
DevQueries = Annotated[int, typer.Option(min=1, help="Maximum held-out queries evaluated in each folder.")]
MaxLength = Annotated[int, typer.Option(help="Maximum tokens of a pair in evaluation.")]
Margin = Annotated[
    float, typer.Option(help="Minimum teacher-score difference to the labelled document of a suspected false negative.")
]
InnerTerms = Annotated[
    list[str] | None,
    typer.Option(
        "--inner",
        help="hidden:MODEL[:WEIGHT] or relations:MODEL[:WEIGHT]: also match a cross-encoder's inner layers.",
        show_default=False,
    ),
]
Head = Annotated[
    str | None,
    typer.Option(
        help="Head of an alibi or scratch student: focus, cosine, classifier or sum.",
        show_default="alibi: focus; scratch: classifier",
    ),
]


def student(
    recipe: Annotated[str, typer.Argument(help="Recipe: alibi, layers or scratch.")],
    source: Annotated[str | None, typer.Option("--from", help="Source model.", show_default=False)] = None,
    out: Annotated[Path, typer.Option(help="Model folder to write.")] = Path("student"),
    layers: Annotated[
        str | None,
        typer.Option(
            help="Number of layers, or indices (0,2,4).", show_default="the source's or shape's; recipe layers: 4"
        ),
    ] = None,
    head: Head = None,
    slopes: Annotated[
        str | None, typer.Option(help="ALiBi slopes: gentle, standard or halved-tail.", show_default="the recipe's")
    ] = None,
    positions: Annotated[
        str | None,
        typer.Option(help="For alibi: mean (added to the words), or repeat (for cross-encoders).", show_default="mean"),
    ] = None,
    shape: Annotated[str, typer.Option(help="Shape, for scratch: turbo, tiny, embedded or micro.")] = "tiny",
    texts: Annotated[
        Path | None,
        typer.Option(
            help="Training folder whose texts are used to match heads (alibi) or to build the vocabulary (scratch).",
            show_default=False,
        ),
    ] = None,
    vocabulary: Annotated[str, typer.Option(help="Tokenizer, for scratch: wordpiece or bpe.")] = "wordpiece",
    vocabulary_size: Annotated[int, typer.Option(help="Maximum vocabulary size, for scratch.")] = 16_384,
    seed: Seed = 0,
) -> None:
    """Write the initial model for training."""
    from turborank.distill import students
    from turborank.errors import InputError, UnknownKeyError

    if recipe not in students.RECIPES:
        raise UnknownKeyError("recipe", recipe, students.RECIPES)
    if recipe != "scratch" and source is None:
        raise InputError(f"expected --from for recipe {recipe!r}: {students.RECIPES[recipe].note}")
    if positions is not None and recipe != "alibi":
        raise InputError(f"expected --positions with recipe 'alibi', got recipe {recipe!r}")
    given = ("head", head), ("slopes", slopes), ("positions", positions)
    chosen: dict[str, Any] = {name: value for name, value in given if value is not None}
    if recipe == "layers":
        made = students.from_layers(source or "", layers=_layers("4" if layers is None else layers))
    elif recipe == "alibi":
        made = students.from_bert(
            source or "", layers=None if layers is None else _layers(layers), probes=_probes(texts), seed=seed, **chosen
        )
    else:
        tokenizer = students.train_tokenizer(_words_of(texts), kind=vocabulary, size=vocabulary_size)
        made = students.from_scratch(tokenizer, shape=shape, layers=_number_of(layers), seed=seed, **chosen)
    made.save(out)
    print(
        f"{out}: {sum(w.numel() for w in made.weights.values()):,} parameters, {made.config.num_hidden_layers} layers"
    )


def recover(
    student: Annotated[Path, typer.Argument(help="Student of the recipe alibi.")],
    source: Annotated[Path, typer.Option(help="The student's source BERT (sentence-transformers folder).")],
    texts: Annotated[Path, typer.Option(help="Training folder with the texts: queries and passages.")],
    long: Annotated[
        list[Path] | None, typer.Option(help="JSON lines with long documents (text or passage).", show_default=False)
    ] = None,
    out: Out = Path("recovered"),
    steps: Steps = 600,
    stop: Stop = None,
    budget: Budget = 4096,
    learning_rate: Rate = 5e-4,
    warmup: Warmup = 20,
    average: Average = 0.98,
    save_every: Save = 50,
    long_tokens: Annotated[
        str, typer.Option(help="Maximum tokens of long documents; each step draws one of these values.")
    ] = "1024,2048,4096",
    bf16: Bf16 = True,
    recompute: Recompute = False,
    threads: cli.Threads = None,
    seed: Seed = 0,
) -> None:
    """Train an ALiBi student, layer by layer, to reproduce the hidden states of its source BERT.

    Needs texts only, no labels. The result ranks like the source bi-encoder; continue with `train`.
    """
    from turborank.distill import train

    plan = _schedule(steps, stop, learning_rate, warmup, average, save_every, 0, 0)
    chosen = train.RecoverOptions(
        bf16=bf16, recompute=recompute, threads=threads, seed=seed, long=long or [], budget=budget,
        long_tokens=_numbers(long_tokens),
    )  # fmt: skip
    with _curve("recover") as progress:
        train.recover(student, source, texts, out, plan, chosen, progress)
    _write_report(out)
    print(out / "final")


def train(
    folder: Folder,
    student: StudentModel,
    out: Out = Path("run"),
    teacher: Teachers = None,
    loss: Losses = None,
    dev: Dev = None,
    steps: Steps = 1000,
    stop: Stop = None,
    budget: Budget = 6144,
    documents: Documents = 8,
    query_tokens: QueryTokens = 128,
    document_tokens: DocumentTokens = "96,160,256",
    long_tokens: LongTokens = "512,1024,2048",
    long_every: LongEvery = 16,
    share: Shares = None,
    learning_rate: Rate = 1e-4,
    warmup: Warmup = 20,
    average: Average = 0.99,
    save_every: Save = 50,
    evaluate_every: EvaluateEvery = 100,
    patience: Patience = 0,
    dev_queries: DevQueries = 200,
    max_length: MaxLength = 512,
    margin: Margin = 0.0,
    inner: InnerTerms = None,
    bf16: Bf16 = True,
    recompute: Recompute = False,
    train_words: TrainWords = False,
    threads: cli.Threads = None,
    seed: Seed = 0,
) -> None:
    """Train a student on lists of documents with labels, teacher scores, or both.

    Evaluates nDCG@10 on held-out queries with the engine used for inference. Writes the best model to best/, the last
    to final/, and the curves to report.html. After an interruption the same command continues; on a CPU the result has
    the same bits.
    """
    from turborank.distill import train
    from turborank.distill.batches import BatchOptions

    plan = _schedule(steps, stop, learning_rate, warmup, average, save_every, evaluate_every, patience)
    batches = BatchOptions(
        budget=budget, documents=documents, query_tokens=query_tokens,
        document_tokens=_sizes(document_tokens, "--document-tokens"),
        long_every=long_every if long_tokens.strip() else 0, shares=_shares(share or ()), margin=margin,
        long_tokens=_sizes(long_tokens, "--long-tokens") if long_tokens.strip() else (),
    )  # fmt: skip
    chosen = train.TrainOptions(
        bf16=bf16, recompute=recompute, threads=threads, seed=seed, teachers=teacher or [], loss=loss,
        dev=dev or [folder], dev_queries=dev_queries, max_length=max_length, intermediate=inner or [],
        train_words=train_words,
    )  # fmt: skip
    with _curve("train") as progress:
        result = train.train(folder, student, out, plan, batches, chosen, progress)
    _write_report(out)
    print(result)


def report(run: Annotated[Path, typer.Argument(help="Folder of a run, in progress or finished.")]) -> None:
    """Write report.html, one self-contained page with the curves of a run of recover or train so far."""
    from turborank.distill.report import write_report

    print(write_report(run))


def ship(
    models: Annotated[list[Path], typer.Argument(help="Model folders; the weights of several are averaged.")],
    out: Annotated[Path, typer.Option(help="Model folder to write.")],
    calibrate: Annotated[
        Path | None,
        typer.Option(help="Training folder on whose held-out queries scores are calibrated.", show_default=False),
    ] = None,
    int8: Annotated[bool, typer.Option("--int8", help="Store matrices as int8, in a quarter of the bytes.")] = False,
    max_length: Annotated[int, typer.Option(help="Maximum tokens of a pair in calibration.")] = 512,
    threads: cli.Threads = None,
) -> None:
    """Average trained models, calibrate their scores, and write a folder that Reranker can load."""
    from turborank.distill import students, train
    from turborank.distill.folder import TrainingFolder

    student = students.average(models)
    if calibrate is not None:
        serving = train.ServingOptions(max_length=max_length, threads=threads)
        factor, bias = train.calibrate(student, TrainingFolder.load(calibrate), serving)
        print(f"logits × {factor:.4g} {bias:+.4g}")
    if int8:
        students.write_int8(student, out)
    else:
        student.save(out)
    print(out)


def _write_report(out: Path) -> None:
    from turborank.distill.report import write_report

    if os.environ.get("RANK", "0") == "0":  # the first of the processes that accelerate or torchrun started
        write_report(out)


def _number_of(layers: str | None) -> int | None:
    from turborank.errors import InputError

    count = None if layers is None else _layers(layers)
    if isinstance(count, list):
        raise InputError(f"expected a number of layers for recipe 'scratch', got {layers!r}")
    return count


def _layers(text: str) -> int | list[int]:
    numbers = _numbers(text)
    if not numbers:
        raise typer.BadParameter(f"expected how many layers, or which, got {text!r}", param_hint="--layers")
    return list(numbers) if "," in text else numbers[0]


def _numbers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(",") if part.strip())
    except ValueError:
        raise typer.BadParameter(f"expected numbers with commas between, got {text!r}") from None


def _sizes(text: str, option: str) -> tuple[int, ...]:
    numbers = _numbers(text)
    if min(numbers, default=0) < 1:
        raise typer.BadParameter(f"expected numbers of tokens, each 1 or more, got {text!r}", param_hint=option)
    return numbers


def _shares(values: Sequence[str]) -> dict[str, float]:
    shares: dict[str, float] = {}
    for text in values:
        name, _, value = text.partition("=")
        try:
            shares[name] = float(value)
        except ValueError:
            shares[name] = math.nan
        if not (name and 0 <= shares[name] < math.inf):
            raise typer.BadParameter(f"expected SOURCE=NUMBER, 0 or more, got {text!r}", param_hint="--share")
    return shares


def _probes(texts: Path | None) -> Sequence[str]:
    """Up to sixteen texts of at least 50 words from a training folder."""
    if texts is None:
        return ()
    found = [text for text in _all_texts(texts) if len(text.split()) >= 50]
    return found[:: max(1, len(found) // 16)][:16]


def _words_of(texts: Path | None) -> list[str]:
    from turborank.errors import InputError

    if texts is None:
        raise InputError("expected --texts for recipe 'scratch': a training folder to make a vocabulary from")
    return _all_texts(texts)


def _all_texts(path: Path) -> list[str]:
    from turborank.distill.folder import TrainingFolder

    folder = TrainingFolder.load(path)
    return [*folder.texts, *folder.queries]


def _schedule(
    steps: int, stop: int | None, rate: float, warmup: int, average: float, save: int, evaluate: int, patience: int
) -> Schedule:
    from turborank.distill.trainer import Schedule

    if not 0 <= average < 1:
        raise typer.BadParameter(f"expected a factor of 0 to 1, 1 left out, got {average}", param_hint="--average")
    return Schedule(
        steps=steps, learning_rate=rate, warmup=warmup, average=average, save_every=save,
        evaluate_every=evaluate or steps + 1, patience=patience, stop=stop,
    )  # fmt: skip


def _shown(name: str, value: float) -> str:
    return f"{value:,.0f} tokens/s" if name == "tokens_per_s" else f"{name} {value:.4f}"


@contextmanager
def _curve(what: str) -> Iterator[Callable[[dict[str, Any], int], None]]:
    """Progress on standard error: loss, nDCG, speed, time left; without a terminal, a line every 20 steps."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns: tuple[Any, ...] = (TextColumn(what), BarColumn(20), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(
        *columns, TextColumn("{task.fields[told]}"), console=console, disable=not console.is_terminal
    ) as bars:
        task = bars.add_task(what, total=None, told="")
        measured: dict[str, float] = {}

        def step(row: dict[str, Any], steps: int) -> None:
            measured.update({k: v for k, v in row.items() if k.startswith("ndcg")})
            parts = {k: v for k, v in row.items() if k in ("loss", "ndcg@10", "tokens_per_s")} | measured
            told = " · ".join(_shown(name, value) for name, value in parts.items())
            bars.update(task, completed=row["step"], total=steps, told=told)
            if not console.is_terminal and (row["step"] % 20 == 0 or "ndcg@10" in row):
                console.print(f"{what} {row['step']}/{steps} · {told}", highlight=False)

        yield step
