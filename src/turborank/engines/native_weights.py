"""Convert a checkpoint's tensors to the arrays that the C++ kernels read (native/kernels.h, native/weights.cpp).

For each linear layer, :func:`pack` fuses matrices that share an input (query, key and value; gate and up), rounds
weights to the precision, and stores them as panels of 32 output columns in the order in which the kernels read them.
For int8 it also mixes input channels, and adds initial sums that undo the offset of the activations. Scores' factor
log2(e)/√D is multiplied into the query projection. Quantisation and mixing are described in docs/kernels.md, "Numbers
in int8"; the panel layout in native/kernels.h.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from turborank.architectures import deberta, encoder, modernbert
from turborank.architectures.jinabert import COSINES, cosine_parameters
from turborank.checkpoint.tensors import SCALE, TensorFile
from turborank.errors import CheckpointError
from turborank.ops.reference import angles, layer_norm, linear
from turborank.types import Float32, ModelConfig

Bytes = npt.NDArray[np.uint8]
Array = npt.NDArray[Any]

STORED = ("float32", "float16", "uint16", "int8")  # in the order of kernels.h, Stored; uint16 holds bfloat16 bits
PANEL = 32  # output columns of a panel
SLACK_DISTANCES = 128  # kernels.h, kSlackDistances
MIXED_CHANNELS = 16  # native/mix.inl: channels of a group; mixing combines equal positions of several groups
LEAST_GELU = -0.171875  # lower bound: the minimum of GELU is gelu(-0.75) = -0.16997, and the kernels' error is 5e-4
_LINE, _HUGE_PAGE, _BLOCK = 64, 2 << 20, 32 << 20  # bytes; pages of a block that are never written use no memory
# AVX2 (native/isa_avx2.cpp): activations of 7 bits are stored plus 64. Each sum of four products must fit 16 bits;
# it is largest if the activation is 127 wherever the weight has one sign and 0 elsewhere.
SEVEN_BITS = 64
MOST_WEIGHT = 32767 // 127
_ONE = np.float32(1.0)


class Packing(NamedTuple):
    """The weight layout of one row of the instruction-set table in one precision (kernels.h, Kernels)."""

    precision: str
    group: int  # int8 weights of one column in a word
    tiles: bool  # words of int8 and bf16 are arranged for matrix tiles (AMX)
    offset: int  # added by the kernels to int8 activations
    lanes: int  # floats in a vector
    exchange: int  # bytes of an element of q, k and v: 2 is bf16, 4 is float


class Columns(NamedTuple):
    """Output columns of a product in the precision's type: W[c] = scale[c] * codes[c]."""

    codes: Array  # (out, in)
    scale: Float32  # (out,)
    bias: Float32  # (out,)

    def ordered(self, order: npt.NDArray[np.intp]) -> Columns:
        return Columns(self.codes[order], self.scale[order], self.bias[order])


def pack(weights: Mapping[str, Array], config: ModelConfig, layout: Packing) -> tuple[dict[str, Bytes], dict[str, Any]]:
    """Pack all tensors of a model: (arrays by the names of native/weights.cpp, facts about them for the C++ side).

    Word embeddings are not copied; the kernels read the stored table. Raises CheckpointError if a tensor is missing or
    has a wrong shape or a type that is not in STORED.
    """
    packer = (_PreNormPacker if config.architecture == "modernbert" else _Packer)(weights, config, layout)
    packer.embeddings()
    packer.places()
    for layer in range(config.num_hidden_layers):
        packer.layer(layer)
        if isinstance(weights, TensorFile):
            weights.release()  # otherwise the whole file would be resident besides the packed copy
    packer.head()
    facts = {
        "stored": STORED.index(packer.raw(packer.words).dtype.name),
        "positions": packer.positions,
        "relative": packer.relative_rows,
        "mixed": packer.mixed,
        "least": packer.least,
    }
    return packer.arrays, facts


