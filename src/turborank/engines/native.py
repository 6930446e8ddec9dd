"""The native engine: the forward pass in C++, tested layer by layer against the numpy reference (docs/kernels.md).

``TURBORANK_ISA`` forces one row of its instruction-set table (``amx``, ``avx512vnni``,
``avxvnni``, ``avx2``; on 64-bit Arm ``armi8mm``, ``armdot``; everywhere ``portable``).
"""

from __future__ import annotations

import copy
import importlib
import math
import os
import weakref
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from turborank.architectures import deberta
from turborank.architectures.jinabert import COSINES, FOCUSED, PASSAGE
from turborank.checkpoint.tensors import TensorFile
from turborank.engines import cores, native_weights
from turborank.errors import CheckpointError, EngineError, EngineUnavailableError, InputError
from turborank.types import Float32, ModelConfig, PackedBatch

try:
    _native: Any = importlib.import_module("turborank._native")
except ImportError as missing:  # not compiled, or compiled for another Python
    _native = None
    _REASON: str | None = f"expected the compiled module turborank._native, got {missing}"
else:
    _REASON = None

ARCHITECTURES = ("jinabert", "bert", "xlm_roberta", "deberta", "modernbert", "electra")
PRECISIONS = ("int8", "fp32", "bf16")
ISA_VARIABLE = "TURBORANK_ISA"
# Row of the table -> the one that replaces it for cosine heads in int8. Its activations have 7 bits; two-term rows
# make up for it (docs/kernels.md, "Seven bits with AVX2").
SEVEN_BITS = {"avx2": "avx2seven"}


def available() -> str | None:
    """None if the engine can run on this machine, else the reason."""
    return _REASON


def automatic() -> str:
    """int8, on every machine: its error is small against the differences between documents (docs/kernels.md)."""
    return "int8"


def supports(config: ModelConfig) -> bool:
    """Whether the C++ engine supports the architecture and its sizes."""
    known = config.architecture in ARCHITECTURES and config.hidden_size % 32 == 0 and config.head_size % 32 == 0
    # attention_relative.inl needs equal or neighbouring table rows for neighbouring distances; a config with many
    # buckets up to a short distance has gaps.
    return known and (not config.position_buckets or bool(max(np.diff(deberta.relative_rows(config))) <= 1))


def build() -> str:
    """The compiler of the engine and its level of optimisation, as ``GNU 12.2.0 -O3``."""
    return str(getattr(_native, "build", "unknown"))


def isas() -> list[str]:
    """Instruction-set rows that this machine can run, best first."""
    return [] if _native is None else [row for row in _native.isas() if row not in SEVEN_BITS.values()]


def row_of(isa: str, precision: str, config: ModelConfig) -> str:
    """The row of the table that computes a model where the instruction set is ``isa``."""
    return SEVEN_BITS.get(isa, isa) if precision == "int8" and config.head in COSINES else isa


def better(isa: str, precision: str) -> dict[str, str]:
    """Rows of this build that would be preferred to ``isa``, best first, each with the reason why it was not chosen."""
    table: dict[str, str] = {} if _native is None else dict(_native.rows())
    reasons = {}
    for row, lacks in table.items():
        if row == isa:
            break
        if row in SEVEN_BITS.values():
            continue
        if lacks:
            reasons[row] = f"this machine lacks {lacks}"
        elif precision not in precisions(row):
            reasons[row] = f"has no {precision}"
        else:
            reasons[row] = f"usable, but {ISA_VARIABLE}={isa}"
    return reasons


def precisions(isa: str) -> list[str]:
    """Precisions that a row of the instruction-set table has on this machine."""
    return [] if _native is None else list(_native.isas().get(isa, []))


def layout(isa: str, precision: str) -> native_weights.Packing:
    """The weight layout of one row of the instruction-set table in one precision."""
    return native_weights.Packing(precision, *_native.isas()[isa][precision])


_engines: weakref.WeakSet[NativeEngine] = weakref.WeakSet()
_watched: list[bool] = []  # not empty: forks are noticed


def _renew() -> None:
    """In a forked child, whose only thread is the one that forked: threads and locks for every engine, anew."""
    for engine in {id(engine._model): engine for engine in _engines}.values():
        engine.renew()


