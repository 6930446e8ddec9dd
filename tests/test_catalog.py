import re

import pytest

from turborank import catalog
from turborank.catalog import MODELS, find, lookup
from turborank.errors import UnknownKeyError


@pytest.mark.parametrize("row", MODELS.values(), ids=MODELS)
def test_rows_are_whole(row: catalog.Model) -> None:
    assert MODELS[row.name] is row
    assert row.activation in ("sigmoid", "identity")
    assert row.architecture in ("jinabert", "bert", "xlm_roberta", "deberta")
    assert row.revision is None or re.fullmatch("[0-9a-f]{40}", row.revision)
    assert all(re.fullmatch("[0-9a-f]{64}", sha256) for sha256 in row.hashes.values())
    assert row.repo is None or not row.embedded
    assert row.licence


def test_names_and_aliases_mean_one_row_each() -> None:
    names = [name for row in MODELS.values() for name in (row.name, row.repo, *row.aliases) if name]
    assert len(set(names)) == len(names)
    for row in MODELS.values():
        for name in (row.name, *row.aliases, *([row.repo] if row.repo else [])):
            assert lookup(name) is row


# docs/model.md §2.2, §5, §6.1: parameters, BEIR-17 nDCG@10, LoCo-5 nDCG@10, hit rate
PUBLISHED = {
    "jina-reranker-v1-base-en": (137_369_089, 52.45, 87.31, 85.53),
    "jina-reranker-v1-turbo-en": (37_771_777, 49.60, 69.21, 85.13),
    "jina-reranker-v1-tiny-en": (33_046_273, 48.54, 70.29, 85.00),
    "mxbai-rerank-base-v1": (184_422_913, 49.19, None, 82.50),
    "mxbai-rerank-xsmall-v1": (70_830_337, 48.80, None, 83.69),
    "ms-marco-MiniLM-L-6-v2": (22_713_601, 48.64, None, 82.63),
    "ms-marco-MiniLM-L-4-v2": (19_164_673, 47.81, None, 83.82),
    "bge-reranker-base": (278_044_417, 47.89, None, 83.03),
}


def test_published_numbers() -> None:
    assert {name for name, row in MODELS.items() if not row.embedded} == set(PUBLISHED)
    for name, expected in PUBLISHED.items():
        row = MODELS[name]
        assert (row.parameters, row.beir, row.loco, row.hit_rate) == expected


def test_the_default_is_embedded() -> None:
    assert MODELS[catalog.DEFAULT].embedded
    assert MODELS[catalog.DEFAULT].folder.name == catalog.DEFAULT


def test_unknown_names_print_the_table() -> None:
    with pytest.raises(UnknownKeyError, match="did you mean 'jina-reranker-v1-turbo-en'") as caught:
        lookup("jina-reranker-v1-turbo")
    assert all(name in str(caught.value) for name in MODELS)
    assert find("jina-reranker-v1-turbo") is None
