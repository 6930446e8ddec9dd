"""DATASETS: the collections that turborank knows by name, one row each, and published figures for them.

Counts are those of the evaluated split, from ir_datasets' metadata; they are verified after loading. None: no exact
count is published. Addresses and checksums come from BEIR's table of datasets, from the LFS pointers of SCROLLS at the
named revision and, for QASPER's archive, from the SHA-256 that its users record. A row without files has no public
download in a layout that turborank reads; its note names the source.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple


class Download(NamedTuple):
    """A file to download: official address, path in the dataset's folder, and published checksum, if any."""

    url: str
    path: str
    md5: str | None = None
    sha256: str | None = None


@dataclass(frozen=True, slots=True)
class DatasetRow:
    """One dataset."""

    name: str
    group: str
    queries: int | None
    documents: int | None
    judgements: int | None
    licence: str
    files: tuple[Download, ...] = ()
    layout: str = "beir"  # a key of turborank.data.corpus.LAYOUTS
    folder: str = ""  # inside the archive
    split: str = "test"
    queries_are_documents: bool = False  # queries are documents of the corpus; a query's own document is left out
    relevant_from: int = 1  # minimum grade that binary measures count as relevant
    measure: str = "nDCG@10"  # the measure that is compared
    note: str = ""


BEIR_FILES = "https://public.ukp.informatik.tu-darmstadt.de/thakur/BEIR/datasets/"
SCROLLS_FILES = "https://huggingface.co/datasets/tau/scrolls/resolve/"
COOKBOOK = (
    "https://raw.githubusercontent.com/anthropics/anthropic-cookbook/7129c029ad4b42431c6fc6e3cde85dc4a6274af9/"
    "skills/retrieval_augmented_generation/"
)
CHUNKING = (
    "https://raw.githubusercontent.com/brandonstarxel/chunking_evaluation/35440b84e4564663157b825faec5968d4375399d/"
    "src/chunking_evaluation/evaluation_framework/general_evaluation_data/"
)
UNSTATED = "not stated by its authors"


def _beir(
    name: str, counts: tuple[int, int, int], md5: str, licence: str, split: str = "test", in_corpus: bool = False
) -> DatasetRow:
    queries, documents, judgements = counts
    files = (Download(f"{BEIR_FILES}{name}.zip", f"{name}.zip", md5),)
    return DatasetRow(
        name, "beir", queries, documents, judgements, licence, files,
        folder=name, split=split, queries_are_documents=in_corpus,
    )  # fmt: skip


def _forum(name: str, queries: int, documents: int, judgements: int) -> DatasetRow:
    files = (Download(f"{BEIR_FILES}cqadupstack.zip", "cqadupstack.zip", "4e41456d7df8ee7760a7f866133bda78"),)
    return DatasetRow(
        f"cqadupstack-{name}", "beir", queries, documents, judgements, "Apache-2.0", files,
        folder=f"cqadupstack/{name}", note="one of CQADupStack's twelve forums; BEIR reports their mean",
    )  # fmt: skip


def _licensed(name: str, queries: int, licence: str) -> DatasetRow:
    return DatasetRow(
        name, "beir", queries, None, None, licence, note="needs an agreement with its owner; BEIR's wiki says how"
    )


def _scrolls(name: str, queries: int, revision: str, sha256: str) -> DatasetRow:
    files = (Download(f"{SCROLLS_FILES}{revision}/{name}.zip", f"{name}.zip", sha256=sha256),)
    return DatasetRow(
        f"loco-{name}", "loco", queries, queries, queries, UNSTATED, files,
        layout="scrolls", folder=name, split="validation",
        note="LoCoV0: the summary is the query, the whole input the document; candidates are the whole split",
    )  # fmt: skip


