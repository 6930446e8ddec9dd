"""A training folder with known relevance: a query is a word, and a document is relevant if it contains it."""

import json

import numpy as np
import pytest

WORDS = [
    "amber", "birch", "cedar", "delta", "ember", "fjord", "grove", "heron", "inlet", "jetty", "kelp", "lotus",
    "maple", "north", "ocean", "prairie", "quartz", "river", "stone", "tundra", "umber", "valley", "willow", "yarrow",
]  # fmt: skip


@pytest.fixture(scope="session")
def word_folder(tmp_path_factory):
    """24 queries (6 held out) × pools of 6: the labelled one has the query's word and the highest teacher score."""
    folder = tmp_path_factory.mktemp("words")
    rng = np.random.default_rng(0)
    corpus, queries, train, dev, pools, scores = [], [], [], [], [], []
    for number, word in enumerate(WORDS):
        queries.append({"_id": f"q{number}", "text": word, "source": "words"})
        others = [w for w in WORDS if w != word]
        for place in range(6):
            text = " ".join([*rng.permutation(others)[:7], *([word] if place == 0 else [])])
            name = f"d{number}-{place}"
            corpus.append({"_id": name, "text": text})
            pools.append(f"q{number} Q0 {name} {place + 1} {6 - place} pool")
            scores.append(f"q{number} Q0 {name} {place + 1} {3.0 if place == 0 else -1.0 - 0.1 * place} t")
        (dev if number % 4 == 3 else train).append(f"q{number}\td{number}-0\t1")
    (folder / "qrels").mkdir()
    (folder / "scores").mkdir()
    for name, rows in (("corpus", corpus), ("queries", queries)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, lines in (("train", train), ("dev", dev)):
        (folder / "qrels" / f"{name}.tsv").write_text("query-id\tcorpus-id\tscore\n" + "\n".join(lines) + "\n")
    (folder / "candidates.trec").write_text("\n".join(pools) + "\n")
    (folder / "scores" / "t.trec").write_text("\n".join(scores) + "\n")
    return folder
