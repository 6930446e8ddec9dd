"""Types of requests and responses, and the dialect-independent types Ask (request) and Answer (result).

The types and their docstrings become the OpenAPI document. Numbers and booleans may be strings, because some clients
send them so; null means absent; unknown fields are ignored and reported as warnings.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from msgspec import UNSET, Meta, Struct, UnsetType, structs

from turborank.calibration import Calibration
from turborank.errors import ModelNotFoundError, TooLongError, TurborankError
from turborank.tokens import NO_LIMITS, Limits
from turborank.types import Document, Pair, Ranked, Scores

MAX_COUNT = 2**31 - 1
MAX_FIELDS = 100  # of a document that are read

Count = Annotated[int, Meta(ge=1, le=MAX_COUNT)]
CountOrZero = Annotated[int, Meta(ge=0, le=MAX_COUNT)]
TruncateTo = Annotated[int, Meta(ge=-1, le=MAX_COUNT)]
Probability = Annotated[float, Meta(ge=0, le=1)]
Target = Annotated[str, Meta(max_length=40)]
Threshold = Probability | Target
Seconds = Annotated[float, Meta(ge=0.1, le=86_400)]
Documents = Annotated[list[str | dict[str, Any]], Meta(min_length=1)]
Length = Literal["truncate", "windows", "error"]


class TextObject(Struct):
    """A query as an object."""

    text: str


class SpanOptions(Struct):
    """Request the best passages of each document, by character offsets (Unicode code points)."""

    mode: Literal["enabled", "disabled"] = "enabled"
    threshold: Probability | None = None
    max_spans: Count | None = None


class _RerankFields(Struct, kw_only=True):
    query: str | TextObject
    model: str | None = None
    top_k: Count | None = None
    return_documents: bool | None = None
    rank_fields: Annotated[list[str], Meta(min_length=1, max_length=MAX_FIELDS)] | None = None
    max_chunks_per_doc: Count | None = None
    max_tokens_per_doc: Count | None = None
    max_tokens_per_query: Count | None = None
    max_doc_length: Count | None = None
    max_query_length: Count | None = None
    truncate_prompt_tokens: TruncateTo | None = None
    truncation: bool | None = None
    relevant_spans: SpanOptions | bool | None = None
    raw_scores: bool | None = None
    use_activation: bool | None = None
    length: Length | None = None
    threshold: Threshold | None = None
    timeout: Seconds | None = None


class RerankRequest(_RerankFields, kw_only=True):
    """Documents to rank for a query: the union of what Jina, Cohere, vLLM, Voyage and Infinity clients send."""

    documents: Documents
    top_n: Count | None = None


class VllmRerankRequest(_RerankFields, kw_only=True):
    """As RerankRequest, but ``top_n: 0`` means all and the documents may be a single string."""

    documents: Documents | str
    top_n: CountOrZero | None = None


Texts = Annotated[list[str | TextObject], Meta(min_length=1)] | str


class ScoreRequest(Struct, kw_only=True):
    """Scores of pairs: one text with each of N, or N with N. Each side has exactly one of its alternative fields."""

    model: str | None = None
    text_1: Texts | None = None
    queries: Texts | None = None
    data_1: Texts | None = None
    text_2: Texts | None = None
    documents: Texts | None = None
    items: Texts | None = None
    data_2: Texts | None = None
    truncate_prompt_tokens: TruncateTo | None = None
    max_tokens_per_doc: Count | None = None
    max_tokens_per_query: Count | None = None
    use_activation: bool | None = None
    raw_scores: bool | None = None
    length: Length | None = None
    timeout: Seconds | None = None


class TeiRequest(Struct, kw_only=True):
    """Request of text-embeddings-inference."""

    query: str
    texts: Annotated[list[str], Meta(min_length=1)]
    truncate: bool | None = None
    truncation_direction: Literal["Left", "left", "Right", "right"] | None = None
    raw_scores: bool | None = None
    return_text: bool | None = None
    top_n: Count | None = None
    model: str | None = None


class WeaviateRequest(Struct, kw_only=True):
    """Request of Weaviate's reranker-transformers module."""

    query: str
    documents: Annotated[list[str], Meta(min_length=1)]
    property: str | None = None


class Span(Struct):
    """A passage, by character offsets, with its own relevance score."""

    start: int
    end: int
    score: float


class RankedResult(Struct):
    """One document in the ranking."""

    index: int
    relevance_score: float
    document: dict[str, Any] | str | UnsetType = UNSET
    relevant_spans: list[Span] | UnsetType = UNSET
    probability: float | UnsetType = UNSET  # only of a calibrated model


class DocumentLength(Struct):
    """Tokens read of one document (with query and special tokens), tokens cut, and the characters that were scored."""

    index: int
    tokens: int
    truncated: int
    span: tuple[int, int]


class Usage(Struct):
    """Tokens read."""

    prompt_tokens: int
    total_tokens: int


