"""Checkpoints with random weights in the shapes of the catalog's models, for measurements of speed."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from turborank import benchmark, catalog

# Architecture -> (prefix of transformers' classes, what their configuration says beyond the sizes of the catalog).
CLASSES: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("Bert", {"vocab_size": 30522}),
    "electra": ("Electra", {"vocab_size": 30522}),
    "xlm_roberta": ("XLMRoberta", {"vocab_size": 250002, "type_vocab_size": 1, "layer_norm_eps": 1e-5}),
    "deberta": ("DebertaV2", {
        "vocab_size": 128100, "type_vocab_size": 0, "layer_norm_eps": 1e-7, "relative_attention": True,
        "position_buckets": 256, "max_relative_positions": -1, "share_att_key": True, "norm_rel_ebd": "layer_norm",
        "pos_att_type": "p2c|c2p", "position_biased_input": False, "pooler_hidden_act": "gelu", "pooler_dropout": 0}),
    "modernbert": ("ModernBert", {"vocab_size": 50368}),
}  # fmt: skip
# Heads, where they have not 64 channels each, and poolings, where they are not of the first token.
HEADS = {"ms-marco-TinyBERT-L-4": 12, **dict.fromkeys(
    ("ms-marco-MiniLM-L-2-v2", "ms-marco-MiniLM-L-4-v2", "ms-marco-MiniLM-L-6-v2", "ms-marco-MiniLM-L-12-v2",
     "mmarco-mMiniLMv2-L12-H384-v1"), 12)}  # fmt: skip
POOLING = {"gte-reranker-modernbert-base": "mean"}
# The models that can be had, and those of them that transformers' classes run.
RELEASED = tuple(row for row in catalog.MODELS.values() if row.embedded or row.repo)
FAMILIES = tuple(row.name for row in RELEASED if row.architecture in CLASSES)


def configuration(row: catalog.Model) -> dict[str, Any]:
    """What transformers' configuration class of the row's architecture is given."""
    values = {
        "num_labels": 1, "hidden_size": row.hidden_size, "num_hidden_layers": row.layers,
        "intermediate_size": row.intermediate_size, "max_position_embeddings": row.max_length,
        "num_attention_heads": HEADS.get(row.name, row.hidden_size // 64),
    } | CLASSES[row.architecture][1]  # fmt: skip
    if row.architecture == "electra":
        values["embedding_size"] = row.hidden_size
    if row.architecture == "xlm_roberta":
        values["max_position_embeddings"] += 2  # the first two positions are for padding
    if row.architecture == "modernbert":
        values["classifier_pooling"] = POOLING.get(row.name, "cls")
    return values


def network(row: catalog.Model) -> Any:
    """The row's model as transformers' class, with its initial weights."""
    import transformers

    prefix = CLASSES[row.architecture][0]
    config = getattr(transformers, f"{prefix}Config")(**configuration(row))
    return getattr(transformers, f"{prefix}ForSequenceClassification")(config)


def write(row: catalog.Model, folder: Path, tokenizer: Path, *, half: bool = False) -> None:
    """A checkpoint of the row's shape in ``folder``, in bfloat16 if ``half``. The tokenizer is not used.

    Sets torch's default type and its seed, so call it in a process of its own.
    """
    if row.architecture == "jinabert":
        benchmark.write_model(folder, tokenizer, layers=row.layers)
        return
    import torch

    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16 if half else torch.float32)
    network(row).save_pretrained(folder)
    shutil.copyfile(tokenizer, folder / "tokenizer.json")
