"""The native engine: the C++ twin of the forward pass."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from turborank.errors import EngineUnavailableError
from turborank.types import ModelConfig

PRECISIONS = ("int8", "fp32", "bf16")


def available() -> str | None:
    try:
        import turborank._native
    except ImportError as error:
        return f"the C++ extension is not built ({error})"
    return None


def supports(config: ModelConfig) -> bool:
    return config.architecture == "jinabert"


def prepare(weights: Mapping[str, Any], config: ModelConfig, *, precision: str, threads: int) -> Any:
    raise EngineUnavailableError("the native engine is not built")
