"""Checks of a model folder: files, config.json, tensors and tokenizer, before anything is computed.

Each check raises CheckpointError with all faults it found, what was expected, and where possible what to do.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from turborank.errors import CheckpointError
from turborank.types import ModelConfig

Shapes = Mapping[str, tuple[int, ...]]

CONFIG, WEIGHTS, TOKENIZER = "config.json", "model.safetensors", "tokenizer.json"
REQUIRED = (CONFIG, WEIGHTS, TOKENIZER)
INDEX = f"{WEIGHTS}.index.json"  # names the files of weights that are split, in place of WEIGHTS

# Prefixes of the encoder's tensor names, as transformers writes them; optional in every family.
PREFIXES = ("bert.", "roberta.", "deberta.", "electra.", "model.")
# Constants that some versions of transformers stored with the weights. They are ignored.
BUFFERS = frozenset({"embeddings.position_ids", "embeddings.token_type_ids", "encoder.alibi"})
CLASSIFIERS = ("classifier.weight", "classifier.out_proj.weight")
COSINE_HEAD = "head.scale"

_LEAST = {
    "vocab_size": 1,
    "hidden_size": 1,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "intermediate_size": 1,
    "max_position_embeddings": 1,
    "type_vocab_size": 0,
}
# model_type -> required keys (of the above, or layer_norm_eps) that this family's config.json lacks.
_NEEDLESS = {"modernbert": ("type_vocab_size", "layer_norm_eps")}
# Supported activations. Tensors do not show the activation, so the config is checked.
_KNOWN = {"hidden_act": ("gelu",), "feed_forward_type": ("geglu", "original")}
MAX_LAYERS = 1024  # layers or heads: above any model, and small enough that the tensor table is built quickly
_INT32, _FLOAT32 = 2**31 - 1, (2 - 2**-23) * 2.0**127  # largest values that engines represent

_FROM_PICKLE = (
    'python -c "import torch, safetensors.torch as s; '
    "w = torch.load('pytorch_model.bin', map_location='cpu', weights_only=True); "
    "s.save_file({k: v.clone().contiguous() for k, v in w.items()}, 'model.safetensors')\""
)
_TO_FAST = (
    "python -c \"from transformers import AutoTokenizer; AutoTokenizer.from_pretrained('.').save_pretrained('.')\""
)


def canonical(name: str) -> str:
    """A stored tensor's name without the encoder's prefix."""
    return next((name.removeprefix(prefix) for prefix in PREFIXES if name.startswith(prefix)), name)


def files(folder: Path) -> None:
    """Raise CheckpointError unless config, weights and tokenizer are in ``folder``."""
    present = {path.name for path in folder.iterdir()}
    missing = [name for name in REQUIRED if not (folder / name).is_file()]  # a broken link counts as missing
    if not missing or (missing == [WEIGHTS] and (folder / INDEX).is_file()):
        return
    wanted = f"expected {', '.join(REQUIRED)} in {folder}"
    if not present:
        raise CheckpointError(f"{wanted}, got an empty folder")
    hint = None
    if WEIGHTS in missing and "pytorch_model.bin" in present:
        hint = (
            "pytorch_model.bin is a pickle, which can run code when opened, so turborank never does; "
            f"convert it, in that folder and where you trust it: {_FROM_PICKLE}"
        )
    elif TOKENIZER in missing and present & {"vocab.txt", "vocab.json", "spiece.model", "sentencepiece.bpe.model"}:
        hint = f"only the slow tokenizer's files are there; write the fast one, in that folder: {_TO_FAST}"
    elif WEIGHTS in missing and any(onnx_files(folder)):
        hint = f"the weights are there as ONNX only; {origin_hint(folder / CONFIG)}"
    elif CONFIG in missing and len(missing) == len(REQUIRED):
        hint = "is that the folder of a model?"
    raise CheckpointError(f"{wanted}, got no {' and no '.join(missing)}", hint=hint)


def onnx_files(folder: Path) -> Iterator[Path]:
    """The ONNX graphs in a folder and in its subfolder ``onnx``, where exporters write them."""
    for place in (folder, folder / "onnx"):
        yield from sorted(place.glob("*.onnx")) if place.is_dir() else ()


def origin_hint(path: Path) -> str:
    """A hint for loading the original of an exported model, from ``_name_or_path`` of its config.json."""
    raw = json_object(path) if path.is_file() else {}
    origin, kind = raw.get("_name_or_path"), raw.get("model_type")
    whose = f"a {kind} model" if isinstance(kind, str) else "the model"
    if isinstance(origin, str) and re.fullmatch(r"[\w.-]+/[\w.-]+", origin):
        return f"it is {whose} exported from {origin}: load that, which has the original weights"
    return f"load {whose} it was exported from: its card names it"


def json_value(path: Path) -> Any:
    """The JSON value in a file. Raises CheckpointError for anything else."""
    try:
        return json.loads(path.read_bytes())
    except OSError as error:
        raise CheckpointError(f"expected a readable file, got {error.strerror or error} at {path}") from error
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError is a ValueError, too
        raise CheckpointError(f"expected JSON, got something else at {path} ({error})") from error


def json_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises CheckpointError for anything else."""
    value = json_value(path)
    if not isinstance(value, dict):
        raise CheckpointError(f"expected a JSON object, got a {type(value).__name__} at {path}")
    return value


