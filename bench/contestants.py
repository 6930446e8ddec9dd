"""Ours and the peers as contestants of the benchmark, the peers' formats, and the file of the results."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peers import FAMILY_PEERS, PEERS

from turborank import catalog
from turborank.benchmark import Contestant
from turborank.engines import native
from turborank.errors import EngineError

HERE = Path(__file__).resolve().parent
NEEDED_GB = {
    "ort": 23,
    "ort-int8": 23,
    "ort-int8-cls": 23,
    "torch": 9,
    "transformers": 9,
    "ov": 5,
    "ov-cls": 5,
    "ov-weights": 5,
}  # at 8,192 tokens and NEEDED_HEADS
NEEDED_HEADS = 12


class State:
    """The results of all stages, in one JSON file to which each stage adds."""

    def __init__(self, work: Path) -> None:
        self.path = work / "state.json"
        self.model = work / "model"
        self.found: dict[str, Any] = json.loads(self.path.read_text()) if self.path.exists() else {}

    def part(self, *keys: str) -> dict[str, Any]:
        """The nested dictionary at ``keys``, created if missing."""
        at = self.found
        for key in keys:
            at = at.setdefault(key, {})
        return at

    def save(self) -> None:
        self.path.write_text(json.dumps(self.found, indent=1))


def ours(cap: str, env: dict[str, str], wanted: list[str]) -> list[Contestant]:
    """The native engine in each requested precision that the instruction set supports."""
    isa = native.isas()[0] if cap == "none" else cap
    return [
        Contestant(
            f"turborank-{precision}",
            f"turborank {precision} ({isa})",
            options={"engine": "native", "precision": precision},
            env=env | {"TURBORANK_ISA": isa},
        )
        for precision in native.precisions(isa)
        if precision in wanted
    ]


def theirs(names: list[str], envs: Mapping[str, dict[str, str]]) -> list[Contestant]:
    """The peers, once for every number of streams: "ov" and "ov/2"."""
    table = PEERS | FAMILY_PEERS
    return [
        Contestant(
            name if streams == 1 else f"{name}/{streams}",
            table[name].label,
            f"{HERE / 'peers.py'}:{table[name].load.__name__}",
            table[name].options | {"streams": streams},
            envs.get(name, {}),
        )
        for name in names
        for streams in table[name].streams
    ]


def elsewhere(code: str) -> None:
    """Run Python code in a separate process: exporters use gigabytes and leave threads running."""
    done = subprocess.run([sys.executable, "-c", code], cwd=HERE, stderr=subprocess.PIPE, text=True)
    if done.returncode:
        said = done.stderr.strip().splitlines() or [""]
        raise EngineError(f"exit code {done.returncode}: {said[-1]}")  # -9 when memory did not suffice


def convert(name: str, model: Path) -> None:
    """Prepare the checkpoint for a peer, if it needs that."""
    if (PEERS | FAMILY_PEERS)[name].prepare is not None:
        table = "PEERS" if name in PEERS else "FAMILY_PEERS"
        elsewhere(
            f"import pathlib, peers; p = peers.{table}[{name!r}]; p.prepare(pathlib.Path({str(model)!r}), p.options)"
        )


def tokenizer_file(given: Path | None) -> Path:
    """The embedded model's tokenizer, unless another is given."""
    if given is None:
        given = catalog.lookup(catalog.DEFAULT).folder / "tokenizer.json"
    return given


def free_gb() -> float:
    """Memory available now."""
    with contextlib.suppress(OSError, IndexError):
        return int(Path("/proc/meminfo").read_text().split("MemAvailable:")[1].split()[0]) / 2**20
    return float("inf")
