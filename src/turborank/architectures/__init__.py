"""ARCHITECTURES: one row for each model family, and the function that decides the family of a checkpoint.

A family is three functions: ``recognise`` (config.json and tensor shapes -> ModelConfig or None),
``parameters`` (ModelConfig -> name and shape of every tensor) and ``forward`` (weights, config, batch, ops ->
logits). docs/model.md specifies the families, docs/architecture.md says how to add one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from turborank.architectures import bert, deberta, jinabert, modernbert
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
    "xlm_roberta": Architecture(bert.recognise_roberta, bert.parameters, bert.forward),
    "deberta": Architecture(deberta.recognise, deberta.parameters, deberta.forward),
    "modernbert": Architecture(modernbert.recognise, modernbert.parameters, modernbert.forward),
    "electra": Architecture(bert.recognise_electra, bert.parameters, bert.forward),
}

# Word embedding tables. Engines leave them in the file: they are the largest tensors, and a batch needs few rows.
WORD_TABLES = ("embeddings.word_embeddings.weight", modernbert.WORDS)

# (part of a tensor name, the family it indicates), most specific first. Used in error messages only.
_SIGNS = (
    ("mlp.gated_layers.", "JinaBERT's (position_embedding_type 'alibi')"),
    (".mixer.Wqkv.", "an XLM-RoBERTa's as jina-reranker-v2 names them"),
    (".attn.Wqkv.", "ModernBERT's (model_type 'modernbert')"),
    ("encoder.rel_embeddings.", "DeBERTa-v2's (model_type 'deberta-v2')"),
    (".attention.qkv_proj.", "Alibaba's gte (model_type 'new'), which turborank does not run"),
    (".self_attn.q_norm.", "a Qwen3's, a decoder, which turborank does not run"),
    (".self_attn.q_proj.", "a decoder's (Qwen, Llama, Gemma …), which turborank does not run"),
    (".attention.q_lin.", "DistilBERT's, which turborank does not run"),
    (".SelfAttention.q.", "T5's, which turborank does not run"),
    ("encoder.albert_layer_groups.", "ALBERT's, which turborank does not run"),
    ("classifier.out_proj.", "a RoBERTa's or an ELECTRA's (model_type 'xlm-roberta', 'roberta' or 'electra')"),
    (".attention.self.query.", "BERT's (model_type 'bert')"),
)


def resembles(shapes: Mapping[str, tuple[int, ...]]) -> str | None:
    """The family that the tensor names indicate, worded for an error message; None if no known name occurs."""
    return next((whose for part, whose in _SIGNS if any(part in f".{name}" for name in shapes)), None)


def recognise(raw: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> ModelConfig:
    """The ModelConfig of a checkpoint, decided by config.json and tensor names, never by the model's name.

    Args:
        raw: the parsed config.json.
        shapes: canonical tensor name -> shape.

    Raises:
        CheckpointError: no family recognises the checkpoint, or its family does not support this variant.

    """
    for architecture in ARCHITECTURES.values():
        config = architecture.recognise(raw, shapes)
        if config is not None:
            return config
    kind = f"model_type {raw.get('model_type')!r}, position_embedding_type {raw.get('position_embedding_type')!r}"
    whose = resembles(shapes)
    alike = f"; its tensors look like {whose}" if whose else ""
    raise CheckpointError(
        f"expected a model of one of these families: {', '.join(ARCHITECTURES)}; got {kind} in config.json{alike}"
    )
