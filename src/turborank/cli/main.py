"""The command ``turborank``: the table of subcommands, error messages and exit codes.

COMMANDS has one row for each subcommand. Its function has a typed signature and imports heavy libraries in its body, so
that other subcommands start without them. A name of two words is a subcommand of a group in GROUPS.
An error is one line on standard error, and the exit code is 2.
"""

from __future__ import annotations

import errno
import functools
import os
import sys
from collections.abc import Callable, Sequence
from typing import Annotated, Any, NamedTuple

import typer

from turborank.cli.distill import LISTS_EXAMPLES, SCORE_EXAMPLES, SUSPECTS_EXAMPLES, lists, score, suspects
from turborank.cli.doctor import BENCH_EXAMPLES, bench, doctor
from turborank.cli.doctor import EXAMPLES as DOCTOR_EXAMPLES
from turborank.cli.evaluate import CALIBRATE_EXAMPLES, calibrate, evaluate
from turborank.cli.evaluate import EXAMPLES as EVALUATE_EXAMPLES
from turborank.cli.models import EXAMPLES as MODELS_EXAMPLES
from turborank.cli.models import EXPORT_EXAMPLES, IMPORT_EXAMPLES, export, import_model, models
from turborank.cli.rank import BULK_EXAMPLES, rank
from turborank.cli.rank import EXAMPLES as RANK_EXAMPLES
from turborank.cli.rank import score as bulk_score
from turborank.cli.serve import EXAMPLES as SERVE_EXAMPLES
from turborank.cli.serve import KEYS_EXAMPLES, keys, serve
from turborank.cli.train import (
    RECOVER_EXAMPLES,
    REPORT_EXAMPLES,
    SHIP_EXAMPLES,
    STUDENT_EXAMPLES,
    TRAIN_EXAMPLES,
    recover,
    report,
    ship,
    student,
    train,
)
from turborank.errors import TurborankError

INTERRUPTED = 130  # exit code of a program that Ctrl-C ended
SIGPIPE = 13  # a constant, because the signal module lacks it on some systems
UNWRITTEN = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # errors that only writing can cause


class Command(NamedTuple):
    """One subcommand: its function, examples as (purpose, command line), and how to continue after Ctrl-C."""

    run: Callable[..., Any]
    examples: tuple[tuple[str, str], ...]
    interrupted: str = ""  # printed after Ctrl-C; empty if there is nothing to continue


AGAIN = "the same command continues from what is complete"
UNWRITTEN_YET = "nothing incomplete was written; run it again"

COMMANDS: dict[str, Command] = {
    "rank": Command(rank, RANK_EXAMPLES),
    "score": Command(bulk_score, BULK_EXAMPLES, AGAIN),
    "serve": Command(serve, SERVE_EXAMPLES),
    "keys": Command(keys, KEYS_EXAMPLES),
    "evaluate": Command(evaluate, EVALUATE_EXAMPLES, AGAIN),
    "calibrate": Command(calibrate, CALIBRATE_EXAMPLES, UNWRITTEN_YET),
    "distill lists": Command(lists, LISTS_EXAMPLES, AGAIN),
    "distill score": Command(score, SCORE_EXAMPLES, AGAIN),
    "distill suspects": Command(suspects, SUSPECTS_EXAMPLES, UNWRITTEN_YET),
    "distill student": Command(student, STUDENT_EXAMPLES, UNWRITTEN_YET),
    "distill recover": Command(recover, RECOVER_EXAMPLES, AGAIN),
    "distill train": Command(train, TRAIN_EXAMPLES, AGAIN),
    "distill report": Command(report, REPORT_EXAMPLES),
    "distill ship": Command(ship, SHIP_EXAMPLES, UNWRITTEN_YET),
    "export": Command(export, EXPORT_EXAMPLES, UNWRITTEN_YET),
    "import": Command(import_model, IMPORT_EXAMPLES, UNWRITTEN_YET),
    "bench": Command(bench, BENCH_EXAMPLES),
    "models": Command(models, MODELS_EXAMPLES),
    "doctor": Command(doctor, DOCTOR_EXAMPLES),
}

# Group (the first word of a name of two words) -> its help text.
GROUPS: dict[str, str] = {
    "distill": "Train a small reranker on training lists and teacher scores.",
}

