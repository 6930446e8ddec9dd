"""Load and save checkpoints: from a model's name or folder to verified weights, config and tokenizer.

A model is searched in this order: embedded in the package, a local folder, the Hugging Face cache, the Hub.
A folder must hold ``config.json``, ``model.safetensors`` and ``tokenizer.json``, or weights in another layout of
:mod:`turborank.checkpoint.layouts`. Pickles are never opened and remote code is never run; ``auto_map`` in a config is
ignored. The format is specified in docs/model.md §2.
"""

from __future__ import annotations

import copy
import hashlib
import json
import logging
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy.typing as npt
from tokenizers import Tokenizer

from turborank import catalog
from turborank.architectures import ARCHITECTURES, recognise, resembles
from turborank.checkpoint import hub, layouts, tensors, verify
from turborank.checkpoint.tensors import TensorFile
from turborank.checkpoint.verify import CONFIG, REQUIRED, TOKENIZER, WEIGHTS
from turborank.data.files import file_hash, replacing
from turborank.errors import CheckpointError, InputError, ModelNotFoundError
from turborank.types import ModelConfig

CARD = "README.md"
FILES = (*REQUIRED, *hub.OPTIONAL, CARD)  # files of the single-file layout
log = logging.getLogger("turborank")
SUFFIX = ".safetensors"
_PATH = re.compile(r"[/\\~]|^\.")  # marks a path or Hub id; names of the catalog have none of these
_HUB_WORD = r"[A-Za-z0-9](?:[\w.-]{0,94}\w)?"
_HUB_ID = re.compile(rf"(?!.*(?:--|\.\.|\.git$)){_HUB_WORD}/{_HUB_WORD}")


@dataclass(frozen=True)
class Checkpoint:
    """A verified model: every tensor of its architecture is present, has the right shape and is finite."""

    name: str  # name in the catalog, id on the Hub, or name of the folder
    folder: Path
    origin: str  # "embedded", "local", "cache" or "hub"
    revision: str | None  # commit on the Hub
    config: ModelConfig
    raw_config: dict[str, Any]  # config.json, merged with the settings that a layout keeps in other files
    # Canonical name -> tensor: float32, converted at each access, or int8 (rows, columns) with float32 scales (rows,)
    # under "<name>_scale" (turborank.checkpoint.tensors, docs/model.md §2.3).
    weights: Mapping[str, npt.NDArray[Any]]
    tokenizer: Tokenizer
    loaded_config: Mapping[str, Any] = field(default_factory=dict, repr=False)  # raw_config as read, to detect changes
    relevant_label: str | int | None = None  # as given to load


def load(
    model: str | os.PathLike[str] | None = None,
    *,
    offline: bool | None = None,
    relevant_label: str | int | None = None,
    revision: str | None = None,
) -> Checkpoint:
    """Load a checkpoint and verify it. A licence that forbids commercial use is logged as a warning.

    Args:
        model: a catalog name, a folder, a Hugging Face id, or None for the embedded default. A local folder takes
            precedence over the cache and the Hub.
        offline: True, or HF_HUB_OFFLINE, forbids network access. A model in the cache never needs it.
        relevant_label: for a classifier with two labels, the name or number of the label that means relevant; needed
            only if config.json does not say.
        revision: commit, tag or branch on the Hub; by default the catalog's commit, else the newest. Has no effect on
            a folder or the embedded model.

    Raises:
        ModelNotFoundError: there is no such folder or repository, or it cannot be fetched.
        UnknownKeyError: ``model`` has the form of a catalog name and is not in the catalog.
        CheckpointError: the folder is incomplete, damaged, not a reranker, or of an unsupported architecture.
        InputError: ``model`` is neither a string nor a path.

    """
    if not isinstance(model, str | os.PathLike | None):
        raise InputError(f"expected a model's name or folder, got {type(model).__name__}")
    text = catalog.DEFAULT if model is None else os.fspath(model)
    row = catalog.find(text) if isinstance(model, str | None) else None
    if row is not None and row.embedded:
        return _embedded(row)
    folder = Path(os.path.expanduser(text))  # os.path returns False where Path raises: too long, unknown ~user
    if os.path.isfile(folder / CONFIG) or (row is None and text and os.path.exists(folder)):
        return read(folder, relevant_label=relevant_label)
    if row is None and isinstance(model, str) and not _PATH.search(text):
        catalog.lookup(text)  # raises UnknownKeyError with the table of names
    if row is None and not (isinstance(model, str) and _HUB_ID.fullmatch(text)):
        return read(folder)  # raises ModelNotFoundError: there is no such path
    repo = row.repo if row else text
    if repo is None:
        raise ModelNotFoundError(
            f"expected a model whose weights are public, got {text!r}: they were never released",
            hint="use jina-reranker-v1-turbo-en or -tiny-en, which were distilled from it, or the embedded model",
        )
    revision = revision or (row.revision if row else None)
    forbidden = bool(offline) or hub.offline_by_environment()
    renamed = [alias for alias in row.aliases if "/" in alias] if row else []
    folder, origin = hub.fetch(repo, revision, offline=forbidden, others=renamed)
    _check_hashes(folder, row.hashes if row and revision == row.revision else {})
    read_from = _read(folder, row.name if row else repo, origin, folder.name, relevant_label)
    if row is not None and row.noncommercial:
        _say_licence(row.name, row.licence)
    return read_from


