"""Everything that is asked with GET: models, health, metrics, the OpenAPI document, the playground."""

from __future__ import annotations

import base64
import hashlib
import re
import time
from collections.abc import Awaitable, Callable
from importlib.resources import files
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from turborank.serve import limits, openapi
from turborank.serve.http import JSON, respond
from turborank.serve.metrics import CONTENT_TYPE
from turborank.serve.models import Model
from turborank.serve.openapi import version
from turborank.serve.problems import Problem
from turborank.serve.service import LOADING_RETRY, Service

OWNER = "turborank"
Endpoint = Callable[[Request], Awaitable[Response]]


def describe(service: Service, model: Model) -> dict[str, Any]:
    """A model as OpenAI, Cohere and Infinity clients read it, at once."""
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


def routes(service: Service) -> dict[str, Endpoint]:
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
        # prefixes, for clients that append the path to a base URL
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
    """An endpoint that is asked every few seconds: its successes are logged at debug level only."""

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
        key = limits.authorise(service.ring, request.headers.raw)
        entries = [describe(service, model) for model in service.models.all if key.allows(model.name)]
        return respond({"object": "list", "data": entries, "models": entries})

    return endpoint


def _model(service: Service) -> Endpoint:
    async def endpoint(request: Request) -> Response:
        key = limits.authorise(service.ring, request.headers.raw)
        model = service.models.find(request.path_params["model"] or None)
        if not key.allows(model.name):
            raise Problem(
                403, "model_not_allowed", f"expected a model that the key {key.name!r} may use", param="model"
            )
        return respond(describe(service, model))

    return endpoint


def _info(service: Service) -> Endpoint:
    """What text-embeddings-inference says of itself; also Weaviate's /meta."""

    async def endpoint(request: Request) -> Response:
        limits.authorise(service.ring, request.headers.raw)
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
    document = msgspec.json.encode(openapi.document(keyed=service.ring.required, root_path=service.settings.prefix))
    return _quiet(lambda: Response(document, media_type=JSON))


def _playground() -> Endpoint:
    page = files("turborank.serve").joinpath("playground/index.html").read_text(encoding="utf-8")
    headers = {"content-security-policy": content_policy(page), "x-frame-options": "DENY"}
    content = page.encode()
    return _quiet(lambda: Response(content, headers=headers, media_type="text/html"))


def content_policy(page: str) -> str:
    """A policy that lets the page run its own script and style, named by their hashes, and nothing else."""

    def hashes(tag: str) -> str:
        bodies = re.findall(rf"<{tag}>(.*?)</{tag}>", page, flags=re.DOTALL)
        return " ".join(
            f"'sha256-{base64.b64encode(hashlib.sha256(body.encode()).digest()).decode()}'" for body in bodies
        )

    return (
        f"default-src 'none'; script-src {hashes('script')}; style-src {hashes('style')}; connect-src 'self'; "
        "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
