"""Students: the models training starts from. RECIPES has one row per way to make one.

``layers``   some layers of a cross-encoder (as DistilBERT, arXiv 1910.01108)
``alibi``    a BERT with learned positions, turned into an ALiBi model (arXiv 2108.12409) for long input: each slope is
             assigned to the head whose attention it changes least. The positions either stay, and their last rows
             repeat, or their mean is added to the word embeddings; :mod:`turborank.distill.recover` then restores the
             quality lost.
``scratch``  random weights (normal, standard deviation 0.02) of a named shape, with a vocabulary of your own

After training, :func:`average` takes the mean of the weights of runs that started from the same student (model soups,
arXiv 2203.05482), :func:`platt` fits scale and bias of the logits, and :func:`write_int8` quantises to a quarter of the
bytes.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from safetensors.numpy import save_file as save_arrays
from safetensors.torch import save_file
from scipy.optimize import linear_sum_assignment, root
from scipy.special import expit
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch import Tensor

from turborank import checkpoint
from turborank.architectures import ARCHITECTURES, encoder, jinabert, recognise
from turborank.checkpoint import verify
from turborank.checkpoint.tensors import SCALE, dense, quantise
from turborank.data.files import os_errors, replacing_together, write_json, write_text
from turborank.distill.biencoder import BiEncoder
from turborank.errors import CheckpointError, InputError, UnknownKeyError
from turborank.ops import torch_training
from turborank.types import ModelConfig, PackedBatch

WORDS, SEGMENTS = "embeddings.word_embeddings.weight", "embeddings.token_type_embeddings.weight"
COSINE_SCALE = 20.0  # initial logit of a cosine of 1
# Initial weight of a passage's cosine in the document's mean (docs/model.md §3.5). Chosen on QMSum's validation and
# SciFact's training queries with states of all-MiniLM-L6-v2 in passages of 16 tokens: nDCG@10 .610 and .730, without
# focus .468 and .722.
FOCUS = 15.0
HEADS = ("focus", "cosine", "classifier", "sum")
POSITIONS = ("mean", "repeat")
REPEAT_FROM = 64  # rows of the position table before it are those of most queries, and do not repeat
# Parameters of the last linear of every head: scaling these scales the logits.
LOGIT_PARAMETERS = {f"{name}.{kind}" for name in ("classifier", "classifier.out_proj") for kind in ("weight", "bias")}
LOGIT_PARAMETERS |= {"head.scale", "head.bias"}
RIDGE = 1e-6  # L2 penalty that keeps the regression of Platt scaling finite on separable data
Float64 = npt.NDArray[np.float64]

# 2^-4 to 2^-9.5. Heads of trained BERTs attend far: for each of all-MiniLM-L6-v2's 72 heads the slope that explains its
# attention best (KL) is between 0 and 0.03. With ALiBi's standard slopes (0.7 to 0.004) the pooled vectors of the
# untrained student have a mean cosine of .56 to the source's, with these .79.
_GENTLE = (-4.0, -9.5)


def gentle_slopes(heads: int) -> tuple[float, ...]:
    """(H,) slopes: a geometric series from 2^-4 to 2^-9.5."""
    first, last = _GENTLE
    step = (last - first) / max(1, heads - 1)
    return tuple(2.0 ** (first + h * step) for h in range(heads))


SLOPES: dict[str, Callable[[int], tuple[float, ...]]] = {"gentle": gentle_slopes, **jinabert.SLOPE_RULES}

ALIBI: dict[str, Any] = {
    "architectures": ["JinaBertForSequenceClassification"],
    "model_type": "bert",
    "hidden_act": "gelu",
}
ALIBI |= {"position_embedding_type": "alibi", "num_labels": 1, "max_position_embeddings": 8192, "pad_token_id": 0}
SHAPES: dict[str, dict[str, Any]] = {
    "turbo": {"num_hidden_layers": 6, "hidden_size": 384, "num_attention_heads": 12, "intermediate_size": 1536},
    "tiny": {"num_hidden_layers": 4, "hidden_size": 384, "num_attention_heads": 12, "intermediate_size": 1536},
    "embedded": {"num_hidden_layers": 6, "hidden_size": 384, "num_attention_heads": 12, "intermediate_size": 1536},
    "micro": {"num_hidden_layers": 2, "hidden_size": 64, "num_attention_heads": 2, "intermediate_size": 128},
}
for _name, _shape in SHAPES.items():
    _shape.update(type_vocab_size=2, layer_norm_eps=1e-12)
    _shape["feed_forward_type"] = "geglu" if _name in ("turbo", "tiny") else "original"


@dataclass
class Student:
    """The contents of a model folder. ``weights`` are float32 under canonical names."""

    weights: dict[str, Tensor]
    raw_config: dict[str, Any]
    tokenizer: Tokenizer

    @property
    def config(self) -> ModelConfig:
        return recognise(self.raw_config, {name: tuple(w.shape) for name, w in self.weights.items()})

    @classmethod
    def load(cls, model: str | Path | None) -> Student:
        """A model that turborank loads (name or folder), with int8 matrices dequantised."""
        loaded = checkpoint.load(model)
        weights = {name: torch.from_numpy(w.copy()) for name, w in dense(loaded.weights).items()}
        return cls(weights, copy.deepcopy(loaded.raw_config), loaded.tokenizer)

    def save(self, folder: Path) -> None:
        """Write a model folder (three files, replaced together) that ``Reranker(folder)`` loads."""
        tensors = {name: w.detach().float().contiguous() for name, w in self.weights.items()}
        with replacing_together(folder) as new, os_errors(folder / verify.WEIGHTS):
            save_file(tensors, new / verify.WEIGHTS, metadata={"format": "pt"})
            self.save_around(new)

    def save_around(self, folder: Path) -> None:
        """Write ``config.json`` and ``tokenizer.json``, the files of a model folder beside the weights."""
        write_json(folder / verify.CONFIG, self.raw_config)
        write_text(folder / verify.TOKENIZER, self.tokenizer.to_str())


def _chosen(layers: int | Sequence[int], of: int) -> tuple[int, ...]:
    """Indices of the layers to keep: those listed, or a number of evenly spread ones with the first and the last."""
    if isinstance(layers, int):
        if not 1 <= layers <= of:
            raise InputError(f"expected 1 to {of} layers, for the source has {of}, got {layers}")
        return tuple(round(i * (of - 1) / (layers - 1)) for i in range(layers)) if layers > 1 else (of - 1,)
    kept = tuple(layers)
    if not kept or len(set(kept)) < len(kept) or not set(kept) <= set(range(of)):
        raise InputError(f"expected different layers between 0 and {of - 1}, for the source has {of}, got {list(kept)}")
    return kept


def keep_layers(weights: Mapping[str, Tensor], kept: Sequence[int]) -> dict[str, Tensor]:
    """Copies of weights with only the layers ``kept``, renumbered from 0."""
    index = {old: new for new, old in enumerate(kept)}
    out: dict[str, Tensor] = {}
    for name, w in weights.items():
        parts = name.split(".")
        if parts[:2] != ["encoder", "layer"]:
            out[name] = w.clone()
        elif int(parts[2]) in index:
            parts[2] = str(index[int(parts[2])])
            out[".".join(parts)] = w.clone()
    return out


def from_layers(teacher: str | Path, *, layers: int | Sequence[int]) -> Student:
    """A student of some layers of a cross-encoder (a number: evenly spread), with its embeddings and head.

    Raises InputError for layers the source has not, CheckpointError for a model with sliding-window layers.
    """
    source = Student.load(teacher)
    if source.config.global_layers:
        raise CheckpointError(
            f"expected a source whose layers are all alike, got {source.config.architecture}: its layers alternate "
            "between windows and the whole pair, so a subset would compute something else"
        )
    kept = _chosen(layers, source.config.num_hidden_layers)
    raw = source.raw_config | {"num_hidden_layers": len(kept)}
    return Student(keep_layers(source.weights, kept), raw, source.tokenizer)


def from_bert(
    folder: str | Path,
    *,
    layers: int | Sequence[int] | None = None,
    slopes: str = "gentle",
    head: str = "focus",
    positions: str = "mean",
    probes: Sequence[str] = (),
    max_length: int = 8192,
    seed: int = 0,
) -> Student:
    """A BERT encoder (bi-encoder, cross-encoder or bare) as an ALiBi student, before recovery.

    ``probes``: some texts of at least 50 tokens, on which heads are assigned to slopes. Without them heads keep their
    order, which loses much (mean pooled cosine .25 instead of .61 with the standard slopes). ``head``: one of HEADS,
    see docs/model.md §3.5. ``positions``: ``mean`` (for a bi-encoder) or ``repeat`` (for a cross-encoder, whose ranking
    depends on them: docs/model.md §3.1; segments stay, too).

    Raises UnknownKeyError for unknown slopes, heads or positions, InputError for a source with too few positions.
    """
    if slopes not in SLOPES:
        raise UnknownKeyError("slopes", slopes, SLOPES)
    if head not in HEADS:
        raise UnknownKeyError("head", head, HEADS)
    if positions not in POSITIONS:
        raise UnknownKeyError("positions", positions, POSITIONS)
    source = BiEncoder.load(folder)
    heads, c = source.config.num_attention_heads, source.config.hidden_size
    raw = dict(ALIBI) | {"alibi_slopes": list(SLOPES[slopes](heads)), "feed_forward_type": "original"}
    raw |= {"hidden_size": c, "num_attention_heads": heads, "intermediate_size": source.config.intermediate_size}
    raw |= {"num_hidden_layers": source.config.num_hidden_layers, "vocab_size": source.config.vocab_size}
    raw |= {"type_vocab_size": 2, "layer_norm_eps": source.config.layer_norm_eps}
    raw["max_position_embeddings"] = max_length
    weights = {name: w.clone() for name, w in source.weights.items() if name.startswith(("embeddings", "encoder"))}
    kinds = weights[SEGMENTS]
    if positions == "repeat":
        rows = len(weights[jinabert.POSITIONS])
        if rows <= REPEAT_FROM:
            raise InputError(f"expected a source with more than {REPEAT_FROM} positions to repeat, got {rows}")
        raw |= {"repeat_positions_from": REPEAT_FROM} if rows < max_length else {"max_position_embeddings": rows}
        weights[SEGMENTS] = kinds if len(kinds) == 2 else kinds[:1].repeat(2, 1)
    else:
        weights[WORDS] += weights.pop(jinabert.POSITIONS).mean(0) + kinds[0]
        weights[SEGMENTS] = torch.zeros(2, c)
    weights |= _new_head(head, c, source.weights, torch.Generator().manual_seed(seed))
    student = Student(weights, raw, source.tokenizer)
    if probes:
        match_heads(student.weights, student.config, source, probes)
    if layers is not None:
        kept = _chosen(layers, source.config.num_hidden_layers)
        student.weights = keep_layers(student.weights, kept)
        student.raw_config["num_hidden_layers"] = len(kept)
    return student


def _new_head(head: str, c: int, source: Mapping[str, Tensor], rng: torch.Generator) -> dict[str, Tensor]:
    if head in jinabert.COSINES:
        return _cosine(head)
    fresh = {
        "pooler.dense.weight": torch.randn(c, c, generator=rng) * 0.02,
        "pooler.dense.bias": torch.zeros(c),
        "classifier.weight": torch.randn(1, c, generator=rng) * 0.02,
        "classifier.bias": torch.zeros(1),
    }
    kept = {
        name: source[name].clone() if name in source and source[name].shape == w.shape else w
        for name, w in fresh.items()
    }
    return kept | _cosine(head)


def from_scratch(
    tokenizer: Tokenizer,
    *,
    shape: str = "tiny",
    layers: int | None = None,
    head: str = "classifier",
    slopes: str = "standard",
    seed: int = 0,
) -> Student:
    """Random weights of a row of SHAPES, for a tokenizer with a pair template (see :func:`train_tokenizer`).

    Raises UnknownKeyError for an unknown shape, slopes or head.
    """
    if shape not in SHAPES:
        raise UnknownKeyError("shape", shape, SHAPES)
    if slopes not in SLOPES:
        raise UnknownKeyError("slopes", slopes, SLOPES)
    if head not in HEADS:
        raise UnknownKeyError("head", head, HEADS)
    if layers is not None and layers < 1:
        raise InputError(f"expected one layer or more, got {layers}")
    raw = dict(ALIBI) | SHAPES[shape] | {"vocab_size": tokenizer.get_vocab_size()}
    raw["num_hidden_layers"] = layers or raw["num_hidden_layers"]
    raw["alibi_slopes"] = list(SLOPES[slopes](raw["num_attention_heads"]))
    fresh = _cosine(head)
    names: dict[str, tuple[int, ...]] = dict.fromkeys(fresh, (1,))
    if head == "sum":
        names["classifier.weight"] = ()
    if raw["feed_forward_type"] == "geglu":
        names["encoder.layer.0.mlp.gated_layers.weight"] = ()
    config = jinabert.recognise(raw, names)
    if config is None:
        raise CheckpointError(f"expected shape {shape!r} to be a JinaBERT's, got another family")
    rng = torch.Generator().manual_seed(seed)
    weights: dict[str, Tensor] = {}
    for name, size in ARCHITECTURES["jinabert"].parameters(config).items():
        if len(size) == 2:
            weights[name] = torch.randn(*size, generator=rng) * 0.02
        else:
            norm = name.endswith(".weight")  # the only vectors named weight are those of LayerNorms
            weights[name] = torch.ones(*size) if norm else torch.zeros(*size)
    return Student(weights | fresh, raw, tokenizer)


def _cosine(head: str) -> dict[str, Tensor]:
    """Initial parameters of a head's cosine; none for the classifier."""
    initial = {"head.scale": COSINE_SCALE, "head.bias": 0.0, "head.focus": FOCUS}
    return {name: torch.tensor([initial[name]]) for name in jinabert.cosine_parameters(head)}


