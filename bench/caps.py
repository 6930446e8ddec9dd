"""Limits a contestant's process to the instructions of an older processor, for ``--cap`` of bench.py.

On processors that can trap CPUID (Intel), cap.c answers it for all contestants. Elsewhere OpenVINO and torch use their
own settings, and ONNX Runtime, which has none, runs from a copy in which a trapping instruction replaces each CPUID.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, NamedTuple

HERE = Path(__file__).resolve().parent
CAPS = ("none", "avx512vnni", "avx2")
OURS = "turborank"  # has TURBORANK_ISA
SWITCHES = {
    "avx2": {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"},
    "avx512vnni": {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_BF16"},
}
SWITCHED = (OURS, "ov", "torch")  # prefixes of the names of contestants that have a setting
SWITCHES_NOTE = (
    "This processor cannot trap CPUID: for *as if it had AVX2* OpenVINO (in float32 where int8 is not asked for) and "
    "torch were held back by their own switches (`ONEDNN_MAX_CPU_ISA`, `ATEN_CPU_CAPABILITY`, "
    "`MKL_ENABLE_INSTRUCTIONS`)."
)
PLANTED = "ort"  # prefix of the names of contestants that run from a copy
PLANTED_NOTE = (
    "ONNX Runtime has no such switch: there it ran from a copy in which each CPUID instruction is replaced by one that "
    "traps (bench/caps.py), and is answered without the newer instructions."
)
CPUID, TRAP = b"\x0f\xa2", b"\xcd\xa2"  # int $0xa2: see cap.c


class Held(NamedTuple):
    """Environments by contestant, without those that cannot be limited; and remarks for the report."""

    environments: dict[str, dict[str, str]]
    notes: list[str]


def held(cap: str, work: Path, names: Sequence[str]) -> Held:
    """Environments in which ``names`` and OURS use no newer instructions than ``cap``."""
    everybody = [OURS, *names]
    if cap == "none":
        return Held({name: {} for name in everybody}, [])
    trapping = preload(cap, work)
    if subprocess.run(["true"], env=os.environ | trapping, check=False, stderr=subprocess.DEVNULL).returncode == 0:
        return Held(dict.fromkeys(everybody, trapping), [])
    found, notes = {name: SWITCHES[cap] for name in everybody if name.startswith(SWITCHED)}, [SWITCHES_NOTE]
    planted = [name for name in names if name.startswith(PLANTED)]
    if planted:
        try:
            found |= dict.fromkeys(planted, from_copy(cap, work))
            notes.append(PLANTED_NOTE)
        except (OSError, RuntimeError, subprocess.SubprocessError) as error:
            print(f"left out {', '.join(planted)}: {error}", file=sys.stderr)
    return Held(found, notes)


def preload(cap: str, work: Path) -> dict[str, str]:
    """The environment that preloads cap.c, which is built if missing or outdated."""
    library, source = work / "cap.so", HERE / "cap.c"
    if not library.exists() or library.stat().st_mtime < source.stat().st_mtime:
        subprocess.run(["gcc", "-O2", "-shared", "-fPIC", "-o", library, source], check=True)
    return {"LD_PRELOAD": str(library), "CPU_CAP": cap}


def from_copy(cap: str, work: Path, package: str = "onnxruntime") -> dict[str, str]:
    """The environment in which ``package`` is imported from a copy whose CPUID instructions cap.c answers."""
    folder = work / f"{package}-{importlib.metadata.version(package)}-planted"
    if not folder.exists():
        made = Path(f"{folder}.new")
        shutil.rmtree(made, ignore_errors=True)
        plant_package(package_folder(package), made / package)
        made.rename(folder)
    path = os.pathsep.join(filter(None, (str(folder), os.environ.get("PYTHONPATH"))))
    env = preload(cap, work) | {"CPU_CAP_PLANTED": "1", "PYTHONPATH": path}
    if not cpuids_answered(env, package):
        raise RuntimeError(f"expected {package} to ask for CPUID when imported from {folder}, and it did not")
    return env


def package_folder(package: str) -> Path:
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise RuntimeError(f"expected {package} to be installed")
    return Path(spec.origin).parent


def cpuids_answered(env: dict[str, str], package: str) -> int:
    """Number of CPUIDs that cap.c answers while ``package`` is imported; 0 if the original was imported."""
    done = subprocess.run(
        [sys.executable, "-c", f"import {package}"], check=True, capture_output=True, text=True,
        env=os.environ | env | {"CPU_CAP_COUNT": "1"},
    )  # fmt: skip
    said = re.search(r"cap: (\d+) CPUIDs", done.stderr)
    return int(said[1]) if said else 0


def plant_package(source: Path, target: Path) -> None:
    """Copy a package's folder as links, except the libraries with CPUIDs, which are copied, and their folders."""
    target.mkdir(parents=True)
    for entry in source.iterdir():
        if entry.name == "__pycache__":
            continue
        if entry.is_dir() and any(entry.rglob("*.so*")):
            plant_package(entry, target / entry.name)
        elif ".so" in entry.suffixes and CPUID in entry.read_bytes():
            plant(entry, target / entry.name)
        else:
            (target / entry.name).symlink_to(entry)


def plant(library: Path, target: Path) -> int:
    """Copy ``library`` with TRAP in place of each CPUID. Returns their number."""
    code = bytearray(library.read_bytes())
    places = list(cpuids(library))
    for at in places:
        if code[at : at + 2] != CPUID:
            raise RuntimeError(f"expected CPUID at byte {at:#x} of {library}, got {code[at : at + 2].hex()}")
        code[at : at + 2] = TRAP
    target.write_bytes(code)
    return len(places)


def cpuids(library: Path) -> Iterator[int]:
    """File offsets of CPUID instructions, by disassembly, because their two bytes also occur in other instructions."""
    heading = re.compile(rb"([0-9a-f]+) <.*> \(File Offset: 0x([0-9a-f]+)\):")
    instruction = re.compile(rb" *([0-9a-f]+):\tcpuid\b")
    shift = 0
    with disassembly(library) as lines:
        for line in lines:
            if found := instruction.match(line):
                yield int(found[1], 16) + shift
            elif found := heading.match(line):
                shift = int(found[2], 16) - int(found[1], 16)


@contextlib.contextmanager
def disassembly(library: Path) -> Iterator[IO[bytes]]:
    """Lines of objdump, streamed, because a large library has hundreds of megabytes of them."""
    if shutil.which("objdump") is None:
        raise RuntimeError("objdump (binutils) is needed to hold them back on a processor that cannot trap CPUID")
    command = ["objdump", "--disassemble", "--file-offsets", "--no-show-raw-insn", str(library)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=os.environ | {"LC_ALL": "C"}) as process:
        assert process.stdout is not None
        yield process.stdout
    if process.returncode:
        raise RuntimeError(f"expected objdump to read {library}, got exit code {process.returncode}")