class ApiVersion(Struct):
    """Version of Cohere's API that the response follows."""

    version: str


class BilledUnits(Struct):
    """Cohere's unit, a query with up to 100 documents; for compatibility only."""

    search_units: float


class MetaTokens(Struct):
    """Tokens as Cohere counts them."""

    input_tokens: int
    output_tokens: int = 0


class MetaData(Struct):
    """Details of the result: tokens read and cut, times in milliseconds, warnings."""

    api_version: ApiVersion
    billed_units: BilledUnits
    tokens: MetaTokens
    documents: list[DocumentLength]
    score: Literal["sigmoid", "logit"]
    timings_ms: dict[str, float]
    warnings: list[str] | UnsetType = UNSET


class RerankResponse(Struct):
    """The ranking, best first, in the shape that Jina, Cohere, vLLM and Infinity clients share."""

    id: str
    object: str
    model: str
    results: list[RankedResult]
    usage: Usage
    meta: MetaData
    created: int | UnsetType = UNSET
    data: list[RankedResult] | UnsetType = UNSET


class ScoredIndex(Struct):
    """The score of one pair, in the order of the request."""

    index: int
    score: float
    object: str = "score"


class ScoreResponse(Struct):
    """Response of vLLM's score API: a score for each pair."""

    id: str
    object: str
    created: int
    model: str
    data: list[ScoredIndex]
    usage: Usage
    meta: MetaData


class TeiResult(Struct):
    """One text in the ranking."""

    index: int
    score: float
    text: str | UnsetType = UNSET


class WeaviateScore(Struct):
    """One document's score."""

    document: str
    score: float


class WeaviateResponse(Struct):
    """Scores in the order of the request."""

    query: str
    scores: list[WeaviateScore]
    property: str | None


@dataclass(kw_only=True)
class Ask:
    """A decoded request, independent of its dialect."""

    pairs: list[Pair]
    documents: list[Document]  # as received, for the response
    model: str | None = None
    top_n: int | None = None
    threshold: float | str | None = None  # a relevance score, or a target such as "precision=0.9" of a calibrated model
    return_documents: bool = False
    raw_scores: bool = False
    limits: Limits = NO_LIMITS
    spans: SpanOptions | None = None
    timeout: float | None = None
    warnings: list[str] = field(default_factory=list)
    field: str = "documents"  # the dialect's name of the documents, for error messages
    request: Any = None  # the decoded request, if the dialect's encoder needs it


@dataclass(kw_only=True)
class Answer:
    """The result of a request, independent of its dialect."""

    id: str
    model: str
    ranking: list[Ranked]
    scores: Scores
    spans: dict[int, list[Span]]  # by index of the document
    timings: dict[str, float]  # seconds by stage
    created: int
    warnings: list[str]
    calibration: Calibration | None = None

    @property
    def tokens(self) -> int:
        return int(self.scores.tokens.sum())

    @property
    def truncated(self) -> int:
        return int(self.scores.truncated.sum())


def required(kind: type[Struct]) -> frozenset[str]:
    """Names of the required fields of a request type."""
    return frozenset(one.encode_name for one in structs.fields(kind) if one.required)


def fields_of(kind: type[Struct]) -> frozenset[str]:
    """Names of all fields of a request type."""
    return frozenset(kind.__struct_encode_fields__)


# The exception for all error responses; each dialect encodes it in its own format.

TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
}


class Problem(Exception):  # noqa: N818 - an error response, not an error of the server
    """An error response.

    ``param`` is the JSON path of the invalid field; ``retry_after``, in seconds, sets the header Retry-After.
    """

    def __init__(
        self, status: int, code: str, message: str, *, param: str | None = None, retry_after: float | None = None
    ) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.message = message
        self.param = param
        self.retry_after = retry_after

    @property
    def type(self) -> str:
        """OpenAI's error type for this status."""
        return TYPES.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")

    @property
    def headers(self) -> dict[str, str]:
        """Headers of the response, the same in all dialects."""
        headers = {}
        if self.retry_after is not None:
            headers["retry-after"] = str(max(1, math.ceil(self.retry_after)))
            headers["retry-after-ms"] = str(max(1, math.ceil(self.retry_after * 1000)))
        if self.status == 401:
            headers["www-authenticate"] = "Bearer"
        return headers


def from_error(error: TurborankError, *, param: str | None = None) -> Problem:
    """Convert a library error to a Problem. Texts of server errors (5xx) go to the log, not to the client."""
    if isinstance(error, TooLongError):  # 400 is what OpenAI-style servers answer
        return Problem(400, error.code, str(error), param=param)
    if isinstance(error, ModelNotFoundError):
        return Problem(503, "model_unavailable", "the model cannot be loaded at the moment; see the server's log")
    if error.status >= 500:
        return Problem(500, error.code, "the engine failed; see the server's log under this request id")
    return Problem(error.status, error.code, str(error), param=param)
