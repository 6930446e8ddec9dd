"""HTTP functions that do not depend on ranking: body limits, JSON, and the middleware around every request."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
import secrets
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import msgspec
import numpy as np
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from turborank.serve import telemetry
from turborank.serve.config import Settings, is_loopback
from turborank.serve.dialects import error_superset
from turborank.serve.wire import Problem

JSON = "application/json"
CLIENT_GONE = 499  # the client disconnected; only in logs and metrics
_REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
# Half a pair of \\u escapes: a high one that no low one follows, or a low one that follows no high one.
_LONE_SURROGATE = re.compile(
    rb"\\u[dD](?:[89abAB][0-9a-fA-F]{2}(?!\\u[dD][c-fC-F][0-9a-fA-F]{2})"
    rb"|(?<!\\u[dD][89abAB][0-9a-fA-F]{2}\\u[dD])[c-fC-F][0-9a-fA-F]{2})"
)
_REPLACEMENT = b"\\ufffd"  # as long as what it replaces
_STRUCTURE = b",[{"  # one of them stands before every value but the first
_NO_STRUCTURE = bytes(set(range(256)) - set(b'"' + _STRUCTURE))
_PIECE = 1 << 18  # bytes of a body that are examined at a time
_MISSING = re.compile(r"missing required field `(\w+)`")
_PORT = re.compile(r":\d*$")  # of a Host header
_SLASHES = re.compile("/{2,}")
_SECURITY = {"x-content-type-options": "nosniff", "referrer-policy": "no-referrer", "cache-control": "no-store"}
_PLAIN = {
    404: ("not_found", "expected one of the paths that /openapi.json lists, got another"),
    405: (
        "method_not_allowed",
        "expected another method on this path, see /openapi.json; rankings are asked for with POST",
    ),
}


def respond(body: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """A JSON response; None gives an empty body."""
    content = b"" if body is None else msgspec.json.encode(body)
    return Response(content, status, headers=headers, media_type=JSON)


class BodyMemory:
    """Bytes of the request bodies that the server holds, from their first byte to their answer; at most ``limit``."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.held = 0

    @contextlib.contextmanager
    def hold(self) -> Iterator[Callable[[int], None]]:
        """A function that counts bytes, until the block ends. It raises Problem 429 when the limit is reached."""
        taken = 0

        def take(size: int) -> None:
            nonlocal taken
            if self.held + size > self.limit and self.held > taken:  # one body alone is bounded by max_body
                message = f"expected bodies of at most {self.limit >> 20} MiB at a time (body_memory), got more; retry"
                raise Problem(429, "overloaded", message, retry_after=1.0)
            taken += size
            self.held += size

        try:
            yield take
        finally:
            self.held -= taken


