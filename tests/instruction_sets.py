"""Instruction sets of the native engine on this machine, best first; or the one that ``TURBORANK_ISA`` forces on the
whole run. Read before any test changes the variable."""

import os

from turborank.engines import native

FORCED = os.environ.get(native.ISA_VARIABLE) or None
ISAS = [isa for isa in native.isas() if FORCED in (None, isa)]
# (instruction set, precision) of every row, and the precisions that the engine has without naming a row.
ROWS = [(isa, precision) for isa in ISAS for precision in native.precisions(isa)]
PRECISIONS = tuple(p for p in native.PRECISIONS if any(precision == p for _, precision in ROWS))
