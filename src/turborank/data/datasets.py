"""Datasets for evaluation: download, checks of queries, judgements and documents, and notes on what was found.

Downloads are resumed, verified against the published checksum, and moved into place whole.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import urllib.error
import urllib.request
import zipfile
from collections.abc import Sequence
from http.client import HTTPException
from pathlib import Path

from turborank.data.corpus import LAYOUTS, Dataset, Parts
from turborank.data.dataset_table import DATASETS, GROUPS, DatasetRow, Download
from turborank.data.files import file_hash
from turborank.data.trec import line_of
from turborank.errors import InputError, UnknownKeyError
from turborank.types import Progress, StartProgress, no_progress

BLOCK = 1 << 20
TIMEOUT = 60  # seconds without a byte
ATTEMPTS = 3  # a broken connection is resumed this often before giving up


def fetch(file: Download, folder: Path, *, progress: Progress | None = None) -> Path:
    """The file in ``folder``, downloaded if it is not there yet.

    A partial download is kept beside it as ``….part`` and continued. Raises InputError when the address cannot be
    reached or the checksum is not the published one; then the partial file is deleted.
    """
    path = folder / file.path
    if path.exists():
        return path
    part = path.with_name(path.name + ".part")
    part.parent.mkdir(parents=True, exist_ok=True)
    for attempt in range(ATTEMPTS):
        try:
            _continue(file.url, part, progress)
            break
        except urllib.error.HTTPError as error:
            raise InputError(f"expected {file.url} to be there, got HTTP {error.code} {error.reason}") from error
        except (OSError, HTTPException) as error:
            if attempt + 1 == ATTEMPTS:
                raise InputError(
                    f"expected to download {file.url}, got {getattr(error, 'reason', error)}",
                    hint=f"download it elsewhere and put it at {path}",
                ) from error
    _verify(file, part)
    os.replace(part, path)
    return path


def _continue(url: str, part: Path, progress: Progress | None) -> None:
    """Append what is missing of ``url`` to ``part``; from the start where the server cannot resume."""
    have = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    try:
        response = urllib.request.urlopen(request, timeout=TIMEOUT)
    except urllib.error.HTTPError as error:
        if error.code == 416 and have:  # nothing is left to fetch
            return
        raise
    with response:
        resumed = response.status == 206
        done = have if resumed else 0
        total = done + int(response.headers.get("Content-Length") or 0)
        with part.open("ab" if resumed else "wb") as out:
            while block := response.read(BLOCK):
                out.write(block)
                done += len(block)
                if progress is not None:
                    progress(done, total)
    if total and done < total:
        raise OSError(f"connection closed after {done} of {total} bytes")


def _verify(file: Download, part: Path) -> None:
    for algorithm, expected in (("md5", file.md5), ("sha256", file.sha256)):
        if expected is not None and (got := file_hash(part, algorithm)) != expected:
            part.unlink()
            raise InputError(
                f"expected {algorithm.upper()} {expected} of {file.url}, got {got}",
                hint="try again; the file was deleted",
            )


def _unpack(archive: Path, into: Path) -> None:
    """A zip's files under ``into``; a name that would leave it is refused."""
    staging = into.with_name(into.name + ".unpacking")
    shutil.rmtree(staging, ignore_errors=True)
    try:
        with zipfile.ZipFile(archive) as zipped:
            for name in zipped.namelist():
                if Path(name).is_absolute() or ".." in Path(name).parts:
                    raise InputError(f"expected an archive of files inside one folder, got {name!r} in {archive}")
            zipped.extractall(staging)
    except zipfile.BadZipFile as error:
        raise InputError(f"expected a zip archive at {archive}", hint="delete it and try again") from error
    os.replace(staging, into)


