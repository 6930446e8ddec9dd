"""Published checkpoints: the cache and the Hub, against a stand-in server on this machine.

Each case runs in a process of its own, because huggingface_hub reads its environment when it is imported.
"""

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from helpers import cache_copy, small_config

from turborank import catalog
from turborank.checkpoint import load

MAIN = "1234567890abcdef1234567890abcdef12345678"  # what the stand-in's default branch points to
MINILM = catalog.MODELS["ms-marco-MiniLM-L-6-v2"]
TURBO = catalog.MODELS["jina-reranker-v1-turbo-en"]

LOAD = """
import json, logging, sys
from turborank.checkpoint import load
from turborank.errors import TurborankError
model, offline = json.loads(sys.argv[1])
try:
    got = load(model, offline=offline)
    said = {"name": got.name, "origin": got.origin, "revision": got.revision, "folder": str(got.folder),
            "sum": sum(float(got.weights[name].sum()) for name in sorted(got.weights))}
except TurborankError as error:
    said = {"error": type(error).__name__, "message": str(error)}
print(json.dumps(said))
"""


@dataclass
class Hub:
    """Repositories by name and revision, and every request that was made."""

    files: dict[tuple[str, str], Path] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)
    url: str = ""


def handler(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            hub.requests.append(f"{self.command} {self.path}")

        def fail(self, status: int, code: str) -> None:
            self.send_response(status)
            self.send_header("X-Error-Code", code)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            repo, _, rest = self.path.partition("?")[0].strip("/").partition("/resolve/")
            revision, _, name = rest.partition("/")
            folder = hub.files.get((repo, revision))
            if folder is None:
                known = repo in {known for known, _ in hub.files}
                return self.fail(404, "RevisionNotFound" if known else "RepoNotFound")
            if not (folder / name).is_file():
                return self.fail(404, "EntryNotFound")
            data = (folder / name).read_bytes()
            self.send_response(200)
            self.send_header("ETag", f'"{hashlib.sha256(data).hexdigest()}"')
            self.send_header("X-Repo-Commit", MAIN if revision == "main" else revision)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(data)

    return Handler


@pytest.fixture
def hub() -> Iterator[Hub]:
    stand_in = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler(stand_in))
    stand_in.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    try:
        yield stand_in
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@dataclass
class Said:
    """Output of a process that loaded a model."""

    result: dict[str, Any]
    notice: str  # standard error

    def __getitem__(self, key: str) -> Any:
        assert key in self.result, self.result
        return self.result[key]