class _Packer:
    words, norm = "embeddings.word_embeddings.weight", "embeddings.LayerNorm"

    def __init__(self, weights: Mapping[str, Array], config: ModelConfig, layout: Packing) -> None:
        self._weights, self._config, self._layout = weights, config, layout
        self._stored = weights.stored if isinstance(weights, TensorFile) else weights.__getitem__
        self._arena = _Arena()
        self.arrays: dict[str, Bytes] = {}
        self.positions = self.relative_rows = 0
        int8 = layout.precision == "int8"
        self.least = LEAST_GELU if int8 and config.feed_forward != "geglu" else 0.0
        # With two-term query rows (cosine heads), mixing saves less error than requantising stored int8 weights adds.
        given = "encoder.layer.0.attention.self.query.weight"
        self.mixed = int8 and not (config.head in COSINES and given in weights and self.raw(given).dtype == np.int8)

    def embeddings(self) -> None:
        """The embedding tables, their norm, and ALiBi's slopes in log2 units."""
        config, width = self._config, self._config.hidden_size
        words = self.raw(self.words, config.vocab_size, width)
        self.arrays["words"] = _bytes(words)
        if words.dtype == np.int8:
            self.arrays["words.scale"] = _bytes(self._scales(self.words, len(words)))
        if config.type_vocab_size > 0:
            self._put("types", self._wide("embeddings.token_type_embeddings.weight", config.type_vocab_size, width))
        places = "embeddings.position_embeddings.weight"
        if places in self._weights:
            self.positions = len(self.raw(places))
            self._put("positions", self._wide(places, self.positions, width))
        self._norm("norm", self.norm)
        slopes = config.slopes or (0.0,) * config.num_attention_heads
        self._put("slopes", np.asarray(slopes, np.float32) * np.float32(math.log2(math.e)))

    def places(self) -> None:
        """DeBERTa's relative positions: the table row of each distance, and the layer-normalised table."""
        config = self._config
        if not config.position_buckets:
            return
        rows = np.pad(np.asarray(deberta.relative_rows(config), np.int32), SLACK_DISTANCES + 1, "edge")
        self._put("relative.rows", rows)
        self.relative_rows = _whole(2 * config.position_buckets, PANEL)
        table = self._wide(deberta.RELATIVE, 2 * config.position_buckets, config.hidden_size)
        weight, bias = (self._wide(f"encoder.LayerNorm.{part}", config.hidden_size) for part in ("weight", "bias"))
        self._table = layer_norm(table, weight, bias, config.layer_norm_eps)

    def _relative_layer(self, name: str, to: str, factor: np.float32) -> None:
        """The table's projections as one layer's keys (H, rows, D) and, in panels, queries. ``factor`` is q's."""
        config, kind = self._config, "bf16" if self._layout.exchange == 2 else "fp32"
        heads, size, width = config.num_attention_heads, config.head_size, config.hidden_size
        longest = np.empty((heads, 2), np.float32)  # largest norm of a key row, of a query row
        for place, part, scale in ((1, "query", factor), (0, "key", np.float32(1.0))):
            weight = self._wide(f"{name}.attention.self.{part}_proj.weight", width, width)
            bias = self._wide(f"{name}.attention.self.{part}_proj.bias", width)
            rows = np.zeros((self.relative_rows, width), np.float32)
            rows[: len(self._table)] = linear(self._table, weight, bias) * scale
            longest[:, place] = np.sqrt(np.square(rows).reshape(-1, heads, size).sum(axis=2).max(axis=0))
            codes: Array = _bf16(rows) if kind == "bf16" else rows
            codes = np.ascontiguousarray(codes.reshape(-1, heads, size).swapaxes(0, 1))  # (H, rows, D)
            if part == "query":
                group, tiles = (2, self._layout.tiles) if kind == "bf16" else (1, False)
                self._put(to + "relative.queries", np.stack([_panels(head, group, tiles) for head in codes]))
            else:
                self._put(to + "relative.keys", codes)
        self._put(to + "relative.longest", longest)

    def layer(self, number: int) -> None:
        """One layer's products and norms. A classifier's last layer with plain attention packs keys and values as rows
        for attention_first.inl and makes only the query projection a product."""
        width, inner = self._config.hidden_size, self._config.intermediate_size
        name, to, mixed = f"encoder.layer.{number}", f"{number}.", self.mixed
        relative = self._config.position_buckets > 0
        first = not relative and self._config.head not in COSINES and number == self._config.num_hidden_layers - 1
        # log2(e) / sqrt(D) is multiplied into q, so scores are in log2 units. DeBERTa divides by sqrt(3 D).
        terms = np.float32(3 if relative else 1)
        factor = np.float32(math.log2(math.e)) / np.sqrt(terms * np.float32(self._config.head_size))
        parts = deberta.PROJECTIONS if relative else encoder.PROJECTIONS
        query = self._columns(f"{name}.attention.self.{parts[0]}", width, width, mixed, factor)
        others = [
            self._columns(f"{name}.attention.self.{part}", width, width, mixed and not first) for part in parts[1:]
        ]
        if first:
            for part, columns in zip(("keys", "values"), others, strict=True):
                self._put(to + part + ".rows", columns.codes)
                self._put_scale_and_bias(to + part, columns)
            self._linear(to + "qkv", query)
        else:
            self._linear(to + "qkv", Columns(*(np.concatenate(parts) for parts in zip(query, *others, strict=True))))
        if relative:
            self._relative_layer(name, to, factor)
        self._linear(to + "out", self._columns(f"{name}.attention.output.dense", width, width))
        self._norm(to + "norm1", f"{name}.attention.output.LayerNorm")
        if self._config.feed_forward == "geglu":
            gated = self._columns(f"{name}.mlp.gated_layers", 2 * inner, width, mixed)
            self._linear(to + "up", gated.ordered(self._turns(2 * inner)))  # a vector of gates, then of their values
            self._linear(to + "down", self._columns(f"{name}.mlp.wo", width, inner))
            self._norm(to + "norm2", f"{name}.mlp.layernorm")
        else:
            self._linear(to + "up", self._columns(f"{name}.intermediate.dense", inner, width, mixed))
            self._linear(to + "down", self._columns(f"{name}.output.dense", width, inner), self.least)
            self._norm(to + "norm2", f"{name}.output.LayerNorm")

    def head(self) -> None:
        """The cosine's scale, bias and focus (0 where a head has none); pooler (always float32) and classifier."""
        if present := cosine_parameters(self._config.head):
            names = "head.scale", "head.bias", "head.focus"
            numbers = [self._wide(name, 1) if name in present else np.zeros(1, np.float32) for name in names]
            self._put("similarity", np.concatenate(numbers))
        if self._config.head in COSINES:
            return
        roberta = "classifier.dense.weight" in self._weights  # XLM-R's names for the same head
        dense, last = ("classifier.dense", "classifier.out_proj") if roberta else ("pooler.dense", "classifier")
        width = self._config.hidden_size
        self._linear("pooler", self._columns(dense, width, width, precision="fp32"), precision="fp32")
        self._put("head", np.append(self._wide(last + ".weight", 1, width), self._wide(last + ".bias", 1)))

    def _turns(self, columns: int) -> npt.NDArray[np.intp]:
        """Order of columns that alternates a vector's lanes of the first half with those of the second half."""
        return np.arange(columns).reshape(2, -1, self._layout.lanes).swapaxes(0, 1).reshape(-1)

    def raw(self, name: str, *shape: int) -> Array:
        """A tensor in its stored type. Checks the shape if given; (1, n) and (n,) are equivalent."""
        if name not in self._weights:
            raise CheckpointError(f"expected a tensor {_plain(shape)}, got none at {name}")
        array = np.ascontiguousarray(self._stored(name))
        if array.dtype.name not in STORED or array.ndim not in (1, 2):
            what = f"{array.ndim} dimensions of {array.dtype}"
            raise CheckpointError(f"expected a vector or matrix of {', '.join(STORED)}, got {what} at {name}")
        if shape and _plain(array.shape) != _plain(shape):
            raise CheckpointError(f"expected shape {_plain(shape)}, got {_plain(array.shape)} at {name}")
        return array

    def _scales(self, name: str, rows: int) -> Float32:
        scale: Array = np.asarray(self._stored(name + SCALE)) if name + SCALE in self._weights else np.empty(0)
        if scale.dtype != np.float32 or scale.size != rows:
            got = f"{scale.size} of {scale.dtype} at {name}{SCALE}"
            raise CheckpointError(f"expected {rows} float32 row scales, got {got}")
        return np.ascontiguousarray(scale.reshape(-1))

    def _wide(self, name: str, *shape: int) -> Float32:
        """A tensor as float32."""
        array = self.raw(name, *shape)
        if array.dtype == np.uint16:
            return (array.astype(np.uint32) << 16).view(np.float32)
        wide = array.astype(np.float32, copy=False)
        if array.dtype != np.int8:
            return wide
        rows = array.reshape(-1, array.shape[-1])
        return (wide.reshape(rows.shape) * self._scales(name, len(rows))[:, None]).reshape(array.shape)

    def _columns(
        self, name: str, out: int, width: int, mixed: bool = False, factor: Any = _ONE, precision: str | None = None
    ) -> Columns:
        """One linear layer of the checkpoint, multiplied by ``factor``, a scalar or (out,); a missing bias is zero."""
        precision, weight = precision or self._layout.precision, name + ".weight"
        bias = self._wide(name + ".bias", out) if name + ".bias" in self._weights else np.zeros(out, np.float32)
        stored = self.raw(weight, out, width)
        if precision == "int8" and stored.dtype == np.int8 and not mixed:
            return Columns(stored, self._scales(weight, out) * factor, bias * factor)
        rows = self._wide(weight, out, width)
        if precision == "int8":
            codes, scale = _int8(_mix(rows) if mixed else rows)
            # The Hadamard transform is not normalised: each side is multiplied by the square root of the groups.
            return Columns(codes, scale / np.float32(_groups(width) if mixed else 1) * factor, bias * factor)
        rows = rows * np.reshape(factor, (-1, 1))
        return Columns(_bf16(rows) if precision == "bf16" else rows, np.ones(out, np.float32), bias * factor)

    def _linear(self, to: str, columns: Columns, least: float = 0.0, precision: str | None = None) -> None:
        precision, offset = precision or self._layout.precision, self._layout.offset
        if precision == "int8" and offset == SEVEN_BITS:
            columns = _bounded(columns)
        group = {"int8": self._layout.group, "bf16": 2, "fp32": 1}[precision]
        panels = _panels(columns.codes, group, self._layout.tiles and precision != "fp32")
        if precision == "int8":
            # Undo the activations' `offset`. With a lower bound, int8 codes are steps above the bound, minus `half`.
            half = SEVEN_BITS if offset == SEVEN_BITS else 128
            sums = columns.codes.sum(axis=1, dtype=np.int32)
            starts = sums * np.int32((half if least else 0) - offset)
            panels = np.concatenate([panels, starts.view(np.uint8).reshape(len(panels), -1)], axis=1)
            columns = columns._replace(bias=columns.bias + np.float32(least) * columns.scale * sums.astype(np.float32))
        self._put(to + ".panels", panels)
        self._put_scale_and_bias(to, columns)

    def _put_scale_and_bias(self, to: str, columns: Columns) -> None:
        self._put(to + ".scale", columns.scale)
        self._put(to + ".bias", columns.bias)

    def _norm(self, to: str, name: str) -> None:
        for part in ("weight", "bias"):
            self._put(f"{to}.{part}", self._wide(f"{name}.{part}", self._config.hidden_size))

    def _put(self, name: str, array: Array) -> None:
        self.arrays[name] = self._arena.put(array)