class NativeEngine:
    """A model with packed weights. Thread-safe: concurrent calls on one engine are serialised.

    A forked child may use its parent's engines: weights are shared, threads are its own.
    """

    name = "native"

    def __init__(self, make: Callable[[], Any], config: ModelConfig, precision: str, isa: str, threads: int) -> None:
        self._make, self._width = make, config.hidden_size
        self._model = model = make()
        self.precision = precision
        self.isa = isa
        self.kernel: str = model.kernel  # instruction of the matrix product
        self.attention: str = model.attention  # element type of attention: "bf16" or "fp32"
        self.threads = threads
        self._watch()

    def _watch(self) -> None:
        _engines.add(self)
        if not _watched and hasattr(os, "register_at_fork"):
            _watched.append(True)
            os.register_at_fork(after_in_child=_renew)

    def with_threads(self, threads: int) -> NativeEngine:
        """The same model computing with another number of threads."""
        engine = copy.copy(self)
        engine.threads = threads
        engine._watch()
        return engine

    def renew(self) -> None:
        """After a fork: replace threads, locks and work space, which belong to the parent process."""
        self._model.renew()

    def shrink(self) -> None:
        """Release the work space and threads of earlier calls, and reset :meth:`spent`; the next call allocates anew.

        Running calls, and engines that :meth:`with_threads` returned, keep theirs.
        """
        self._model = self._make()  # the weights are those of the old one

    def logits(self, batch: PackedBatch) -> Float32:
        """Logits (P,), float32.

        Raises InputError if ids, types or offsets do not fit the model, MemoryError if there is no room for the
        activations, and EngineError if the system gives no threads. The engine stays usable.
        """
        return np.frombuffer(self._computed(self._model.logits, batch), np.float32)

    def layers(self, batch: PackedBatch) -> list[Float32]:
        """Embeddings and each layer's output: (T, C); the last is (P, C) if the head reads first tokens only.

        Raises as :meth:`logits`.
        """
        layers = self._computed(self._model.layers, batch)
        return [np.frombuffer(layer, np.float32).reshape(-1, self._width) for layer in layers]

    def _computed(self, compute: Callable[..., Any], batch: PackedBatch) -> Any:
        try:
            return compute(*_arrays(batch), self.threads)
        except ValueError as fault:
            raise InputError(str(fault)) from None
        except RuntimeError as fault:
            raise EngineError(
                f"expected {self.threads} threads, got none from the system ({fault})",
                hint="allow the process more of them (ulimit -u, pids.max of its cgroup), or choose fewer threads",
            ) from None

    def spent(self) -> dict[str, float]:
        """CPU seconds by part, summed over threads and calls; a product includes the operations fused into it."""
        return dict(self._model.spent())


def _arrays(batch: PackedBatch) -> tuple[npt.NDArray[np.int32], ...]:
    arrays = []
    for name in ("input_ids", "type_ids", "cu_seqlens"):
        value = np.asarray(getattr(batch, name))
        if value.ndim != 1 or value.dtype != np.int32:
            got = f"{value.ndim} dimensions of {value.dtype}"
            raise InputError(f"expected a one-dimensional int32 array, got {got} at {name}")
        arrays.append(np.ascontiguousarray(value))
    return tuple(arrays)


def plain_config(config: ModelConfig) -> dict[str, Any]:
    """The fields of the config that the C++ side reads (native/module.cpp)."""
    names = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "max_length",
             "type_vocab_size", "layer_norm_eps", "position_offset", "repeat_from")  # fmt: skip
    plain: dict[str, Any] = {name: getattr(config, name) for name in names}
    plain["alibi"] = bool(config.slopes)
    plain["geglu"] = config.feed_forward == "geglu"
    plain["cosine"], plain["sum"] = config.head in COSINES, config.head == "sum"
    plain["prenorm"] = config.architecture == "modernbert"
    plain["mean"] = plain["prenorm"] and config.pooling == "mean"
    plain["window"] = config.half_window
    plain["gelu_head"] = config.architecture in ("deberta", "modernbert", "electra")
    plain["passage"] = PASSAGE if config.head in FOCUSED else 0
    return plain


