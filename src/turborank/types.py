"""The shared data types, as immutable values.

Dimension letters in docstrings and shape comments:

    P  pairs in a batch            L  layers            Q  queries
    T  tokens in a batch           H  heads             K  documents of one list
    n  tokens of one pair          D  head size
                                   C  = H·D, hidden size
                                   F  intermediate size
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

Float32 = npt.NDArray[np.float32]
Int32 = npt.NDArray[np.int32]
Document = str | Mapping[str, Any]
Progress = Callable[[int, int], None]  # (done, total), called from time to time
StartProgress = Callable[[str], Progress]  # name of a task -> where to report its progress


def no_progress(task: str) -> Progress:
    """A :data:`StartProgress` that reports nothing."""
    return lambda done, total: None


class Pair(NamedTuple):
    """A query and a document: the unit that the model scores."""

    query: str
    document: str


@dataclass(frozen=True, slots=True)
class Encoding:
    """The tokens of one pair (or of one window of it), special tokens included.

    ``query_cut`` and ``document_cut`` count every token that the length policy dropped.
    """

    input_ids: Int32  # (n,)
    type_ids: Int32  # (n,) segment of each token, as the model's template defines it
    read: int  # tokens of the pair that the model reads, over all windows; overlaps count once
    query_cut: int = 0
    document_cut: int = 0
    span: tuple[int, int] = (0, 0)  # (start, end) of this encoding in the document, in characters

    def __len__(self) -> int:
        return int(self.input_ids.shape[0])

    @property
    def truncated(self) -> int:
        """Tokens of the pair that the length policy dropped."""
        return self.query_cut + self.document_cut


@dataclass(frozen=True, slots=True)
class PackedBatch:
    """P pairs, concatenated without padding."""

    input_ids: Int32  # (T,)
    type_ids: Int32  # (T,)
    cu_seqlens: Int32  # (P+1,) pair p is tokens cu_seqlens[p] … cu_seqlens[p+1]-1
    max_seqlen: int

    @property
    def pairs(self) -> int:
        return int(self.cu_seqlens.shape[0]) - 1

    @property
    def tokens(self) -> int:
        return int(self.input_ids.shape[0])


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """The shape of a checkpoint and the variants of its forward pass, for all architectures.

    Built by :func:`turborank.architectures.recognise` from ``config.json`` and the tensor names.
    """

    architecture: str  # a row of ARCHITECTURES: "jinabert", "bert", "xlm_roberta", "deberta", "modernbert"
    vocab_size: int
    hidden_size: int  # C
    num_hidden_layers: int  # L
    num_attention_heads: int  # H
    intermediate_size: int  # F
    max_length: int  # maximum tokens of a pair, special tokens included
    type_vocab_size: int
    layer_norm_eps: float
    feed_forward: str = "gelu"  # "gelu" (two linears) or "geglu" (gated, docs/model.md §3.4)
    slopes: tuple[float, ...] = ()  # (H,) ALiBi constants; empty: the model has no ALiBi
    head: str = "classifier"  # "classifier": tanh pooler + linear; "cosine", "focus": see architectures.jinabert
    position_offset: int = 0  # first learned position (XLM-R counts from 2)
    learned_positions: int = 0  # rows of a JinaBERT's position table (docs/model.md §3.1); 0: it has none
    repeat_from: int = 0  # first of its rows that repeat for the positions after the last row
    position_buckets: int = 0  # relative positions to one side (DeBERTa); 0: the model has none
    max_relative_positions: int = 0  # larger distances share the last bucket
    half_window: int = 0  # keys on each side in sliding-window attention (ModernBERT); 0: full attention in all layers
    global_layers: tuple[int, ...] = ()  # indices of layers with full attention when half_window is set
    global_theta: float = 0.0  # RoPE base of layers with full attention; 0: the model has no RoPE
    local_theta: float = 0.0  # RoPE base of layers with sliding-window attention
    pooling: str = "cls"  # input of the classifier: the first token ("cls") or the mean over tokens ("mean")
    head_bias: bool = False  # whether the norm inside the classifier has a bias (ModernBERT)

    @property
    def head_size(self) -> int:
        return self.hidden_size // self.num_attention_heads


class Scores(NamedTuple):
    """Logits and token counts of P pairs, in the caller's order."""

    logits: Float32  # (P,)
    tokens: Int32  # (P,) tokens read, special tokens included; overlaps of windows count once
    truncated: Int32  # (P,) tokens dropped by the length policy
    spans: npt.NDArray[np.int64]  # (P, 2) start and end, in characters, of the text that the logit was computed from


class Engine(Protocol):
    """A model prepared for one engine and precision."""

    @property
    def name(self) -> str: ...
    @property
    def precision(self) -> str: ...
    @property
    def isa(self) -> str: ...
    @property
    def threads(self) -> int: ...

    def logits(self, batch: PackedBatch, /) -> Float32:
        """Logits (P,), float32, of a packed batch."""

    def with_threads(self, threads: int) -> Engine:
        """The same model with another number of threads; itself where numpy or torch sets the number."""

    def shrink(self) -> None:
        """Release the work space of earlier calls; has no effect on an engine that keeps none."""


@dataclass(frozen=True, slots=True)
class Ranked:
    """One document of a ranking."""

    index: int  # 0-based index in the caller's list
    document: Document  # as the caller passed it
    logit: float  # the sort key, higher is better
    score: float  # relevance score, sigmoid(logit)
    tokens: int  # tokens read for this document, query and special tokens included
    truncated: int  # tokens dropped by the length policy
    span: tuple[int, int]  # (start, end) in the document's text, in characters, of what the logit was computed from


def _option(default: Any, help_text: str, shown: str | None = None) -> Any:
    return field(default=default, metadata={"help": help_text, "shown": shown})


@dataclass(frozen=True)
class RerankerOptions:
    """Compute options of a reranker: the keyword arguments of :class:`turborank.Reranker`, with their defaults.

    Commands and the server take their options from here; ``help`` and ``shown`` (the default in words) are metadata.
    """

    length: str = _option("truncate", "Policy for long documents: truncate, windows (read all of the text) or error.")
    max_length: int | None = _option(None, "Maximum tokens of a query with one document.", "the model's")
    engine: str = _option("auto", "auto, native, torch or reference.")
    precision: str = _option("auto", "auto, int8, bf16 or fp32, if the engine supports it.")
    threads: int | None = _option(None, "Number of compute threads.", "all cores")
    offline: bool | None = _option(None, "Do not use the network.")
    faithful: bool = _option(False, "Read special tokens in texts as special tokens.")


@dataclass(frozen=True)
class RerankerRecipe:
    """The arguments with which another process opens the same reranker; a pickle holds them and not the weights.

    ``engine`` and ``precision`` of the options are those in use, never "auto"; ``threads`` is None unless the caller
    gave a number, so that each machine uses its own cores. ``files`` is the hash of a local model folder; the folder on
    the other machine must have the same one.
    """

    model: str | None
    options: RerankerOptions = RerankerOptions()
    revision: str | None = None  # commit on the Hub
    files: str | None = None
    relevant_label: str | int | None = None

    def with_threads(self, threads: int | None) -> RerankerRecipe:
        """The same with another number of threads."""
        return replace(self, options=replace(self.options, threads=threads))
