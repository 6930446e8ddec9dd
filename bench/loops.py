"""Cycles of the Arm kernels' inner loops, estimated with llvm-mca's models of four processors; not a measurement.

python bench/loops.py [--mca llvm-mca-19] [--compiler aarch64-linux-gnu-g++]

Compiles the rows to assembly, takes each innermost loop with the products of a complete tile, and prints for each
processor the model's peak of the instruction and the share of it that the loops reach. The models have no caches: every
load hits the first level.
"""

from __future__ import annotations

import argparse
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

NATIVE = Path(__file__).resolve().parent.parent / "native"
FLAGS = ["-std=c++20", "-O3", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-S", "-o", "-"]
FEATURES = {"isa_armdot.cpp": "armv8.2-a+dotprod", "isa_armi8mm.cpp": "armv8.2-a+dotprod+i8mm+bf16"}
# The product instruction, its file, its number in one step of a complete tile, and operands without dependencies.
LOOPS = [
    ("sdot", "isa_armdot.cpp", 64, "v30.16b, v31.4b[0]"),
    ("fmla", "isa_armdot.cpp", 64, "v30.4s, v31.s[0]"),
    ("smmla", "isa_armi8mm.cpp", 32, "v30.16b, v31.16b"),
    ("bfdot", "isa_armi8mm.cpp", 64, "v30.8h, v31.2h[0]"),
]
PROCESSORS = ("apple-m1", "neoverse-n1", "neoverse-v1", "neoverse-v2")


def loops(assembly: str, product: str, count: int) -> Iterator[str]:
    """Distinct bodies of innermost loops with ``count`` products."""
    lines = assembly.split("\n")
    labels, seen = {}, set()
    for i, line in enumerate(lines):
        if label := re.match(r"(\.L\w+):", line):
            labels[label[1]] = i
        jump = re.match(r"\t(?:b\.?\w+|cbn?z|tbn?z)\t(?:.*, *)?(\.L\w+)$", line)
        if not jump or jump[1] not in labels:
            continue
        body = [text for text in lines[labels[jump[1]] + 1 : i + 1] if re.match(r"\t[a-z]", text)]
        jumps = sum(bool(re.match(r"\tb(\.|[a-z]{2}\t|\t)", text)) for text in body)
        products = sum(bool(re.match(rf"\t{product}\s", text)) for text in body)
        if products == count and jumps <= 1 and "\n".join(sorted(body)) not in seen:
            seen.add("\n".join(sorted(body)))
            yield "\n".join(body) + "\n"


def cycles(mca: str, processor: str, body: str) -> float:
    """Of one iteration."""
    features = ["-mtriple=aarch64", f"-mcpu={processor}", "-mattr=+dotprod,+i8mm,+bf16", "-iterations=500"]
    done = subprocess.run([mca, *features], input=body, capture_output=True, text=True, check=True)
    total = re.search(r"Total Cycles:\s+(\d+)", done.stdout)
    assert total, done.stdout
    return int(total[1]) / 500


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mca", default="llvm-mca-19")
    parser.add_argument("--compiler", default="aarch64-linux-gnu-g++")
    options = parser.parse_args()
    assembly = {
        name: subprocess.run(
            [options.compiler, *FLAGS, f"-march={march}", NATIVE / name], capture_output=True, text=True, check=True
        ).stdout
        for name, march in FEATURES.items()
    }
    for product, name, count, operands in LOOPS:
        alone = "".join(f"\t{product}\tv{r}.4s, {operands}\n" for r in range(24))
        bodies = list(loops(assembly[name], product, count))
        for processor in PROCESSORS:
            peak = 24 / cycles(options.mca, processor, alone)
            rates = sorted(count / cycles(options.mca, processor, body) for body in bodies)
            shares = f"{rates[0] / peak:.0%} to {rates[-1] / peak:.0%}"
            print(f"{product:6} {processor:12} peak {peak:.2f} a cycle, {len(bodies)} loops: {shares}")


if __name__ == "__main__":
    main()
