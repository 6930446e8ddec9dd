#!/bin/sh
# The native checks under AddressSanitizer + UndefinedBehaviorSanitizer, and under ThreadSanitizer.
#   tests/native/sanitize.sh [CASES [SEED]]       PYTHON and CXX may be set
set -eu
cd "$(dirname "$0")/../.."
out=${SANITIZE_DIR:-build/sanitize}
mkdir -p "$out"
PYTHONPATH=src:tests/native "${PYTHON:-python3}" tests/native/cases.py "$out/cases" "${1:-8}" "${2:-0}"
for kind in address,undefined thread; do
    cmake -S . -B "$out/$kind" -DTURBORANK_CHECK=ON -DTURBORANK_SANITIZE="$kind" -DCMAKE_BUILD_TYPE=None > "$out/$kind.log"
    cmake --build "$out/$kind" --target native_check -j 2 >> "$out/$kind.log" 2>&1 || { tail -30 "$out/$kind.log"; exit 1; }
    echo "== $kind"
    UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1 TSAN_OPTIONS=halt_on_error=1 "$out/$kind/native_check" "$out"/cases/*.bin
done