def load_elsewhere(hub: Hub, home: Path, model: str, *, offline: bool | None = None, **environment: str) -> Said:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    own = {"HF_ENDPOINT": hub.url, "HF_HOME": str(home / "hf"), "HF_HUB_DISABLE_TELEMETRY": "1"}
    direct = {"NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}
    home.mkdir(exist_ok=True)
    done = subprocess.run(
        [sys.executable, "-c", LOAD, json.dumps([model, offline])],
        env={**clean, **own, **direct, **environment}, cwd=home, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return Said(json.loads(done.stdout.splitlines()[-1]), done.stderr)


def test_a_pinned_model_is_fetched_once_and_announced(hub: Hub, random_checkpoint: Path, tmp_path: Path) -> None:
    revision = str(MINILM.revision)
    hub.files[str(MINILM.repo), revision] = random_checkpoint
    first = load_elsewhere(hub, tmp_path / "home", MINILM.name)
    assert (first["name"], first["origin"], first["revision"]) == (MINILM.name, "hub", revision)
    assert f"downloading {MINILM.repo}@{revision}" in first.notice
    size = sum(path.stat().st_size for path in random_checkpoint.iterdir()) / 1e6
    assert f"({size:.1f} MB)" in first.notice
    fetched = {path.name for path in Path(first["folder"]).iterdir()}
    assert fetched == {path.name for path in random_checkpoint.iterdir()}
    assert all(revision in request for request in hub.requests)

    hub.requests.clear()
    for offline in (None, True):
        again = load_elsewhere(hub, tmp_path / "home", str(MINILM.repo), offline=offline)
        assert (again["origin"], again["folder"], again["sum"]) == ("cache", first["folder"], first["sum"])
        assert "downloading" not in again.notice
    assert load_elsewhere(hub, tmp_path / "home", MINILM.name, HF_HUB_OFFLINE="1")["origin"] == "cache"
    assert hub.requests == []


def test_any_repository_at_its_default_branch(hub: Hub, random_checkpoint: Path, tmp_path: Path) -> None:
    (random_checkpoint / "modeling_bert.py").write_text("raise SystemExit", encoding="utf-8")
    (random_checkpoint / "pytorch_model.bin").write_bytes(b"pickle")
    hub.files["someone/her-reranker", "main"] = random_checkpoint
    got = load_elsewhere(hub, tmp_path / "home", "someone/her-reranker")
    assert (got["name"], got["origin"], got["revision"]) == ("someone/her-reranker", "hub", MAIN)
    assert "modeling_bert.py" not in os.listdir(got["folder"])
    assert "pytorch_model.bin" not in os.listdir(got["folder"])
    assert load_elsewhere(hub, tmp_path / "home", "someone/her-reranker")["origin"] == "cache"


@pytest.mark.parametrize("how", ["argument", "environment"])
def test_offline_and_not_in_the_cache(hub: Hub, tmp_path: Path, how: str) -> None:
    environment = {"HF_HUB_OFFLINE": "1"} if how == "environment" else {}
    offline = True if how == "argument" else None
    got = load_elsewhere(hub, tmp_path / "home", TURBO.name, offline=offline, **environment)
    assert got["error"] == "ModelNotFoundError"
    assert "got nothing of it, and network access is disabled" in got["message"]
    command = f"hf download {TURBO.repo} config.json model.safetensors tokenizer.json --revision {TURBO.revision}"
    assert command in got["message"]
    assert "Reranker()" in got["message"]
    assert hub.requests == []


def test_a_part_of_it_in_the_cache(hub: Hub, random_checkpoint: Path, tmp_path: Path) -> None:
    hub.files["someone/half", "main"] = random_checkpoint
    folder = Path(load_elsewhere(hub, tmp_path / "home", "someone/half")["folder"])
    (folder / "model.safetensors").unlink()
    got = load_elsewhere(hub, tmp_path / "home", "someone/half", offline=True)
    assert "got only config.json, tokenizer.json of it" in got["message"]
    assert load_elsewhere(hub, tmp_path / "home", "someone/half")["origin"] == "hub"  # the rest is fetched


def test_no_such_repository_revision_or_file(hub: Hub, random_checkpoint: Path, tmp_path: Path) -> None:
    got = load_elsewhere(hub, tmp_path / "home", "nobody/nothing")
    assert got["error"] == "ModelNotFoundError"
    assert "got no such repository (or a private one), and no folder 'nobody/nothing' is here" in got["message"]

    hub.files[str(MINILM.repo), "main"] = random_checkpoint  # but not at the pinned revision
    got = load_elsewhere(hub, tmp_path / "home", MINILM.name)
    assert got["error"] == "ModelNotFoundError"
    assert "got no such revision" in got["message"]

    (random_checkpoint / "model.safetensors").rename(random_checkpoint / "pytorch_model.bin")
    hub.files["someone/pickled", "main"] = random_checkpoint
    got = load_elsewhere(hub, tmp_path / "home", "someone/pickled")
    assert got["error"] == "CheckpointError"
    assert "on the Hub, got no model.safetensors" in got["message"]
    assert "downloading" not in got.notice


def test_no_network(hub: Hub, tmp_path: Path) -> None:
    nobody = Hub(url="http://127.0.0.1:9")  # the discard port: nothing listens
    got = load_elsewhere(nobody, tmp_path / "home", TURBO.name)
    assert got["error"] == "ModelNotFoundError"
    assert "got no usable answer" in got["message"]
    assert "hf download" in got["message"]


def test_files_other_than_the_pinned_ones_are_not_opened(hub: Hub, random_checkpoint: Path, tmp_path: Path) -> None:
    hub.files[str(TURBO.repo), str(TURBO.revision)] = random_checkpoint
    for _ in range(2):  # and not taken from the cache afterwards either
        got = load_elsewhere(hub, tmp_path / "home", TURBO.name)
        assert got["error"] == "CheckpointError"
        assert f"expected sha256 {TURBO.hashes['config.json']}, got" in got["message"]


def test_modules_and_shards_are_fetched_with_their_parts(hub: Hub, tmp_path: Path) -> None:
    pytest.importorskip("torch")  # the helpers compare with it
    import test_layouts
    import test_modernbert
    from random_models import random_weights

    from turborank.architectures import recognise

    config = recognise(test_modernbert.V5, {"head.norm.bias": (64,)})
    modules = test_modernbert.write_modules(tmp_path / "ettin", test_modernbert.V5, random_weights(config))
    (modules / "onnx").mkdir()
    (modules / "onnx" / "model.onnx").write_bytes(b"onnx")
    shards, _ = test_layouts.write_shards(tmp_path / "shards")
    for name, folder in (("someone/ettin", modules), ("someone/shards", shards)):
        hub.files[name, "main"] = folder
        got = load_elsewhere(hub, tmp_path / "home", name)
        files = {path.relative_to(folder) for path in folder.rglob("*") if path.is_file() and path.suffix != ".onnx"}
        fetched = Path(got["folder"])
        assert {path.relative_to(fetched) for path in fetched.rglob("*") if path.is_file()} == files
        size = sum((folder / path).stat().st_size for path in files) / 1e6
        assert f"({size:.1f} MB)" in got.notice
        hub.requests.clear()
        assert load_elsewhere(hub, tmp_path / "home", name, offline=True)["sum"] == got["sum"]
        assert hub.requests == []
    (modules / "2_Dense" / "model.safetensors").unlink()
    hub.files["someone/half-ettin", "main"] = modules
    got = load_elsewhere(hub, tmp_path / "home", "someone/half-ettin")
    assert "expected 2_Dense/model.safetensors, which its lists name" in got["message"]


def test_onnx_alone_on_the_hub_says_where_the_original_is(hub: Hub, random_checkpoint: Path, tmp_path: Path) -> None:
    raw = json.loads((random_checkpoint / "config.json").read_text()) | {"_name_or_path": "someone/original"}
    (random_checkpoint / "config.json").write_text(json.dumps(raw))
    (random_checkpoint / "onnx").mkdir()
    (random_checkpoint / "model.safetensors").rename(random_checkpoint / "onnx" / "model.onnx")
    hub.files["Xenova/converted", "main"] = random_checkpoint
    got = load_elsewhere(hub, tmp_path / "home", "Xenova/converted")
    assert got["error"] == "CheckpointError"
    assert "the weights are there as ONNX only; it is a bert model exported from someone/original" in got["message"]


# ---------------------------------------------------------------- renamed repositories, licences: this process's cache


def test_a_renamed_repository_is_found_under_both_names(
    random_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    constants = pytest.importorskip("huggingface_hub.constants")
    row = catalog.MODELS["ms-marco-MiniLM-L-6-v2"]
    assert row.repo == "cross-encoder/ms-marco-MiniLM-L-6-v2"
    for number, cached_as in enumerate((row.repo, "cross-encoder/ms-marco-MiniLM-L6-v2")):
        home = tmp_path / str(number)
        cache_copy(home, cached_as, str(row.revision), random_checkpoint)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(home))
        for asked in (row.name, row.repo, *row.aliases):
            loaded = load(asked, offline=True)
            assert (loaded.name, loaded.origin, loaded.config) == (row.name, "cache", small_config())


def test_a_licence_against_commerce_is_said_when_loaded(
    random_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    row = catalog.MODELS["jina-reranker-v2-base-multilingual"]
    cache_copy(tmp_path, str(row.repo), row.revision or "b" * 40, random_checkpoint)
    with caplog.at_level("WARNING", "turborank"):
        load(row.name, offline=True)
    assert f"{row.name} is licensed under CC-BY-NC-4.0, which forbids commercial use" in caplog.text


@pytest.mark.parametrize(("licence", "said"), [("cc-by-nc-4.0", True), ("apache-2.0", False), ("mit", False)])
def test_a_folder_s_card_is_read_for_its_licence(
    random_checkpoint: Path, caplog: pytest.LogCaptureFixture, licence: str, said: bool
) -> None:
    (random_checkpoint / "README.md").write_text(f"---\nlanguage: en\nlicense: {licence}\n---\n# A model\n")
    with caplog.at_level("WARNING", "turborank"):
        load(random_checkpoint)
    assert ("forbids commercial use" in caplog.text) == said
