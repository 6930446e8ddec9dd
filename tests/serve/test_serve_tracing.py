"""OpenTelemetry: a span per request with its stages, in the caller's trace; and the exported attributes."""

import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

pytest.importorskip("starlette", reason="the service needs pip install 'turborank[serve]'")
pytest.importorskip("opentelemetry.sdk", reason="needs pip install 'turborank[otel]'")

from opentelemetry.sdk.trace.export import in_memory_span_exporter as memory
from serving import running, until

from turborank.serve.telemetry import Tracer

BODY = {"query": "my private question", "documents": ["my private text", "tides"]}
TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
HEADERS = {"traceparent": f"00-{TRACE}-{PARENT}-01"}


def test_spans_are_children_of_the_callers(model):
    exporter = memory.InMemorySpanExporter()
    with running(model) as up:
        up.service.tracer = Tracer(exporter=exporter)
        assert up.ask("/v1/rerank", BODY, HEADERS).status == 200
        spans = {span.name: span for span in exporter.get_finished_spans()}
        exporter.clear()
        assert up.ask("/v1/rerank", {**BODY, "relevant_spans": True}).status == 200
        alone = [span for span in exporter.get_finished_spans() if span.name == "rerank"]
    assert set(spans) == {"rerank", "tokenise", "queue", "compute"}
    assert format(spans["rerank"].context.trace_id, "032x") == TRACE
    assert format(spans["rerank"].parent.span_id, "016x") == PARENT
    assert all(spans[stage].parent.span_id == spans["rerank"].context.span_id for stage in set(spans) - {"rerank"})
    assert all(span.start_time <= span.end_time for span in spans.values())
    assert [span.parent for span in alone] == [None]
    attributes = spans["rerank"].attributes
    assert attributes["http.response.status_code"] == 200
    assert (attributes["turborank.documents"], attributes["turborank.model"]) == (2, "bees")
    assert attributes["turborank.tokens"] > 0
    assert "private" not in str(attributes)


def test_refusals_and_failures_have_spans_that_do_not_quote_the_client(model):
    class Broken:
        name, precision, isa, threads = "broken", "fp32", "none", 1

        def logits(self, batch):
            raise RuntimeError("my private insides")

    exporter = memory.InMemorySpanExporter()
    with running(model) as up:
        up.service.tracer = Tracer(exporter=exporter)
        assert up.ask("/v1/rerank", {**BODY, "model": "my private model"}).status == 404
        up.service.models.default.reranker.engine = Broken()
        assert up.ask("/v1/rerank", BODY).status == 500
        refused, failed = (span for span in exporter.get_finished_spans() if span.name == "rerank")
    assert refused.attributes["http.response.status_code"] == 404
    assert refused.attributes["error.type"] == "model_not_found"
    assert refused.status.status_code.name == "UNSET"
    assert failed.status.status_code.name == "ERROR"
    assert "private" not in refused.to_json() + failed.to_json()


def test_they_are_sent_to_the_endpoint(model):
    """A collector of our own reads what the exporter sends, by the protocol's own definition."""
    from opentelemetry.proto.collector.trace.v1 import trace_service_pb2 as trace_service

    received = []

    class Collector(BaseHTTPRequestHandler):
        def do_POST(self):
            content = self.rfile.read(int(self.headers["Content-Length"]))
            received.append((self.path, self.headers["Content-Type"], content))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *arguments):
            pass

    collector = ThreadingHTTPServer(("127.0.0.1", 0), Collector)
    threading.Thread(target=collector.serve_forever, daemon=True).start()
    try:
        with running(model, otlp_endpoint=f"http://127.0.0.1:{collector.server_port}/v1/traces") as up:
            assert up.ask("/v1/rerank", BODY, HEADERS).status == 200
        until(lambda: received)  # what is left is sent when the server closes
    finally:
        collector.shutdown()
        collector.server_close()
    path, kind, content = received[0]
    assert (path, kind) == ("/v1/traces", "application/x-protobuf")
    [resource] = trace_service.ExportTraceServiceRequest.FromString(content).resource_spans
    named = {pair.key: pair.value.string_value for pair in resource.resource.attributes}
    assert named["service.name"] == "turborank"
    spans = [span for scope in resource.scope_spans for span in scope.spans]
    assert {span.name for span in spans} == {"rerank", "tokenise", "queue", "compute"}
    assert {span.trace_id.hex() for span in spans} == {TRACE}
    assert b"private" not in content