def read(folder: str | os.PathLike[str], *, relevant_label: str | int | None = None) -> Checkpoint:
    """Load the checkpoint in a local folder. Arguments and errors are those of :func:`load`."""
    path = Path(os.path.expanduser(folder))
    if not os.path.isdir(path):
        got = "a file" if os.path.exists(path) else "no such path"
        raise ModelNotFoundError(
            f"expected a model folder, got {got} at {path}", hint=f"give the folder that holds {', '.join(REQUIRED)}"
        )
    checkpoint = _read(path, path.resolve().name, "local", None, relevant_label)
    licence = _card_licence(path / CARD)
    if licence and catalog.forbids_commerce(licence):
        _say_licence(checkpoint.name, licence)
    return checkpoint


def _say_licence(name: str, licence: str) -> None:
    log.warning("%s is licensed under %s, which forbids commercial use", name, licence)


def _card_licence(path: Path) -> str | None:
    """The ``license`` in the front matter of a model card; None if there is no card or no such key."""
    if not path.is_file():
        return None
    with path.open("rb") as file:
        card = file.read(8192).decode(errors="replace")
    front = re.match(r"---\s*\n(.*?)\n---", card, flags=re.S)
    found = re.search(r"^license:\s*[\"']?([\w.-]+)", front[1], flags=re.M) if front else None
    return found[1] if found else None


def _embedded(row: catalog.Model) -> Checkpoint:
    if not (row.folder / WEIGHTS).is_file():
        raise ModelNotFoundError(
            f"expected the embedded model {row.name} in {row.folder}, got no {WEIGHTS} there",
            hint="this installation is incomplete; install turborank again",
        )
    return _read(row.folder, row.name, "embedded", None)


def _read(folder: Path, name: str, origin: str, revision: str | None, relevant: str | int | None = None) -> Checkpoint:
    verify.files(folder)
    weights, raw = layouts.read(folder, verify.json_object(folder / CONFIG), relevant)
    shapes = weights.shapes
    verify.one_logit(shapes, weights.path, resembles(shapes))
    config = model_config(raw, shapes, folder / CONFIG)
    tensors.check(weights, ARCHITECTURES[config.architecture].parameters(config), config.architecture)
    weights.release()  # the check for NaN and infinity has read every page
    tokenizer = verify.tokenizer(folder / TOKENIZER, config)
    return Checkpoint(
        name, folder, origin, revision, config, raw, weights, tokenizer, copy.deepcopy(raw), relevant
    )  # fmt: skip


