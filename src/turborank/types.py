"""Immutable value types that all parts exchange.

Dimension letters, used in every docstring and shape comment of the code:

    P  pairs in a batch            L  layers            Q  queries
    T  tokens in a batch           H  heads             K  documents of one list
    n  tokens of one pair          D  head size
                                   C  = H·D, hidden size
                                   F  intermediate size
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

Float32 = npt.NDArray[np.float32]
Int32 = npt.NDArray[np.int32]
Document = str | Mapping[str, Any]


class Pair(NamedTuple):
    """A query and a document whose relevance to it is to be scored."""

    query: str
    document: str


@dataclass(frozen=True, slots=True)
class Encoding:
    """The tokens of one pair, or of one window of it, template included.

    ``query_cut`` and ``document_cut`` count the tokens that the length policy removed.
    """

    input_ids: Int32  # (n,)
    type_ids: Int32  # (n,) segment of each token, as the model's template defines it
    read: int  # tokens of the pair that are read, in all its windows together; overlaps count once
    query_cut: int = 0
    document_cut: int = 0
    span: tuple[int, int] = (0, 0)  # range of the document's characters in this encoding

    def __len__(self) -> int:
        return int(self.input_ids.shape[0])

    @property
    def truncated(self) -> int:
        """Tokens of the pair that the model does not read."""
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
    """The parameters of a forward pass, for every family (docs/model.md).

    Built by :func:`turborank.architectures.recognise` from ``config.json`` and the tensor names.
    """

    architecture: str  # a row of ARCHITECTURES: "jinabert", "bert", "xlm_roberta", "deberta", "modernbert"
    vocab_size: int
    hidden_size: int  # C
    num_hidden_layers: int  # L
    num_attention_heads: int  # H
    intermediate_size: int  # F
    max_length: int  # tokens of a pair the model can read
    type_vocab_size: int
    layer_norm_eps: float
    feed_forward: str = "gelu"  # "gelu" (two linears) or "geglu" (gated, docs/model.md §3.4)
    slopes: tuple[float, ...] = ()  # (H,) ALiBi constants; empty: the model has no ALiBi
    head: str = "classifier"  # "classifier": tanh pooler + linear; "cosine", "focus": see architectures.jinabert
    position_offset: int = 0  # first learned position (XLM-R counts from 2)
    position_buckets: int = 0  # relative positions to one side (DeBERTa); 0: the model has none
    max_relative_positions: int = 0  # distances from here on share the last bucket
    half_window: int = 0  # keys a sliding layer reads to either side (ModernBERT); 0: every layer reads the whole pair
    global_layers: tuple[int, ...] = ()  # in a model with a window: layers that read the whole pair
    global_theta: float = 0.0  # RoPE's base in those layers; 0: the model has no RoPE
    local_theta: float = 0.0  # RoPE's base in the other layers
    pooling: str = "cls"  # input of the classifier: the first token ("cls") or the mean of all tokens ("mean")
    head_bias: bool = False  # whether the norm inside the classifier has a bias (ModernBERT)

    @property
    def head_size(self) -> int:
        return self.hidden_size // self.num_attention_heads


@dataclass(frozen=True, slots=True)
class Ranked:
    """One document of a ranking."""

    index: int  # 0-based index in the caller's list
    document: Document  # as the caller gave it
    logit: float  # the ranking's sort key
    score: float  # relevance score, sigmoid(logit)
    tokens: int  # tokens that the model read, query and template included
    truncated: int  # tokens that it did not read; 0 unless the length policy truncated the pair
    span: tuple[int, int]  # range of the document's characters that gave the logit