def obtain(row: DatasetRow, data_dir: Path, *, offline: bool, progress: StartProgress = no_progress) -> Path:
    """The folder of a dataset, downloaded and unpacked if it is not under ``data_dir`` yet.

    A folder ``data_dir/<name>`` takes precedence. Raises InputError, with the files to put there, if the dataset cannot
    be fetched.
    """
    placed = data_dir / row.name
    if placed.is_dir():
        return placed
    if not row.files:
        raise InputError(
            f"expected {row.name} at {placed}; it has no public download", hint=f"put it there: {row.note}"
        )
    archive = next((file for file in row.files if file.path.endswith(".zip")), None)
    unpacked = data_dir / ".unpacked" / archive.path.removesuffix(".zip") if archive else None
    downloads = data_dir / ".downloads" if archive else data_dir / ".downloads" / row.name
    needed = [] if unpacked is not None and unpacked.is_dir() else list(row.files)
    absent = [file for file in needed if not (downloads / file.path).exists()]
    if absent and offline:
        hint = "\n".join(f"  {file.url}  ->  {downloads / file.path}" for file in absent)
        raise InputError(
            f"expected {row.name} at {placed}, got nothing, and offline nothing is downloaded",
            hint=f"go online, or unpack it at {placed}, or put\n{hint}",
        )
    for file in needed:
        fetch(file, downloads, progress=progress(f"download {file.path}"))
    if archive is None or unpacked is None:
        return downloads
    if not unpacked.is_dir():
        _unpack(downloads / archive.path, unpacked)
    return unpacked / row.folder


SHOWN = 3  # examples in a message


def expand(names: Sequence[str]) -> list[str]:
    """Names with every group (``beir``, ``loco``, …) replaced by its datasets, each once."""
    spread = [member for name in names for member in GROUPS.get(name, (name,))]
    return list(dict.fromkeys(spread))


def default_data_dir() -> Path:
    """Where datasets are kept: ``TURBORANK_DATA``, or the user's cache."""
    named = os.environ.get("TURBORANK_DATA")
    base = os.environ.get("XDG_CACHE_HOME")
    return Path(named) if named else (Path(base) if base else Path.home() / ".cache") / "turborank" / "datasets"


def called(name: str) -> str:
    """What the dataset of that name, or at that path, is called in results."""
    path = Path(name)
    if name in DATASETS:
        return name
    return path.resolve().name if path.is_dir() else path.stem


def load(
    name: str,
    *,
    data_dir: Path | None = None,
    split: str | None = None,
    offline: bool = False,
    keep_unknown: bool = False,
    progress: StartProgress = no_progress,
) -> Dataset:
    """A dataset by name (a row of DATASETS), or the user's own: a folder in BEIR layout, or a LlamaIndex JSON file.

    ``keep_unknown`` keeps judgements of documents that are not in the corpus, as trec_eval would: they count as
    not found. Otherwise they are an error. Raises InputError for anything malformed, with file and line.
    """
    row = DATASETS.get(name)
    if row is not None:
        folder = obtain(row, data_dir or default_data_dir(), offline=offline, progress=progress)
        parts = LAYOUTS[row.layout](folder, split or row.split, progress(f"read {name}"))
        keep_unknown = keep_unknown or bool(row.files)
        return _checked(name, split or row.split, parts, row, keep_unknown)
    path = Path(name)
    if not path.exists():
        raise UnknownKeyError("dataset", name, (*DATASETS, *GROUPS), hint="or give a folder in BEIR layout")
    if path.is_dir():
        split = split or "test"
        return _checked(called(name), split, _folder(path, split, progress), None, keep_unknown)
    if split is not None:
        raise InputError(f"expected no split of a LlamaIndex file, which has none, got {split!r} for {path}")
    return _checked(called(name), "all", LAYOUTS["llamaindex"](path, "", None), None, keep_unknown)


