"""The first stage: BM25 by bm25s, with the parameters and the analysis of Anserini's BEIR baselines.

k1 0.9, b 0.4, Lucene's idf; words by Unicode's rules (UAX 29), as in Lucene's StandardTokenizer; English possessive 's
removed; lower case; Lucene's 33 stop words; Porter stemming. Documents that share no word with the query are not
retrieved; equal scores keep the order of the collection, as in Lucene.
"""

from __future__ import annotations

import itertools
import json
import re
from array import array
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from turborank.data.corpus import Corpus, Dataset
from turborank.data.files import NOT_JSON, file_hash, write_json
from turborank.data.trec import Run, Scored, read_run, write_run
from turborank.types import Float32, Progress

K1, B = 0.9, 0.4
STOP_WORDS = frozenset(
    re.findall(
        r"\w+",
        "a an and are as at be but by for if in into is it no not of on or such that the their then there these they "
        "this to was will with",
    )
)
REPORT_EVERY = 1000  # documents between two progress reports
# A word is letters, digits and underscores; . ' and : may join letters, . , ; and ' may join digits.
_WORD = re.compile(r"\w+(?:(?:(?<=[^\W\d_])[.'’:·](?=[^\W\d_])|(?<=\d)[.,;'’](?=\d))\w+)*")
_MAX_WORD = 255  # longer words are dropped; StandardTokenizer splits them at this length


class Analyzer:
    """Converts a text to its list of stemmed words without stop words."""

    def __init__(self) -> None:
        import Stemmer

        self._stem = Stemmer.Stemmer("porter")

    def __call__(self, text: str) -> list[str]:
        words = (word.replace("’", "'").removesuffix("'s") for word in _WORD.findall(text.lower()))
        return self._stem.stemWords([word for word in words if word not in STOP_WORDS and len(word) <= _MAX_WORD])  # type: ignore[no-any-return]


def best(scores: Float32, depth: int) -> npt.NDArray[np.intp]:
    """Indices of the ``depth`` highest scores above 0, best first; ties keep their order, also at the cut-off."""
    matching = np.flatnonzero(scores > 0)
    if 0 < depth < len(matching):
        threshold = np.partition(scores[matching], len(matching) - depth)[len(matching) - depth]
        matching = matching[scores[matching] >= threshold]
    return matching[np.argsort(-scores[matching], kind="stable")][:depth]


class BM25:
    """An index of one corpus, in memory: 4 bytes per word during the build, then 8 bytes per posting; no texts."""

    def __init__(self, corpus: Corpus, *, progress: Progress | None = None) -> None:
        import bm25s
        from bm25s.tokenization import Tokenized

        self._corpus = corpus
        self._analyze = Analyzer()
        vocabulary: dict[str, int] = {}
        documents: list[array[int]] = []
        for done, text in enumerate(corpus.texts(), 1):
            words = self._analyze(text)
            documents.append(array("i", [vocabulary.setdefault(word, len(vocabulary)) for word in words]))
            if progress is not None and (done % REPORT_EVERY == 0 or done == len(corpus)):
                progress(done, len(corpus))
        vocabulary.setdefault("", len(vocabulary))
        self._index = bm25s.BM25(k1=K1, b=B, method="lucene")
        self._index.index(Tokenized(ids=documents, vocab=vocabulary), show_progress=False)
        self._vocabulary = vocabulary

    def scores(self, query: str) -> Float32:
        """Scores (N,) of all documents in the order of the corpus; 0 for documents that share no word."""
        words = [self._vocabulary[word] for word in self._analyze(query) if word in self._vocabulary]
        if not words:
            return np.zeros(len(self._corpus), dtype=np.float32)
        return np.asarray(self._index.get_scores_from_ids(words), dtype=np.float32)

    def search(self, query: str, depth: int, without: str | None = None) -> list[Scored]:
        """The best ``depth`` documents, best first, leaving out the document with id ``without``."""
        scores = self.scores(query)
        order = best(scores, depth + (without is not None))
        found = (Scored(self._corpus.id_at(int(index)), float(scores[index])) for index in order)
        return list(itertools.islice((scored for scored in found if scored.doc_id != without), depth))


def parameters() -> dict[str, Any]:
    """Parameters of this first stage, for reports and manifests."""
    import bm25s

    return {
        "method": "BM25", "library": f"bm25s {bm25s.__version__}", "k1": K1, "b": B, "idf": "lucene",
        "analysis": "UAX 29 words, lower case, Lucene stop words, Porter", "text": "title + ' ' + text",
    }  # fmt: skip


def bm25_run(dataset: Dataset, depth: int, cache: Path, *, progress: Progress | None = None) -> tuple[Run, str]:
    """The BM25 run of a dataset's queries, and the SHA-256 of its file.

    The folder ``cache`` keeps the run as ``bm25.trec`` and its parameters, dataset and depth as ``bm25.json``; if any
    of these differs, the run is computed again.
    """
    path, about = cache / "bm25.trec", cache / "bm25.json"
    made_from = {**parameters(), "dataset": dataset.fingerprint, "depth": depth}
    if path.exists() and about.exists():
        known = _read_about(about)
        if known.get("made_from") == made_from and known.get("sha256") == file_hash(path):
            return read_run(path), known["sha256"]
    index = BM25(dataset.corpus, progress=progress)
    run: Run = {}
    for query_id, query in dataset.queries.items():
        without = query_id if dataset.queries_are_documents else None
        run[query_id] = index.search(query, depth, without)
    write_run(path, run, "bm25")
    digest = file_hash(path)
    write_json(about, {"made_from": made_from, "sha256": digest})
    return read_run(path), digest


def _read_about(path: Path) -> dict[str, Any]:
    """The inputs that a run was made from; empty if the file is damaged, so that the run is made again."""
    try:
        known = json.loads(path.read_bytes())
    except NOT_JSON:
        return {}
    return known if isinstance(known, dict) else {}
