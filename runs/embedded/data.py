"""Passages and questions, and BM25's candidates of each question.

    python runs/embedded/data.py DATA WORK

Writes WORK/texts.jsonl, queries.jsonl and pool.npz (of each question, by falling BM25 score, up to 50 places in texts).
Questions without a known passage stay only where one of BM25's ten best covers COVERAGE of the weight (idf) of the
question's words: a question that no passage answers teaches little. Every choice is by hashes of the texts.
Meetings and stories with their questions (QMSum, SQuALITY) go to WORK/long-texts.jsonl and long-queries.jsonl, whole.
"""

from __future__ import annotations

import gzip
import json
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from common import save, write_lines

from turborank.data.bm25 import Analyzer, best
from turborank.distill.sources import index, text_hash
from turborank.distill.sources import make as make_queries
from turborank.text import cleaner

WORDS, MIN_WORDS = 180, 8  # of a passage
DEPTH, COVERAGE = 50, 0.6
PASSAGES = (
    "enwiki_lead", "enwiki_body", "enwiki_body2", "wikinews", "us_gov_web", "worldfactbook", "openstax",
    "stackexchange", "wikipedia_movies",
)  # fmt: skip
# File, name of the source, most questions, cleaning rules. All passages of these files join the pool.
PAIRS = (
    ("nq_oracle", "nq_oracle", 2655, ()), ("squad_nqg", "squad_nqg", 2500, ("treebank",)), ("xquad", "xquad", 600, ()),
    ("pubmedqa", "pubmedqa", 500, ()), ("medquad", "medquad", 1500, ("treebank", "alternatives")),
    ("acl_title_abstract", "acl", 2500, ()), ("pairs_wikinews_title", "wikinews", 700, ()),
    ("pairs_stackexchange_title_answer", "stackexchange", 800, ()), ("reuters_title_body", "reuters", 400, ()),
    ("pairs_covid_faq_usgov", "covid", 133, ()), ("pairs_distant_enwiki", "distant", 0, ()),
)  # fmt: skip
QUESTIONS = {
    "nq": 9500, "webquestions": 2500, "query-wellformedness (wikianswers)": 5500, "squad-dev": 1200, "trivia": 800,
    "openstax": 200,
}  # fmt: skip
QUESTION_FILES = {
    "queries_natural_questions": "nq", "queries_questions": None, "queries_opentriviaqa": "trivia",
    "queries_openstax_questions": "openstax",
}  # fmt: skip
LONG = ("qmsum", "squality")
MADE = {"sentence": 1500, "span": 500, "keywords": 900}  # queries made from passages; those of PAIRS weigh three times


class Question(NamedTuple):
    """A question with its BM25 candidates."""

    text: str
    source: str
    known: int  # the place of its passage, -1 where it has none
    places: np.ndarray
    scores: np.ndarray


def records(path: Path) -> Iterator[dict]:
    """The objects of a gzipped file of JSON lines."""
    with gzip.open(path, "rt", encoding="utf-8") as file:
        yield from map(json.loads, file)


class Texts:
    """Passages by place, equal ones once; every second of those that have a title begins with it."""

    def __init__(self) -> None:
        self.places: dict[str, int] = {}

    def add(self, text: str, title: str = "") -> int:
        """The place of a passage, -1 for one that is too short."""
        words = text.split()
        if len(words) < MIN_WORDS:
            return -1
        text = " ".join(words[:WORDS])
        if title and text_hash(text) % 2:
            text = f"{title} {text}"
        return self.places.setdefault(text, len(self.places))


def pairs(data: Path, texts: Texts) -> list[tuple[str, str, int]]:
    """(question, source, place of its passage) of the files of PAIRS."""
    out: list[tuple[str, str, int]] = []
    for file, source, most, rules in PAIRS:
        clean = cleaner(rules)
        rows = [
            (clean(row["query"]), source, texts.add(clean(row["passage"]), row.get("title", "") if not most else ""))
            for row in records(data / f"{file}.jsonl.gz")
        ]
        if source == "reuters":
            rows = [(query.capitalize(), *rest) for query, *rest in rows]
        out += sorted(rows, key=lambda row: text_hash(row[0]))[:most]
    return out