def _qasper(field: str) -> DatasetRow:
    url = "https://qasper-dataset.s3.us-west-2.amazonaws.com/qasper-test-and-evaluator-v0.3.tgz"
    sha256 = "72a52a41193e2838b8074f80ac074b94f956b84886c36a61c58a7df4171bdd72"
    return DatasetRow(
        f"loco-qasper-{field}", "loco", 416, 416, 416, "CC BY 4.0", (Download(url, "qasper-test.tgz", sha256=sha256),),
        layout=f"qasper-{field}", note=f"LoCoV0: the paper's {field} is the query, its full text the document",
    )  # fmt: skip


def _local(
    name: str,
    counts: tuple[int, int, int | None],
    licence: str,
    *,
    relevant_from: int = 1,
    note: str,
) -> DatasetRow:
    return DatasetRow(name, "collections", *counts, licence, relevant_from=relevant_from, note=note)


_MSMARCO = "MS MARCO terms: non-commercial research"
_CLASSIC = "classic test collection, converted to BEIR layout"
_ROWS = (
    _beir("msmarco", (6_980, 8_841_823, 7_437), "444067daf65d982533ea17ebd59501e4", _MSMARCO, "dev"),
    _beir("trec-covid", (50, 171_332, 66_336), "ce62140cb23feb9becf6270d0d1fe6d1", "CORD-19 licence"),
    _beir("nfcorpus", (323, 3_633, 12_334), "a89dba18a62ef92f7d323ec890a0d38d", UNSTATED),
    _beir("nq", (3_452, 2_681_468, 4_201), "d4d3d2e48787a744b6f6e691ff534307", "CC BY-SA 3.0"),
    _beir("hotpotqa", (7_405, 5_233_329, 14_810), "f412724f78b0d91183a0e86805e16114", "CC BY-SA 4.0"),
    _beir("fiqa", (648, 57_638, 1_706), "17918ed23cd04fb15047f73e6c3bd9d9", UNSTATED),
    _beir("arguana", (1_406, 8_674, 1_406), "8ad3e3c2a5867cdced806d6503f29b99", "CC BY 4.0", in_corpus=True),
    _beir("webis-touche2020", (49, 382_545, 2_214), "46f650ba5a527fc69e0a6521c5a23563", "CC BY 4.0"),
    _beir("quora", (10_000, 522_931, 15_675), "18fb154900ba42a600f84b839c173167", UNSTATED, in_corpus=True),
    _beir("dbpedia-entity", (400, 4_635_922, 43_515), "c2a39eb420a3164af735795df012ac2c", "CC BY-SA 3.0"),
    _beir("scidocs", (1_000, 25_657, 29_928), "38121350fc3a4d2f48850f6aff52e4a9", "GPL-3.0"),
    _beir("fever", (6_666, 5_416_568, 7_937), "5a818580227bfb4b35bb6fa46d9b6c03", "CC BY-SA 3.0"),
    _beir("climate-fever", (1_535, 5_416_593, 4_681), "8b66f0a9126c521bae2bde127b4dc99d", UNSTATED),
    _beir("scifact", (300, 5_183, 339), "5f7d1de60b170fc8027bb7898e2efca1", "CC BY-NC 2.0"),
    _forum("android", 699, 22_998, 1_696),
    _forum("english", 1_570, 40_221, 3_765),
    _forum("gaming", 1_595, 45_301, 2_263),
    _forum("gis", 885, 37_637, 1_114),
    _forum("mathematica", 804, 16_705, 1_358),
    _forum("physics", 1_039, 38_316, 1_933),
    _forum("programmers", 876, 32_176, 1_675),
    _forum("stats", 652, 42_269, 913),
    _forum("tex", 2_906, 68_184, 5_154),
    _forum("unix", 1_072, 47_382, 1_693),
    _forum("webmasters", 506, 17_405, 1_395),
    _forum("wordpress", 541, 48_605, 744),
    _licensed("bioasq", 500, "CC BY 2.5, registration"),
    _licensed("signal1m", 97, "Signal AI terms"),
    _licensed("trec-news", 57, "NIST agreement (Washington Post)"),
    _licensed("robust04", 249, "NIST agreement (TREC disks 4 and 5)"),
    _scrolls("summ_screen_fd", 338, "5d8b930b6c45999f7754a757f10401297adadb23",
             "e4ea9e80c3e8315441bcdcac9893602ce3cf1746992747740eb82d0abc11a03c"),
    _scrolls("gov_report", 972, "fd1aa83070c138b7b7f381388d3b59f1f70a0fa7",
             "b0adf0d2304fa34f89580a36bb0e7871793aa99613224e5b970f554dfb43b1cc"),
    _scrolls("qmsum", 272, "fd1aa83070c138b7b7f381388d3b59f1f70a0fa7",
             "6dff4c1ffb7d81cdd909872862f65a2fc9409e6e4b9c15665e281338a48bc61b"),
    _qasper("title"),
    _qasper("abstract"),
    DatasetRow(
        "anthropic-docs-rag", "rag", 100, 232, 192, "MIT",
        (Download(f"{COOKBOOK}data/anthropic_docs.json", "anthropic_docs.json"),
         Download(f"{COOKBOOK}evaluation/docs_evaluation_dataset.json", "docs_evaluation_dataset.json")),
        layout="anthropic-docs", measure="Success@5", note="questions over documentation chunks",
    ),
    DatasetRow(
        "chunking_evaluation", "rag", 472, None, None, "MIT",
        (Download(f"{CHUNKING}questions_df.csv", "questions_df.csv"),
         *(Download(f"{CHUNKING}corpora/{name}.md", f"corpora/{name}.md")
           for name in ("chatlogs", "finance", "pubmed", "state_of_the_union", "wikitexts"))),
        layout="chunks", measure="Success@5",
        note="five texts cut every 200 words; the chunk that holds most of a reference is relevant",
    ),
    _local("cranfield", (225, 1_400, 1_837), "public research collection", note=_CLASSIC),
    _local("npl", (93, 11_429, 2_083), "research use", note=_CLASSIC),
    _local("cisi", (76, 1_460, 3_114), "research use", note=_CLASSIC),
    _local("med", (30, 1_033, 696), "research use", note=_CLASSIC),
    _local("time", (83, 423, 324), "research use", note=_CLASSIC),
    _local("qmsum", (244, 232, 244), "MIT", note="QMSum: a question, and the meeting transcript that answers it"),
    _local("pubmedqa-l", (500, 1_000, 500), "MIT", note="PubMedQA: a question and the abstract it was made from"),
    _local("wikiqa", (243, 12_153, 2_351), UNSTATED, note="WikiQA: sentences that answer a question"),
    _local(
        "trec-dl21-pool", (53, 10_553, None), _MSMARCO, relevant_from=2,
        note="TREC Deep Learning 2021, judged passages only; binary measures count grades from 2, as in the track. "
        "The track's BM25 run scores 0.4458 with all 10,828 judgements; with fewer judgements the figures differ",
    ),
)  # fmt: skip

