#!/bin/bash
# Everything behind src/turborank/models/turborank-embedded-v1, from the data folder to the shipped files.
# usage: run.sh DATA WORK      e.g.  runs/embedded/run.sh ../shared/data build/embedded
# Needs turborank itself and requirements.txt. Interrupted stages go on where they stopped (--resume).
# Two workers with one thread each, their weights averaged, train faster on two shared cores than one with two threads.
set -euo pipefail
DATA=$(realpath "$1"); mkdir -p "$2"; WORK=$(realpath "$2"); ROOT=$(realpath "$(dirname "$0")/../.."); cd "$(dirname "$0")"
# glibc would give every freed tensor back to the kernel and take it again; one arena keeps a
# worker at 2.6 GB.
export OMP_WAIT_POLICY=PASSIVE MALLOC_ARENA_MAX=1 MALLOC_MMAP_THRESHOLD_=33554432
export MALLOC_TRIM_THRESHOLD_=1000000000 MALLOC_TOP_PAD_=134217728

python lists.py --data "$DATA" --out "$WORK/lists.npz"

# Stage 1, recovery: 50 steps together (of a schedule of 600), then two workers to step 250.
python recover.py --data "$DATA" --out "$WORK/recover-0" --steps 600 --stop 50 --seed 0
cp -r "$WORK/recover-0" "$WORK/recover-1"
for seed in 0 1; do
    python recover.py --data "$DATA" --out "$WORK/recover-$seed" --steps 250 --seed $seed --threads 1 --resume &
done
wait
python ship.py --models "$WORK"/recover-[01] --float32 "$WORK/recovered"

# Stage 2, ranking: planned for 400 steps, the checkpoints shipped are those of steps 200 and 300.
stop=(200 300)
for seed in 0 1; do
    python train.py --lists "$WORK/lists.npz" --start "$WORK/recovered" --out "$WORK/rank-$seed" \
        --steps 400 --stop ${stop[$seed]} --seed $seed --threads 1 --resume &
done
wait
python ship.py --models "$WORK"/rank-[01] --lists "$WORK/lists.npz" --fit 100 --float32 "$WORK/final" \
    --out "$ROOT/src/turborank/models/turborank-embedded-v1"

# The numbers of the card.
SHIPPED=$ROOT/src/turborank/models/turborank-embedded-v1
python evaluate.py --data "$DATA" --out "$WORK/results" --baselines
python evaluate.py --data "$DATA" --out "$WORK/results" --tag int8 --model "$SHIPPED" --sets med trec-dl21-pool cisi npl
python evaluate.py --data "$DATA" --out "$WORK/results" --tag int8 --model "$SHIPPED" --sets cranfield --sample 60
python evaluate.py --data "$DATA" --out "$WORK/results" --tag int8 --model "$SHIPPED" --sets scifact --sample 50
