"""The ASGI application: routes and endpoints."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import re
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from importlib import metadata
from importlib.resources import files
from typing import Any

import msgspec
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route, Router
from starlette.types import ASGIApp

from turborank.serve import auth, dialects
from turborank.serve.auth import Key
from turborank.serve.dialects import DIALECTS
from turborank.serve.http import (
    JSON,
    BodyMemory,
    Front,
    check_values,
    decode_as,
    decode_fields,
    read_body,
    respond,
    unless_gone,
)
from turborank.serve.models import ServedModel
from turborank.serve.service import LOADING_RETRY, Service
from turborank.serve.telemetry import CONTENT_TYPE
from turborank.serve.wire import Answer, Ask, Problem

ERRORS = {
    "400": "The body is not JSON, or a pair is too long and the length policy is 'error'.",
    "401": "No valid API key.",
    "403": "The key may not use this model.",
    "404": "Unknown model.",
    "408": "The body was not received in time.",
    "413": "More bytes, documents, characters or tokens than a setting allows; the message names the setting.",
    "415": "The body is not uncompressed application/json.",
    "421": "The server does not accept this Host header.",
    "422": "A field is missing or invalid; the message has its path.",
    "424": "The engine failed (the status that text-embeddings-inference uses).",
    "429": "The queue is full, or the key's rate limit is reached; see Retry-After.",
    "500": "The engine failed.",
    "503": "The model is loading, or the server is shutting down; see Retry-After.",
    "504": "The request was not answered in time.",
}
_REFERENCE = "#/components/schemas/{name}"
_ERROR_SCHEMA = {
    "description": "An error in the dialect of the request.",
    "anyOf": [
        {"type": "object", "properties": {"error": {}}, "required": ["error"]},
        {"type": "object", "properties": {"detail": {}}, "required": ["detail"]},
    ],
}
_GET = {
    "/v1/models": ("The served models.", "200", "401"),
    "/v1/models/{model}": ("One model.", "200", "401", "403", "404"),
    "/info": ("The default model, with the fields of text-embeddings-inference.", "200", "401"),
    "/health": ("Liveness: the process is running.", "200"),
    "/ready": ("Readiness: the server answers requests.", "200", "503"),
}


def version() -> str:
    """The installed version; "source" when the package is not installed."""
    try:
        return metadata.version("turborank")
    except metadata.PackageNotFoundError:
        return "source"


def openapi_document(*, keyed: bool, root_path: str = "") -> dict[str, Any]:
    """The OpenAPI 3.1 document; ``keyed`` adds bearer authentication."""
    kinds = [kind for row in DIALECTS.values() for kind in (row.request, row.response)]
    schemas, components = msgspec.json.schema_components(kinds, ref_template=_REFERENCE)
    by_row = {name: (schemas[2 * place], schemas[2 * place + 1]) for place, name in enumerate(DIALECTS)}
    paths: dict[str, Any] = {path: {"post": _post(path, names, by_row)} for path, names in dialects.by_path().items()}
    paths |= {path: {"get": _get(path, *about)} for path, about in _GET.items()}
    described: dict[str, Any] = {
        "openapi": "3.1.0",
        "info": {
            "title": "turborank",
            "version": version(),
            "summary": "Rerank documents with a cross-encoder; each path has the format of an existing rerank API.",
        },
        "servers": [{"url": root_path or "/"}],
        "paths": paths,
        "components": {"schemas": {**components, "Error": _ERROR_SCHEMA}},
    }
    if keyed:
        described["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        described["security"] = [{"key": []}]
    return described


def _post(path: str, names: list[str], by_row: dict[str, Any]) -> dict[str, Any]:
    requests = [by_row[name][0] for name in names]
    responses = list({str(by_row[name][1]): by_row[name][1] for name in names}.values())
    unique = list({str(schema): schema for schema in requests}.values())
    answers = {
        status: {
            "description": text,
            "content": {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}},
        }
        for status, text in ERRORS.items()
    }
    return {
        "summary": DIALECTS[names[-1]].note,
        "description": "\n".join(f"* `{name}`: {DIALECTS[name].note}" for name in names),
        "operationId": "post" + path.replace("/", "_"),
        "requestBody": {"required": True, "content": {"application/json": {"schema": _any_of(unique)}}},
        "responses": {
            "200": {"description": "The ranking.", "content": {"application/json": {"schema": _any_of(responses)}}},
            **answers,
        },
    }


def _any_of(schemas: list[Any]) -> Any:
    return schemas[0] if len(schemas) == 1 else {"anyOf": schemas}


def _get(path: str, text: str, *statuses: str) -> dict[str, Any]:
    content = {"application/json": {"schema": {"type": "object"}}}
    operation: dict[str, Any] = {
        "summary": text,
        "operationId": "get" + path.replace("/", "_").replace("{", "").replace("}", ""),
        "responses": {status: {"description": ERRORS.get(status, "OK"), "content": content} for status in statuses},
    }
    if "{model}" in path:
        operation["parameters"] = [{"name": "model", "in": "path", "required": True, "schema": {"type": "string"}}]
    return operation


LARGE = 128 * 1024  # larger bodies (in bytes) are decoded in a worker thread, so that they do not block the event loop

Endpoint = Callable[[Request], Awaitable[Response]]


def build(service: Service, *, on_failure: Callable[[BaseException], None] | None = None) -> ASGIApp:
    """Build the ASGI application of a service. ``on_failure`` is called when the default model cannot be loaded."""

    @asynccontextmanager
    async def lifespan(app: Any) -> AsyncIterator[None]:
        async def load() -> None:
            try:
                await service.start()
            except BaseException as error:
                if on_failure:
                    on_failure(error)

        loading = asyncio.create_task(load())  # connections are accepted while it loads; /ready answers 503 until then
        yield
        loading.cancel()
        service.close()

    bodies = BodyMemory(service.settings.body_memory << 20)
    routes = [
        Route(path, rank_endpoint(service, names, bodies), methods=["POST"])
        for path, names in dialects.by_path().items()
    ]
    routes += [Route(path, endpoint, methods=["GET"]) for path, endpoint in get_endpoints(service).items()]
    app: ASGIApp = Front(
        Router(routes, redirect_slashes=False, lifespan=lifespan),
        service.settings,
        open_door=not service.ring.required,
        count=lambda dialect, status: service.metrics.requests.labels(dialect, str(status)).inc(),
    )
    if service.settings.cors_origin:  # outermost, so that pages of other origins can read error responses too
        origins = list(service.settings.cors_origin)
        app = CORSMiddleware(app, allow_origins=origins, allow_methods=["GET", "POST"], allow_headers=["*"])
    return app


def rank_endpoint(service: Service, names: list[str], bodies: BodyMemory) -> Endpoint:
    """The endpoint of one path, which serves the dialects ``names``. ``bodies`` is shared by all endpoints."""

    async def endpoint(request: Request) -> Response:
        record = request.state.record
        record["dialect"] = names[-1]
        record["path"] = request.scope["route"].path
        key: Key | None = None
        try:
            with service.tracer.request(request.headers) as span, bodies.hold() as take:
                key = auth.authorise(service.ring, request.headers.raw)
                record["key"] = key.name
                service.admit_request(key)
                ask = await _read(service, request, names, take)
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


async def _read(service: Service, request: Request, names: list[str], take: Callable[[int], None]) -> Ask:
    """Decode the request into an Ask; write dialect, size and times into its log record.

    ``take`` counts the body's bytes as they arrive.
    """
    record = request.state.record
    started = time.monotonic()
    body = await read_body(request, service.settings, take)
    received = time.monotonic()

    def decode() -> Ask:
        try:
            check_values(body, service.settings.max_values)
        except Problem:
            record["dialect"] = dialects.likely(names, body)
            raise
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
    """Write the request's counts and times into the log record and the trace; texts are never logged."""
    record["model"] = answer.model
    record["documents"] = len(ask.pairs)
    record["tokens"] = answer.tokens
    record["truncated_tokens"] = answer.truncated
    record.update({f"{stage}_ms": round(seconds * 1000, 3) for stage, seconds in answer.timings.items()})
    if span is not None:
        for name in ("dialect", "model", "documents", "tokens", "truncated_tokens", "request_id"):
            span.set_attribute(f"turborank.{name}", record[name])


