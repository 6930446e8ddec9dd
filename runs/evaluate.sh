#!/usr/bin/env bash
# The table of runs/results/evaluation.md: BM25 and the embedded model over every collection in ../shared/data/eval.
#
#   runs/evaluate.sh                     everything, cheapest first
#   runs/evaluate.sh passages rag        some parts only; the table keeps its other rows while the weights are the same
#   MODELS=a,b runs/evaluate.sh          other models, which join the rows of the table that have the same candidates
#
# What is done is kept in OUT, which is named after the model's weights: the same command continues after a kill, and
# new weights begin anew. 50 million tokens: an hour or more on two quiet cores with AVX-512 VNNI, which read 24,000 tokens
# a second in abstracts and 5,800 in meetings; less with AMX.
#
# Depths are below 100 where documents are long or the collection is saturated; the table says which. QMSum's meetings
# are 13,451 tokens each: they are read four ways (the first 512 or 8,192 tokens, or all of them in windows of 512 or
# 8,192), and MEETINGS says how many candidates of each query. At 3, 12 million tokens, which take half of the time;
# WINDOWS_SAMPLE=50 reads the last and longest way for 50 of the 244 queries only.
set -euo pipefail
cd "$(dirname "$0")/.."
DATA=${DATA:-../shared/data/eval}
MODELS=${MODELS:-}
PYTHON=${PYTHON:-python3}
TURBORANK=${TURBORANK:-turborank}
MEETINGS=${MEETINGS:-3}
weights=$(cat src/turborank/models/*/model.safetensors <(echo "$MODELS") | sha256sum)
OUT=${OUT:-build/evaluation-${weights:0:12}}
chosen=("$@")

evaluate() { # name of the part, then the command's arguments
  local part=$1
  shift
  [[ ${#chosen[@]} == 0 || " ${chosen[*]} " == *" $part "* ]] || return 0
  echo "== $part: turborank evaluate $*"
  nice -n "${NICE:-0}" $TURBORANK evaluate "$@" ${MODELS:+--models "$MODELS"} --data-dir "$DATA" --offline --out "$OUT/$part"
  "$PYTHON" runs/evaluate_table.py "$OUT" runs/results
}

evaluate trec-dl21 trec-dl21-pool --run "$DATA/trec-dl21-pool/runs/bm25.txt"
evaluate meetings-512 qmsum --depth "$MEETINGS" --skip-constant --max-length 512
evaluate passages npl med wikiqa cisi
evaluate open "$DATA/hotpotqa-hipporag" "$DATA/clapnq-dev" "$DATA/liveqa-med-nist"
evaluate rag chunking_evaluation anthropic-docs-rag --depth 10
evaluate saturated pubmedqa-l --depth 10
evaluate aerodynamics cranfield
evaluate articles time
evaluate science scifact
evaluate meetings-passages qmsum --depth "$MEETINGS" --skip-constant --length windows --max-length 512
evaluate meetings-truncated qmsum --depth "$MEETINGS" --skip-constant
evaluate meetings-windows qmsum --depth "$MEETINGS" --skip-constant --length windows ${WINDOWS_SAMPLE:+--sample "$WINDOWS_SAMPLE"}
