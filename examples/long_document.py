"""Find the part of a long document that answers: windows first, then sentences.

With ``length="windows"`` the whole document is read in overlapping windows; ``span`` has the characters of the best
one. Its sentences, scored one by one, are the highlights.

python examples/long_document.py ["your question"]
"""

import re
import sys
from pathlib import Path

from turborank import Reranker

QUESTION = "who invented the sun valve?"
DOCUMENT = Path(__file__).parent / "texts" / "lighthouses.md"


def main(question: str = QUESTION) -> None:
    text = DOCUMENT.read_text(encoding="utf-8")
    reranker = Reranker(length="windows", max_length=512)
    [best] = reranker.rank(question, [text])
    start, end = best.span
    print(f"read {best.tokens:,} tokens, cut {best.truncated}; the best window is characters {start:,} to {end:,}")
    sentences = [" ".join(part.split()) for part in re.split(r"(?<=[.!?])\s+", text[start:end])]
    for ranked in reranker.rank(question, sentences, top_n=3):
        print(f"{ranked.score:.3f}  {ranked.document}")


if __name__ == "__main__":
    main(*sys.argv[1:2])