class StudentRecipe(NamedTuple):
    """A row of RECIPES."""

    make: Callable[..., Student]
    note: str


RECIPES: dict[str, StudentRecipe] = {
    "layers": StudentRecipe(from_layers, "some layers of a cross-encoder that turborank loads"),
    "alibi": StudentRecipe(
        from_bert, "a BERT encoder, positions replaced by ALiBi: reads 8,192 tokens after `recover`"
    ),
    "scratch": StudentRecipe(from_scratch, "random weights, with a vocabulary of its own"),
}


# Assigning ALiBi slopes to the attention heads of a BERT, without training.

PROBE_TOKENS = 200  # per text


def match_heads(weights: dict[str, Tensor], config: ModelConfig, source: BiEncoder, texts: Sequence[str]) -> None:
    """Permute the heads of ``weights`` in place, layer by layer, so that each slope gets the head it changes least.

    The cost of a head under a slope is the cross entropy between the source's attention (on the source's hidden states)
    and the head's attention with the slope's bias (on the student's, lower layers already permuted). The assignment of
    least total cost is found by the Hungarian algorithm (scipy).
    """
    batches = [source.pack([ids]) for ids in source.token_ids(texts, PROBE_TOKENS)]
    for layer in range(config.num_hidden_layers):
        name = f"encoder.layer.{layer}.attention"
        cost = sum(_costs(weights, config, source, name, layer, batch) for batch in batches)
        assign_heads(weights, name, cost)  # type: ignore[arg-type]


