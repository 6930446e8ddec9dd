"""The table DIALECTS of rerank APIs, one row each: paths, request type, decoder, encoder, error format.

Where rows share a path, the fields of the request select the row: a row with ``marks`` is selected when the request has
one of these fields. To add a dialect, add a row, and a recorded request, response and error to tests/serve.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import msgspec
from msgspec import UNSET

from turborank.calibration import sigmoid
from turborank.errors import InputError
from turborank.serve import wire
from turborank.serve.wire import Answer, Ask, Problem
from turborank.text import DEFAULT_FIELDS, document_text
from turborank.tokens import MIN_LENGTH, Limits
from turborank.types import Document, Pair, Ranked

NULL = msgspec.Raw(b"null")
DOCUMENTS_PER_SEARCH_UNIT = 100
# Fields without effect on the response, ignored silently. All other unknown fields cause a warning.
SILENT = frozenset({"user", "request_id", "cache_salt", "priority", "encoding_format", "stream"})


class Dialect(NamedTuple):
    """The request, response and error format of one rerank API."""

    note: str
    paths: tuple[str, ...]
    request: type[msgspec.Struct]
    response: Any
    decode: Callable[[Any], Ask]
    encode: Callable[[Ask, Answer], Any]
    error: Callable[[Problem, str], tuple[int, Any]]  # (problem, request id) -> status and body; None: empty
    marks: frozenset[str] = frozenset()


def _texts(documents: list[str | dict[str, Any]], fields: list[str] | None) -> list[str]:
    fields = list(dict.fromkeys(fields or DEFAULT_FIELDS))  # a field is read once, however often it is named
    texts = []
    for place, document in enumerate(documents):
        try:
            texts.append(document_text(document, fields))
        except InputError as error:
            raise Problem(422, error.code, f"{error} at $.documents[{place}]", param=f"documents[{place}]") from None
    return texts


def _limits(request: Any) -> Limits:
    """The length limits of a request; an explicit ``length`` takes precedence over what other fields imply.

    Raises Problem 422 for a ``truncate_prompt_tokens`` below MIN_LENGTH.
    """
    policy = request.length
    cap = request.truncate_prompt_tokens
    if policy is None and cap is not None:
        policy = "truncate"
    if policy is None and getattr(request, "truncation", None) is False:
        policy = "error"
    if cap is not None and 0 <= cap < MIN_LENGTH:
        message = f"expected truncate_prompt_tokens to be -1 or at least {MIN_LENGTH}, got {cap}"
        raise Problem(422, "invalid_input", message, param="truncate_prompt_tokens")
    windows = getattr(request, "max_chunks_per_doc", None)
    if policy is None and windows is not None:
        policy = "windows"
    return Limits(
        policy=policy,
        max_length=cap if cap is not None and cap >= 0 else None,  # -1: what the model reads
        max_query=request.max_tokens_per_query or getattr(request, "max_query_length", None),
        max_document=request.max_tokens_per_doc or getattr(request, "max_doc_length", None),
        max_windows=windows,
    )


def decode_rerank(request: wire.RerankRequest | wire.VllmRerankRequest, *, return_documents: bool = False) -> Ask:
    query = request.query if isinstance(request.query, str) else request.query.text
    documents: list[Document] = [request.documents] if isinstance(request.documents, str) else list(request.documents)
    spans = request.relevant_spans
    if isinstance(spans, bool):
        spans = wire.SpanOptions() if spans else None
    return Ask(
        pairs=[Pair(query, text) for text in _texts(documents, request.rank_fields)],  # type: ignore[arg-type]
        documents=documents,
        model=request.model,
        top_n=(request.top_n if request.top_n is not None else request.top_k) or None,
        threshold=request.threshold,
        return_documents=return_documents if request.return_documents is None else request.return_documents,
        raw_scores=bool(request.raw_scores) or request.use_activation is False,
        limits=_limits(request),
        spans=spans if spans is not None and spans.mode == "enabled" else None,
        timeout=request.timeout,
    )


def decode_vllm(request: wire.VllmRerankRequest) -> Ask:
    return decode_rerank(request, return_documents=True)


def decode_score(request: wire.ScoreRequest) -> Ask:
    left = _side(request, ("text_1", "queries", "data_1"))
    right = _side(request, ("text_2", "documents", "items", "data_2"))
    if len(left) == 1:
        left = left * len(right)
    elif len(right) == 1:
        right = right * len(left)
    if len(left) != len(right):
        message = f"expected one text with N, or N with N, got {len(left)} at $.text_1 and {len(right)} at $.text_2"
        raise Problem(400, "invalid_input", message, param="text_2")
    return Ask(
        pairs=[Pair(query, document) for query, document in zip(left, right, strict=True)],
        documents=list(right),
        model=request.model,
        raw_scores=bool(request.raw_scores) or request.use_activation is False,
        limits=_limits(request),
        timeout=request.timeout,
        field="text_2",
    )


def _side(request: wire.ScoreRequest, names: tuple[str, ...]) -> list[str]:
    given = [name for name in names if getattr(request, name) is not None]
    if len(given) != 1:
        got = " and ".join(given) or "none"
        raise Problem(422, "invalid_input", f"expected one of {', '.join(names)}, got {got}", param=names[0])
    value = getattr(request, given[0])
    return [value] if isinstance(value, str) else [one if isinstance(one, str) else one.text for one in value]


def decode_tei(request: wire.TeiRequest) -> Ask:
    left = (request.truncation_direction or "right").lower() == "left"
    return Ask(
        pairs=[Pair(request.query, text) for text in request.texts],
        documents=list(request.texts),
        model=request.model,
        top_n=request.top_n,
        return_documents=bool(request.return_text),
        raw_scores=bool(request.raw_scores),
        limits=Limits(policy="error" if request.truncate is False else None),
        warnings=["truncation_direction: texts are always cut at their end"] if left else [],
        field="texts",
    )


def decode_weaviate(request: wire.WeaviateRequest) -> Ask:
    documents: list[Document] = list(request.documents)
    return Ask(pairs=[Pair(request.query, text) for text in request.documents], documents=documents, request=request)


def _as_object(document: Document) -> dict[str, Any]:
    return {"text": document} if isinstance(document, str) else dict(document)


def _meta(ask: Ask, answer: Answer, version: str) -> wire.MetaData:
    scores = answer.scores
    columns = zip(scores.tokens.tolist(), scores.truncated.tolist(), scores.spans.tolist(), strict=True)
    return wire.MetaData(
        api_version=wire.ApiVersion(version),
        billed_units=wire.BilledUnits(-(-len(ask.pairs) // DOCUMENTS_PER_SEARCH_UNIT)),
        tokens=wire.MetaTokens(answer.tokens),
        documents=[
            wire.DocumentLength(index, tokens, truncated, (span[0], span[1]))
            for index, (tokens, truncated, span) in enumerate(columns)
        ],
        score="logit" if ask.raw_scores else "sigmoid",
        timings_ms={stage: round(seconds * 1000, 3) for stage, seconds in answer.timings.items()},
        warnings=answer.warnings or UNSET,
    )


def _results(ask: Ask, answer: Answer, *, strings: bool = False) -> list[wire.RankedResult]:
    """The ranking; documents are objects, or with ``strings`` the text that the model read."""

    def document(ranked: Ranked) -> dict[str, Any] | str:
        return ask.pairs[ranked.index].document if strings else _as_object(ranked.document)

    return [
        wire.RankedResult(
            index=ranked.index,
            relevance_score=ranked.logit if ask.raw_scores else ranked.score,
            document=document(ranked) if ask.return_documents else UNSET,
            relevant_spans=answer.spans.get(ranked.index, UNSET),
            probability=answer.calibration.probability(ranked.logit) if answer.calibration else UNSET,
        )
        for ranked in answer.ranking
    ]


def encode_rerank(ask: Ask, answer: Answer, *, version: str = "1") -> wire.RerankResponse:
    return wire.RerankResponse(
        id=answer.id,
        object="list",
        model=answer.model,
        results=_results(ask, answer),
        usage=wire.Usage(answer.tokens, answer.tokens),
        meta=_meta(ask, answer, version),
    )


def encode_cohere_v2(ask: Ask, answer: Answer) -> wire.RerankResponse:
    return encode_rerank(ask, answer, version="2")


def encode_voyage(ask: Ask, answer: Answer) -> wire.RerankResponse:
    response = encode_rerank(ask, answer)
    response.data = _results(ask, answer, strings=True)
    return response


def encode_infinity(ask: Ask, answer: Answer) -> wire.RerankResponse:
    response = encode_rerank(ask, answer)
    response.object, response.created = "rerank", answer.created
    response.id = f"infinity-{answer.id}"
    response.results = _results(ask, answer, strings=True)
    return response


def encode_vllm(ask: Ask, answer: Answer) -> wire.RerankResponse:
    response = encode_rerank(ask, answer)
    response.id = f"rerank-{answer.id}"
    return response


def encode_score(ask: Ask, answer: Answer) -> wire.ScoreResponse:
    logits = answer.scores.logits.tolist()
    scored = [wire.ScoredIndex(i, logit if ask.raw_scores else sigmoid(logit)) for i, logit in enumerate(logits)]
    usage = wire.Usage(answer.tokens, answer.tokens)
    meta = _meta(ask, answer, "1")
    return wire.ScoreResponse(f"score-{answer.id}", "list", answer.created, answer.model, scored, usage, meta)


def encode_tei(ask: Ask, answer: Answer) -> list[wire.TeiResult]:
    return [
        wire.TeiResult(
            index=ranked.index,
            score=ranked.logit if ask.raw_scores else ranked.score,
            text=ask.pairs[ranked.index].document if ask.return_documents else UNSET,
        )
        for ranked in answer.ranking
    ]


def encode_weaviate(ask: Ask, answer: Answer) -> wire.WeaviateResponse:
    scores = [sigmoid(logit) for logit in answer.scores.logits.tolist()]
    scored = [wire.WeaviateScore(pair.document, score) for pair, score in zip(ask.pairs, scores, strict=True)]
    return wire.WeaviateResponse(ask.request.query, scored, ask.request.property)


def _openai(problem: Problem) -> dict[str, Any]:
    return {"message": problem.message, "type": problem.type, "param": problem.param, "code": problem.code}


def error_superset(problem: Problem, request_id: str) -> tuple[int, Any]:
    """One body with OpenAI's ``error``, Cohere's ``message``, and the ``detail`` of Jina and Voyage."""
    body = {"id": request_id, "message": problem.message, "detail": problem.message, "error": _openai(problem)}
    return problem.status, body


def error_infinity(problem: Problem, request_id: str) -> tuple[int, Any]:
    if problem.status == 422:
        loc = ["body", *(part for part in re.split(r"[.\[\]]+", problem.param or "") if part)]
        return 422, {"detail": [{"loc": loc, "msg": problem.message, "type": problem.code}]}
    if problem.status == 401:
        return 401, {"detail": "Unauthorized"}
    return problem.status, {"error": _openai(problem)}


_TEI_ERRORS = {429: (429, "overloaded"), 503: (503, "unhealthy"), 500: (424, "backend"), 504: (424, "backend")}


def error_tei(problem: Problem, request_id: str) -> tuple[int, Any]:
    if problem.status in (401, 403, 404):
        return problem.status, None if problem.status == 401 else {"error": problem.message, "error_type": "validation"}
    status, kind = _TEI_ERRORS.get(problem.status, (problem.status, "validation"))
    if problem.code == "too_long":
        status = 422
    return status, {"error": problem.message, "error_type": kind}


def error_weaviate(problem: Problem, request_id: str) -> tuple[int, Any]:
    return problem.status, {"error": problem.message}


_SUPERSET = Dialect(
    note="Jina, Cohere v1, LiteLLM, Dify, Haystack, llama.cpp: one response with the fields that all of them read",
    paths=("/v1/rerank", "/rerank", "/v1/reranking", "/reranking", "/jina/v1/rerank"),
    request=wire.RerankRequest,
    response=wire.RerankResponse,
    decode=decode_rerank,
    encode=encode_rerank,
    error=error_superset,
)

DIALECTS: dict[str, Dialect] = {
    "tei": Dialect(
        note="text-embeddings-inference: texts in, a bare list out",
        paths=("/rerank", "/tei/rerank"),
        request=wire.TeiRequest,
        response=list[wire.TeiResult],
        decode=decode_tei,
        encode=encode_tei,
        error=error_tei,
        marks=frozenset({"texts"}),
    ),
    "weaviate": Dialect(
        note="Weaviate's reranker-transformers module: scores in the order of the request",
        paths=("/rerank", "/weaviate/rerank"),
        request=wire.WeaviateRequest,
        response=wire.WeaviateResponse,
        decode=decode_weaviate,
        encode=encode_weaviate,
        error=error_weaviate,
        marks=frozenset({"property"}),
    ),
    "voyage": _SUPERSET._replace(
        note="Voyage: results under 'data', documents as strings",
        paths=("/v1/rerank", "/rerank", "/voyage/v1/rerank"),
        encode=encode_voyage,
        marks=frozenset({"top_k"}),
    ),
    "jina": _SUPERSET,
    "cohere-v1": _SUPERSET._replace(
        note="Cohere v1 under its own prefix, and where its client is given a base URL that ends in /v1",
        paths=("/cohere/v1/rerank", "/v1/v1/rerank"),
    ),
    "cohere-v2": _SUPERSET._replace(
        note="Cohere v2", paths=("/v2/rerank", "/v1/v2/rerank", "/cohere/v2/rerank"), encode=encode_cohere_v2
    ),
    "infinity": _SUPERSET._replace(
        note="Infinity: object 'rerank', documents as strings",
        paths=("/infinity/rerank",),
        encode=encode_infinity,
        error=error_infinity,
    ),
    "vllm": _SUPERSET._replace(
        note="vLLM's rerank: documents always returned",
        paths=("/vllm/rerank", "/vllm/v1/rerank", "/vllm/v2/rerank"),
        request=wire.VllmRerankRequest,
        decode=decode_vllm,
        encode=encode_vllm,
    ),
    "vllm-score": Dialect(
        note="vLLM's scores of pairs, in the order of the request",
        paths=("/score", "/v1/score", "/vllm/score", "/vllm/v1/score"),
        request=wire.ScoreRequest,
        response=wire.ScoreResponse,
        decode=decode_score,
        encode=encode_score,
        error=error_superset,
    ),
}


def by_path() -> dict[str, list[str]]:
    """Path -> names of its dialects, those with marks first; the last one is the default."""
    paths = dict.fromkeys(path for row in DIALECTS.values() for path in row.paths)
    sharing = {path: [name for name, row in DIALECTS.items() if path in row.paths] for path in paths}
    return {path: sorted(names, key=lambda name: not DIALECTS[name].marks) for path, names in sharing.items()}


def recognise(names: list[str], present: Mapping[str, Any]) -> str:
    """The dialect, among the ``names`` of a path, of a request with these fields.

    A mark with the value null counts as present (Voyage sends ``top_k: null``), unless the dialect requires the field.
    """

    def speaks(row: Dialect) -> bool:
        needed = wire.required(row.request)
        return any(mark in present and (present[mark] != NULL or mark not in needed) for mark in row.marks)

    return next((name for name in names[:-1] if speaks(DIALECTS[name])), names[-1])


def likely(names: list[str], body: bytes) -> str:
    """The dialect, among the ``names`` of a path, of a body that is not decoded: by the marks that stand in it."""
    marks = frozenset[str]().union(*(DIALECTS[name].marks for name in names))
    return recognise(names, {mark: b"" for mark in marks if b'"%s"' % mark.encode() in body})


def unknown_fields(row: Dialect, present: Mapping[str, Any]) -> list[str]:
    """Fields of the request that its dialect does not have, without those in SILENT."""
    return sorted(present.keys() - wire.fields_of(row.request) - SILENT)
