"""Does reranking help on your data? Write a folder in BEIR layout, then compare BM25 with the reranked list.

Needs pip install 'turborank[eval]'. Replace QUESTIONS and the documents by yours; a few dozen judged questions show a
large difference, a few hundred a small one.

python examples/evaluate_your_data.py [FOLDER]
"""

import json
import sys
import tempfile
from pathlib import Path

from turborank.evaluate import EvaluateOptions, evaluate

FAQ = Path(__file__).parent / "texts" / "faq.jsonl"
QUESTIONS = {  # question -> id of the document that answers it
    "can I keep a novel for another month?": "renew",
    "somebody stole my card": "lost-card",
    "what does it cost when I am late?": "late-fees",
    "the dog chewed the cover": "damaged",
    "how do I hold a title that another reader has?": "reserve",
    "you do not have the book that I need": "interlibrary",
}


def write_beir(folder: Path) -> None:
    """corpus.jsonl (_id, title, text), queries.jsonl (_id, text), qrels/test.tsv (query, document, grade)."""
    (folder / "qrels").mkdir(parents=True, exist_ok=True)
    documents = [json.loads(line) for line in FAQ.read_text(encoding="utf-8").splitlines()]
    corpus = [{"_id": one["id"], "title": one["title"], "text": one["text"]} for one in documents]
    queries = [{"_id": f"q{number}", "text": text} for number, text in enumerate(QUESTIONS)]
    for name, rows in (("corpus", corpus), ("queries", queries)):
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")
    qrels = [f"q{number}\t{document}\t1" for number, document in enumerate(QUESTIONS.values())]
    lines = ["query-id\tcorpus-id\tscore", *qrels]
    (folder / "qrels" / "test.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")


def main(folder: Path) -> None:
    write_beir(folder / "faq")
    evaluation = evaluate(
        [str(folder / "faq")], options=EvaluateOptions(measures=["nDCG@10", "Success@1"]), out=folder / "results"
    )
    for result in evaluation.results:
        for system in result.systems:
            print(f"{system.name:24}", *(f"{name} {value:.3f}" for name, value in system.means.items()))
    print(f"report: {folder / 'results' / 'report.html'}")


if __name__ == "__main__":
    if sys.argv[1:]:
        main(Path(sys.argv[1]))
    else:
        with tempfile.TemporaryDirectory() as scratch:
            main(Path(scratch))
