"""The OpenAPI document (/openapi.json), generated from DIALECTS."""

from __future__ import annotations

from importlib import metadata
from typing import Any

import msgspec

from turborank.serve import dialects
from turborank.serve.dialects import DIALECTS

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


def document(*, keyed: bool, root_path: str = "") -> dict[str, Any]:
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
