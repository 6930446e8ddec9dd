"""Settings of the server, from command-line options, environment variables and a TOML file.

``--max-documents 500`` · ``TURBORANK_MAX_DOCUMENTS=500`` · ``max_documents = 500``. Options take precedence over the
environment, and the environment over the file. Errors about a limit name its setting.
"""

from __future__ import annotations

import contextlib
import dataclasses
import ipaddress
import os
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_type_hints

from turborank.errors import InputError, UnknownKeyError
from turborank.tokens import LENGTH_POLICIES
from turborank.types import RerankerOptions

PREFIX = "TURBORANK_"
LOG_LEVELS = ("debug", "info", "warning", "error")
MAX_PORT = 65_535
_MIB = 1024 * 1024
HELP = {one.name: one.metadata["help"] for one in dataclasses.fields(RerankerOptions)}


def _setting(default: Any, group: str, help_text: str, *, minimum: float | None = None) -> Any:
    return field(default=default, metadata={"group": group, "help": help_text, "minimum": minimum})


@dataclass(frozen=True, kw_only=True)
class Settings:
    """All settings of `turborank serve`. The field metadata has the text and group for ``--help``."""

    model: tuple[str, ...] = _setting(
        (),
        "Models",
        "A model to serve: a catalog name, a folder, a Hugging Face id, or NAME=any of these. Repeat it for several; "
        "the first is the default and is loaded at start, the others on first use.",
    )
    alias: tuple[str, ...] = _setting(
        (), "Models", "NAME=MODEL: another name for a served model, for example rerank-v3.5=jina-reranker-v1-turbo-en."
    )
    engine: str = _setting("auto", "Models", HELP["engine"])
    precision: str = _setting("auto", "Models", HELP["precision"])
    length: str = _setting(
        "truncate",
        "Models",
        "What to do with pairs longer than max_length: truncate, windows (read all of it) or error.",
    )
    max_length: int = _setting(0, "Models", "Maximum tokens of a pair; 0 means the model's own.", minimum=0)
    threads: int = _setting(0, "Models", "Number of compute threads; 0 means all cores.", minimum=0)
    model_memory: int = _setting(
        4096,
        "Models",
        "Maximum MiB of loaded weights; above it the minimum recently used model is unloaded.",
        minimum=1,
    )
    offline: bool = _setting(False, "Models", "Do not use the network to find models.")
    calibration: tuple[str, ...] = _setting(
        (),
        "Models",
        "NAME=FILE: calibration of a served model, written by `turborank calibrate`; default: its calibration.json.",
    )
    score_cache_entries: int = _setting(
        0,
        "Models",
        "Maximum scores in the cache, keyed by the pair's text, about 150 bytes each; 0: no cache.",
        minimum=0,
    )
    score_cache: str = _setting(
        "", "Models", "SQLite file of the score cache, kept across restarts; by default the cache is in memory."
    )

    host: str = _setting("127.0.0.1", "Server", "Address to listen on; other addresses than loopback require API keys.")
    port: int = _setting(8080, "Server", "Port to listen on.", minimum=0)
    tls_certificate: str = _setting(
        "", "Server", "PEM file of the certificate; with it and --tls-key the server uses HTTPS."
    )
    tls_key: str = _setting("", "Server", "PEM file of the certificate's private key.")
    root_path: str = _setting("", "Server", "Path prefix that a reverse proxy removes, for example /rerank-api.")
    playground: bool = _setting(True, "Server", "Serve the playground page at /.")
    cors_origin: tuple[str, ...] = _setting((), "Server", "Origin whose pages may call this server; repeatable.")
    allowed_host: tuple[str, ...] = _setting(
        (), "Server", "Accepted Host header; repeatable. Default: any; without keys on loopback, only loopback names."
    )
    log_level: str = _setting("info", "Server", "debug, info, warning or error.")
    otlp_endpoint: str = _setting("", "Server", "URL to which OpenTelemetry spans are sent (needs the extra 'otel').")

    keys: str = _setting(
        "", "Keys and rates", "TOML file of API keys, written by `turborank keys new`; read again when it changes."
    )
    requests_per_minute: int = _setting(
        0, "Keys and rates", "Request limit of keys without their own; 0 means no limit.", minimum=0
    )
    tokens_per_minute: int = _setting(
        0, "Keys and rates", "Token limit of keys without their own; 0 means no limit.", minimum=0
    )

    max_body: int = _setting(32 * _MIB, "Limits", "Maximum bytes of a request body.", minimum=1)
    max_values: int = _setting(
        250_000,
        "Limits",
        "Maximum JSON values of a body, fields and nested values included; more are refused before they are decoded.",
        minimum=1,
    )
    body_memory: int = _setting(
        512, "Limits", "Maximum MiB of bodies held at a time; requests beyond are answered with 429.", minimum=1
    )
    max_documents: int = _setting(2048, "Limits", "Maximum documents of a request.", minimum=1)
    max_document_characters: int = _setting(
        1_000_000, "Limits", "Maximum characters of one document, or of the query.", minimum=1
    )
    max_characters: int = _setting(
        8_000_000, "Limits", "Maximum characters of a request; the query counts once.", minimum=1
    )
    max_tokens: int = _setting(
        2_000_000, "Limits", "Maximum tokens of a request; the query counts with each document.", minimum=1
    )
    header_timeout: float = _setting(
        10.0, "Limits", "Maximum seconds for receiving the headers of a request.", minimum=0.1
    )
    body_timeout: float = _setting(30.0, "Limits", "Maximum seconds for receiving the body of a request.", minimum=0.1)
    answer_timeout: float = _setting(
        30.0,
        "Limits",
        "Seconds without progress in sending a response after which the connection is closed.",
        minimum=0.1,
    )
    keep_alive: int = _setting(75, "Limits", "Seconds after which an idle connection is closed.", minimum=1)
    max_connections: int = _setting(
        2048, "Limits", "Maximum concurrent connections; more are answered with 503.", minimum=1
    )

    batch_tokens: int = _setting(
        4096, "Queue", "Maximum tokens of a batch, which may join several requests.", minimum=16
    )
    batch_seconds: float = _setting(
        0.25,
        "Queue",
        "Maximum predicted seconds of a batch, for which a short request may have to wait; 0 means no limit.",
        minimum=0,
    )
    queue_tokens: int = _setting(
        1_000_000, "Queue", "Maximum tokens in the queue; more are answered with 429.", minimum=1
    )
    queue_seconds: float = _setting(
        5.0, "Queue", "Maximum expected waiting time in seconds; above it the answer is 429 at once.", minimum=0.01
    )
    timeout: float = _setting(60.0, "Queue", "Seconds after which a request is answered with 504.", minimum=0.01)
    drain: float = _setting(
        0.0,
        "Queue",
        "Seconds between SIGTERM and refusing connections, so that load balancers can deregister.",
        minimum=0,
    )

    def __post_init__(self) -> None:
        faults = [fault for name in FIELDS for fault in _faults(name, getattr(self, name))]
        if bool(self.tls_certificate) != bool(self.tls_key):
            faults.append("expected tls_certificate and tls_key together, got one of them")
        if faults:
            raise InputError("; ".join(faults))

    @property
    def prefix(self) -> str:
        """``root_path`` with a leading and without a trailing slash; empty if unset."""
        return f"/{self.root_path.strip('/')}".rstrip("/")

    @property
    def loopback(self) -> bool:
        """Whether the server listens on a loopback address only."""
        return is_loopback(self.host)


