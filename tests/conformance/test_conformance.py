"""Real clients against a real server: every client receives the library's scores and the server's error messages.

The snippets of docs/clients are executed, too.

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

from environments import CLIENTS, HERE, VARIABLE, python
from helpers import write_checkpoint
from serving import running

from turborank.reranker import Reranker
from turborank.serve import auth

pytestmark = pytest.mark.skipif(not os.environ.get(VARIABLE), reason=f"{VARIABLE} names no folder for the clients")

QUERY = "how do bees choose a home"
DOCUMENTS = ["scouts dance for it", "sourdough needs a starter", "tides follow the moon", "the swarm votes"]
MAPPINGS = [{"title": f"note {place}", "text": text} for place, text in enumerate(DOCUMENTS)]
UNICODE = [
    "Bienen tänzeln 🐝 über Äcker",
    "蜜蜂はどうやって家を選ぶのか",
    "пчёлы танцуют",
    "e\u0301 \u200f\u00a0 mixed",
]
MANY = [f"bee {place}" for place in range(1000)]  # short: the reference engine is slow, and Haystack waits 10 s
LONG = ["short", "a" * 600]  # one token a letter, and the model reads 512
PATIENCE = 2.0  # seconds that Retry-After tells a caller in a hurry to wait

MODEL_LESS = {"llamaindex:tei", "litellm:huggingface", "litellm-newest:huggingface"}  # this dialect names no model
YAML = {"langchain:cohere"}  # makes such text of mappings itself, as Cohere's second version wants it
DECLINABLE = {"nulls", "mappings", "invalid"}  # what not every client has the means to say

WANTED: dict[str, list[tuple[int, float]]] = {}

# What the client raises must hold our words, or be what that client raises when it keeps the reason to itself.
REFUSALS = {
    "unauthorized": "expected a valid API key",
    "unknown_model": "expected model to be one of bees",
    "too_many": "expected at most 1 tokens per minute",
    "too_long": "expected a pair of at most 512 tokens",
    "invalid": "expected int >= ",
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
    """Name of a case -> request and server: the ordinary one, or one that refuses long pairs."""
    file = tmp_path_factory.mktemp("keys") / "keys.toml"
    good, spent = auth.new(file, "good"), auth.new(file, "spent", tokens=1)
    with running(folder, keys=str(file)) as up, running(folder, keys=str(file), length="error") as strict:
        for server in (up, strict):  # a thousand documents overdraw a token a minute for days
            body = {"query": QUERY, "documents": MANY}
            answer = server.ask("/v1/rerank", body, {"Authorization": f"Bearer {spent}"})
            assert answer.status == 200
        # of these a thousand documents use up a minute's tokens and PATIENCE seconds' worth
        tokens = int(answer.json["usage"]["total_tokens"] * 60 / (60 + PATIENCE))
        hasty = {name: auth.new(file, f"hasty-{name}", tokens=tokens) for name in CLIENTS}
        plain = {"base": up.url, "key": good, "model": "bees", "query": QUERY, "documents": DOCUMENTS, "top_n": 4}
        yield {
            "success": plain,
            "top_n": {**plain, "top_n": 2},
            "nulls": {**plain, "top_n": None},
            "mappings": {**plain, "documents": MAPPINGS},
            "unicode": {**plain, "query": "🐝 Bienen?", "documents": UNICODE},
            "thousand": {**plain, "documents": MANY, "top_n": 10},
            "unauthorized": {**plain, "key": "tr-wrong"},
            "unknown_model": {**plain, "model": "no-such-model"},
            "too_many": {**plain, "key": spent},
            "too_long": {**plain, "base": strict.url, "documents": LONG},
            "invalid": {**plain, "top_n": -3},
            "patience": {**plain, "key": hasty, "documents": MANY, "top_n": 10},
        }


def expected(case: str, asked: dict[str, Any], library: Reranker, way: str = "") -> list[tuple[int, float]]:
    """(index, score) of the library, best first; computed once for each case."""
    same, documents = "thousand" if case == "patience" else case, asked["documents"]
    if case == "mappings" and way in YAML:
        same = "yaml"
        documents = ["".join(f"{name}: {value}\n" for name, value in one.items()) for one in documents]
    if same not in WANTED:
        ranking = library.rank(asked["query"], documents, top_n=asked["top_n"])
        WANTED[same] = [(one.index, one.score) for one in ranking]
    return WANTED[same]


def drive(name: str, cases: dict[str, Any]) -> dict[str, Any]:
    """Results of all cases from a client's ranking functions and the snippets of its page."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "DO_NOT_TRACK": "1", "LITELLM_LOCAL_MODEL_COST_MAP": "True"}
    command = [str(python(name)), "-W", "ignore", str(HERE / CLIENTS[name].script)]
    given = {**cases, "patience": {**cases["patience"], "key": cases["patience"]["key"][name]}}
    done = subprocess.run(
        command, input=json.dumps(given), capture_output=True, text=True, env=environment, timeout=900
    )
    assert done.returncode == 0, done.stderr[-4000:]
    report: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    if os.environ.get("TURBORANK_CONFORMANCE_REPORT"):
        Path(os.environ["TURBORANK_CONFORMANCE_REPORT"], f"{name}.json").write_text(json.dumps(report, indent=1))
    return report