def _check(config: ModelConfig) -> None:
    """Raise CheckpointError for sizes that the kernels do not support."""
    width, heads, between = config.hidden_size, config.num_attention_heads, config.intermediate_size
    segments = 0 if config.head == "classifier" else 2
    rules = [
        (config.vocab_size > 0, "a positive vocab_size", config.vocab_size),
        (config.num_hidden_layers > 0, "a positive num_hidden_layers", config.num_hidden_layers),
        (config.max_length > 0, "a positive max_length", config.max_length),
        (0 < width <= 8192 and width % 32 == 0, "a hidden_size that is a multiple of 32, at most 8192", width),
        (heads > 0 and width % heads == 0, "num_attention_heads that divide the hidden size", heads),
        (config.head_size in (32, 64, 96, 128), "a head size of 32, 64, 96 or 128", config.head_size),
        (0 < between <= 65536 and between % 32 == 0, "an intermediate_size, a multiple of 32, at most 65536", between),
        (config.type_vocab_size >= segments, f"a type_vocab_size of at least {segments}", config.type_vocab_size),
        (config.position_offset >= 0, "a position_offset of at least 0", config.position_offset),
        (len(config.slopes) in (0, heads), "one slope for each head or none", len(config.slopes)),
        (all(0 <= s < math.inf for s in config.slopes), "finite slopes of at least 0", list(config.slopes)),
    ]
    for well, what, got in rules:
        if not well:
            raise CheckpointError(f"expected {what}, got {got} in the model's config")


def _isa(precision: str) -> str:
    """The instruction-set row to use for a precision: the one ``TURBORANK_ISA`` names, else the best one.

    Raises EngineUnavailableError if there is no such row on this machine or it lacks the precision.
    """
    forced = os.environ.get(ISA_VARIABLE) or None
    if forced is not None and forced not in isas():
        known = ", ".join(isas())
        raise EngineUnavailableError(f"expected {ISA_VARIABLE} to be one of {known} on this machine, got {forced!r}")
    rows = {name: precisions(name) for name in ([forced] if forced else isas())}
    able = [name for name, known in rows.items() if precision in known]
    if not able:
        known = ", ".join(dict.fromkeys(p for row in rows.values() for p in row))
        where = f"with {ISA_VARIABLE}={forced}" if forced else "on this machine"
        raise EngineUnavailableError(f"expected a precision among {known} {where}, got {precision!r}")
    return able[0]


def prepare(
    weights: Mapping[str, npt.NDArray[Any]], config: ModelConfig, *, precision: str = "int8", threads: int | None = None
) -> NativeEngine:
    """Pack a checkpoint's tensors for this machine's instruction set.

    Args:
        weights: canonical name -> float32, float16 or bfloat16 (as uint16) array, or int8 with float32
            ``<name>_scale`` (rows,). int8 linears use stored int8 values unchanged unless their inputs are mixed
            (docs/kernels.md).
        config: the model.
        precision: one of PRECISIONS.
        threads: at least 1; by default :func:`turborank.engines.cores.allowed`.

    Raises:
        EngineUnavailableError: the extension is not compiled, or the machine lacks the precision or the instruction
            set of ``TURBORANK_ISA``, or the architecture or its sizes are not supported.
        CheckpointError: a tensor is missing or has a wrong shape or type.
        InputError: ``threads`` is less than 1.

    """
    if _native is None:
        raise EngineUnavailableError(_REASON or "", hint="pip install turborank where a C++ compiler is present")
    if not supports(config):
        raise EngineUnavailableError(
            f"expected one of {', '.join(ARCHITECTURES)} with hidden and head sizes that are multiples of 32, and no "
            f"more position buckets than distances, got {config.architecture} with {config.hidden_size}, "
            f"{config.head_size} and {config.position_buckets} buckets up to {config.max_relative_positions}"
        )
    if threads is not None and threads < 1:
        raise InputError(f"expected threads to be at least 1, got {threads}")
    _check(config)
    isa = _isa(precision)
    row = row_of(isa, precision, config)
    packed, facts = native_weights.pack(weights, config, layout(row, precision))
    make = partial(_native.Model, plain_config(config) | facts, packed, precision, row)
    if isinstance(weights, TensorFile):
        weights.release()  # what is packed; word embeddings stay in the file and are read there
    return NativeEngine(make, config, precision, isa, threads or cores.allowed())
