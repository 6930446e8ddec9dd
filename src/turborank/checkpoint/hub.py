"""Fetch published checkpoints: from the Hugging Face cache if complete, else from the Hub. Downloads are logged.

huggingface_hub does the work, and its environment variables apply (HF_HOME, HF_ENDPOINT, HF_TOKEN).
It is imported on first use, because importing it takes ten times as long as importing the rest of turborank.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from turborank.checkpoint import layouts, verify
from turborank.checkpoint.verify import CONFIG, INDEX, REQUIRED, WEIGHTS
from turborank.errors import CheckpointError, ModelNotFoundError

OPTIONAL = ("tokenizer_config.json", "special_tokens_map.json")
MODULE_FILES = (layouts.MODULES, *layouts.SETTINGS)  # sentence-transformers' layout; optional, too
ONNX = ("onnx/model.onnx", "model.onnx", "onnx/model_quantized.onnx")
log = logging.getLogger("turborank")


def offline_by_environment() -> bool:
    """Whether HF_HUB_OFFLINE forbids network access, by huggingface_hub's rules for its value."""
    return os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "ON", "YES", "TRUE"}


def cached(repo: str, revision: str | None, others: Sequence[str] = ()) -> tuple[Path | None, list[str]]:
    """The cached folder of a repository (None if not cached) and the required files missing from it.

    ``others``: former names of the repository, under which it may have been cached; the first complete copy is taken.
    """
    found = [_cached(name, revision) for name in (repo, *others)]
    whole = [copy for copy in found if copy[0] is not None and not copy[1]]
    return (whole or found)[0]


def _cached(repo: str, revision: str | None) -> tuple[Path | None, list[str]]:
    from huggingface_hub import try_to_load_from_cache

    def look(names: Iterable[str]) -> dict[str, str]:
        paths = {name: try_to_load_from_cache(repo, name, revision=revision) for name in names}
        return {name: path for name, path in paths.items() if isinstance(path, str)}

    found = look((*REQUIRED, INDEX))
    if not found:
        return None, list(REQUIRED)
    folder = Path(found.get(CONFIG) or next(iter(found.values()))).parent
    wanted = list(REQUIRED)
    try:
        if WEIGHTS not in found and INDEX in found:
            wanted = [name for name in REQUIRED if name != WEIGHTS] + list(
                dict.fromkeys(layouts.shards(folder).values())
            )
        wanted += [f"{name}/{file}" for name, file in _module_files(folder)]
    except CheckpointError:
        pass  # a damaged index or modules.json is reported when the folder is loaded
    return folder, [name for name in wanted if not (folder / name).is_file()]


def _module_files(folder: Path) -> Iterator[tuple[str, str]]:
    """(folder, file) of every module after the encoder; Pooling has no weights."""
    for module in layouts.modules(folder)[1:]:
        yield module.folder.name, CONFIG
        if module.kind != "Pooling":
            yield module.folder.name, WEIGHTS


def fetch(repo: str, revision: str | None, *, offline: bool, others: Sequence[str] = ()) -> tuple[Path, str]:
    """The folder with a repository's files and their origin, "cache" or "hub".

    A complete copy in the cache, under ``repo`` or one of its ``others`` names, is used without network access.

    Raises:
        ModelNotFoundError: the files are not in the cache and cannot be fetched.
        CheckpointError: the repository lacks a required file.

    """
    folder, missing = cached(repo, revision, others)
    if folder is not None and not missing:
        return folder, "cache"
    if offline:
        present = sorted(name for name in REQUIRED if folder is not None and name not in missing)
        there = f"only {', '.join(present)} of it" if present else "a part of it" if folder else "nothing of it"
        raise ModelNotFoundError(
            f"expected {_named(repo, revision)} in the Hugging Face cache, got {there}, and network access is disabled "
            "(offline=True or HF_HUB_OFFLINE)",
            hint=_remedy(repo, revision),
        )
    return _download(repo, revision), "hub"