def marked(name: str) -> Any:
    return pytest.param(name, marks=pytest.mark.core if CLIENTS[name].core else ())


@pytest.mark.parametrize("name", [marked(name) for name in CLIENTS])
def test_client(name: str, cases: dict[str, Any], library: Reranker) -> None:
    report = drive(name, cases)
    assert report["ways"]
    faults = [
        f"{name}:{way} {case}: {fault}"
        for way, happened in report["ways"].items()
        for case, outcome in happened.items()
        if (fault := judge(f"{name}:{way}", case, cases[case], outcome, library))
    ]
    want = expected("success", cases["success"], library)
    for snippet, outcome in report["snippets"].items():
        got = [(index, score) for index, score in outcome.get("ranking", ())]
        if len(got) < 3 or got != want[: len(got)]:
            faults.append(f"docs/clients/{snippet}: expected {want[:3]} to be printed, got {outcome}")
    assert not faults, "\n".join(faults)


def judge(way: str, case: str, asked: dict[str, Any], happened: dict[str, Any], library: Reranker) -> str | None:
    """Describe how a client's result of a case differs from the expected one; None if it does not."""
    if "cannot" in happened:
        return None if case in DECLINABLE else f"expected every client to be able to say this, got {happened['cannot']}"
    if case not in REFUSALS:
        want = expected(case, asked, library, way)
        if "ranking" not in happened:
            return f"expected a ranking, got {happened['error']}"
        if case == "patience" and happened["seconds"] < PATIENCE / 2:
            return f"expected it to wait about {PATIENCE} s before it tried again, got {happened['seconds']:.1f} s"
        got = happened["ranking"]
        same = [index for index, _ in got] == [index for index, _ in want]
        scores = all(score is None or score == wanted for (_, score), (_, wanted) in zip(got, want, strict=False))
        return None if same and scores else f"expected {want[:4]}, got {got[:4]}"
    if case == "unknown_model" and way in MODEL_LESS:
        return None if "ranking" in happened else f"expected a ranking, got {happened['error']}"
    if "error" not in happened:
        return f"expected a refusal, got {str(happened)[:300]}"
    told = REFUSALS[case] in happened["error"]
    mute = MUTE.get(way) or MUTE.get(way.partition(":")[0])
    if case == "unauthorized" and "infinity" in way:
        mute = re.escape('{"detail":"Unauthorized"}')  # Infinity's own words
    if not told and not (mute and re.search(mute, happened["error"])):
        return f"expected {REFUSALS[case]!r} in {happened['error']}"
    if case == "too_many" and happened["headers"] and "retry-after" not in happened["headers"]:
        return f"expected Retry-After among {happened['headers']}"
    return None
