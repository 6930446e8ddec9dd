"""Rank documents for a question: strings, and mappings with a title and a text.

python examples/rank.py ["your question"]
"""

import json
import sys
from pathlib import Path

from turborank import Reranker

QUESTION = "how long may I keep a book?"
FAQ = Path(__file__).parent / "texts" / "faq.jsonl"


def main(question: str = QUESTION) -> None:
    documents = [json.loads(line) for line in FAQ.read_text(encoding="utf-8").splitlines()]
    reranker = Reranker()  # the embedded model; a catalog name, a Hugging Face id or a folder loads another
    for place, ranked in enumerate(reranker.rank(question, documents, top_n=3), 1):
        print(f"{place}  {ranked.score:.3f}  {ranked.document['title']}  ({ranked.tokens} tokens read)")


if __name__ == "__main__":
    main(*sys.argv[1:2])
