"""Prometheus metrics, JSON logs and OpenTelemetry traces. Each application has its own metrics registry."""

from __future__ import annotations

import logging
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TextIO

import msgspec
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from turborank.errors import CheckpointError, EngineError, InputError
from turborank.serve.queue import Batcher, Computed
from turborank.serve.wire import Problem

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_SHARES = (0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 1.0)


class Metrics:
    """The Prometheus metrics of one server."""

    def __init__(self, batcher: Batcher, ready: Callable[[], bool]) -> None:
        self.registry = registry = CollectorRegistry()
        self.requests = Counter(
            "turborank_requests", "Requests by dialect and HTTP status.", ("dialect", "status"), registry=registry
        )
        self.documents = Counter("turborank_documents", "Documents ranked.", registry=registry)
        self.tokens = Counter(
            "turborank_tokens", "Tokens of documents ranked, query and template included.", registry=registry
        )
        self.truncated = Counter("turborank_truncated_documents", "Documents that were truncated.", registry=registry)
        self.cut = Counter("turborank_truncated_tokens", "Tokens cut by truncation.", registry=registry)
        self.seconds = Histogram(
            "turborank_stage_seconds", "Seconds of a request by stage.", ("stage",), buckets=_SECONDS, registry=registry
        )
        self.batches = Counter("turborank_batches", "Batches computed.", registry=registry)
        self.computed = Counter("turborank_computed_tokens", "Tokens computed by the engine.", registry=registry)
        self.padding = Counter(
            "turborank_padding_saved_tokens",
            "Tokens that padding each batch to its longest pair would have added.",
            registry=registry,
        )
        self.fill = Histogram(
            "turborank_batch_fill", "Share of the token budget that a batch used.", buckets=_SHARES, registry=registry
        )
        self.batch_seconds = Histogram(
            "turborank_batch_seconds",
            "Seconds of a batch; a request that arrives meanwhile waits for its end.",
            buckets=_SECONDS,
            registry=registry,
        )
        self.mixed = Histogram(
            "turborank_batch_requests", "Requests in a batch.", buckets=(1, 2, 4, 8, 16, 32), registry=registry
        )
        self._gauge("turborank_queue_tokens", "Tokens waiting.", lambda: batcher.waiting_tokens)
        self._gauge("turborank_queue_requests", "Requests waiting.", lambda: batcher.waiting_requests)
        self._gauge(
            "turborank_queue_seconds",
            "Expected seconds to compute the queue, at the measured speed.",
            batcher.wait_seconds,
        )
        self._gauge("turborank_tokens_per_second", "Measured speed of recent batches.", lambda: batcher.speed or 0.0)
        self._gauge("turborank_ready", "Whether the default model is loaded.", lambda: float(ready()))
        self._budget = batcher.batch_tokens

    def _gauge(self, name: str, text: str, read: Callable[[], float]) -> None:
        Gauge(name, text, registry=self.registry).set_function(read)

    def batch(self, computed: Computed) -> None:
        """Called by the batcher after each batch."""
        self.batches.inc()
        self.computed.inc(computed.tokens)
        self.padding.inc(computed.pairs * computed.longest - computed.tokens)
        self.fill.observe(min(1.0, computed.tokens / self._budget))
        self.mixed.observe(computed.requests)
        self.batch_seconds.observe(computed.seconds)

    def text(self) -> bytes:
        """The page."""
        return generate_latest(self.registry)


# Logs: one JSON object a line. Never a query, a document, a key, a header or a path as the client wrote it.

NAME = "turborank.serve"
# Errors whose messages are logged. A KeyError, a UnicodeEncodeError or a library's own may quote a client's text.
QUOTE_NO_TEXT = (OSError, MemoryError, ImportError, RuntimeError, EngineError, CheckpointError)


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
            line["traceback"] = "\nwhile handling\n".join(_without_texts(record.exc_info[1]))
        return msgspec.json.encode(line, enc_hook=str).decode()


def _without_texts(error: BaseException | None) -> Iterator[str]:
    """The traceback of an error and of those that led to it; the messages of QUOTE_NO_TEXT only."""
    while error is not None:
        message = f": {error}" if isinstance(error, QUOTE_NO_TEXT) else ""
        yield f"{''.join(traceback.format_tb(error.__traceback__))}{type(error).__name__}{message}"
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)


def set_up(level: str, stream: TextIO | None = None) -> None:
    """Write the events of turborank and uvicorn as JSON lines to ``stream``, by default standard error."""
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(JsonFormatter())
    for name in (NAME, "uvicorn", "uvicorn.error"):
        logger = logging.getLogger(name)
        logger.handlers = [handler] if name != "uvicorn.error" else []
        logger.propagate = name == "uvicorn.error"
        logger.setLevel(level.upper())
    access = logging.getLogger("uvicorn.access")  # off: every request is logged by turborank, without the raw path
    access.handlers, access.propagate = [], False


def event(name: str, fields: dict[str, Any], *, level: int = logging.INFO, error: BaseException | None = None) -> None:
    """Log the event ``name`` with ``fields``, and with the traceback of ``error``."""
    logging.getLogger(NAME).log(level, name, extra={"fields": fields}, exc_info=error)


# OpenTelemetry spans: active with the extra ``otel`` and an endpoint, else without effect.


class Tracer:
    """One span for each request, with a child span for each stage. ``exporter`` replaces the OTLP exporter.

    Raises InputError when OpenTelemetry is not installed.
    """

    def __init__(self, endpoint: str = "", *, exporter: Any = None) -> None:
        self._provider: Any = None
        if not endpoint and exporter is None:
            return
        try:
            from opentelemetry.sdk.resources import Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor, SimpleSpanProcessor

            if exporter is None:
                from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter

                processor: Any = BatchSpanProcessor(OTLPSpanExporter(endpoint=endpoint))
            else:
                processor = SimpleSpanProcessor(exporter)
        except ImportError as error:
            hint = "pip install 'turborank[otel]'"
            raise InputError(f"expected OpenTelemetry for otlp_endpoint, got: {error}", hint=hint) from None
        self._provider = TracerProvider(resource=Resource.create({"service.name": "turborank"}))
        self._provider.add_span_processor(processor)
        self._tracer = self._provider.get_tracer("turborank")

    @contextmanager
    def request(self, headers: Mapping[str, str]) -> Iterator[Any]:
        """The span of a request, a child of the trace context in the headers; None when tracing is off."""
        if self._provider is None:
            yield None
            return
        from opentelemetry.trace import SpanKind, StatusCode
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        context = TraceContextTextMapPropagator().extract(headers)
        # Exceptions are not recorded, because their messages may quote the client's texts.
        quiet = {"record_exception": False, "set_status_on_exception": False}
        with self._tracer.start_as_current_span("rerank", context=context, kind=SpanKind.SERVER, **quiet) as span:
            try:
                yield span
            except BaseException as error:
                status = error.status if isinstance(error, Problem) else 500
                span.set_attribute("error.type", error.code if isinstance(error, Problem) else type(error).__name__)
                if isinstance(error, Problem):
                    span.set_attribute("http.response.status_code", status)
                if status >= 500:  # errors of the client do not mark the span as failed
                    span.set_status(StatusCode.ERROR)
                raise
            span.set_attribute("http.response.status_code", 200)

    def stage(self, name: str, seconds: float) -> None:
        """Record a stage that has just ended as a child of the request's span."""
        if self._provider is not None:
            end = time.time_ns()
            self._tracer.start_span(name, start_time=end - int(seconds * 1e9)).end(end)

    def close(self) -> None:
        """Send the remaining spans."""
        if self._provider is not None:
            self._provider.shutdown()