DATASETS: Mapping[str, DatasetRow] = {row.name: row for row in _ROWS}
FORUMS = tuple(name for name in DATASETS if name.startswith("cqadupstack-"))
# A name for several datasets. In a mean, CQADupStack counts once.
GROUPS: Mapping[str, tuple[str, ...]] = {
    "cqadupstack": FORUMS,
    "beir": tuple(row.name for row in _ROWS if row.group == "beir"),
    "beir-public": tuple(row.name for row in _ROWS if row.group == "beir" and row.files),
    "loco": tuple(row.name for row in _ROWS if row.group == "loco"),
    "rag": tuple(row.name for row in _ROWS if row.group == "rag"),
}


class Published(NamedTuple):
    """A figure that others have published; reports mark it as published."""

    system: str
    measure: str
    value: float
    source: str


_ANSERINI = "BM25 (Anserini, flat)", "Pyserini's BEIR regressions"
_TURBO = "jina-reranker-v1-turbo-en over BM25 top-100", "model card of juanluisdb/MiniLM-L-6-rerank-m3"
_BM25 = {  # nDCG@10, R@100
    "trec-covid": (0.5947, 0.1091), "bioasq": (0.5225, 0.7687), "nfcorpus": (0.3218, 0.2457), "nq": (0.3055, 0.7513),
    "hotpotqa": (0.6330, 0.7957), "fiqa": (0.2361, 0.5395), "signal1m": (0.3304, 0.3703), "trec-news": (0.3952, 0.4469),
    "robust04": (0.4070, 0.3746), "arguana": (0.3970, 0.9324), "webis-touche2020": (0.4422, 0.5822),
    "cqadupstack-android": (0.3801, 0.6829), "cqadupstack-english": (0.3453, 0.5757),
    "cqadupstack-gaming": (0.4822, 0.7651), "cqadupstack-gis": (0.2901, 0.6119),
    "cqadupstack-mathematica": (0.2015, 0.4877), "cqadupstack-physics": (0.3214, 0.6326),
    "cqadupstack-programmers": (0.2802, 0.5588), "cqadupstack-stats": (0.2711, 0.5338),
    "cqadupstack-tex": (0.2244, 0.4686), "cqadupstack-unix": (0.2749, 0.5417),
    "cqadupstack-webmasters": (0.3059, 0.5820), "cqadupstack-wordpress": (0.2483, 0.5152), "quora": (0.7886, 0.9733),
    "dbpedia-entity": (0.3180, 0.4682), "scidocs": (0.1490, 0.3477), "fever": (0.6513, 0.9185),
    "climate-fever": (0.1651, 0.4249), "scifact": (0.6789, 0.9253),
}  # fmt: skip
_TURBO_NDCG = {
    "nq": 0.533, "fever": 0.852, "fiqa": 0.336, "trec-covid": 0.774, "scidocs": 0.166, "scifact": 0.739,
    "nfcorpus": 0.353, "hotpotqa": 0.745, "dbpedia-entity": 0.421, "quora": 0.858, "climate-fever": 0.233,
}  # fmt: skip
PUBLISHED: Mapping[str, tuple[Published, ...]] = {
    name: (
        *(Published(_ANSERINI[0], measure, value, _ANSERINI[1])
          for measure, value in zip(("nDCG@10", "R@100"), _BM25.get(name, ()), strict=False)),
        *(Published(_TURBO[0], "nDCG@10", value, _TURBO[1]) for value in [_TURBO_NDCG.get(name)] if value is not None),
    )
    for name in DATASETS
}  # fmt: skip

