"""Instructions that a row of the instruction-set table executes per token, counted by qemu's user-mode emulation.

python bench/instructions.py CHECK ROW... [--qemu qemu-aarch64] [--cpu max]

CHECK: native_check compiled for the processor (tests/native/emulate.sh makes one). The case is one pair of 128 tokens
through two layers of the turbo shape in int8 on one thread; the second layer is computed for the first token only.
qemu must be linked dynamically (qemu-user, not qemu-user-static) to load instructions.c.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "tests" / "native"), str(ROOT / "tests")]

import cases  # noqa: E402
import shapes  # noqa: E402

TOKENS = 128


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("check")
    parser.add_argument("rows", nargs="+")
    parser.add_argument("--qemu", default="qemu-aarch64")
    parser.add_argument("--cpu", default="max")
    options = parser.parse_args()
    emulator = [options.qemu, "-cpu", options.cpu]
    with tempfile.TemporaryDirectory() as folder:
        plugin, listing, case = f"{folder}/count.so", Path(folder) / "layouts", f"{folder}/case.bin"
        subprocess.run(["cc", "-O1", "-shared", "-fPIC", "-o", plugin, ROOT / "bench" / "instructions.c"], check=True)
        known = subprocess.run([*emulator, options.check, "--layouts"], capture_output=True, text=True, check=True)
        listing.write_text(known.stdout)
        layouts = {row: layout for row, layout in cases.layouts(str(listing)).items() if row[1] == "int8"}
        model = shapes.config(layers=2, vocab=200)
        batch = shapes.batch([TOKENS], model.vocab_size)
        with Path(case).open("wb") as file:
            cases.write(file, model, batch, shapes.weights(model), np.zeros(1, np.float32), layouts)
        for row in options.rows:
            counts = []
            for times in ("1", "2"):
                command = [*emulator, "-plugin", plugin, options.check, "--run", row, "int8", times, case]
                done = subprocess.run(command, capture_output=True, text=True, check=True)
                counts.append(int(re.findall(r"instructions (\d+)", done.stderr)[-1]))
            print(f"{row:12} {(counts[1] - counts[0]) / TOKENS:,.0f} instructions a token")


if __name__ == "__main__":
    main()