def _headers(dialect: str, ask: Ask, answer: Answer, record: dict[str, Any]) -> dict[str, str]:
    """Response headers: tokens read and cut, for dialects whose bodies lack these fields, and the headers of TEI."""
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


# GET endpoints: models, health, metrics, the OpenAPI document, the playground.

OWNER = "turborank"


def describe(service: Service, model: ServedModel) -> dict[str, Any]:
    """A model in one object with the fields that OpenAI, Cohere and Infinity clients read."""
    reranker = model.reranker
    entry: dict[str, Any] = {
        "id": model.name,
        "name": model.name,
        "object": "model",
        "created": model.created,
        "owned_by": OWNER,
        "endpoints": ["rerank"],
        "loaded": reranker is not None,
        "stats": {"queue_fraction": service.batcher.waiting_tokens / service.settings.queue_tokens},
        "backend": OWNER,
        "capabilities": ["rerank"],
    }
    if reranker is not None:
        engine = reranker.engine
        entry |= {
            "context_length": reranker.max_length,
            "engine": engine.name,
            "precision": engine.precision,
            "isa": engine.isa,
        }
    return entry


def get_endpoints(service: Service) -> dict[str, Endpoint]:
    """Path -> endpoint."""
    health, ready, models = _health(service), _ready(service), _models(service)
    table: dict[str, Endpoint] = {
        "/health": health,
        "/ready": ready,
        "/metrics": _quiet(lambda: Response(service.metrics.text(), headers={"content-type": CONTENT_TYPE})),
        "/openapi.json": _openapi(service),
        "/v1/models": models,
        "/models": models,
        "/v1/models/{model:path}": _model(service),
        "/info": _info(service),
        # prefixed paths, for clients that append a path to their base URL
        **{f"{prefix}/health": health for prefix in ("/tei", "/infinity", "/vllm")},
        **{f"{prefix}/models": models for prefix in ("/infinity", "/vllm/v1", "/cohere/v1", "/voyage/v1", "/jina/v1")},
        "/tei/info": _info(service),
        "/infinity/metrics": _quiet(lambda: Response(service.metrics.text(), headers={"content-type": CONTENT_TYPE})),
    }
    for prefix in ("", "/weaviate"):
        table[f"{prefix}/.well-known/live"] = _quiet(lambda: Response(status_code=204))
        table[f"{prefix}/.well-known/ready"] = _ready(service, status=204)
        table[f"{prefix}/meta"] = _info(service)
    if service.settings.playground:
        table["/"] = _playground()
    return table


