"""Published scores against published weights, for every model of the table that is on this machine.

The records are facts with their sources (``golden_scores.json`` and ``golden_families.json`` in
``../shared/reference``); the weights are looked for in the Hugging Face cache only. Models that are not there are
skipped by name. Run: ``pytest -m golden -rs``.
"""

import dataclasses
import functools
import json
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from turborank import Reranker
from turborank.architectures import ARCHITECTURES, jinabert
from turborank.engines import ENGINES
from turborank.errors import ModelNotFoundError
from turborank.ops import reference
from turborank.tokens import pack
from turborank.types import Encoding, Float32, PackedBatch, Pair

pytestmark = pytest.mark.golden

REFERENCE = Path(__file__).resolve().parents[2] / "shared" / "reference"
RECORDS_FILES = [REFERENCE / "golden_scores.json", REFERENCE / "golden_families.json"]
RECORDS: list[dict[str, Any]] = [
    record for path in RECORDS_FILES if path.exists() for record in json.loads(path.read_text(encoding="utf-8"))
]
ENGINE_NAMES = ("reference", "torch", "native")


def records(*uses: str) -> Any:
    """One case for each record with these uses, or one skipped case where the file is not available."""
    chosen = [pytest.param(record, id=record["id"]) for record in RECORDS if record["use"] in uses]
    names = " and ".join(path.name for path in RECORDS_FILES)
    absent = pytest.mark.skip(reason=f"needs the published scores, {names}, which are not on this machine")
    return pytest.mark.parametrize("record", chosen or [pytest.param(None, marks=absent)])


@functools.lru_cache(maxsize=2)
def load(model: str, engine: str) -> Reranker:
    """The published weights from the local cache, in float32; texts are tokenised as published."""
    row = ENGINES[engine]
    reason = row.available()
    if reason is not None:
        pytest.skip(f"engine {engine}: {reason}")
    try:
        reranker = Reranker(model, engine="reference", precision="fp32", offline=True, faithful=True)
    except ModelNotFoundError:
        pytest.skip(f"needs the published weights of {model}, which are not in the Hugging Face cache of this machine")
    checkpoint = reranker.checkpoint
    if not row.supports(checkpoint.config):
        pytest.skip(f"engine {engine} does not run {checkpoint.config.architecture}")
    reranker.engine = row.prepare(checkpoint.weights, checkpoint.config, precision="fp32", threads=1)
    return reranker


def encodings(reranker: Reranker, record: dict[str, Any]) -> list[Encoding]:
    """The record's pairs, or its one text without a document, as the model reads them."""
    if record.get("single_text"):
        alone = reranker.checkpoint.tokenizer.encode(record["query"])
        ids, kinds = (np.asarray(values, dtype=np.int32) for values in (alone.ids, alone.type_ids))
        return [Encoding(ids, kinds, read=len(ids))]
    pairs = [Pair(record["query"], document) for document in record["documents"]]
    return [windows[0] for windows in reranker.encoder.encode(pairs)]


def in_kind(logits: Float32, kind: str) -> np.ndarray[Any, np.dtype[np.float64]]:
    wide = logits.astype(np.float64)
    return wide if kind == "logit" else 1 / (1 + np.exp(-wide))


def error(logits: Float32, record: dict[str, Any]) -> float:
    """The largest distance from the published scores; documents without a published score are ignored."""
    published = np.asarray([np.nan if score is None else score for score in record["scores"]])
    return float(np.nanmax(np.abs(in_kind(logits, record["kind"]) - published)))


@pytest.mark.parametrize("engine", ENGINE_NAMES)
@records("reference")
def test_published_scores(record: dict[str, Any], engine: str) -> None:
    reranker = load(record["model"], engine)
    read = encodings(reranker, record)
    if "input_ids" in record:
        assert [encoding.input_ids.tolist() for encoding in read] == record["input_ids"]
    logits = reranker.engine.logits(pack(read))
    assert error(logits, record) <= record["tolerance"]
    scores = [-np.inf if score is None else score for score in record["scores"]]  # an unpublished one is below the rest
    assert int(np.argmax(logits)) == int(np.argmax(scores))


@records("discriminator")
def test_another_implementation_s_score_is_explained_by_its_differences(record: dict[str, Any]) -> None:
    """The standard slopes and the tanh GELU together give the recorded score; the published rules do not."""
    reranker = load(record["model"], "reference")
    batch = pack(encodings(reranker, record))
    assert [batch.input_ids.tolist()] == record["input_ids"]
    heads = reranker.checkpoint.config.num_attention_heads
    misses = {
        (slopes, gelu): error(_forward(reranker, batch, jinabert.SLOPE_RULES[slopes](heads), gelu), record)
        for slopes in jinabert.SLOPE_RULES
        for gelu in ("erf", "tanh")
    }
    assert misses["standard", "tanh"] <= record["tolerance"]
    assert misses["standard", "tanh"] == min(misses.values())
    assert misses["halved-tail", "erf"] > record["tolerance"]


def _forward(reranker: Reranker, batch: PackedBatch, slopes: tuple[float, ...], gelu: str) -> Float32:
    config = dataclasses.replace(reranker.checkpoint.config, slopes=slopes)
    ops: Any = types.SimpleNamespace(**{**vars(reference), **({"gelu": _tanh_gelu} if gelu == "tanh" else {})})
    weights = reranker.checkpoint.weights
    logits: Float32 = ARCHITECTURES[config.architecture].forward(weights, config, batch, ops)
    return logits


def _tanh_gelu(x: Float32) -> Float32:
    """The approximation of arXiv 1606.08415."""
    return np.asarray(0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))), dtype=np.float32)


@records("known-buggy")
def test_known_wrong_scores_are_not_ours(record: dict[str, Any]) -> None:
    reranker = load(record["model"], "reference")
    logits = reranker.engine.logits(pack(encodings(reranker, record)))
    assert error(logits, record) > record["tolerance"]
    assert int(np.argmax(logits)) == int(np.argmax(record["scores"]))  # what they had right


@records("other-model")
def test_models_of_other_tables_are_named(record: dict[str, Any]) -> None:
    pytest.skip(f"{record['model']} is not of the table, and of no architecture turborank has")


@records("reference", "discriminator", "known-buggy")
def test_every_record_can_be_judged(record: dict[str, Any]) -> None:
    """Runs without weights. A record of unknown kind or with missing parts would not be checked at all."""
    assert record["kind"] in ("logit", "sigmoid")
    assert record["tolerance"] > 0
    assert any(score is not None for score in record["scores"])
    if record.get("single_text"):
        assert len(record["scores"]) == 1
    else:
        assert len(record["documents"]) == len(record["scores"])


def test_no_record_is_left_out() -> None:
    assert {record["use"] for record in RECORDS} <= {"reference", "discriminator", "known-buggy", "other-model"}
