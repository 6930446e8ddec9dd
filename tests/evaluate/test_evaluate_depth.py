"""evaluate --depth auto: scores the documents that the rule selects, and ranks the others below."""

import json
from pathlib import Path

import pytest
from helpers import write_checkpoint

pytest.importorskip("bm25s")

from turborank import InputError, Reranker, scheduler
from turborank.evaluate import EvaluateOptions, evaluate
from turborank.types import Pair


def collection(folder: Path) -> Path:
    """One query, sixty documents that share its word."""
    (folder / "qrels").mkdir(parents=True)
    texts = {f"d{n}": f"bees {'tide ' * (n % 9)}{chr(97 + n % 26)}" for n in range(60)}
    lines = [json.dumps({"_id": name, "text": text}) for name, text in texts.items()]
    (folder / "corpus.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "queries.jsonl").write_text(json.dumps({"_id": "q", "text": "bees"}) + "\n")
    (folder / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\nq\td3\t1\n")
    return folder


def test_what_is_read_is_what_the_rule_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scheduler, "STOP_SHARE", 0.4)  # so that a list of sixty stops somewhere in its middle
    model = Reranker(write_checkpoint(tmp_path / "tiny"), engine="reference")
    found = evaluate([str(collection(tmp_path / "bees"))], [model], EvaluateOptions(depth="auto"), out=tmp_path / "out")
    first, system = found.results[0].systems
    corpus = found.results[0].dataset.corpus
    candidates = [one.doc_id for one in first.run["q"]]
    logits = model.score_detailed([Pair("bees", corpus.text(name)) for name in candidates]).logits
    read = next(d for d in range(10, 61, 10) if d == 60 or scheduler.expected_share(logits[:d], 10, 60) < 0.4)
    assert read < 60
    assert system.manifest["pairs"] == read
    assert system.manifest["adaptive_depth"] is True
    order = sorted(range(read), key=lambda place: -logits[place])
    assert [one.doc_id for one in system.run["q"]] == [candidates[place] for place in order] + candidates[read:]
    scores = [one.score for one in system.run["q"]]
    assert scores == sorted(scores, reverse=True)
    with pytest.raises(InputError, match="adaptive_depth"):  # scores of part of a list are not scores of the list
        evaluate([str(tmp_path / "bees")], [model], EvaluateOptions(depth=100), out=tmp_path / "out")
    with pytest.raises(InputError, match="'auto'"):
        evaluate([str(tmp_path / "bees")], [model], EvaluateOptions(depth="deep"), out=tmp_path / "no")
