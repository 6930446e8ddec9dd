"""Layouts of published rerankers, each read into one mapping of canonical tensor names.

``single``   ``model.safetensors``
``shards``   ``model.safetensors.index.json`` and the files it names
``modules``  a chain of sentence-transformers modules (the Ettin rerankers, docs/model.md §5.6): ``modules.json`` lists
             the encoder, then Pooling, Dense, LayerNorm and Dense, each in its own folder
``fused``    XLM-RoBERTa with the tensor names of jina-reranker-v2 (docs/model.md §5.7); query, key and value are one
             tensor

Settings outside config.json (pooling, maximum length) are merged into the config under transformers' keys. A classifier
with two labels is converted to one logit if it is known which label means relevant: softmax over two labels equals
the sigmoid of the difference of their logits (docs/model.md §5.8).
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from turborank.checkpoint import verify
from turborank.checkpoint.tensors import TensorFile
from turborank.checkpoint.verify import CLASSIFIERS, CONFIG, INDEX, WEIGHTS
from turborank.errors import CheckpointError

MODULES = "modules.json"
SETTINGS = ("config_sentence_transformers.json", "sentence_bert_config.json")  # in the same folder
_PLAIN_NAME = re.compile(r"\w[\w.-]{0,254}", re.ASCII)  # file systems take 255 bytes
_GELU, _IDENTITY = "GELU", "Identity"

# Recognised names of the relevant and of the irrelevant label; compared in lower case, with "_" and "-" as spaces.
_RELEVANT = ("relevant", "is relevant")
_IRRELEVANT = ("irrelevant", "not relevant", "non relevant", "nonrelevant")


class FolderLayout(NamedTuple):
    """A folder's tensors by canonical name, and config.json merged with the layout's other settings."""

    weights: TensorFile
    raw: dict[str, Any]


class _Module(NamedTuple):
    kind: str  # class name without the dotted path, which differs between versions
    folder: Path


def read(folder: Path, raw: Mapping[str, Any], relevant: str | int | None = None) -> FolderLayout:
    """Read a model folder; the layout is recognised by its files.

    Args:
        folder: the model folder.
        raw: its parsed config.json.
        relevant: name or number of the relevant label, for a classifier with two labels.

    Raises:
        CheckpointError: unsupported modules, inconsistent shards, or two labels and no ``relevant``.

    """
    chain = modules(folder)
    weights = _weights(folder, chain)
    weights.drop(verify.BUFFERS)
    config = dict(raw)
    if chain:
        config |= _chain_config(folder, chain, config)
    if raw.get("model_type") == "modernbert" and CLASSIFIERS[0] in weights.table:
        weights.drop(name for name in weights.table if name.startswith("decoder."))  # the language-model head
    if _is_fused(config, weights):
        config["model_type"] = "xlm-roberta"
        _unfuse(weights)
    _one_of_two(weights, config, relevant)
    return FolderLayout(weights, config)


def extra_files(folder: Path) -> list[str]:
    """Names of the model's files besides the usual ones: shards, their index, modules and their settings."""
    names = [INDEX, *shards(folder).values()] if not (folder / WEIGHTS).is_file() else []
    chain = modules(folder)
    names += [MODULES, *SETTINGS] if chain else []
    for module in chain[1:]:
        names += [f"{module.folder.name}/{name}" for name in (CONFIG, WEIGHTS)]
    return [name for name in dict.fromkeys(names) if (folder / name).is_file()]


# ---------------------------------------------------------------- shards


def shards(folder: Path) -> dict[str, str]:
    """Stored tensor name -> file name, from the index; {} if there is no index.

    Raises CheckpointError for an entry that is not the plain name of a safetensors file, such as a path.
    """
    path = folder / INDEX
    if not path.is_file():
        return {}
    table = verify.json_object(path).get("weight_map")
    if not isinstance(table, dict) or not table:
        raise CheckpointError(f"expected a weight_map, tensor name to file name, got {table!r:.80} in {path}")
    for name in table.values():
        if not isinstance(name, str) or not _PLAIN_NAME.fullmatch(name) or not name.endswith(".safetensors"):
            raise CheckpointError(
                f"expected the names of safetensors files beside the index, got {name!r:.80} in {path}"
            )
    return dict(table)


def _weights(folder: Path, chain: list[_Module]) -> TensorFile:
    if (folder / WEIGHTS).is_file():
        renames = _chain_names(chain)
        path = folder / WEIGHTS
        return TensorFile(path, {path: verify.canonical, **renames} if renames else verify.canonical)
    index, table = folder / INDEX, shards(folder)
    if chain[1:]:
        raise CheckpointError(f"expected {WEIGHTS} beside {MODULES}, got shards in {folder}")
    missing = [name for name in dict.fromkeys(table.values()) if not (folder / name).is_file()]
    if missing:
        raise CheckpointError(f"expected the shards named in {index}, got no {' and no '.join(missing)}")
    weights = TensorFile(index, {folder / name: verify.canonical for name in dict.fromkeys(table.values())})
    found = {entry.name: entry.file.name for entry in weights.table.values() if entry.file is not None}
    faults = [f"{name}: missing from {file}" for name, file in table.items() if found.get(name) != file]
    faults += [f"{name}: in {file}, but not in the index" for name, file in found.items() if name not in table]
    if faults:
        raise CheckpointError.listing("shards as their index describes them", faults, index)
    return weights


