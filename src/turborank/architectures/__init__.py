"""ARCHITECTURES: one row for each model family, and how a checkpoint is recognised as one of them.

A family is three plain functions: ``recognise`` (config and tensor shapes -> ModelConfig or None),
``parameters`` (ModelConfig -> every tensor with its shape) and ``forward`` (-> logits).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from turborank.architectures import bert, deberta, jinabert, modernbert, xlm_roberta
from turborank.errors import CheckpointError
from turborank.types import ModelConfig


class Architecture(NamedTuple):
    """One model family."""

    recognise: Callable[[Mapping[str, Any], Mapping[str, tuple[int, ...]]], ModelConfig | None]
    parameters: Callable[[ModelConfig], dict[str, tuple[int, ...]]]
    forward: Callable[..., Any]


ARCHITECTURES: dict[str, Architecture] = {
    "jinabert": Architecture(jinabert.recognise, jinabert.parameters, jinabert.forward),
    "bert": Architecture(bert.recognise, bert.parameters, bert.forward),
    "xlm_roberta": Architecture(xlm_roberta.recognise, xlm_roberta.parameters, xlm_roberta.forward),
    "deberta": Architecture(deberta.recognise, deberta.parameters, deberta.forward),
    "modernbert": Architecture(modernbert.recognise, modernbert.parameters, modernbert.forward),
}


def recognise(raw: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> ModelConfig:
    """The ModelConfig of a checkpoint, decided from its config and tensor names, never from its name."""
    for architecture in ARCHITECTURES.values():
        config = architecture.recognise(raw, shapes)
        if config is not None:
            return config
    kind = f"model_type {raw.get('model_type')!r}, position_embedding_type {raw.get('position_embedding_type')!r}"
    raise CheckpointError(
        f"expected a model of one of these families: {', '.join(ARCHITECTURES)}; got {kind} in config.json"
    )
