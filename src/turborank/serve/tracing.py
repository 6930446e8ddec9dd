"""OpenTelemetry spans, for those who install the extra ``otel`` and name an endpoint; otherwise nothing at all."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from turborank.errors import InputError
from turborank.serve.problems import Problem


class Tracer:
    """A span for each request, with a child for each stage. ``exporter`` replaces the OTLP one."""

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
        """The span of a request, child of the caller's when its headers carry a trace context; None when off."""
        if self._provider is None:
            yield None
            return
        from opentelemetry.trace import SpanKind, StatusCode
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        context = TraceContextTextMapPropagator().extract(headers)
        # No exceptions are recorded: their messages may quote what the client sent.
        quiet = {"record_exception": False, "set_status_on_exception": False}
        with self._tracer.start_as_current_span("rerank", context=context, kind=SpanKind.SERVER, **quiet) as span:
            try:
                yield span
            except BaseException as error:
                status = error.status if isinstance(error, Problem) else 500
                span.set_attribute("error.type", error.code if isinstance(error, Problem) else type(error).__name__)
                if isinstance(error, Problem):
                    span.set_attribute("http.response.status_code", status)
                if status >= 500:  # what the client did wrong is no error of this server
                    span.set_status(StatusCode.ERROR)
                raise
            span.set_attribute("http.response.status_code", 200)

    def stage(self, name: str, seconds: float) -> None:
        """A stage that has just ended, as a child of the request's span."""
        if self._provider is not None:
            end = time.time_ns()
            self._tracer.start_span(name, start_time=end - int(seconds * 1e9)).end(end)

    def close(self) -> None:
        """Send what is left."""
        if self._provider is not None:
            self._provider.shutdown()