# ---------------------------------------------------------------- sentence-transformers' modules


def modules(folder: Path) -> list[_Module]:
    """The chain of modules.json, the encoder first; [] if there is no modules.json.

    Raises CheckpointError if it is not a list of modules or if a module's path leaves the folder.
    """
    path = folder / MODULES
    if not path.is_file():
        return []
    rows = verify.json_value(path)
    chain: list[_Module] = []
    for row in rows if isinstance(rows, list) else []:
        kind, name = (row.get(key) for key in ("type", "path")) if isinstance(row, dict) else (None, None)
        if not isinstance(kind, str) or not isinstance(name, str) or (name and not _PLAIN_NAME.fullmatch(name)):
            chain = []
            break
        chain.append(_Module(kind.rpartition(".")[2], folder / name if name else folder))
    if not chain:
        raise CheckpointError(f"expected a list of modules, each with a type and a folder, got {rows!r:.120} in {path}")
    return chain


_HEAD = ("Transformer", "Pooling", "Dense", "LayerNorm", "Dense")


def _chain_names(chain: list[_Module]) -> dict[Path, Callable[[str], str]]:
    """File -> renaming of the head's tensors to canonical names. Raises CheckpointError for any other chain."""
    kinds = tuple(module.kind for module in chain)
    if kinds in ((), ("Transformer",)):
        return {}
    if kinds != _HEAD:
        embeds = "; this is an embedding model, use the cross-encoder of its family" if "Dense" not in kinds else ""
        raise CheckpointError(
            f"expected the modules {' → '.join(_HEAD)}, or Transformer alone, got {' → '.join(kinds)} "
            f"in {chain[0].folder / MODULES}{embeds}"
        )
    _pooling, first, norm, last = chain[1:]
    tables = {
        first.folder: {"linear.weight": "head.dense.weight"},
        norm.folder: {"norm.weight": "head.norm.weight", "norm.bias": "head.norm.bias"},
        last.folder: {"linear.weight": "classifier.weight", "linear.bias": "classifier.bias"},
    }
    missing = [str(path / WEIGHTS) for path in tables if not (path / WEIGHTS).is_file()]
    if missing:
        raise CheckpointError(f"expected the weights of the modules, got no {' and no '.join(missing)}")
    return {path / WEIGHTS: functools.partial(_renamed, path.name, table) for path, table in tables.items()}


def _renamed(module: str, table: Mapping[str, str], name: str) -> str:
    return table.get(name, f"{module}.{name}")  # tensors.check reports an unknown tensor by this name


def _chain_config(folder: Path, chain: list[_Module], raw: Mapping[str, Any]) -> dict[str, Any]:
    """The modules' settings under the keys of config.json. Raises CheckpointError for unsupported settings."""
    faults: list[str] = []
    stated: dict[str, Any] = {}
    settings, sizes = (verify.json_object(folder / n) if (folder / n).is_file() else {} for n in SETTINGS)
    prompts = settings.get("prompts")
    chosen = settings.get("default_prompt_name")
    prompt = prompts.get(chosen) if isinstance(prompts, dict) and isinstance(chosen, str) else None
    if prompt:
        faults.append(f"no default prompt, got {prompt!r:.80} in {SETTINGS[0]}")
    longest, positions = sizes.get("max_seq_length"), raw.get("max_position_embeddings")
    if isinstance(longest, int) and isinstance(positions, int) and 0 < longest < positions and len(chain) > 1:
        stated["max_position_embeddings"] = longest
    if len(chain) > 1:
        if raw.get("model_type") != "modernbert":
            faults.append(f"model_type 'modernbert' before this chain, got {raw.get('model_type')!r} in {CONFIG}")
        pooling, first, norm, last = (verify.json_object(module.folder / CONFIG) for module in chain[1:])
        stated["classifier_pooling"] = _pooling(pooling, faults)
        width = raw.get("hidden_size")
        _dense(first, {"in_features": width, "out_features": width, "bias": False}, _GELU, chain[2], faults)
        _dense(last, {"in_features": width, "out_features": 1, "bias": True}, _IDENTITY, chain[4], faults)
        if norm.get("dimension", width) != width:
            faults.append(f"dimension {width}, got {norm['dimension']!r} in {chain[3].folder.name}")
    if faults:
        raise CheckpointError.listing("modules like the published rerankers'", faults, folder / MODULES)
    return stated