# Module of an optional library -> the extra that installs it.
EXTRAS = {
    **dict.fromkeys(("bm25s", "Stemmer", "ir_measures", "matplotlib", "jinja2"), "eval"),
    "pyarrow": "parquet",
    **dict.fromkeys(("torch", "accelerate", "scipy", "httpx", "tenacity"), "train"),
}


def epilog(examples: Sequence[tuple[str, str]]) -> str:
    """Examples in rich markup for typer's help; each paragraph becomes a line."""
    return "\n\n".join(f"[dim]# {purpose}[/dim]\n{_escaped(line)}" for purpose, line in examples)


def _escaped(text: str) -> str:
    return text.replace("[", "\\[")


def build() -> typer.Typer:
    """The typer application, built from COMMANDS."""
    app = typer.Typer(
        name="turborank",
        help="Rank documents by how well they answer a question, on your own machine.",
        epilog=epilog([("sort files by relevance, best first", 'turborank rank "why is the sky blue?" notes/*.md')]),
        rich_markup_mode="rich",
        add_completion=False,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    groups: dict[str, typer.Typer] = {}
    for name, command in COMMANDS.items():
        group, _, leaf = name.rpartition(" ")
        if group and group not in groups:
            groups[group] = typer.Typer(help=GROUPS[group], rich_markup_mode="rich")
            app.add_typer(groups[group], name=group)
        (groups[group] if group else app).command(leaf, epilog=epilog(command.examples))(_interruptible(command))
    app.callback()(_global)
    return app


def _interruptible(command: Command) -> Callable[..., Any]:
    """The command's function; Ctrl-C ends it with one line on standard error and INTERRUPTED as its exit code."""

    @functools.wraps(command.run)
    def _run(*values: Any, **named: Any) -> Any:
        try:
            return command.run(*values, **named)
        except KeyboardInterrupt:
            how = f"; {command.interrupted}" if command.interrupted else ""
            print(f"turborank: interrupted{how}", file=sys.stderr)
            return INTERRUPTED

    return _run


def _version(wanted: bool) -> None:
    if wanted:
        from turborank import __version__

        print(f"turborank {__version__}")
        raise typer.Exit


def _global(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


def run(arguments: Sequence[str]) -> int:
    """Run the command and return its exit code. Expected errors are printed as one line."""
    try:
        alone = " ".join(arguments) in ("", *GROUPS)
        code = build()(
            args=[*arguments, "--help"] if alone else list(arguments), prog_name="turborank", standalone_mode=False
        )
        sys.stdout.flush()
        return code if isinstance(code, int) else 0
    except TurborankError as error:
        return _fail(str(error))
    except typer.Abort:
        return INTERRUPTED
    except ModuleNotFoundError as error:
        extra = EXTRAS.get((error.name or "").partition(".")[0])
        if extra is None:
            raise
        return _fail(f"expected the library {error.name}, got none of that name; pip install 'turborank[{extra}]'")
    except BrokenPipeError:
        return _unread()
    except OSError as error:
        return _refused(error)
    except SystemExit as leaving:  # click turns a broken pipe into SystemExit
        if isinstance(leaving.__context__, BrokenPipeError):
            return _unread()
        raise
    except Exception as error:  # click's usage errors; checked by method, because typer may bundle its own click
        if not hasattr(error, "format_message"):
            raise
        context = getattr(error, "ctx", None)
        command = context.command_path if context else "turborank"
        return _fail(f"{error.format_message().rstrip('.')}; see {command} --help")


def _unread() -> int:
    """Exit code when the reader of the pipe (such as ``head``) has closed it, as for a program killed by SIGPIPE."""
    _discard_output()
    return 128 + SIGPIPE


def _refused(error: OSError) -> int:
    """Report an OSError: the disk is full, a file cannot be opened."""
    reason = error.strerror or str(error)
    if error.errno in UNWRITTEN:
        _discard_output()
        return _fail(f"cannot write {error.filename or 'the output'}: {reason}")
    return _fail(f"{reason}: {error.filename}" if error.filename else reason)


def _discard_output() -> None:
    """Redirect standard output to the null device, because flushing it at exit would fail again."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


def _fail(message: str) -> int:
    line = " ".join(message.split())
    print(f"turborank: {line}", file=sys.stderr)
    return 2


def main() -> None:
    """Entry point of the installed command."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # closed by the parent process; in this order each gets its own file descriptor
            setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_RDWR), mode, encoding="utf-8"))
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # print a substitute for characters that the terminal's encoding lacks
            stream.reconfigure(errors="replace")
    sys.exit(run(sys.argv[1:]))
