#!/usr/bin/env bash
# The table of runs/results/evaluation.md: BM25 and the embedded model over every collection in ../shared/data/eval.
#
#   runs/evaluate.sh                     everything; what is there already is continued, not repeated
#   MODELS=a,b OUT=folder runs/evaluate.sh
#   python3 runs/evaluate_table.py build/evaluation runs/results      the table of what is done so far
#
# Scores of another model under the same name are refused: give new weights a new OUT.
#
# Depths are below 100 where documents are long or the collection is saturated; the table says which.
set -euo pipefail
cd "$(dirname "$0")/.."
DATA=${DATA:-../shared/data/eval}
OUT=${OUT:-build/evaluation}
TURBORANK=${TURBORANK:-turborank}
MODELS=${MODELS:-}

evaluate() { # name of the part, then the command's arguments
  local part=$1
  shift
  echo "== $part: $*"
  nice -n "${NICE:-0}" $TURBORANK evaluate "$@" ${MODELS:+--models "$MODELS"} --data-dir "$DATA" --offline --out "$OUT/$part"
}

evaluate trec-dl21 trec-dl21-pool --run "$DATA/trec-dl21-pool/runs/bm25.txt"
evaluate passages npl med cisi wikiqa
evaluate rag chunking_evaluation anthropic-docs-rag --depth 10
evaluate meetings-truncated qmsum --depth 5 --sample "${MEETINGS:-8}"
evaluate meetings-windows qmsum --depth 5 --sample "${MEETINGS:-8}" --length windows
evaluate articles time
evaluate saturated pubmedqa-l --depth 10
evaluate aerodynamics cranfield
evaluate science scifact

python3 runs/evaluate_table.py "$OUT" runs/results
