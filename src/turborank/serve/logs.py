"""Logs: one JSON object a line. Never a query, a document, a key, a header or a path as the client wrote it."""

from __future__ import annotations

import logging
import sys
import time
from typing import Any, TextIO

import msgspec

NAME = "turborank.serve"


class JsonFormatter(logging.Formatter):
    """A record as a JSON object: time, level, event, and the record's ``fields``."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "event": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return msgspec.json.encode(line, enc_hook=str).decode()


def set_up(level: str, stream: TextIO | None = None) -> None:
    """Send our events and uvicorn's to standard error as JSON."""
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(JsonFormatter())
    for name in (NAME, "uvicorn", "uvicorn.error"):
        logger = logging.getLogger(name)
        logger.handlers = [handler] if name != "uvicorn.error" else []
        logger.propagate = name == "uvicorn.error"
        logger.setLevel(level.upper())
    access = logging.getLogger("uvicorn.access")  # it would print paths as they came; we log every request ourselves
    access.handlers, access.propagate = [], False


def event(name: str, fields: dict[str, Any], *, level: int = logging.INFO, error: BaseException | None = None) -> None:
    """Log ``name`` with ``fields``."""
    logging.getLogger(NAME).log(level, name, extra={"fields": fields}, exc_info=error)
