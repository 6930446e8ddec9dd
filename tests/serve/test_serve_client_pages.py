"""docs/clients: runs the code of pages that need no client library; tests/conformance runs the others."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("starlette", reason="the service needs pip install 'turborank[serve]'")

sys.path.append(str(Path(__file__).parents[1] / "conformance"))

from environments import CLIENTS

PAGES = Path(__file__).resolve().parents[2] / "docs" / "clients"
FENCE = re.compile(r"^```(\w+)\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def blocks(page: Path, language: str) -> list[str]:
    return [text for kind, text in FENCE.findall(page.read_text(encoding="utf-8")) if kind == language]


REPLAYS = [
    (page.stem, number, json.loads(text))
    for page in sorted(PAGES.glob("*.md"))
    for number, text in enumerate(blocks(page, "json"))
]


def follow(path: str, value: object) -> list[object]:
    """The values that a JSON path of names and [*] finds."""
    found = [value]
    for step in re.findall(r"\[\*\]|\.(\w+)", path.removeprefix("$")):
        found = [one[step] for one in found] if step else [inner for one in found for inner in one]
    return found


@pytest.mark.parametrize(("page", "number", "replay"), REPLAYS, ids=[f"{page}-{n}" for page, n, _ in REPLAYS])
def test_requests_of_products_that_we_do_not_run_are_answered_as_they_read_them(up, library, page, number, replay):
    sends = {**replay["sends"], **({"model": "bees"} if "model" in replay["sends"] else {})}
    reply = up.ask(replay["path"], sends)
    assert reply.status == 200
    documents = sends.get("documents") or sends["texts"]
    ranking = library.rank(sends["query"], documents)
    if page == "weaviate":  # the only one that wants the order of the request
        ranking = sorted(ranking, key=lambda one: one.index)
    want = {
        "index": [one.index for one in ranking],
        "relevance_score": [one.score for one in ranking],
        "document_text": [documents[one.index] for one in ranking],
    }
    assert {name: follow(path, reply.json) for name, path in replay["reads"].items()} == {
        name: want[name] for name in replay["reads"]
    }


def test_elasticsearchs_recipe_is_the_request_that_is_replayed():
    page = PAGES / "elasticsearch.md"
    [replay], [recipe] = blocks(page, "json"), blocks(page, "http")
    settings = json.loads(recipe.partition("\n")[2])["service_settings"]
    reads = {**settings["response"]["json_parser"]}
    reads["index"] = reads.pop("reranked_index")
    assert reads == json.loads(replay)["reads"]
    sends = json.loads(replay)["sends"]
    filled = settings["request"].replace("${query}", json.dumps(sends["query"]))
    assert json.loads(filled.replace("${input}", json.dumps(sends["documents"]))) == sends


def test_curl_as_the_page_shows_it(up, library):
    if not shutil.which("curl"):
        pytest.skip("no curl on this machine")
    [command] = blocks(PAGES / "curl.md", "bash")
    command = command.replace("http://127.0.0.1:8080", up.url).replace("turborank-embedded-v2", "bees")
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, env={**os.environ, "KEY": "any"})
    [result] = json.loads(done.stdout)["results"]
    asked = json.loads(re.search(r"--data '(.*)'", command, re.DOTALL).group(1))
    [best] = library.rank(asked["query"], asked["documents"], top_n=1)
    assert result == {"index": best.index, "relevance_score": best.score, "document": {"text": best.document}}


def test_python_as_the_page_shows_it(up, library):
    [code] = blocks(PAGES / "python.md", "python")
    code = code.replace("http://127.0.0.1:8080", up.url).replace("turborank-embedded-v2", "bees")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    scope: dict[str, object] = {}
    exec(re.search(r"^query = .*?\]\n", code, re.DOTALL | re.MULTILINE).group(), scope)
    want = [f"{one.index} {one.score}" for one in library.rank(scope["query"], scope["documents"])]
    assert done.stdout.splitlines() == want, done.stderr


def test_python_is_written_as_ours_is():
    """The code is formatted by ruff and has no undefined names."""
    for page in sorted(PAGES.glob("*.md")):
        code = "\n".join(blocks(page, "python"))
        tools = [sys.executable, "-m", "ruff"]
        lint = [*tools, "check", "--isolated", "--select", "F,E9", "-"]
        done = subprocess.run(lint, input=code, capture_output=True, text=True)
        assert done.returncode == 0, f"{page.name}: {done.stdout}"
        for block in blocks(page, "python"):
            shape = [*tools, "format", "--isolated", "--line-length", "120", "-"]
            formatted = subprocess.run(shape, input=block, capture_output=True, text=True).stdout
            assert formatted == block, page.name


def test_the_index_names_every_page_and_every_version_that_is_driven():
    index = (PAGES / "README.md").read_text(encoding="utf-8")
    assert set(re.findall(r"\((\w[\w-]*\.md)\)", index)) == {page.name for page in PAGES.glob("*.md")} - {"README.md"}
    driven = {
        package.partition("==")[2]
        for environment in CLIENTS.values()
        for package in (*environment.packages, *environment.forced)
        if "==" in package
    }
    assert set(re.findall(r"(?<=[ |])\d+\.\d+\.\d+(?=[ ,])", index)) == driven


def test_every_page_with_code_is_run_by_its_client():
    scripts = "".join(path.read_text() for path in PAGES.parents[1].glob("tests/conformance/clients/*_client.py"))
    paged = {page.name for page in PAGES.glob("*.md") if blocks(page, "python")} - {"python.md"}
    assert set(re.findall(r'page="([\w-]+\.md)"', scripts)) == paged