_CARD = "model card of jina-reranker-v1-tiny-en (first stage and depth not stated)"
# Averages on the model card for whole groups: model -> BEIR (17 sets, not named), LoCo (5 sets), hit rate.
_AVERAGES: Mapping[str, tuple[float, float | None, float]] = {
    "jina-reranker-v1-base-en": (0.5245, 0.8731, 0.8553),
    "jina-reranker-v1-turbo-en": (0.4960, 0.6921, 0.8513),
    "jina-reranker-v1-tiny-en": (0.4854, 0.7029, 0.8500),
    "mxbai-rerank-base-v1": (0.4919, None, 0.8250),
    "mxbai-rerank-xsmall-v1": (0.4880, None, 0.8369),
    "ms-marco-MiniLM-L-6-v2": (0.4864, None, 0.8263),
    "ms-marco-MiniLM-L-4-v2": (0.4781, None, 0.8382),
    "bge-reranker-base": (0.4789, None, 0.8303),
}
PUBLISHED_MEANS: Mapping[str, tuple[Published, ...]] = {
    group: tuple(
        Published(model, measure, value, _CARD)
        for model, row in _AVERAGES.items()
        if (value := row[column]) is not None
    )
    for column, (group, measure) in enumerate((("beir", "nDCG@10"), ("loco", "nDCG@10"), ("rag", "hit rate")))
}