async def read_body(request: Request, settings: Settings, take: Callable[[int], None] = lambda size: None) -> bytes:
    """The request body in bytes; ``take`` is called with the size of each part that arrives.

    Raises Problem 415 unless it is uncompressed JSON, 413 above ``max_body`` and 408 after ``body_timeout``.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != JSON and not kind.endswith("+json"):
        message = f"expected the header 'Content-Type: {JSON}', got {kind[:100] or 'none'!r}"
        raise Problem(415, "unsupported_media_type", message)
    if request.headers.get("content-encoding", "identity").lower() != "identity":
        raise Problem(415, "unsupported_media_type", "expected a body without Content-Encoding; send it uncompressed")
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and len(declared) < 20:
        _check_size(int(declared), settings.max_body)
    body = bytearray()
    try:
        async with asyncio.timeout(settings.body_timeout):
            async for part in request.stream():
                _check_size(len(body) + len(part), settings.max_body)
                take(len(part))
                body += part
    except TimeoutError:
        message = f"expected the body within {settings.body_timeout:g} s (body_timeout), got {len(body)} bytes of it"
        raise Problem(408, "body_timeout", message) from None
    return bytes(body)


def _check_size(size: int, limit: int) -> None:
    if size > limit:
        message = f"expected a body of at most {limit} bytes (max_body), got {size} or more; send less at a time"
        raise Problem(413, "too_large", message)


def check_values(body: bytes, limit: int) -> None:
    """Raise Problem 413 for a body of more than ``limit`` JSON values, before any of them becomes an object.

    A value of two bytes takes about a hundred as an object of Python. Only quotation marks, commas and opening brackets
    are looked at, one piece of the body at a time; nested and empty values count, too.
    """
    if sum(map(body.count, (b",", b"[", b"{"))) <= limit:
        return  # even if no comma of the body is text
    count, inside, escape = 0, 0, b""
    for start in range(0, len(body), _PIECE):
        piece = escape + body[start : start + _PIECE]
        odd = (len(piece) - len(piece.rstrip(b"\\"))) % 2  # then the next piece begins with an escaped character
        escape = b"\\" * odd
        piece = piece[: len(piece) - odd].replace(b"\\\\", b"").replace(b'\\"', b"")
        marks = np.frombuffer(piece.translate(None, _NO_STRUCTURE), np.uint8)
        quotes = marks == ord('"')
        in_text = (np.cumsum(quotes, dtype=np.int32) + inside) & 1
        count += int(np.count_nonzero(~quotes & (in_text == 0)))
        inside = (inside + int(np.count_nonzero(quotes))) & 1
    if count > limit:
        message = f"expected at most {limit} JSON values (max_values), got {count} in the body; send fewer at a time"
        raise Problem(413, "too_large", message)


def decode_fields(body: bytes) -> tuple[bytes, dict[str, msgspec.Raw]]:
    """(body with lone surrogates replaced by U+FFFD, its top-level fields with undecoded values).

    Raises Problem 400 when the body is not JSON, and 422 when it is not an object.
    """
    try:
        try:
            return body, msgspec.json.decode(body, type=dict[str, msgspec.Raw])
        except msgspec.ValidationError:
            raise
        except msgspec.DecodeError:
            replaced = _without_lone_surrogates(body)
            if replaced == body:
                raise
            return replaced, msgspec.json.decode(replaced, type=dict[str, msgspec.Raw])
    except msgspec.ValidationError as error:
        raise problem_of(error) from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise problem_of(error) from None


def _without_lone_surrogates(body: bytes) -> bytes:
    """The body with U+FFFD for each lone surrogate; edited in place, because there may be millions."""
    replaced = bytearray(body)
    for found in _LONE_SURROGATE.finditer(body.replace(b"\\\\", b"\0\0")):  # an escaped backslash begins no escape
        replaced[found.start() : found.end()] = _REPLACEMENT
    return bytes(replaced)


def decode_as(body: bytes, kind: type[Any]) -> Any:
    """The body decoded as ``kind``; numbers and booleans may be strings. Raises Problem with the path of the error."""
    try:
        return msgspec.json.decode(body, type=kind, strict=False)
    except (msgspec.ValidationError, msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise problem_of(error) from None


def problem_of(error: Exception) -> Problem:
    """A decoding error as Problem: 422 with the path of the field, or 400 when the body is not JSON."""
    if isinstance(error, msgspec.ValidationError):
        what, _, where = str(error).partition(" - at `")
        path = where.rstrip("`") or "$"
        message = f"{what[:1].lower()}{what[1:]} at {path}".replace("`", "")
        missing = _MISSING.search(what)
        place = f"{path}.{missing[1]}" if missing else path
        return Problem(422, "invalid_input", message, param=place.removeprefix("$").removeprefix(".") or None)
    if isinstance(error, RecursionError):
        return Problem(400, "invalid_json", "expected a JSON object of documents, got one nested too deeply")
    if isinstance(error, UnicodeDecodeError):
        return Problem(400, "invalid_json", f"expected UTF-8, got the byte 0x{error.object[error.start]:02x}")
    return Problem(400, "invalid_json", f"expected a JSON object, got something else: {error}")


async def unless_gone(request: Request, work: asyncio.Task[Any]) -> Any:
    """The result of ``work``. Cancels it and raises ClientDisconnect when the client disconnects first."""

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    watch = asyncio.create_task(gone())
    try:
        await asyncio.wait((work, watch), return_when=asyncio.FIRST_COMPLETED)
        if not work.done():
            raise ClientDisconnect
        return await work
    finally:
        for task in (work, watch):
            task.cancel()
        await asyncio.gather(work, watch, return_exceptions=True)


class Front:
    """Middleware of every request: request id, Host check, log line and counters; exceptions become error responses."""

    def __init__(self, app: ASGIApp, settings: Settings, *, open_door: bool, count: Callable[[str, int], None]) -> None:
        self._app = app
        self._hosts = {_PORT.sub("", host).lower() for host in settings.allowed_host}
        # Without keys, checking the Host header prevents DNS rebinding: a page of another site cannot reach the server.
        self._loopback_only = open_door and settings.loopback and not self._hosts
        self._count = count

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request = Request(scope, receive)
        given = request.headers.get("x-request-id", "")
        request_id = given if _REQUEST_ID.fullmatch(given) else f"req_{secrets.token_hex(12)}"
        record: dict[str, Any] = {"request_id": request_id, "method": scope["method"][:16]}
        scope["app"] = self  # makes the router raise 404 and 405 instead of answering in plain text
        scope["path"] = _SLASHES.sub("/", scope["path"]).rstrip("/") or "/"  # base URLs may end in slashes
        scope["state"] = {**scope.get("state", {}), "record": record}
        started = time.monotonic()
        begun = False

        async def sending(message: Message) -> None:
            nonlocal begun
            if message["type"] == "http.response.start":
                begun = True
                record["status"] = record.get("status", message["status"])
                milliseconds = str(round((time.monotonic() - started) * 1000))
                extra = {"x-request-id": request_id, "openai-processing-ms": milliseconds, **_SECURITY}
                present = {name for name, _ in message["headers"]}
                added = [
                    (name.encode(), value.encode()) for name, value in extra.items() if name.encode() not in present
                ]
                message["headers"] = [*message["headers"], *added]
            await send(message)

        try:
            self._check_host(request)
            await self._app(scope, receive, sending)
        except ClientDisconnect:
            record["status"] = CLIENT_GONE
        except Exception as error:
            answer = self._failure(error, record)
            if not begun:
                await answer(scope, receive, sending)
        finally:
            self._finish(record, time.monotonic() - started)

    def _check_host(self, request: Request) -> None:
        host = _PORT.sub("", request.headers.get("host", "")).lower()
        if (self._loopback_only and not is_loopback(host)) or (self._hosts and host not in self._hosts):
            message = f"expected a Host that this server answers to, got {host[:100]!r}; add it with --allowed-host"
            raise Problem(421, "wrong_host", message)

    def _failure(self, error: Exception, record: dict[str, Any]) -> Response:
        headers: Mapping[str, str] = {}
        if isinstance(error, HTTPException):
            headers = error.headers or {}
            code, message = _PLAIN.get(error.status_code, ("http_error", str(error.detail)))
            error = Problem(error.status_code, code, message)
        if not isinstance(error, Problem):
            telemetry.event("failed", {"request_id": record["request_id"]}, level=logging.ERROR, error=error)
            error = Problem(
                500,
                "internal_error",
                "expected an answer, got an error in the server; see its log under this request id",
            )
        record["code"] = error.code
        status, body = error_superset(error, record["request_id"])
        return respond(body, status, {**headers, **error.headers})

    def _finish(self, record: dict[str, Any], seconds: float) -> None:
        status = record.setdefault("status", CLIENT_GONE)
        self._count(record.get("dialect", "none"), status)
        record["total_ms"] = round(seconds * 1000, 3)
        quiet = record.get("quiet") and status < 400
        telemetry.event("request", record, level=logging.DEBUG if quiet else logging.INFO)