def assign_heads(weights: dict[str, Tensor], name: str, cost: Tensor) -> None:
    """Permute the heads of the attention ``name`` in place, for the least total of ``cost`` (H heads, H slopes)."""
    heads, slopes = linear_sum_assignment(cost.numpy())
    order = torch.empty(len(heads), dtype=torch.long)
    order[torch.as_tensor(slopes)] = torch.as_tensor(heads)  # slope h gets the old head order[h]
    size = len(weights[f"{name}.self.query.bias"]) // len(heads)
    rows = (order[:, None] * size + torch.arange(size)).flatten()
    for part in encoder.PROJECTIONS:
        for kind in ("weight", "bias"):
            key = f"{name}.self.{part}.{kind}"
            weights[key] = weights[key][rows]
    weights[f"{name}.output.dense.weight"] = weights[f"{name}.output.dense.weight"][:, rows]


def _costs(
    weights: dict[str, Tensor], config: ModelConfig, source: BiEncoder, name: str, layer: int, batch: PackedBatch
) -> Tensor:
    """Costs (H heads, H slopes) of one text."""
    heads = config.num_attention_heads
    want = torch.softmax(_scores(source.weights, name, source.layers(batch)[layer], heads), dim=-1)
    have = _scores(weights, name, _layers(weights, config, batch)[layer], heads)
    steps = torch.arange(have.shape[-1])
    distance = (steps[:, None] - steps[None, :]).abs()
    columns = [-(want * torch.log_softmax(have - slope * distance, dim=-1)).sum(-1).mean(-1) for slope in config.slopes]
    return torch.stack(columns, dim=1)


