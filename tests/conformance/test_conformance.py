"""Real clients against a real server: every client gets the library's scores, and is told what went wrong.

TURBORANK_CONFORMANCE=~/.cache/turborank-conformance pytest tests/conformance          all clients
TURBORANK_CONFORMANCE=~/.cache/turborank-conformance pytest tests/conformance -m core  the core five
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("starlette", reason="the service needs pip install 'turborank[serve]'")
sys.path.append(str(Path(__file__).parents[1] / "serve"))

from environments import ENVIRONMENTS, HERE, VARIABLE, python
from helpers import write_checkpoint
from serving import running

from turborank.reranker import Reranker
from turborank.serve import keys

pytestmark = pytest.mark.skipif(not os.environ.get(VARIABLE), reason=f"{VARIABLE} names no folder for the clients")

QUERY = "how do bees choose a home"
DOCUMENTS = ["scouts dance for it", "sourdough needs a starter", "tides follow the moon", "the swarm votes"]
UNICODE = [
    "Bienen tänzeln 🐝 über Äcker",
    "蜜蜂はどうやって家を選ぶのか",
    "пчёлы танцуют",
    "e\u0301 \u200f\u00a0 mixed",
]
MANY = [f"bee {place}" for place in range(1000)]  # short: the reference engine is slow, and Haystack waits 10 s
MODEL_LESS = {"llamaindex:tei", "litellm:huggingface"}  # this dialect names no model
LONG = ["short", "a" * 600]  # one token a letter, and the model reads 512

WANTED: dict[str, list[tuple[int, float]]] = {}

# What the client raises must hold our words, or be what that client raises when it keeps the reason to itself.
REFUSALS = {
    "unauthorized": "expected a valid API key",
    "unknown_model": "expected model to be one of bees",
    "too_many": "expected at most 1 tokens per minute",
    "too_long": "expected a pair of at most 512 tokens",
}
MUTE = {
    "rerankers": r"KeyError|TypeError|JSONDecodeError",  # looks for results whatever the status
    "dify": r"InvokeServerUnavailableError",
    "llamaindex:tei": r"TypeError|KeyError|AssertionError|JSONDecodeError",  # looks for scores whatever the status
    "infinity": r"UnexpectedStatus",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("models") / "bees")


@pytest.fixture(scope="module")
def library(folder: Path) -> Reranker:
    return Reranker(folder, engine="reference")


@pytest.fixture(scope="module")
def cases(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, dict[str, Any]]]:
    """Name of a case -> what to ask, against a server, or another one that refuses long pairs."""
    file = tmp_path_factory.mktemp("keys") / "keys.toml"
    good, spent = keys.new(file, "good"), keys.new(file, "spent", tokens=1)
    with running(folder, keys=str(file)) as up, running(folder, keys=str(file), length="error") as strict:
        for server in (up, strict):  # a thousand documents overdraw a token a minute for days
            body = {"query": QUERY, "documents": MANY}
            assert server.ask("/v1/rerank", body, {"Authorization": f"Bearer {spent}"}).status == 200
        plain = {"base": up.url, "key": good, "model": "bees", "query": QUERY, "documents": DOCUMENTS, "top_n": 4}
        yield {
            "success": plain,
            "top_n": {**plain, "top_n": 2},
            "unicode": {**plain, "query": "🐝 Bienen?", "documents": UNICODE},
            "thousand": {**plain, "documents": MANY, "top_n": 10},
            "unauthorized": {**plain, "key": "tr-wrong"},
            "unknown_model": {**plain, "model": "no-such-model"},
            "too_many": {**plain, "key": spent},
            "too_long": {**plain, "base": strict.url, "documents": LONG},
        }


def expected(case: str, asked: dict[str, Any], library: Reranker) -> list[tuple[int, float]]:
    """(index, score) of the library, best first; computed once for each case."""
    if case not in WANTED:
        ranking = library.rank(asked["query"], asked["documents"], top_n=asked["top_n"])
        WANTED[case] = [(one.index, one.score) for one in ranking]
    return WANTED[case]


def drive(name: str, cases: dict[str, Any]) -> dict[str, Any]:
    """What a client's ways to rank made of the cases."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "DO_NOT_TRACK": "1", "LITELLM_LOCAL_MODEL_COST_MAP": "True"}
    command = [str(python(name)), "-W", "ignore", str(HERE / ENVIRONMENTS[name].script)]
    done = subprocess.run(
        command, input=json.dumps(cases), capture_output=True, text=True, env=environment, timeout=900
    )
    assert done.returncode == 0, done.stderr[-4000:]
    report: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return report


def marked(name: str) -> Any:
    return pytest.param(name, marks=pytest.mark.core if ENVIRONMENTS[name].core else ())


@pytest.mark.parametrize("name", [marked(name) for name in ENVIRONMENTS])
def test_client(name: str, cases: dict[str, Any], library: Reranker) -> None:
    report = drive(name, cases)
    assert report
    faults = [
        f"{name}:{way} {case}: {fault}"
        for way, happened in report.items()
        for case, asked in cases.items()
        if (fault := judge(f"{name}:{way}", case, asked, happened[case], library))
    ]
    assert not faults, "\n".join(faults)


def judge(way: str, case: str, asked: dict[str, Any], happened: dict[str, Any], library: Reranker) -> str | None:
    """What is wrong with what a client made of a case; None when nothing is."""
    if case not in REFUSALS:
        want = expected(case, asked, library)
        if "ranking" not in happened:
            return f"expected a ranking, got {happened['error']}"
        got = happened["ranking"]
        same = [index for index, _ in got] == [index for index, _ in want]
        scores = all(score is None or score == wanted for (_, score), (_, wanted) in zip(got, want, strict=False))
        return None if same and scores else f"expected {want[:4]}, got {got[:4]}"
    if case == "unknown_model" and way in MODEL_LESS:
        return None if "ranking" in happened else f"expected a ranking, got {happened['error']}"
    if "error" not in happened:
        return f"expected a refusal, got {str(happened)[:300]}"
    mute = MUTE.get(way) or MUTE.get(way.partition(":")[0])
    if mute:
        return None if re.search(mute, happened["error"]) else f"expected {mute}, got {happened['error']}"
    told = REFUSALS[case] in happened["error"]
    if not told and not (
        case == "unauthorized" and '{"detail":"Unauthorized"}' in happened["error"]
    ):  # Infinity's own words
        return f"expected {REFUSALS[case]!r} in {happened['error']}"
    if case == "too_many" and happened["headers"] and "retry-after" not in happened["headers"]:
        return f"expected Retry-After among {happened['headers']}"
    return None