def _download(repo: str, revision: str | None) -> Path:
    from huggingface_hub import hf_hub_download

    def get(name: str) -> Path:
        return Path(hf_hub_download(repo, name, revision=revision))

    try:
        sizes = {name: size for name in REQUIRED if (size := _size(repo, name, revision)) is not None}
        lists = [INDEX] if WEIGHTS not in sizes else []
        sizes |= {n: size for n in (*lists, *OPTIONAL, *MODULE_FILES) if (size := _size(repo, n, revision)) is not None}
        _refuse_incomplete(repo, revision, sizes, get)
        folder = get(CONFIG).parent
        for name in (INDEX, layouts.MODULES):  # each lists further files
            if name in sizes:
                get(name)
        more = list(dict.fromkeys(layouts.shards(folder).values())) if INDEX in sizes else []
        more += [f"{name}/{file}" for name, file in _module_files(folder)] if layouts.MODULES in sizes else []
        for name in more:
            if (size := _size(repo, name, revision)) is None:
                raise CheckpointError(
                    f"expected {name}, which its lists name, in {_named(repo, revision)}, got no such file"
                )
            sizes[name] = size
        megabytes = sum(sizes.values()) / 1e6
        log.warning("downloading %s (%.1f MB) into the Hugging Face cache", _named(repo, revision), megabytes)
        # Files that a complete copy may lack come first: without them none that was interrupted passes for complete.
        for name in sorted(sizes, key=lambda name: name in (*REQUIRED, *more)):
            get(name)
    except CheckpointError:
        raise
    except Exception as error:  # the library's HTTP client, and with it the error classes, differs between versions
        raise ModelNotFoundError(_trouble(repo, revision, error), hint=_remedy(repo, revision)) from error
    return folder


def _size(repo: str, name: str, revision: str | None) -> int | None:
    """Size in bytes of a file on the Hub; None if the repository has no such file."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_url
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    try:
        return get_hf_file_metadata(hf_hub_url(repo, name, revision=revision)).size or 0
    except LocalEntryNotFoundError:  # a subclass of EntryNotFoundError that means there is no network
        raise
    except EntryNotFoundError:
        return None


def _refuse_incomplete(repo: str, revision: str | None, sizes: dict[str, int], get: Callable[[str], Path]) -> None:
    missing = [name for name in REQUIRED if name not in sizes and not (name == WEIGHTS and INDEX in sizes)]
    if not missing:
        return
    hint = "if it offers other formats, download and convert it, then give the folder's path"
    if missing == [WEIGHTS] and any(_size(repo, name, revision) is not None for name in ONNX):
        hint = f"the weights are there as ONNX only; {verify.origin_hint(get(CONFIG))}"
    raise CheckpointError(
        f"expected {', '.join(REQUIRED)} in {_named(repo, revision)} on the Hub, got no {' and no '.join(missing)}",
        hint=hint,
    )


def _trouble(repo: str, revision: str | None, error: Exception) -> str:
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    wanted = f"expected {_named(repo, revision)} on the Hugging Face Hub"
    if isinstance(error, GatedRepoError):
        return f"{wanted}, got a gated repository: accept its terms on its page and log in with hf auth login"
    if isinstance(error, RepositoryNotFoundError):
        return f"{wanted}, got no such repository (or a private one), and no folder {repo!r} is here"
    if isinstance(error, RevisionNotFoundError):
        return f"{wanted}, got no such revision"
    first = (str(error) or "no message").strip().splitlines()[0]
    return f"{wanted}, got no usable answer ({type(error).__name__}: {first})"


def _named(repo: str, revision: str | None) -> str:
    return f"{repo}@{revision or 'main'}"


def _remedy(repo: str, revision: str | None) -> str:
    at = f" --revision {revision}" if revision else ""
    folder = repo.rpartition("/")[2]
    return (
        f"where there is a network, run: hf download {repo} {' '.join(REQUIRED)}{at} --local-dir {folder}"
        f" (huggingface-cli download with older versions), copy the folder {folder} here and give its path;"
        " or use the embedded model, which needs no network: Reranker()"
    )
