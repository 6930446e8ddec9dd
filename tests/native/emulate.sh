#!/bin/sh
# The native checks on 64-bit Arm, compiled across and run by qemu's user-mode emulation, once with every feature (the row
# armi8mm) and once as a Neoverse N1 (armdot) and a Cortex-A72 (portable alone).
#   apt-get install g++-aarch64-linux-gnu qemu-user-static
#   tests/native/emulate.sh [CASES [SEED]]       PYTHON, PROCESSORS, OPTIMISE, JOBS and EMULATE_DIR may be set
set -eu
cd "$(dirname "$0")/../.."
out=${EMULATE_DIR:-build/emulate}
mkdir -p "$out"
cmake -S . -B "$out/aarch64" -DTURBORANK_CHECK=ON -DCMAKE_BUILD_TYPE=Release -DCMAKE_SYSTEM_NAME=Linux \
    -DCMAKE_SYSTEM_PROCESSOR=aarch64 -DCMAKE_CXX_COMPILER=aarch64-linux-gnu-g++ -DCMAKE_EXE_LINKER_FLAGS=-static \
    -DTURBORANK_OPTIMISE="${OPTIMISE:--O3}" > "$out/log"
cmake --build "$out/aarch64" --target native_check -j "${JOBS:-2}" >> "$out/log" 2>&1 || { tail -30 "$out/log"; exit 1; }
check=$out/aarch64/native_check
qemu-aarch64-static -cpu max "$check" --layouts > "$out/layouts"
PYTHONPATH=src:tests/native "${PYTHON:-python3}" tests/native/cases.py "$out/cases" "${1:-4}" "${2:-0}" "$out/layouts"
for processor in ${PROCESSORS:-max neoverse-n1 cortex-a72}; do
    echo "== $processor"
    qemu-aarch64-static -cpu "$processor" "$check" "$out"/cases/*.bin
done
