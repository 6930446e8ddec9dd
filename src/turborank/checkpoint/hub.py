"""Published checkpoints: from the Hugging Face cache if they are there, else from the Hub, never unannounced.

huggingface_hub does the work and keeps its own rules (HF_HOME, HF_ENDPOINT, HF_TOKEN, its progress bars).
It is imported when first needed: it is ten times as slow to import as everything else together.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path

from turborank.checkpoint.verify import REQUIRED
from turborank.errors import CheckpointError, ModelNotFoundError

OPTIONAL = ("tokenizer_config.json", "special_tokens_map.json")
log = logging.getLogger("turborank")


def offline_by_environment() -> bool:
    """Whether HF_HUB_OFFLINE forbids the network, read as huggingface_hub reads it."""
    return os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "ON", "YES", "TRUE"}


def cached(repo: str, revision: str | None) -> tuple[Path | None, list[str]]:
    """The cached folder of a repository, or None, and the required files that it lacks."""
    from huggingface_hub import try_to_load_from_cache

    found = {name: try_to_load_from_cache(repo, name, revision=revision) for name in REQUIRED}
    paths = [Path(path) for path in found.values() if isinstance(path, str)]
    missing = [name for name, path in found.items() if not isinstance(path, str)]
    return (paths[0].parent if paths else None), missing


def fetch(repo: str, revision: str | None, *, offline: bool) -> tuple[Path, str]:
    """The folder with a repository's files, and where they came from, "cache" or "hub".

    A complete copy in the cache is taken without asking the network. Raises ModelNotFoundError when the files
    are not in the cache and cannot be fetched, CheckpointError when the repository lacks one of them.
    """
    folder, missing = cached(repo, revision)
    if folder is not None and not missing:
        return folder, "cache"
    if offline:
        there = f"only {', '.join(sorted(set(REQUIRED) - set(missing)))} of it" if folder else "nothing of it"
        raise ModelNotFoundError(
            f"expected {_named(repo, revision)} in the Hugging Face cache, got {there}, and the network is off limits "
            "(offline=True or HF_HUB_OFFLINE)",
            hint=_remedy(repo, revision),
        )
    return _download(repo, revision), "hub"


def _download(repo: str, revision: str | None) -> Path:
    from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    sizes: dict[str, int] = {}
    try:
        for name in (*REQUIRED, *OPTIONAL):
            try:
                sizes[name] = get_hf_file_metadata(hf_hub_url(repo, name, revision=revision)).size or 0
            except LocalEntryNotFoundError:  # an EntryNotFoundError that means: no network
                raise
            except EntryNotFoundError as error:
                if name in REQUIRED:
                    raise CheckpointError(
                        f"expected {', '.join(REQUIRED)} in {_named(repo, revision)} on the Hub, got no {name}",
                        hint="if it offers other formats, download and convert it, then give the folder's path",
                    ) from error
        megabytes = sum(sizes.values()) / 1e6
        log.warning("downloading %s (%.1f MB) into the Hugging Face cache", _named(repo, revision), megabytes)
        paths = [Path(hf_hub_download(repo, name, revision=revision)) for name in sizes]
    except CheckpointError:
        raise
    except Exception as error:  # the library's transport, and so its errors, changed with its versions
        raise ModelNotFoundError(_trouble(repo, revision, error), hint=_remedy(repo, revision)) from error
    return paths[0].parent


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
