"""Settings: one name each, whether it comes as a flag, from the environment or from a TOML file.

``--max-documents 500`` · ``TURBORANK_MAX_DOCUMENTS=500`` · ``max_documents = 500``; flags win over the environment,
which wins over the file. An error about a limit names its setting.
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

PREFIX = "TURBORANK_"
LOG_LEVELS = ("debug", "info", "warning", "error")
MOST_PORT = 65_535
_MIB = 1024 * 1024


def _setting(default: Any, group: str, help_text: str, *, least: float | None = None) -> Any:
    return field(default=default, metadata={"group": group, "help": help_text, "least": least})


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Everything `turborank serve` can be told. Field metadata is what ``--help`` prints."""

    model: tuple[str, ...] = _setting(
        (),
        "Models",
        "A model to serve: a catalog name, a folder, a Hugging Face id, or NAME=any of these. Repeat it for several; "
        "the first is the default and is loaded at start, the others when first asked for.",
    )
    alias: tuple[str, ...] = _setting(
        (), "Models", "NAME=MODEL: another name clients may ask for, say rerank-v3.5=jina-reranker-v1-turbo-en."
    )
    engine: str = _setting("auto", "Models", "auto, native, torch or reference.")
    precision: str = _setting("auto", "Models", "auto, or one that the engine has: int8, bf16, fp32.")
    length: str = _setting("truncate", "Models", "Pairs longer than the model reads: truncate, windows or error.")
    max_length: int = _setting(0, "Models", "Tokens read of a pair; 0 means what the model was made for.", least=0)
    threads: int = _setting(0, "Models", "Threads to compute with; 0 means all cores.", least=0)
    model_memory: int = _setting(
        4096, "Models", "MiB of weights kept loaded; beyond it the model unused longest is let go.", least=1
    )
    offline: bool = _setting(False, "Models", "Never touch the network.")
    calibration: tuple[str, ...] = _setting(
        (), "Models", "NAME=FILE: what `turborank calibrate` made for a served model; else its calibration.json."
    )
    score_cache_entries: int = _setting(
        0, "Models", "Scores kept by content, so that a pair is not read twice, about 150 bytes each; 0: none.", least=0
    )
    score_cache: str = _setting(
        "", "Models", "SQLite file of the kept scores, which outlives the server; by default they are in memory."
    )

    host: str = _setting("127.0.0.1", "Server", "Address to listen on; anything but loopback needs keys.")
    port: int = _setting(8080, "Server", "Port to listen on.", least=0)
    tls_certificate: str = _setting("", "Server", "PEM file; with it and --tls-key the server speaks HTTPS.")
    tls_key: str = _setting("", "Server", "PEM file of the certificate's private key.")
    root_path: str = _setting("", "Server", "Path prefix a reverse proxy strips, say /rerank-api.")
    playground: bool = _setting(True, "Server", "Serve the playground page at /.")
    cors_origin: tuple[str, ...] = _setting(
        (), "Server", "An origin whose pages may call this server; may be repeated."
    )
    allowed_host: tuple[str, ...] = _setting(
        (), "Server", "A Host header to answer; by default any, but only loopback names when there are no keys."
    )
    log_level: str = _setting("info", "Server", "debug, info, warning or error.")
    otlp_endpoint: str = _setting("", "Server", "Where to send OpenTelemetry spans (needs the extra 'otel').")

    keys: str = _setting(
        "", "Keys and rates", "TOML file of API keys, made by `turborank keys new`; read again when changed."
    )
    requests_per_minute: int = _setting(0, "Keys and rates", "For keys without their own; 0 means no limit.", least=0)
    tokens_per_minute: int = _setting(0, "Keys and rates", "For keys without their own; 0 means no limit.", least=0)

    max_body: int = _setting(32 * _MIB, "Limits", "Bytes of a request body.", least=1)
    max_documents: int = _setting(2048, "Limits", "Documents of a request.", least=1)
    max_document_characters: int = _setting(
        1_000_000, "Limits", "Characters of one document, or of the query.", least=1
    )
    max_characters: int = _setting(8_000_000, "Limits", "Characters of a request, the query counted once.", least=1)
    max_tokens: int = _setting(2_000_000, "Limits", "Tokens computed for a request.", least=1)
    header_timeout: float = _setting(10.0, "Limits", "Seconds a client may take to send its headers.", least=0.1)
    body_timeout: float = _setting(30.0, "Limits", "Seconds a client may take to send its body.", least=0.1)
    answer_timeout: float = _setting(30.0, "Limits", "Seconds an answer may lie unread by its client.", least=0.1)
    keep_alive: int = _setting(75, "Limits", "Seconds an idle connection is kept.", least=1)
    max_connections: int = _setting(2048, "Limits", "Connections at a time; beyond it the answer is 503.", least=1)

    batch_tokens: int = _setting(4096, "Queue", "Tokens computed at a time, of any requests.", least=16)
    queue_tokens: int = _setting(1_000_000, "Queue", "Tokens that may wait; beyond it the answer is 429.", least=1)
    queue_seconds: float = _setting(
        5.0, "Queue", "Seconds a request may expect to wait; beyond it the answer is 429 at once.", least=0.01
    )
    timeout: float = _setting(60.0, "Queue", "Seconds until an unanswered request gets 504.", least=0.01)
    drain: float = _setting(
        0.0, "Queue", "Seconds between SIGTERM and closing the door, so that load balancers can look away.", least=0
    )

    def __post_init__(self) -> None:
        faults = [fault for name in FIELDS for fault in _faults(name, getattr(self, name))]
        if bool(self.tls_certificate) != bool(self.tls_key):
            faults.append("expected tls_certificate and tls_key together, got one of them")
        if faults:
            raise InputError("; ".join(faults))

    @property
    def prefix(self) -> str:
        """``root_path`` with a slash before it and none behind, or nothing."""
        return f"/{self.root_path.strip('/')}".rstrip("/")

    @property
    def loopback(self) -> bool:
        """Whether only this machine can connect."""
        return is_loopback(self.host)