def _pooling(config: Mapping[str, Any], faults: list[str]) -> str:
    """Return "cls" or "mean", from ``pooling_mode`` or the older boolean keys."""
    mode = config.get("pooling_mode")
    older = {"cls": "pooling_mode_cls_token", "mean": "pooling_mode_mean_tokens"}
    chosen = [str(mode)] if mode else [name for name, key in older.items() if config.get(key)]
    others = [key for key, value in config.items() if key.startswith("pooling_mode_") and value]
    if len(chosen) != 1 or chosen[0] not in older or (not mode and len(others) != 1):
        faults.append(f"pooling of cls or mean, got {mode or ', '.join(others) or 'none'}")
        return "cls"
    return str(chosen[0])


def _dense(
    config: Mapping[str, Any], expected: Mapping[str, object], activation: str, module: _Module, faults: list[str]
) -> None:
    where = f"in {module.folder.name}"
    faults += [f"{k} {v!r}, got {config.get(k)!r} {where}" for k, v in expected.items() if config.get(k, v) != v]
    given = str(config.get("activation_function", activation)).rpartition(".")[2]
    if given != activation:
        faults.append(f"activation_function {activation}, got {given} {where}")
    if config.get("use_residual"):
        faults.append(f"no use_residual, got {config['use_residual']!r} {where}")


# ---------------------------------------------------------------- jina-reranker-v2's names

_FUSED = re.compile(r"encoder\.layers\.(\d+)\.(mixer\.Wqkv|mixer\.out_proj|norm1|mlp\.fc1|mlp\.fc2|norm2)\.(\w+)")
_PARTS = {
    "mixer.out_proj": "attention.output.dense",
    "norm1": "attention.output.LayerNorm",
    "mlp.fc1": "intermediate.dense",
    "mlp.fc2": "output.dense",
    "norm2": "output.LayerNorm",
}


def _is_fused(raw: Mapping[str, Any], weights: TensorFile) -> bool:
    stated = raw.get("architectures")
    first = stated[0] if isinstance(stated, list) and stated else None
    known = raw.get("model_type") is None and isinstance(first, str) and first.startswith("XLMRoberta")
    return known and "encoder.layers.0.mixer.Wqkv.weight" in weights.table


def _unfuse(weights: TensorFile) -> None:
    """Rename the tensors to canonical names and split Wqkv; its rows are query, key and value, in this order."""
    for name in list(weights.table):
        found = _FUSED.fullmatch(name)
        if name.startswith("emb_ln."):
            weights.split(name, [name.replace("emb_ln", "embeddings.LayerNorm")])
        elif found and found[2] == "mixer.Wqkv":
            layer = f"encoder.layer.{found[1]}.attention.self"
            weights.split(name, [f"{layer}.{part}.{found[3]}" for part in ("query", "key", "value")])
        elif found:
            weights.split(name, [f"encoder.layer.{found[1]}.{_PARTS[found[2]]}.{found[3]}"])


# ---------------------------------------------------------------- two labels


def _one_of_two(weights: TensorFile, raw: dict[str, Any], relevant: str | int | None) -> None:
    """Replace a classifier with two labels by one logit: the relevant label's row minus the other row.

    Raises CheckpointError if neither the config nor ``relevant`` names the relevant label.
    """
    name = next((name for name in CLASSIFIERS if len(weights.shapes.get(name, ())) == 2), None)
    if name is None or weights.shapes[name][0] != 2:
        return
    labels = _labels(raw)
    row = _relevant_row(labels) if relevant is None else _chosen_row(labels, relevant)
    if row is None:
        raise CheckpointError(
            f"expected a reranker, with one label, got a classifier with 2 labels ({', '.join(map(repr, labels))}; "
            f"{name} is {list(weights.shapes[name])}) and no statement which label means relevant, in {weights.path}",
            hint="if the model is a reranker, name the relevant label: checkpoint.load(…, relevant_label=1), or in "
            'config.json "id2label": {"0": "irrelevant", "1": "relevant"}',
        )
    for tensor in (name, name.removesuffix("weight") + "bias"):
        if tensor in weights:
            value = weights[tensor]
            weights.derive(tensor, value[row : row + 1] - value[1 - row : 2 - row])
    raw |= {"id2label": {"0": labels[row]}, "label2id": {labels[row]: 0}}
    raw.pop("num_labels", None)


def _labels(raw: Mapping[str, Any]) -> list[str]:
    table = raw.get("id2label")
    table = table if isinstance(table, Mapping) else {}
    return [str(table.get(str(i), table.get(i, f"LABEL_{i}"))) for i in range(2)]


def _relevant_row(labels: list[str]) -> int | None:
    plain = [re.sub("[_-]", " ", label).strip().lower() for label in labels]
    return next((i for i in range(2) if plain[i] in _RELEVANT and plain[1 - i] in _IRRELEVANT), None)


def _chosen_row(labels: list[str], relevant: str | int) -> int:
    if relevant in labels and labels[0] != labels[1]:
        return labels.index(str(relevant))
    if str(relevant) in ("0", "1") and not isinstance(relevant, bool):
        return int(relevant)
    raise CheckpointError(f"expected relevant_label to be 0, 1 or one of {', '.join(labels)}, got {relevant!r:.80}")
