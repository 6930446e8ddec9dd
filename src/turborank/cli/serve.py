"""``turborank serve`` and ``turborank keys``: the HTTP server and its API keys."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from turborank.errors import InputError

if TYPE_CHECKING:
    from turborank.serve.config import Settings

EXAMPLES = (
    ("the embedded model, for this machine only", "turborank serve"),
    (
        "for other machines, with API keys",
        "turborank keys new search-team && turborank serve --host 0.0.0.0 --keys keys.toml",
    ),
    (
        "two models, and an alias for a client with a fixed model name",
        "turborank serve --model jina-reranker-v1-turbo-en --model mine=./my-model --alias rerank-v3.5=mine",
    ),
    ("settings from the environment", "TURBORANK_PORT=9000 TURBORANK_MAX_DOCUMENTS=500 turborank serve"),
    ("settings from a file", "turborank serve --config turborank.toml"),
)
KEYS_EXAMPLES = (
    ("a key for all models", "turborank keys new search-team"),
    ("a key for one model, 600 requests per minute", "turborank keys new trial --model mine --requests-per-minute 600"),
)
DEFAULT_KEYS = "keys.toml"


def _serve(config: str | None, given: Mapping[str, Any]) -> None:
    try:
        from turborank.serve import app, server
    except ModuleNotFoundError as error:
        raise InputError(
            f"expected the libraries of the service, got none of {error.name}", hint="pip install 'turborank[serve]'"
        ) from None
    from turborank.serve import config as configuration

    settings: Settings = configuration.load({name: value for name, value in given.items() if value != []}, path=config)
    server.run(settings, app.build)


def _with_options(run: Callable[[str | None, Mapping[str, Any]], None]) -> Callable[..., None]:
    """A command with one option for each setting; name, type, help and group come from the settings table."""
    from turborank.serve.config import FIELDS, TYPES

    def _command(config: Any = None, **given: Any) -> None:
        run(config, given)

    option = typer.Option(help="TOML file of settings, named as the options with underscores.")
    parameters = [_keyword("config", Annotated[str | None, option])]
    for name, field in FIELDS.items():
        flag = "--" + name.replace("_", "-")
        kind, shown = TYPES[name], str(field.default)
        if kind is bool:
            kind, flag = bool | None, f"{flag}/--no-{flag[2:]}"
            shown = "yes" if field.default else "no"
        elif kind not in (str, int, float):
            kind, shown = list[str] | None, "none"
        else:
            kind = kind | None
        option = typer.Option(
            flag, help=field.metadata["help"], show_default=shown or "none", rich_help_panel=field.metadata["group"]
        )
        parameters.append(_keyword(name, Annotated[kind, option]))
    _command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    _command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    _command.__doc__ = """Serve rerankers over HTTP, compatible with existing rerank clients.

    Clients of Jina, Cohere, Voyage, vLLM, Infinity and text-embeddings-inference work with this address as base URL.
    Open the address in a browser to try it. Every option can also be set in the environment (TURBORANK_MAX_DOCUMENTS)
    and in a TOML file (max_documents). Options take precedence over the environment, and it over the file.
    """
    return _command


def _keyword(name: str, annotation: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)


serve = _with_options(_serve)


def keys(
    action: Annotated[str, typer.Argument(help="The action: new.")],
    name: Annotated[str, typer.Argument(help="Name of the key, for logs and rate limits.")],
    file: Annotated[Path, typer.Option(help="Key file; created if it does not exist.")] = Path(DEFAULT_KEYS),
    model: Annotated[
        list[str] | None, typer.Option(help="Model that the key may use; repeatable.", show_default="all")
    ] = None,
    requests_per_minute: Annotated[int, typer.Option(min=0, help="Request limit; 0: the server's setting.")] = 0,
    tokens_per_minute: Annotated[int, typer.Option(min=0, help="Token limit; 0: the server's setting.")] = 0,
) -> None:
    """Create an API key and print it once. The file stores only its hash; a running server reads the file again."""
    from turborank.serve import auth as ring

    if action != "new":
        raise InputError(
            f"expected the action new, got {action!r}", hint="to revoke a key, delete its entry in the file"
        )
    secret = ring.new(file, name, models=tuple(model or ()), requests=requests_per_minute, tokens=tokens_per_minute)
    print(secret)
    typer.echo(f"API key {name!r}: copy it now, because {file} stores only its hash.", err=True)