FIELDS = {entry.name: entry for entry in dataclasses.fields(Settings)}
TYPES: dict[str, Any] = get_type_hints(Settings)
_CHOICES = {"length": LENGTH_POLICIES, "log_level": LOG_LEVELS}


def _faults(name: str, value: Any) -> list[str]:
    minimum = FIELDS[name].metadata["minimum"]
    if minimum is not None and not value >= minimum:  # also false for NaN
        return [f"expected {name} to be at least {minimum}, got {value}"]
    if name == "port" and value > MAX_PORT:
        return [f"expected port to be at most {MAX_PORT}, got {value}"]
    if name in _CHOICES and value not in _CHOICES[name]:
        return [UnknownKeyError(name, value, _CHOICES[name]).message]
    if name in ("alias", "calibration"):
        what = "NAME=MODEL" if name == "alias" else "NAME=FILE"
        return [f"expected {name} to be {what}, got {one!r}" for one in value if not all(one.partition("="))]
    return []


def is_loopback(host: str) -> bool:
    """Whether ``host`` is a loopback address or "localhost"."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


def load(
    given: Mapping[str, Any] | None = None, *, environment: Mapping[str, str] | None = None, path: str | None = None
) -> Settings:
    """Settings from options (``given``; None means unset), then the environment, then the TOML file.

    Raises InputError, with the setting and its source, for an unknown setting or an invalid value.
    """
    environment = os.environ if environment is None else environment
    path = path or environment.get(PREFIX + "CONFIG") or None
    values = _from_file(Path(path)) if path else {}
    for name in FIELDS:
        text = environment.get(PREFIX + name.upper())
        if text:
            values[name] = _converted(name, text, f"the environment variable {PREFIX}{name.upper()}")
    for name, value in (given or {}).items():
        if value is not None:
            values[name] = tuple(value) if isinstance(value, list) else value
    return Settings(**values)


def _from_file(path: Path) -> dict[str, Any]:
    try:
        table = tomllib.loads(path.read_text("utf-8-sig"))
    except (OSError, ValueError) as error:
        raise InputError(f"expected a TOML file of settings at {path}, got: {error}") from None
    for name in table:
        if name not in FIELDS:
            raise UnknownKeyError(f"a setting in {path}", name, FIELDS)
    return {name: _converted(name, value, str(path)) for name, value in table.items()}


def _converted(name: str, value: Any, source: str) -> Any:
    """``value`` converted to the setting's type; strings from the environment are parsed."""
    wanted = TYPES[name]
    if wanted not in (str, int, float, bool):  # a tuple of strings
        items = [item.strip() for item in value.split(",")] if isinstance(value, str) else value
        if isinstance(items, list) and all(isinstance(item, str) for item in items):
            return tuple(item for item in items if item)
        raise InputError(f"expected {name} in {source} to be a list of strings, got {value!r}")
    if wanted is bool and isinstance(value, str):
        value = {"1": True, "true": True, "yes": True, "0": False, "false": False, "no": False}.get(
            value.lower(), value
        )
    elif wanted in (int, float) and isinstance(value, str):
        with contextlib.suppress(ValueError):
            value = wanted(value)
    if wanted is float and type(value) is int:
        value = float(value)
    if type(value) is not wanted:
        raise InputError(f"expected {name} in {source} to be of type {wanted.__name__}, got {value!r}")
    return value
