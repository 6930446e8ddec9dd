"""The models of one server process: loaded on first use, unloaded above a memory limit."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Executor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from turborank import catalog
from turborank.architectures import ARCHITECTURES
from turborank.errors import InputError, TurborankError
from turborank.reranker import Reranker
from turborank.serve.config import Settings
from turborank.serve.wire import Problem, from_error
from turborank.types import Pair

_MIB = 1024 * 1024
UNSPECIFIED = ("", "default/not-specified")  # the second is Infinity's
BYTES = {"int8": 1, "bf16": 2, "fp16": 2, "fp32": 4}
_WARM_UP = Pair(
    "how do bees choose a home?", "Scouts dance for the place they found, and the swarm follows the liveliest dance."
)


class ServedModel:
    """One served model, loaded or not."""

    def __init__(self, name: str, source: str | None) -> None:
        self.name = name
        self.source = source  # argument of Reranker; None: the embedded model
        self.created = int(time.time())
        self.reranker: Reranker | None = None
        self.bytes = 0
        self.users = 0  # requests in progress
        self.used = 0.0  # time.monotonic() of the last use
        self.loading: asyncio.Task[Reranker] | None = None


def served(settings: Settings) -> list[ServedModel]:
    """The models named in the settings, the default first.

    Raises InputError for an invalid or repeated name, ModelNotFoundError for a model that another one replaced.
    """
    models: list[ServedModel] = []
    for text in settings.model or (catalog.DEFAULT,):
        name, separator, source = text.partition("=")
        if not separator:
            _refuse_retired(text)
            row = catalog.find(text)
            name, source = (row.name if row else Path(text).name if Path(text).exists() else text), text
        if not name or not source:
            raise InputError(f"expected model to be a name, a folder or NAME=either, got {text!r}")
        if name in {model.name for model in models}:
            raise InputError(
                f"expected each served model to have its own name, got {name!r} twice", hint="write NAME=FOLDER"
            )
        models.append(ServedModel(name, source))
    return models


class Models:
    """The served models by name and alias. Raises InputError for an alias or calibration of an unknown model."""

    def __init__(self, settings: Settings, pool: Executor, report: Callable[[str, dict[str, Any]], None]) -> None:
        self._settings = settings
        self._pool = pool
        self._report = report
        self._models = {model.name: model for model in served(settings)}
        self._newest: ServedModel | None = None  # loaded last
        self._names = {alias: name for name in self._models for alias in _aliases(name)}
        self._names |= {name: name for name in self._models}
        for alias in settings.alias:
            name, _, target = alias.partition("=")
            if target not in self._names:
                _refuse_retired(target)
                raise InputError(f"expected the alias {name!r} to name a served model, got {target!r}")
            self._names[name] = self._names[target]
        for one in settings.calibration:
            if (name := one.partition("=")[0]) not in self._names:
                _refuse_retired(name)
                raise InputError(f"expected calibration to name a served model, got {name!r}")

    @property
    def default(self) -> ServedModel:
        """The model for requests that do not name one."""
        return next(iter(self._models.values()))

    @property
    def ready(self) -> bool:
        """Whether the default model is loaded."""
        return self.default.reranker is not None

    @property
    def all(self) -> list[ServedModel]:
        return list(self._models.values())

    def find(self, name: str | None) -> ServedModel:
        """The served model with this name or alias. Raises Problem 404, which lists the names, for an unknown one."""
        if name is None or name in UNSPECIFIED:
            return self.default
        if name not in self._names:
            new = catalog.RETIRED.get(name)
            got = f"{name[:200]!r}, which {new} replaced" if new else f"{name[:200]!r}"
            raise Problem(
                404,
                "model_not_found",
                f"expected model to be one of {', '.join(sorted(self._names))}, got {got}; "
                "serve it with --model, or name it with --alias",
                param="model",
            )
        return self._models[self._names[name]]

    async def load(self, model: ServedModel) -> Reranker:
        """The model's reranker, loaded if necessary.

        Concurrent requests wait for the same load, which continues when all of them are cancelled.
        Raises Problem when the model cannot be loaded.
        """
        if model.reranker is not None:
            return model.reranker
        if model.loading is None:
            model.loading = asyncio.create_task(self._load(model))
            # Waiting requests get the exception; retrieving it here avoids asyncio's warning when none is left.
            model.loading.add_done_callback(lambda task: task.cancelled() or task.exception())
        return await asyncio.shield(model.loading)

    async def _load(self, model: ServedModel) -> Reranker:
        started = time.monotonic()
        try:
            reranker = await asyncio.get_running_loop().run_in_executor(self._pool, self._open, model)
        except TurborankError as error:
            self._report("model_failed", {"model": model.name, "error": str(error)})
            raise from_error(error) from error
        finally:
            model.loading = None
        model.bytes = weight_bytes(reranker)
        model.reranker = reranker
        model.used = time.monotonic()
        self._report("model_loaded", {"model": model.name, "seconds": round(time.monotonic() - started, 3)})
        self._newest = model
        self._make_room()
        return reranker

    @contextmanager
    def using(self, model: ServedModel) -> Iterator[None]:
        """Keep the model loaded while the context is active."""
        model.users += 1
        try:
            yield
        finally:
            model.users -= 1
            model.used = time.monotonic()
            self._make_room()  # a model that was in use when the newest was loaded may go now

    def _open(self, model: ServedModel) -> Reranker:
        settings = self._settings
        reranker = Reranker(
            model.source,
            engine=settings.engine,
            precision=settings.precision,
            length=settings.length,
            max_length=settings.max_length or None,
            threads=settings.threads or None,
            offline=settings.offline or None,
        )
        for one in settings.calibration:
            name, _, file = one.partition("=")
            if self._names[name] == model.name:
                reranker.calibrate(file)
        _ = reranker.calibration  # read now, so that an invalid file fails the load and not a request
        reranker.score([_WARM_UP])  # the first forward pass allocates buffers that later ones reuse
        return reranker

    def _make_room(self) -> None:
        bound = self._settings.model_memory * _MIB
        loaded = sorted((model for model in self.all if model.reranker is not None), key=lambda model: model.used)
        total = sum(model.bytes for model in loaded)
        for model in loaded:
            if total > bound and model is not self._newest and model is not self.default and not model.users:
                model.reranker = None
                total -= model.bytes
                self._report("model_unloaded", {"model": model.name})


def weight_bytes(reranker: Reranker) -> int:
    """Bytes of the model's parameters in the engine's precision."""
    config = reranker.checkpoint.config
    count = sum(math.prod(shape) for shape in ARCHITECTURES[config.architecture].parameters(config).values())
    return count * BYTES[reranker.engine.precision]


def _refuse_retired(name: str) -> None:
    """Raise ModelNotFoundError for the name of a replaced model that is no folder here either."""
    if name in catalog.RETIRED and not Path(name).exists():
        raise catalog.retired(name)


def _aliases(name: str) -> tuple[str, ...]:
    row = catalog.find(name)
    return (*row.aliases, *((row.repo,) if row.repo else ())) if row else ()
