"""The ASGI application: routes, and the way of a request from bytes to bytes."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route, Router
from starlette.types import ASGIApp

from turborank.serve import dialects, limits, pages
from turborank.serve.dialects import DIALECTS
from turborank.serve.http import Front, decode_as, decode_fields, read_body, respond, unless_gone
from turborank.serve.keys import Key
from turborank.serve.problems import Problem
from turborank.serve.service import Service
from turborank.serve.wire import Answer, Ask

LARGE = 128 * 1024  # bytes of a body that is decoded off the event loop

Endpoint = Callable[[Request], Awaitable[Response]]


def build(service: Service, *, on_failure: Callable[[BaseException], None] | None = None) -> ASGIApp:
    """The application around a service. ``on_failure`` is told when the first model cannot be loaded."""

    @asynccontextmanager
    async def lifespan(app: Any) -> AsyncIterator[None]:
        async def load() -> None:
            try:
                await service.start()
            except BaseException as error:
                if on_failure:
                    on_failure(error)

        loading = asyncio.create_task(load())  # the door is open while it loads; /ready says when
        yield
        loading.cancel()
        service.close()

    routes = [
        Route(path, rank_endpoint(service, names), methods=["POST"]) for path, names in dialects.by_path().items()
    ]
    routes += [Route(path, endpoint, methods=["GET"]) for path, endpoint in pages.routes(service).items()]
    app: ASGIApp = Front(
        Router(routes, redirect_slashes=False, lifespan=lifespan),
        service.settings,
        open_door=not service.ring.required,
        count=lambda dialect, status: service.metrics.requests.labels(dialect, str(status)).inc(),
    )
    if service.settings.cors_origin:  # outermost: a page is to be able to read refusals too
        origins = list(service.settings.cors_origin)
        app = CORSMiddleware(app, allow_origins=origins, allow_methods=["GET", "POST"], allow_headers=["*"])
    return app


def rank_endpoint(service: Service, names: list[str]) -> Endpoint:
    """One path, and the dialects spoken there."""

    async def endpoint(request: Request) -> Response:
        record = request.state.record
        record["dialect"] = names[-1]
        record["path"] = request.scope["route"].path
        key: Key | None = None
        try:
            with service.tracer.request(request.headers) as span:
                key = limits.authorise(service.ring, request.headers.raw)
                record["key"] = key.name
                service.admit_request(key)
                ask = await _read(service, request, names, record)
                answering = asyncio.create_task(service.answer(ask, key, record["request_id"]))
                answer: Answer = await unless_gone(request, answering)
                _describe(record, span, ask, answer)
                row = DIALECTS[record["dialect"]]
                headers = {**_headers(record["dialect"], ask, answer, record), **service.rates.headers(key)}
                return respond(row.encode(ask, answer), 200, headers)
        except Problem as problem:
            record["code"] = problem.code
            status, body = DIALECTS[record["dialect"]].error(problem, record["request_id"])
            return respond(body, status, {**problem.headers, **(service.rates.headers(key) if key else {})})

    return endpoint


async def _read(service: Service, request: Request, names: list[str], record: dict[str, Any]) -> Ask:
    """The request as an Ask; ``record`` learns which dialect it is in."""
    started = time.monotonic()
    body = await read_body(request, service.settings)
    received = time.monotonic()

    def decode() -> Ask:
        text, present = decode_fields(body)
        record["dialect"] = name = dialects.recognise(names, present)
        row = DIALECTS[name]
        ask = row.decode(decode_as(text, row.request))
        ask.warnings += [
            f"unknown field {field[:60]!r} was ignored" for field in dialects.unknown_fields(row, present)[:20]
        ]
        if text is not body:
            ask.warnings.append("lone surrogates were replaced with U+FFFD")
        return ask

    if len(body) > LARGE:
        ask = await asyncio.get_running_loop().run_in_executor(service.pool, decode)
    else:
        ask = decode()
    record["bytes"] = len(body)
    record["receive_ms"] = round((received - started) * 1000, 3)
    record["decode_ms"] = round((time.monotonic() - received) * 1000, 3)
    return ask


def _describe(record: dict[str, Any], span: Any, ask: Ask, answer: Answer) -> None:
    """What the log and the trace say about a request: counts and times, never text."""
    record["model"] = answer.model
    record["documents"] = len(ask.pairs)
    record["tokens"] = answer.tokens
    record["truncated_tokens"] = answer.truncated
    record.update({f"{stage}_ms": round(seconds * 1000, 3) for stage, seconds in answer.timings.items()})
    if span is not None:
        for name in ("dialect", "model", "documents", "tokens", "truncated_tokens", "request_id"):
            span.set_attribute(f"turborank.{name}", record[name])


def _headers(dialect: str, ask: Ask, answer: Answer, record: dict[str, Any]) -> dict[str, str]:
    """The truth about length, for dialects whose bodies have no room for it; and TEI's own headers."""
    headers = {"x-turborank-tokens": str(answer.tokens), "x-turborank-truncated-tokens": str(answer.truncated)}
    if dialect == "tei":
        times = {stage: str(round(seconds * 1000)) for stage, seconds in answer.timings.items()}
        headers |= {
            "x-compute-type": "cpu",
            "x-compute-time": times["compute"],
            "x-compute-characters": str(sum(len(pair.query) + len(pair.document) for pair in ask.pairs)),
            "x-compute-tokens": str(answer.tokens),
            "x-total-time": str(round(sum(answer.timings.values()) * 1000)),
            "x-tokenization-time": times["tokenise"],
            "x-queue-time": times["queue"],
            "x-inference-time": times["compute"],
        }
    return headers