def _scores(weights: dict[str, Tensor], name: str, x: Tensor, heads: int) -> Tensor:
    """Attention scores of one text before the softmax: (H, n, n)."""
    q, k = (encoder.dense(weights, f"{name}.self.{part}", x, torch_training) for part in ("query", "key"))
    q, k = (y.view(y.shape[0], heads, -1).transpose(0, 1) for y in (q, k))
    scores: Tensor = q @ k.transpose(1, 2) / q.shape[-1] ** 0.5
    return scores


def _layers(weights: dict[str, Tensor], config: ModelConfig, batch: PackedBatch) -> list[Tensor]:
    """The student's hidden states of one text, read without a query: L+1 tensors (n, C)."""
    trace: list[Tensor] = []
    bounds: Any = batch.cu_seqlens
    with torch.no_grad():
        x = jinabert.embed(weights, config, batch, torch_training)
        encoder.encode(weights, config, x, bounds, torch_training, first_only=False, trace=trace)
    return trace


# Training a tokenizer with the pair template a cross-encoder needs.

TOKENIZERS = ("wordpiece", "bpe")
MIN_VOCABULARY = 64  # pieces; fewer cannot hold an alphabet


def train_tokenizer(texts: Sequence[str], *, kind: str = "wordpiece", size: int = 16_384) -> Tokenizer:
    """A tokenizer of at most ``size`` pieces, trained on texts.

    ``wordpiece``: as BERT's (uncased, `[CLS] q [SEP] d [SEP]`, arXiv 1810.04805). ``bpe``: byte-level, as RoBERTa's
    (arXiv 1907.11692; `<s> q </s></s> d </s>`), without unknown pieces. Raises UnknownKeyError for another kind,
    InputError for no texts or fewer than MIN_VOCABULARY pieces.
    """
    if kind not in TOKENIZERS:
        raise UnknownKeyError("vocabulary", kind, TOKENIZERS)
    if size < MIN_VOCABULARY or not texts:
        raise InputError(
            f"expected texts and at least {MIN_VOCABULARY} pieces, got {len(texts)} texts and {size} pieces"
        )
    if kind == "wordpiece":
        return _wordpiece(texts, size)
    return _bpe(texts, size)


