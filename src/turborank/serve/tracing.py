"""OpenTelemetry spans, for those who install the extra ``otel`` and name an endpoint; otherwise nothing at all."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from turborank.errors import InputError


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
        from opentelemetry.trace import SpanKind
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        context = TraceContextTextMapPropagator().extract(headers)
        with self._tracer.start_as_current_span("rerank", context=context, kind=SpanKind.SERVER) as span:
            yield span

    def stage(self, name: str, seconds: float) -> None:
        """A stage that has just ended, as a child of the request's span."""
        if self._provider is not None:
            end = time.time_ns()
            self._tracer.start_span(name, start_time=end - int(seconds * 1e9)).end(end)

    def close(self) -> None:
        """Send what is left."""
        if self._provider is not None:
            self._provider.shutdown()
