"""/metrics: what an operator watches, in Prometheus' format. One registry for each application, none global."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from turborank.serve.batcher import Batcher, Computed
from turborank.serve.models import Models

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_SHARES = (0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 1.0)


class Metrics:
    """All instruments."""

    def __init__(self, batcher: Batcher, models: Models) -> None:
        self.registry = registry = CollectorRegistry()
        self.requests = Counter(
            "turborank_requests", "Requests by dialect and HTTP status.", ("dialect", "status"), registry=registry
        )
        self.documents = Counter("turborank_documents", "Documents ranked.", registry=registry)
        self.tokens = Counter(
            "turborank_tokens", "Tokens of documents ranked, query and template included.", registry=registry
        )
        self.truncated = Counter(
            "turborank_truncated_documents", "Documents of which something was not read.", registry=registry
        )
        self.cut = Counter("turborank_truncated_tokens", "Tokens not read.", registry=registry)
        self.seconds = Histogram(
            "turborank_stage_seconds", "Seconds of a request by stage.", ("stage",), buckets=_SECONDS, registry=registry
        )
        self.batches = Counter("turborank_batches", "Batches computed.", registry=registry)
        self.computed = Counter("turborank_computed_tokens", "Tokens that went through the engine.", registry=registry)
        self.padding = Counter(
            "turborank_padding_saved_tokens",
            "Tokens that padding each batch to its longest pair would have added.",
            registry=registry,
        )
        self.fill = Histogram(
            "turborank_batch_fill", "Share of the token budget that a batch used.", buckets=_SHARES, registry=registry
        )
        self.mixed = Histogram(
            "turborank_batch_requests", "Requests in a batch.", buckets=(1, 2, 4, 8, 16, 32), registry=registry
        )
        self._gauge("turborank_queue_tokens", "Tokens waiting.", lambda: batcher.waiting_tokens)
        self._gauge("turborank_queue_requests", "Requests waiting.", lambda: batcher.waiting_requests)
        self._gauge("turborank_queue_seconds", "Seconds the queue will take, as measured.", batcher.wait_seconds)
        self._gauge("turborank_tokens_per_second", "Speed of the newest batches.", lambda: batcher.speed or 0.0)
        self._gauge("turborank_ready", "Whether the default model is loaded.", lambda: float(models.ready))
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

    def text(self) -> bytes:
        """The page."""
        return generate_latest(self.registry)