def _wordpiece(texts: Sequence[str], size: int) -> Tokenizer:
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(vocab_size=size, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    begin, end = (tokenizer.token_to_id(token) for token in ("[CLS]", "[SEP]"))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", begin), ("[SEP]", end)]
    )
    return tokenizer


def _bpe(texts: Sequence[str], size: int) -> Tokenizer:
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=max(size, 256 + len(special)), special_tokens=special, show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    tokenizer.train_from_iterator(texts, trainer)
    begin, end = (tokenizer.token_to_id(token) for token in ("<s>", "</s>"))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> </s> $B:1 </s>:1", special_tokens=[("<s>", begin), ("</s>", end)]
    )
    return tokenizer


# ---------------------------------------------------------------- from training runs to a published folder


def average(folders: Sequence[str | Path]) -> Student:
    """The mean of several models of equal shapes. Raises InputError where shapes differ or there is no model."""
    if not folders:
        raise InputError("expected at least one model to ship, got none")
    students = [Student.load(Path(folder)) for folder in folders]
    first = students[0]
    shapes = {name: w.shape for name, w in first.weights.items()}
    for folder, other in zip(folders, students, strict=True):
        if {name: w.shape for name, w in other.weights.items()} != shapes:
            raise InputError(f"expected models of one shape to average, got another at {folder}")
    for name in shapes:
        first.weights[name] = sum(s.weights[name] for s in students) / len(students)  # type: ignore[assignment]
    return first


