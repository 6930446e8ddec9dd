#!/usr/bin/env bash
# Distil a small reranker from a larger one: training lists from question-answer pairs, a teacher's scores, a student.
# Needs pip install 'turborank[train]'. The sizes are for a demonstration of seconds; docs/distillation.md has real ones.
#
#   examples/distil.sh [FOLDER]
set -euo pipefail
texts="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)/texts"
work="${1:-$(mktemp -d)}"
mkdir -p "$work" && cd "$work"

# 1. Pairs: a question and the passage that answers it, one JSON object a line.
python3 - "$texts/faq.jsonl" > pairs.jsonl <<'PY'
import json, sys
for line in open(sys.argv[1], encoding="utf-8"):
    row = json.loads(line)
    print(json.dumps({"query": row["title"], "passage": row["text"]}))
PY

# 2. Lists: for each question the labelled passage and candidates; a quarter of the questions is held out.
turborank distill lists faq=pairs.jsonl --out lists --bm25 4 --random 2 --held-out 0.25
# 3. A teacher scores the lists. Here: the embedded model. Any cross-encoder or rerank endpoint can take its place.
turborank distill score lists -t teacher=checkpoint:turborank-embedded-v2
# 4. A student: three of the teacher's six layers. Recipe alibi starts from a bi-encoder, scratch from random weights.
turborank distill student layers --from turborank-embedded-v2 --layers 3 --out student
# 5. Train on labels and the teacher's scores.
turborank distill train lists --student student -t teacher --loss infonce:1,kl:1 --out run \
    --steps "${STEPS:-20}" --evaluate-every 10 --budget 512 --documents 4 --long-every 0
# 6. Ship: int8, a folder that Reranker loads.
turborank distill ship run/best --int8 --out my-reranker
turborank rank "How do I renew a book?" "$texts/faq.jsonl" --model my-reranker --top-n 3
echo "the model: $work/my-reranker"
