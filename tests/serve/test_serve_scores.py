"""Calibration and the score cache in the service."""

import json

import pytest

pytest.importorskip("starlette", reason="the service needs pip install 'turborank[serve]'")

from helpers import write_checkpoint
from serving import running

from turborank import InputError, Reranker, calibration
from turborank.calibration import Calibration
from turborank.serve.config import Settings

QUERY = "how do bees choose a home"
DOCUMENTS = ["scouts dance for it", "sourdough needs a starter", "tides follow the moon", "the swarm votes"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("models") / "bees")


@pytest.fixture(scope="module")
def calibrated(folder, tmp_path_factory):
    """(file, calibration) in which the second best document's logit is the threshold of precision 0.5."""
    reranker = Reranker(folder, engine="reference")
    logits = [one.logit for one in reranker.rank(QUERY, DOCUMENTS)]
    curve = ((logits[0], 1, 0), (logits[1], 2, 1), (logits[2], 3, 1))
    made = Calibration(3.0, 0.25, reranker.weights_hash, 3, 1, curve, {})
    path = tmp_path_factory.mktemp("calibrations") / "bees.json"
    calibration.write(made, path)
    return path, made


def ask(up, **fields):
    return up.ask("/v1/rerank", {"query": QUERY, "documents": DOCUMENTS, **fields})


def test_thresholds_and_probabilities_of_a_calibrated_model(folder, calibrated):
    path, made = calibrated
    library = Reranker(folder, engine="reference")
    library.calibrate(path)
    with running(folder, calibration=(f"bees={path}",)) as up:
        whole = ask(up).json["results"]
        assert [one["probability"] for one in whole] == [
            made.probability(one.logit) for one in library.rank(QUERY, DOCUMENTS)
        ]
        for threshold in ("precision=0.5", 0.2, "0.2", None):
            kept = ask(up, threshold=threshold).json["results"]
            wanted = float(threshold) if threshold == "0.2" else threshold
            want = library.rank(QUERY, DOCUMENTS, threshold=wanted)
            assert [(one["index"], one["relevance_score"]) for one in kept] == [(one.index, one.score) for one in want]
        assert len(ask(up, threshold="precision=0.5").json["results"]) == 2
        for wrong in ("often", "precision=2", 1.5, "precision=0.9"):  # the last is never reached
            assert ask(up, threshold=wrong).status == 422


def test_a_model_without_calibration_refuses_targets_and_gives_no_probability(folder):
    with running(folder) as up:
        assert all("probability" not in one for one in ask(up).json["results"])
        refused = ask(up, threshold="precision=0.9")
        assert refused.status == 422
        assert "turborank calibrate" in refused.json["message"]


@pytest.mark.parametrize("place", ["memory", "disk"])
def test_the_cache_answers_with_the_same_bits_and_computes_nothing_twice(folder, tmp_path, place):
    path = str(tmp_path / "scores.sqlite3") if place == "disk" else ""
    settings = {"score_cache_entries": 1000, "score_cache": path}
    want = [(one.index, one.score, one.tokens) for one in Reranker(folder, engine="reference").rank(QUERY, DOCUMENTS)]

    def told(reply):
        tokens = {one["index"]: one["tokens"] for one in reply.json["meta"]["documents"]}
        return [(one["index"], one["relevance_score"], tokens[one["index"]]) for one in reply.json["results"]]

    with running(folder, **settings) as up:
        computed = []
        observe = up.service.batcher.observe
        up.service.batcher.observe = lambda batch: (computed.append(batch.pairs), observe(batch))
        assert told(ask(up)) == want
        assert told(ask(up)) == want
        assert sum(computed) == len(DOCUMENTS)
        half = up.ask("/v1/rerank", {"query": QUERY, "documents": [DOCUMENTS[0], "bees fly"]})
        assert half.json["results"][0]["index"] in (0, 1)
        assert sum(computed) == len(DOCUMENTS) + 1
        # limits of a request are part of the key
        short = ask(up, max_tokens_per_doc=3)
        assert sum(computed) == 2 * len(DOCUMENTS) + 1
        assert told(short) != want
        # what is too long is named by its place in the request, cached ones before it included
        long = up.ask("/v1/rerank", {"query": QUERY, "documents": [*DOCUMENTS, "a" * 600], "length": "error"})
        again = up.ask("/v1/rerank", {"query": QUERY, "documents": [*DOCUMENTS, "a" * 600], "length": "error"})
        assert "documents[4]" in json.dumps(long.json)
        assert "documents[4]" in json.dumps(again.json)
        tei = up.ask("/tei/rerank", {"query": QUERY, "texts": DOCUMENTS})  # its headers hold the times of all stages
        assert tei.status == 200
    if path:
        with running(folder, **settings) as up:
            computed = []
            up.service.batcher.observe = lambda batch: computed.append(batch.pairs)
            assert told(ask(up)) == want
            assert computed == []


def test_settings_that_do_not_fit(folder, tmp_path):
    for wrong in ({"score_cache": str(tmp_path / "scores")}, {"calibration": ("nobody=file",)}):
        with pytest.raises(InputError), running(folder, **wrong):
            pass
    with pytest.raises(InputError):
        Settings(calibration=("file",))
