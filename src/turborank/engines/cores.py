"""Default number of threads: the smallest of the process's affinity mask and its cgroups' CPU quotas.

A quota may be set on the process's own cgroup or on any parent (a pod, a systemd slice); the smallest one applies. Both
cgroup versions are read where they are mounted: version 2 has ``cpu.max``, version 1 ``cpu.cfs_quota_us`` and
``cpu.cfs_period_us`` (Linux, Documentation/admin-guide/cgroup-v2.rst and scheduler/sched-bwc.rst).
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import NamedTuple

_PROC = Path("proc/self")
_ESCAPED = re.compile(r"\\([0-7]{3})")  # mountinfo writes blanks and backslashes of paths in octal


class CoreLimit(NamedTuple):
    """A limit of the number of cores, and its source."""

    cores: float  # a quota may be a fraction
    source: str


class _Mount(NamedTuple):
    root: PurePosixPath  # path in the cgroup hierarchy that is mounted
    point: PurePosixPath  # mount point
    version: int


def limits(root: Path = Path("/")) -> list[CoreLimit]:
    """The limits of this process's cores: the affinity mask, then each quota, innermost cgroup first.

    ``root``: folder in which /proc and the cgroup file systems are searched.
    """
    if hasattr(os, "sched_getaffinity"):
        affinity = CoreLimit(len(os.sched_getaffinity(0)), "affinity mask")
    else:
        affinity = CoreLimit(os.cpu_count() or 1, "cores of the machine")
    return [affinity, *quotas(root)]


def allowed(found: list[CoreLimit] | None = None) -> int:
    """Number of threads to compute with: the smallest limit, rounded up to a whole core."""
    return max(1, min(math.ceil(limit.cores) for limit in (found or limits())))


def quotas(root: Path = Path("/")) -> list[CoreLimit]:
    """CPU quotas of this process's cgroup and of its parents, innermost first; [] if there are none."""
    found: dict[str, CoreLimit] = {}
    paths = _cgroups(root)
    for mount in _mounts(root):
        if mount.version not in paths:
            continue
        top = root / mount.point.relative_to("/")
        for folder in _upward(_inside(mount, paths[mount.version]), top):
            cores = _quota(folder, mount.version)
            if cores is not None:
                found.setdefault(str(folder), CoreLimit(cores, f"cgroup v{mount.version} quota of {folder}"))
    return list(found.values())


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    except OSError:
        return []


def _cgroups(root: Path) -> dict[int, PurePosixPath]:
    """Paths of this process's cgroup in the hierarchies that limit CPUs, by cgroup version."""
    paths: dict[int, PurePosixPath] = {}
    for line in _lines(root / _PROC / "cgroup"):
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if number == "0" and not controllers:
            paths[2] = PurePosixPath(path)
        elif "cpu" in controllers.split(","):
            paths[1] = PurePosixPath(path)
    return paths


def _mounts(root: Path) -> Iterator[_Mount]:
    """Mounts of the cgroup hierarchies that limit CPUs (proc(5), /proc/pid/mountinfo)."""
    for line in _lines(root / _PROC / "mountinfo"):
        fields, _, rest = line.partition(" - ")
        parts, kind = fields.split(), rest.split()
        if len(parts) < 5 or len(kind) < 3 or kind[0] not in ("cgroup", "cgroup2"):
            continue
        if kind[0] == "cgroup" and "cpu" not in kind[2].split(","):
            continue
        source, point = (PurePosixPath(_ESCAPED.sub(lambda code: chr(int(code[1], 8)), part)) for part in parts[3:5])
        yield _Mount(source, point, 2 if kind[0] == "cgroup2" else 1)


def _inside(mount: _Mount, path: PurePosixPath) -> PurePosixPath:
    """The cgroup's path below the mount point; empty (the mount point itself) if the mount does not contain it.

    In a container with the host's cgroup namespace, the mount's root is the container's own cgroup and
    /proc/self/cgroup has the host's path. With a private namespace, paths of parents may begin with "/..".
    """
    if ".." in path.parts or not path.is_relative_to(mount.root):
        return PurePosixPath()
    return path.relative_to(mount.root)


def _upward(inside: PurePosixPath, top: Path) -> Iterator[Path]:
    yield from (top / part for part in (inside, *inside.parents) if part != PurePosixPath())
    yield top


def _quota(folder: Path, version: int) -> float | None:
    """Quota of a cgroup in cores; None if it has none or the file cannot be read."""
    if version == 2:
        words = " ".join(_lines(folder / "cpu.max")).split()
    else:
        words = [word for name in ("quota", "period") for word in _lines(folder / f"cpu.cfs_{name}_us")[:1]]
    try:
        quota, period = (int(word) for word in words)
    except ValueError:  # "max", or not two numbers
        return None
    return quota / period if quota > 0 and period > 0 else None