def _quiet(make: Callable[[], Response]) -> Endpoint:
    """A GET endpoint that monitoring polls often; successful requests are logged at debug level only."""

    async def endpoint(request: Request) -> Response:
        request.state.record["quiet"] = True
        return make()

    return endpoint


def _health(service: Service) -> Endpoint:
    return _quiet(lambda: respond({"status": "ok", "unix": time.time(), "version": version()}))


def _ready(service: Service, *, status: int = 200) -> Endpoint:
    def make() -> Response:
        if not service.ready:
            state = "draining" if service.draining else "loading"
            return respond({"status": state}, 503, {"retry-after": str(int(LOADING_RETRY))})
        return respond({"status": "ready"} if status == 200 else None, status)

    return _quiet(make)


def _models(service: Service) -> Endpoint:
    async def endpoint(request: Request) -> Response:
        key = auth.authorise(service.ring, request.headers.raw)
        entries = [describe(service, model) for model in service.models.all if key.allows(model.name)]
        return respond({"object": "list", "data": entries, "models": entries})

    return endpoint


def _model(service: Service) -> Endpoint:
    async def endpoint(request: Request) -> Response:
        key = auth.authorise(service.ring, request.headers.raw)
        model = service.models.find(request.path_params["model"] or None)
        if not key.allows(model.name):
            raise Problem(
                403, "model_not_allowed", f"expected a model that the key {key.name!r} may use", param="model"
            )
        return respond(describe(service, model))

    return endpoint


def _info(service: Service) -> Endpoint:
    """/info with the fields of text-embeddings-inference; also serves Weaviate's /meta."""

    async def endpoint(request: Request) -> Response:
        auth.authorise(service.ring, request.headers.raw)
        model, settings = service.models.default, service.settings
        reranker = model.reranker
        return respond(
            {
                "model_id": model.name,
                "model_sha": reranker.checkpoint.revision if reranker else None,
                "model_dtype": reranker.engine.precision if reranker else None,
                "model_type": {"reranker": {"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}},
                "max_concurrent_requests": settings.max_connections,
                "max_input_length": reranker.max_length if reranker else None,
                "max_batch_tokens": settings.batch_tokens,
                "max_batch_requests": None,
                "max_client_batch_size": settings.max_documents,
                "auto_truncate": settings.length == "truncate",
                "tokenization_workers": 2,
                "version": version(),
            }
        )

    return endpoint


def _openapi(service: Service) -> Endpoint:
    document = msgspec.json.encode(openapi_document(keyed=service.ring.required, root_path=service.settings.prefix))
    return _quiet(lambda: Response(document, media_type=JSON))


def _playground() -> Endpoint:
    page = files("turborank.serve").joinpath("playground/index.html").read_text(encoding="utf-8")
    headers = {"content-security-policy": content_policy(page), "x-frame-options": "DENY"}
    content = page.encode()
    return _quiet(lambda: Response(content, headers=headers, media_type="text/html"))


def content_policy(page: str) -> str:
    """A Content-Security-Policy that allows only the page's own script and style, by their hashes."""

    def hashes(tag: str) -> str:
        bodies = re.findall(rf"<{tag}>(.*?)</{tag}>", page, flags=re.DOTALL)
        return " ".join(
            f"'sha256-{base64.b64encode(hashlib.sha256(body.encode()).digest()).decode()}'" for body in bodies
        )

    return (
        f"default-src 'none'; script-src {hashes('script')}; style-src {hashes('style')}; connect-src 'self'; "
        "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