def write_long(data: Path, work: Path) -> None:
    """Write the texts of LONG, each once, and their questions, each with the index of its text."""
    clean = cleaner(())
    places: dict[str, int] = {}
    rows = [row for name in LONG for row in records(data / f"{name}.jsonl.gz")]
    queries = [
        {"query": clean(row["query"]), "text": places.setdefault(clean(row["passage"]), len(places))} for row in rows
    ]
    write_lines(work / "long-texts.jsonl", list(places))
    write_lines(work / "long-queries.jsonl", queries)
    print(f"{len(places):,} long texts, {len(queries):,} questions")


def main() -> None:
    data, work = Path(sys.argv[1]) / "train", Path(sys.argv[2])
    work.mkdir(parents=True, exist_ok=True)
    if not (work / "long-queries.jsonl").is_file():
        write_long(data, work)
    if (work / "pool.npz").is_file():
        return
    known = Texts()
    clean = cleaner(())
    for name in PASSAGES:
        for row in records(data / f"passages_{name}.jsonl.gz"):
            known.add(clean(row["passage"]), row.get("title", ""))
    labelled = pairs(data, known)
    texts = list(known.places)
    bm25, analyze = index(texts), Analyzer()
    frequency: Counter[str] = Counter()
    for text in texts[::5]:
        frequency.update(set(analyze(text)))

    def weight(word: str) -> float:
        return float(np.log(1 + len(texts) / 5 / (1 + frequency[word])))

    def asked(query: str, source: str, place: int) -> Question:
        scores = bm25.scores(query)
        places = best(scores, DEPTH)
        return Question(query, source, place, places.astype(np.int32), scores[places])

    def plausible(question: Question) -> bool:
        words = set(analyze(question.text))
        if len(words) < 2 or len(question.places) < 20:
            return False
        total = sum(map(weight, words))
        covered = (sum(map(weight, words & set(analyze(texts[place])))) for place in question.places[:10])
        return max(covered) / total >= COVERAGE

    out = [q for row in labelled if len((q := asked(*row)).places) >= 10]
    seen = {query.casefold() for query, *_ in labelled}
    offered: dict[str, list[str]] = {source: [] for source in QUESTIONS}
    for file, source in QUESTION_FILES.items():
        for row in records(data / f"{file}.jsonl.gz"):
            offered[source or row["source"]].append(row["query"])
    for source, queries in offered.items():
        kept = 0
        for query in sorted(set(queries), key=text_hash):
            if kept == QUESTIONS[source] or query.casefold() in seen:
                continue
            seen.add(query.casefold())
            if plausible(question := asked(query, source.split(" ")[0], -1)):
                out.append(question)
                kept += 1
        print(f"{source}: {kept} of {len(queries)} questions")
    for made in make_queries(texts, np.where(np.arange(len(texts)) < 198_000, 1.0, 3.0), MADE, 0):
        question = asked(made.text, f"made-{made.kind}", made.passage)
        if text_hash(made.text) % 2:  # half of them without the passage they were made from
            others = question.places != made.passage
            question = question._replace(places=question.places[others], scores=question.scores[others])
        if len(question.places) >= 10:
            out.append(question)
    out.sort(key=lambda question: text_hash(question.text, 1))
    write_lines(work / "texts.jsonl", texts)
    write_lines(work / "queries.jsonl", ({"query": q.text, "source": q.source} for q in out))
    save(
        work / "pool.npz",
        bounds=np.cumsum([0, *(len(q.places) for q in out)]),
        places=np.concatenate([q.places for q in out]),
        bm25=np.concatenate([q.scores for q in out]).astype(np.float32),
        known=np.array([q.known for q in out], np.int32),
    )
    print(f"{len(texts):,} passages, {len(out):,} questions: {Counter(q.source for q in out)}")


if __name__ == "__main__":
    main()