def _folder(path: Path, split: str, progress: StartProgress) -> Parts:
    if (path / "questions_df.csv").exists():
        return LAYOUTS["chunks"](path, split, None)
    missing = [name for name in ("corpus.jsonl", "queries.jsonl", "qrels") if not (path / name).exists()]
    if missing:
        raise InputError(f"expected corpus.jsonl, queries.jsonl and qrels/ in {path}, got no {', '.join(missing)}")
    return LAYOUTS["beir"](path, split, progress(f"read {path.name}"))


def _examples(values: Sequence[str]) -> str:
    more = f" and {len(values) - SHOWN} more" if len(values) > SHOWN else ""
    return ", ".join(map(repr, values[:SHOWN])) + more


def _checked(name: str, split: str, parts: Parts, row: DatasetRow | None, keep_unknown: bool) -> Dataset:
    """A dataset from its parts, once they have been compared with each other and with the row's counts."""
    if not parts.qrels:
        raise InputError(f"expected judged queries in {name}, got none")
    unknown = [query_id for query_id in parts.qrels if query_id not in parts.queries]
    if unknown:
        raise InputError(
            f"expected every judged query among the queries of {name}, got {_examples(unknown)} without text"
            + (f" at {line_of(parts.judged_in, unknown[0])}" if parts.judged_in else "")
        )
    notes = [row.note] if row and row.note else []
    notes += _unknown_documents(name, parts, keep_unknown)
    if parts.repeated:
        notes.append(f"judgements that only repeat another: {parts.repeated}; each counts once")
    queries = {query_id: parts.queries[query_id] for query_id in parts.qrels}
    empty = [query_id for query_id, text in queries.items() if not text.strip()]
    if empty:
        notes.append(f"empty queries: {len(empty)} ({_examples(empty)}); they retrieve nothing and count as zero")
    relevant_from = row.relevant_from if row else 1
    hopeless = sum(max(judged.values(), default=0) < relevant_from for judged in parts.qrels.values())
    if hopeless:
        notes.append(
            f"queries without a relevant document (grade {relevant_from} or more): {hopeless}; they count as zero"
        )
    if row is not None and split == row.split:
        _assert_counts(row, parts)
    digest = hashlib.sha256(parts.corpus.fingerprint.encode())
    digest.update(
        json.dumps([queries, bool(row and row.queries_are_documents)], ensure_ascii=False).encode("utf-8", "replace")
    )
    return Dataset(
        name, split, queries, parts.qrels, parts.corpus, digest.hexdigest(), row, tuple(notes),
        queries_are_documents=bool(row and row.queries_are_documents), relevant_from=relevant_from,
    )  # fmt: skip


def _unknown_documents(name: str, parts: Parts, keep: bool) -> list[str]:
    judged = dict.fromkeys(doc_id for documents in parts.qrels.values() for doc_id in documents)
    unknown = [doc_id for doc_id in judged if doc_id not in parts.corpus]
    if unknown and not keep:
        query_id = next(one for one, documents in parts.qrels.items() if unknown[0] in documents)
        raise InputError(
            f"expected every judged document in the corpus of {name}, got {_examples(unknown)} missing"
            + (f" at {line_of(parts.judged_in, query_id, unknown[0])}" if parts.judged_in else ""),
            hint="complete the corpus, or keep them (--keep-unknown): they will count as not found",
        )
    if not unknown:
        return []
    return [f"judged documents not in the corpus: {len(unknown)} ({_examples(unknown)}); they count as not found"]


def _assert_counts(row: DatasetRow, parts: Parts) -> None:
    """The numbers of the table, so that another collection under the same name never passes for this one."""
    got = {
        "queries": len(parts.qrels),
        "documents": len(parts.corpus),
        "judgements": sum(map(len, parts.qrels.values())) + parts.repeated,
    }
    expected = {"queries": row.queries, "documents": row.documents, "judgements": row.judgements}
    wrong = [
        f"{expected[what]} {what}, got {count}" for what, count in got.items() if expected[what] not in (None, count)
    ]
    if wrong:
        raise InputError(
            f"expected {row.name} with {'; '.join(wrong)}", hint="the files are not the published collection"
        )