FIELDS = {entry.name: entry for entry in dataclasses.fields(Settings)}
TYPES: dict[str, Any] = get_type_hints(Settings)
_CHOICES = {"length": LENGTH_POLICIES, "log_level": LOG_LEVELS}


def _faults(name: str, value: Any) -> list[str]:
    least = FIELDS[name].metadata["least"]
    if least is not None and not value >= least:  # also false for NaN
        return [f"expected {name} to be at least {least}, got {value}"]
    if name == "port" and value > MOST_PORT:
        return [f"expected port to be at most {MOST_PORT}, got {value}"]
    if name in _CHOICES and value not in _CHOICES[name]:
        return [UnknownKeyError(name, value, _CHOICES[name]).message]
    if name in ("alias", "calibration"):
        what = "NAME=MODEL" if name == "alias" else "NAME=FILE"
        return [f"expected {name} to be {what}, got {one!r}" for one in value if not all(one.partition("="))]
    return []


def is_loopback(host: str) -> bool:
    """Whether an address or name is this machine's own."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


def load(
    given: Mapping[str, Any] | None = None, *, environment: Mapping[str, str] | None = None, path: str | None = None
) -> Settings:
    """Settings from flags (``given``; None values are absent), then the environment, then the TOML file.

    Raises InputError naming a setting that does not exist or does not fit, and where it came from.
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
        with path.open("rb") as file:
            table = tomllib.load(file)
    except (OSError, ValueError) as error:
        raise InputError(f"expected a TOML file of settings at {path}, got: {error}") from None
    for name in table:
        if name not in FIELDS:
            raise UnknownKeyError(f"a setting in {path}", name, FIELDS)
    return {name: _converted(name, value, str(path)) for name, value in table.items()}


def _converted(name: str, value: Any, source: str) -> Any:
    """``value`` as the setting's type; text from the environment is parsed."""
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