def one_logit(shapes: Shapes, path: Path, whose: str | None) -> None:
    """Raise CheckpointError unless the tensors include a head with one logit. ``whose``: what they look like."""
    for name in CLASSIFIERS:
        shape = shapes.get(name, ())
        if len(shape) == 2 and shape[0] != 1:
            raise CheckpointError(
                f"expected a reranker, with one label, got a classifier with {shape[0]} labels "
                f"({name} is {list(shape)}) in {path}"
            )
    if not any(name in shapes for name in (*CLASSIFIERS, COSINE_HEAD)):
        alike = f", whose tensors look like {whose}" if whose else ""
        raise CheckpointError(
            f"expected a reranker, with a classifier.weight of one row, got a model without one in {path}{alike}: "
            "an embedding model or a bare encoder; take the cross-encoder of its family"
            " (or fetch its modules.json and the folders it names, if its classifier is there)"
        )


def config_faults(raw: Mapping[str, Any]) -> list[str]:
    """Every value of config.json that is missing or out of range, and what was expected."""
    faults, needless = [], _NEEDLESS.get(str(raw.get("model_type")), ())
    for key, least in _LEAST.items():
        if key in needless:
            continue
        value, most = raw.get(key), MAX_LAYERS if key in ("num_hidden_layers", "num_attention_heads") else _INT32
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
            faults.append(f"{key}: expected an integer, {least} to {most}, got {_shown(raw, key)}")
    eps = raw.get("layer_norm_eps")
    if "layer_norm_eps" in needless:
        pass  # recognise() of the family checks its epsilon
    elif isinstance(eps, bool) or not isinstance(eps, int | float) or not 0 < eps < 1:
        faults.append(f"layer_norm_eps: expected a number between 0 and 1, got {_shown(raw, 'layer_norm_eps')}")
    for key, known in _KNOWN.items():
        if key in raw and raw[key] not in known:
            faults.append(f"{key}: expected {' or '.join(map(repr, known))}, got {_shown(raw, key)}")
    slopes = raw.get("alibi_slopes")
    if isinstance(slopes, list):
        if not all(isinstance(s, int | float) and not isinstance(s, bool) and 0 <= s <= _FLOAT32 for s in slopes):
            faults.append(f"alibi_slopes: expected finite numbers, 0 or more, got {slopes!r:.200}")
    elif not isinstance(slopes, str | None):
        faults.append(f"alibi_slopes: expected a list or the name of a rule, got {slopes!r:.80}")
    if not faults and raw["hidden_size"] % raw["num_attention_heads"]:
        faults.append(
            f"hidden_size: expected a multiple of num_attention_heads ({raw['num_attention_heads']}), "
            f"got {raw['hidden_size']}"
        )
    return faults


def _shown(raw: Mapping[str, Any], key: str) -> str:
    return f"{raw[key]!r:.80}" if key in raw else "no such key"


def tokenizer(path: Path, model: ModelConfig) -> Tokenizer:
    """A checkpoint's tokenizer, with truncation and padding off.

    Raises CheckpointError if the file is not a tokenizer, its ids exceed the word embeddings, or it has no pair
    template.
    """
    try:
        loaded = Tokenizer.from_file(str(path))
    except Exception as error:  # the tokenizers library raises plain Exception
        raise CheckpointError(f"expected a tokenizer, got something else at {path} ({error})") from error
    loaded.no_truncation()
    loaded.no_padding()
    last = _last_id(loaded)
    if last >= model.vocab_size:
        raise CheckpointError(
            f"expected token ids below {model.vocab_size}, the rows of the word embeddings, "
            f"got {loaded.id_to_token(last)!r} with id {last} in {path}; it belongs to another model"
        )
    try:
        pair = loaded.encode("", "")
    except BaseException as error:  # a panic in the library's Rust code is no Exception
        if type(error) is not Exception and type(error).__name__ != "PanicException":
            raise
        raise CheckpointError(f"expected a tokenizer that encodes a pair, got {error} at {path}") from error
    wrong = [
        f"{token!r} with id {id_}"
        for token, id_ in itertools.zip_longest(pair.tokens, pair.ids)  # a damaged template has more of one
        if token is None or loaded.token_to_id(token) != id_
    ]
    if wrong:
        raise CheckpointError(f"expected the template's tokens in the vocabulary, got {', '.join(wrong)} in {path}")
    added = loaded.num_special_tokens_to_add(True)
    if added < 3:
        raise CheckpointError(
            "expected a pair template with a first token, a separator and an end, "
            f"got {added} special tokens in {path}; a post_processor is missing from it"
        )
    return loaded


def _last_id(loaded: Tokenizer) -> int:
    size: int = loaded.get_vocab_size()
    if None not in map(loaded.id_to_token, range(size)):  # ids without gaps: no need to build the whole vocabulary
        return size - 1
    return max(loaded.get_vocab().values())