def platt(logits: npt.NDArray[np.floating], labels: npt.NDArray[np.bool_]) -> tuple[float, float]:
    """(factor, bias) of the class-balanced logistic regression of ``labels`` (N,) on ``logits`` (N,).

    Platt scaling (J. Platt, "Probabilistic outputs for support vector machines", 1999). With balanced classes, a score
    of ½ means that a labelled document and a candidate from its pool are equally likely. The factor is positive, so the
    ranking does not change.

    Raises InputError for labels of one class only, and for a factor that is not positive: the model ranks backwards.
    """
    if labels.all() or not labels.any():
        raise InputError("expected labelled and other documents to calibrate on, got only one kind")
    x = np.stack([logits, np.ones_like(logits)], axis=1).astype(np.float64)
    y = labels.astype(np.float64)
    weight = np.where(labels, 0.5 / labels.sum(), 0.5 / (~labels).sum())

    def gradient(w: Float64) -> Float64:
        return np.asarray(x.T @ (weight * (expit(x @ w) - y)) + RIDGE * w)

    def hessian(w: Float64) -> Float64:
        p = expit(x @ w)
        return np.asarray((x.T * (weight * p * (1 - p))) @ x + RIDGE * np.eye(2))

    # The loss is strictly convex: the one root of its gradient is the minimum, to more digits than its value shows.
    factor, bias = map(float, root(gradient, np.zeros(2), jac=hessian, method="lm", tol=1e-12).x)
    if not factor > 0:
        raise InputError(
            f"expected logits that rise with relevance, got a factor of {factor:.3g}: the model ranks backwards"
        )
    return factor, bias


def scale_logits(student: Student, factor: float, bias: float) -> None:
    """Multiply ``factor`` and add ``bias`` to every logit, in place, in the last layer of the head."""
    for name in LOGIT_PARAMETERS & set(student.weights):
        student.weights[name] = student.weights[name] * factor
    for name in ("head.bias", "classifier.bias", "classifier.out_proj.bias"):
        if name in student.weights:
            student.weights[name] = student.weights[name] + bias


def write_int8(student: Student, folder: Path) -> None:
    """Write a model folder with int8 matrices, one scale per row (docs/model.md §2.3)."""
    tensors: dict[str, npt.NDArray[np.generic]] = {}
    for name, weight in sorted(student.weights.items()):
        value = weight.detach().float().numpy()
        if value.ndim == 2:
            tensors[name], tensors[name + SCALE] = quantise(value)
        else:
            tensors[name] = value
    with replacing_together(folder) as new, os_errors(folder / verify.WEIGHTS):
        save_arrays(tensors, new / verify.WEIGHTS, metadata={"format": "np"})
        student.save_around(new)