def model_config(raw: Mapping[str, Any], shapes: verify.Shapes, path: Path) -> ModelConfig:
    """The ModelConfig of a checkpoint. Raises CheckpointError naming every invalid value of config.json."""
    faults = verify.config_faults(raw)
    sizes = [raw[key] for key in ("num_hidden_layers", "num_attention_heads") if raw.get(key) is not None]
    if any(not isinstance(size, int) or size > verify.MAX_LAYERS for size in sizes):  # a family makes lists of them
        raise CheckpointError.listing("a usable config", faults, path)
    try:
        known = recognise(raw, shapes)
    except (CheckpointError, LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        if isinstance(error, CheckpointError):  # first the unknown family: it may be why the other keys are missing
            faults.insert(0, error.message)
        raise CheckpointError.listing("a usable config", faults or [repr(error)], path) from error
    if faults:
        raise CheckpointError.listing("a usable config", faults, path)
    return known


def save(checkpoint: Checkpoint, folder: str | os.PathLike[str]) -> None:
    """Write a checkpoint in the published layout.

    A checkpoint as loaded is written back byte for byte, including stored types, name prefix, tensor order, metadata,
    shards and modules. If ``weights`` or ``raw_config`` were replaced, they are serialised (float32 and int8, canonical
    names, one file), and the tokenizer files are copied from ``checkpoint.folder``. Each file is written atomically.

    Raises CheckpointError if ``folder`` is a file.
    """
    target = Path(folder).expanduser()
    if target.exists() and not target.is_dir():
        raise CheckpointError(f"expected a folder to save to, got a file at {target}")
    target.mkdir(parents=True, exist_ok=True)
    source, weights = checkpoint.folder, checkpoint.weights
    if isinstance(weights, TensorFile):
        names = files(source)
        for path, data in weights.data().items():
            _write(target / path.relative_to(source), data)
            names.remove(str(path.relative_to(source)))
    else:
        names = [name for name in FILES if name != WEIGHTS and (source / name).is_file()]
        _write(target / WEIGHTS, _serialised(weights))
    as_loaded = checkpoint.raw_config == checkpoint.loaded_config and isinstance(weights, TensorFile)
    for name in names:
        if name == CONFIG and not as_loaded:
            _write(target / name, (json.dumps(checkpoint.raw_config, indent=2) + "\n").encode())
        else:
            _write(target / name, (source / name).read_bytes())


def files(folder: Path) -> list[str]:
    """Names of the files of a model folder that :func:`save` copies and :func:`hashes` covers, in every layout."""
    return [name for name in (*FILES, *layouts.extra_files(folder)) if (folder / name).is_file()]


def _serialised(weights: Mapping[str, npt.NDArray[Any]]) -> bytes:
    from safetensors.numpy import save as serialise

    return serialise({name: weights[name] for name in weights}, metadata={"format": "pt"})


def _write(path: Path, data: bytes | memoryview) -> None:
    with replacing(path) as file:  # the old file may be memory-mapped; renaming over it keeps that mapping valid
        file.write(data)


def hashes(checkpoint: Checkpoint) -> dict[str, str]:
    """File name -> SHA-256 of each of the checkpoint's files on disk. Reads all of them."""
    return {name: file_hash(checkpoint.folder / name) for name in files(checkpoint.folder)}


def weights_hash(checkpoint: Checkpoint) -> str:
    """SHA-256 of ``model.safetensors``; of weights in several files, of the list of their names and hashes."""
    found = {name: file_hash(checkpoint.folder / name) for name in files(checkpoint.folder) if name.endswith(SUFFIX)}
    if list(found) == [WEIGHTS]:
        return found[WEIGHTS]
    return hashlib.sha256(json.dumps(found, sort_keys=True).encode()).hexdigest()


def _check_hashes(folder: Path, pinned: Mapping[str, str]) -> None:
    """Raise CheckpointError for a file whose SHA-256 is not the one pinned in the catalog."""
    for name, expected in pinned.items():
        if (folder / name).is_file() and (got := file_hash(folder / name)) != expected:
            raise CheckpointError(
                f"expected sha256 {expected}, got {got} at {folder / name}",
                hint="delete it from the Hugging Face cache and load the model again",
            )