class _PreNormPacker(_Packer):
    """Packer of ModernBERT: pre-norm layers, no biases, RoPE."""

    words, norm = modernbert.WORDS, "embeddings.norm"

    def places(self) -> None:
        """Cosines and sines of RoPE for both thetas, which layers attend to all keys, and the final norms."""
        config = self._config
        for kind, theta in enumerate((config.local_theta, config.global_theta)):
            turns = angles(np.arange(config.max_length, dtype=np.int32), config.head_size, theta)  # (N, D/2)
            self._put(f"rope.{kind}", np.stack([np.cos(turns), np.sin(turns)], axis=1))
        self._put("whole", np.isin(np.arange(config.num_hidden_layers), config.global_layers).astype(np.int32))
        self._norm("final_norm", "final_norm")
        self._norm("head_norm", "head.norm")

    def layer(self, number: int) -> None:
        """One layer's products and norms; layer 0 has no norm before its attention."""
        config, name, to = self._config, f"layers.{number}", f"{number}."
        width, inner, size = config.hidden_size, config.intermediate_size, config.head_size
        factor = np.ones(3 * width, np.float32)
        factor[:width] = np.float32(math.log2(math.e)) / np.sqrt(np.float32(size))  # of q: scores are in log2 units
        # Columns of q and k within a head: the two channels that RoPE rotates together go to neighbouring vectors.
        order = np.arange(3 * width).reshape(-1, size)
        order[: 2 * config.num_attention_heads] = order[: 2 * config.num_attention_heads, self._turns(size)]
        packed = self._columns(f"{name}.attn.Wqkv", 3 * width, width, self.mixed, factor)
        self._linear(to + "qkv", packed.ordered(order.reshape(-1)))
        self._linear(to + "out", self._columns(f"{name}.attn.Wo", width, width))
        self._linear(
            to + "up", self._columns(f"{name}.mlp.Wi", 2 * inner, width, self.mixed).ordered(self._turns(2 * inner))
        )
        self._linear(to + "down", self._columns(f"{name}.mlp.Wo", width, inner))
        if number:
            self._norm(to + "norm1", f"{name}.attn_norm")
        self._norm(to + "norm2", f"{name}.mlp_norm")

    def head(self) -> None:
        """The head's two linears; the first is float32 in every precision."""
        width = self._config.hidden_size
        self._linear("pooler", self._columns("head.dense", width, width, precision="fp32"), precision="fp32")
        self._put("head", np.append(self._wide("classifier.weight", 1, width), self._wide("classifier.bias", 1)))

    def _norm(self, to: str, name: str) -> None:
        width, bias = self._config.hidden_size, f"{name}.bias"
        self._put(f"{to}.weight", self._wide(f"{name}.weight", width))
        self._put(f"{to}.bias", self._wide(bias, width) if bias in self._weights else np.zeros(width, np.float32))


