"""Fetching a dataset's files: resumed where a download broke off, verified, and put in place whole."""

from __future__ import annotations

import os
import shutil
import urllib.error
import urllib.request
import zipfile
from http.client import HTTPException
from pathlib import Path

from turborank.data.dataset_table import DatasetRow, Download
from turborank.data.files import file_hash
from turborank.errors import InputError
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

    Looked for at ``data_dir/<name>`` first, where anybody may put it. Raises InputError, saying what to put
    where, when it is not there and cannot be fetched.
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
