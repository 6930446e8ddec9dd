"""Ray: rerank a Dataset with a pool of actors, and serve the HTTP dialects with Ray Serve; see docs/scale.md.

>>> dataset.map_batches(BatchReranker, concurrency=8, num_cpus=2, batch_size=2048)  # doctest: +SKIP
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from typing import Any

import ray
from ray import serve

from turborank.errors import UnknownKeyError
from turborank.integrations import open_in_process, recipe_of, score_columns
from turborank.reranker import Reranker
from turborank.serve import app, config
from turborank.serve.service import Service


class BatchReranker:
    """A class for ``ray.data.Dataset.map_batches`` that adds logit, score, tokens and truncated to a batch.

    Args:
        model: a Reranker, or the first argument of :class:`~turborank.Reranker`; each actor opens the model itself.
        query: column of the queries.
        document: column of the documents.
        options: other arguments of Reranker. ``threads`` is by default the actor's ``num_cpus``.

    Raises what Reranker raises, and InputError for a row without texts in these columns.
    """

    def __init__(
        self,
        model: str | os.PathLike[str] | Reranker | None = None,
        query: str = "query",
        document: str = "document",
        options: Mapping[str, Any] | None = None,
    ) -> None:
        self.query, self.document = query, document
        self.reranker = open_in_process(recipe_of(model, options), assigned_cpus())

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """The batch (a dict of numpy arrays, Ray's default format) with the four columns added."""
        return {**batch, **score_columns(self.reranker, batch[self.query], batch[self.document])}


def assigned_cpus() -> int:
    """Number of CPUs that Ray assigned to this task or actor, at least 1."""
    resources: Mapping[str, float] = ray.get_runtime_context().get_assigned_resources()
    return max(1, math.floor(resources.get("CPU", 1)))


def deployment(settings: Mapping[str, Any] | None = None, *, name: str = "turborank") -> Any:
    """A Ray Serve deployment of the HTTP service, with all its dialects, keys, limits and metrics.

    ``settings``: settings of ``turborank serve`` by name (docs/serving.md); ``threads`` is by default the replica's
    CPUs. Each replica has its own model and queue. Scale it with ``.options(num_replicas=…)``:

    >>> serve.run(deployment({"keys": "keys.toml"}).options(num_replicas=4).bind())  # doctest: +SKIP

    Raises UnknownKeyError for an unknown setting, and InputError for a value of the wrong type or range.
    """
    given = dict(settings or {})
    for setting in given:
        if setting not in config.FIELDS:
            raise UnknownKeyError("a setting", setting, config.FIELDS)
    config.load(given, environment={})  # raises here, not in a replica

    def build() -> Any:
        return app.build(Service(config.load({"threads": assigned_cpus(), **given}, environment={})))

    @serve.ingress(build)
    class TurborankService:
        """One replica."""

    scaled: Any = serve.deployment(name=name, ray_actor_options={"num_cpus": 1}, max_ongoing_requests=1000)
    return scaled(TurborankService)