class _Arena:
    """Copies of arrays in a few large blocks aligned to huge pages, each array aligned to a cache line."""

    def __init__(self) -> None:
        self._block: Bytes = np.empty(0, np.uint8)

    def put(self, array: Array) -> Bytes:
        size = _whole(array.nbytes, _LINE)
        if size > len(self._block):
            room = _whole(max(size, _BLOCK), _HUGE_PAGE)
            given: Bytes = np.empty(room + _HUGE_PAGE, np.uint8)  # numpy requests huge pages for large arrays
            start = -given.ctypes.data % _HUGE_PAGE
            self._block = given[start : start + room]
        place, self._block = self._block[: array.nbytes], self._block[size:]
        place[:] = _bytes(np.ascontiguousarray(array))
        return place


def _whole(size: int, unit: int) -> int:
    return -(-size // unit) * unit


def _bytes(array: Array) -> Bytes:
    return array.reshape(-1).view(np.uint8)


def _plain(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape, with (1, n) reduced to (n,)."""
    return shape[1:] if len(shape) == 2 and shape[0] == 1 else shape


def _bf16(x: Float32) -> npt.NDArray[np.uint16]:
    """Bits of the nearest bfloat16, ties to even."""
    bits = x.view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)


def _int8(rows: Float32) -> tuple[npt.NDArray[np.int8], Float32]:
    """Symmetric quantisation to ±127 by row: codes (out, in) and scales (out,)."""
    largest = np.abs(rows).max(axis=1)
    inverse = np.divide(np.float32(127.0), largest, out=np.zeros_like(largest), where=largest > 0)
    return np.rint(rows * inverse[:, None]).astype(np.int8), largest / np.float32(127.0)


def _bounded(columns: Columns) -> Columns:
    """The same columns, rounded anew with a larger scale where four weights of a sum of 16 bits exceed MOST_WEIGHT.

    The four are those that native/isa_avx2.cpp adds: of eight neighbours the first two of each half, or the last two.
    """
    fours = columns.codes.reshape(len(columns.codes), -1, 2, 2, 2).astype(np.int16)  # eight, half, first or last, two
    sums = [np.maximum(sign * fours, 0).sum(axis=(2, 4)).max(axis=(1, 2)) for sign in (np.int16(1), np.int16(-1))]
    worst = np.maximum(*sums)
    room = MOST_WEIGHT - 2  # rounding adds at most a half to each of the four
    factor = np.where(worst > MOST_WEIGHT, room / np.maximum(worst, 1), 1.0).astype(np.float32)
    return columns._replace(
        codes=np.rint(columns.codes * factor[:, None]).astype(np.int8), scale=columns.scale / factor
    )


def _groups(width: int) -> int:
    return math.gcd(width // MIXED_CHANNELS, 8)


def _mix(rows: Float32) -> Float32:
    """Each row (width,) mixed as mix.inl mixes activations: Hadamard over groups, then I - 2/3 over three of them."""
    groups, count = _groups(rows.shape[1]), len(rows)
    x, span = rows, MIXED_CHANNELS
    while span < groups * MIXED_CHANNELS:
        pairs = x.reshape(count, -1, 2, span)
        x = np.stack((pairs[:, :, 0] + pairs[:, :, 1], pairs[:, :, 0] - pairs[:, :, 1]), axis=2)
        span *= 2
    if rows.shape[1] // span % 3 == 0:
        threes = x.reshape(count, -1, 3, span)
        x = threes - (threes[:, :, 0] + threes[:, :, 1] + threes[:, :, 2])[:, :, None] * (np.float32(2) / np.float32(3))
    return x.reshape(rows.shape)


def _panels(codes: Array, group: int, tiles: bool) -> Bytes:
    """(out, in) -> (out / 32, bytes of a panel); the depth is padded with zeros to a multiple of 16 words."""
    out, width = codes.shape
    depth = _whole(width, 16 * group)
    padded = np.zeros((out, depth), codes.dtype)
    padded[:, :width] = codes
    words = padded.view(f"u{group * codes.itemsize}")
    if tiles:  # [steps][2 halves of the columns][16 words][16 columns]
        placed = words.reshape(-1, 2, 16, depth // (16 * group), 16).transpose(0, 3, 1, 4, 2)
    else:  # [words][32 columns]
        placed = words.reshape(-1, PANEL, depth // group).transpose(0, 2, 1)
    return np.ascontiguousarray(placed).reshape(out // PANEL, -1).view(np.uint8)
