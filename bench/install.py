"""Cost of an installation: seconds from an empty environment to the first score; import and first score on each row.

python bench/install.py WHEEL [--python PYTHON]

Makes a fresh virtual environment and installs the wheel and its dependencies there from wheels alone, with no compiler
on the PATH. Prints JSON: bytes, seconds, MiB of peak memory (Linux).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

FIRST_SCORE = """
import json, os, time
started = time.perf_counter()
import turborank
imported = time.perf_counter()
from turborank.reranker import Reranker
reranker = Reranker()
loaded = time.perf_counter()
score = reranker.score([("what do bees eat?", "Bees eat nectar and pollen.")])
scored = time.perf_counter()
again = reranker.score([("what do bees eat?", "Bees eat nectar and pollen.")])
peak = None
if os.path.exists("/proc/self/status"):
    peak = int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0]) / 2**10
print(json.dumps({"isa": reranker.engine.isa, "import_s": imported - started, "load_s": loaded - imported,
                  "first_score_s": scored - loaded, "second_score_s": time.perf_counter() - scored, "peak_mib": peak,
                  "score": float(score[0])}))
"""


def call(command: list[str], **variables: str) -> tuple[str, float]:
    """Run a command: (standard output, seconds)."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("TURBORANK", "PYTHON"))}
    began = time.perf_counter()
    done = subprocess.run(command, env=environment | variables, stdout=subprocess.PIPE, text=True, check=True)
    return done.stdout, time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("wheel", type=Path)
    parser.add_argument("--python", default=sys.executable)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        call([options.python, "-m", "venv", folder])
        python = str(Path(folder) / ("Scripts/python.exe" if os.name == "nt" else "bin/python"))
        path = str(Path(python).parent)  # nothing else: no compiler
        pip = [python, "-m", "pip", "--quiet", "--disable-pip-version-check", "install", "--only-binary", ":all:"]
        _, installing = call([*pip, str(options.wheel)], PATH=path)
        first, running = call([python, "-c", FIRST_SCORE], PATH=path)
        listing = "from turborank.engines import native; print(*native.isas())"
        rows = call([python, "-c", listing], PATH=path)[0].split()
        later = [json.loads(call([python, "-c", FIRST_SCORE], PATH=path, TURBORANK_ISA=row)[0]) for row in rows]
    report = {
        "wheel_bytes": options.wheel.stat().st_size,
        "install_s": installing,
        "install_to_first_score_s": installing + running,
        "first": json.loads(first),
        "rows": later,
    }
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
