"""Downloads from a server on loopback: complete, resumed, damaged, refused; and the errors offline."""

import hashlib
import io
import json
import tarfile
import threading
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from mini import write_mini

from turborank import InputError
from turborank.data import datasets
from turborank.data.corpus import LAYOUTS
from turborank.data.dataset_table import DatasetRow, Download
from turborank.data.datasets import fetch, obtain
from turborank.evaluate import DATASETS


class Server(ThreadingHTTPServer):
    """Serves ``contents`` by path, ``content`` as /file.zip; can cut connections and ignore range requests."""

    contents: dict[str, bytes]
    cut_at: int | None = None  # close each connection after so many bytes
    ranges = True
    asked: list[str | None]

    @property
    def content(self) -> bytes:
        return self.contents["/file.zip"]

    @content.setter
    def content(self, value: bytes) -> None:
        self.contents["/file.zip"] = value


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        wanted = self.headers.get("Range")
        self.server.asked.append(wanted)
        content = self.server.contents.get(self.path)
        if content is None:
            self.send_error(404)
            return
        start = int(wanted.removeprefix("bytes=").rstrip("-")) if wanted and self.server.ranges else 0
        if start >= len(content) > 0:
            self.send_error(416)
            return
        body = content[start:]
        self.send_response(206 if wanted and self.server.ranges else 200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body if self.server.cut_at is None else body[: self.server.cut_at])

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Server]:
    with Server(("127.0.0.1", 0), Handler) as running:
        running.contents, running.asked = {"/file.zip": bytes(range(256)) * 400}, []
        thread = threading.Thread(target=running.serve_forever)
        thread.start()
        yield running
        running.shutdown()
        thread.join()


def file_of(server: Server, path: str = "/file.zip", *, md5: str | None = None, sha256: str | None = None) -> Download:
    md5 = md5 or hashlib.md5(server.content).hexdigest()
    return Download(f"http://127.0.0.1:{server.server_address[1]}{path}", "file.zip", md5, sha256)


def test_a_download_is_verified_and_made_once(server: Server, tmp_path: Path) -> None:
    steps: list[tuple[int, int]] = []
    path = fetch(file_of(server), tmp_path, progress=lambda done, total: steps.append((done, total)))
    assert path.read_bytes() == server.content
    assert steps[-1] == (len(server.content), len(server.content))
    assert fetch(file_of(server), tmp_path) == path
    assert server.asked == [None]
    assert [entry.name for entry in tmp_path.iterdir()] == ["file.zip"]


def test_a_broken_connection_is_resumed(server: Server, tmp_path: Path) -> None:
    server.cut_at = 40_000
    assert fetch(file_of(server), tmp_path).read_bytes() == server.content
    assert server.asked == [None, "bytes=40000-", "bytes=80000-"]


def test_a_kill_is_resumed_next_time(server: Server, tmp_path: Path) -> None:
    (tmp_path / "file.zip.part").write_bytes(server.content[:1000])
    assert fetch(file_of(server), tmp_path).read_bytes() == server.content
    assert server.asked == ["bytes=1000-"]


def test_a_server_without_ranges_starts_again(server: Server, tmp_path: Path) -> None:
    server.ranges = False
    (tmp_path / "file.zip.part").write_bytes(b"older bytes")
    assert fetch(file_of(server), tmp_path).read_bytes() == server.content


def test_a_complete_partial_file_is_taken(server: Server, tmp_path: Path) -> None:
    (tmp_path / "file.zip.part").write_bytes(server.content)
    assert fetch(file_of(server), tmp_path).read_bytes() == server.content


def test_a_right_checksum_of_either_kind_is_accepted(server: Server, tmp_path: Path) -> None:
    sha256 = hashlib.sha256(server.content).hexdigest()
    assert fetch(file_of(server, sha256=sha256), tmp_path).read_bytes() == server.content


@pytest.mark.parametrize("wrong", [{"md5": "0" * 32}, {"sha256": "0" * 64}])
def test_a_wrong_checksum_leaves_nothing(server: Server, tmp_path: Path, wrong: dict[str, str]) -> None:
    (name,) = wrong
    with pytest.raises(InputError, match=rf"expected {name.upper()} 0000.*got [0-9a-f]+.*try again"):
        fetch(file_of(server, **wrong), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_damage_in_what_was_kept_is_found_and_the_next_try_starts_again(server: Server, tmp_path: Path) -> None:
    (tmp_path / "file.zip.part").write_bytes(bytes(1000))  # not the first thousand bytes of the file
    with pytest.raises(InputError, match="expected MD5"):
        fetch(file_of(server), tmp_path)
    assert fetch(file_of(server), tmp_path).read_bytes() == server.content
    assert server.asked == ["bytes=1000-", None]


def test_failed_downloads_say_what_to_do(server: Server, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="HTTP 404"):
        fetch(file_of(server, "/other"), tmp_path)
    server.cut_at = 10
    with pytest.raises(InputError, match=r"closed after 30 of .*put it at .*file\.zip"):
        fetch(file_of(server), tmp_path)


def mini_row(server: Server, tmp_path: Path, name: str = "mini") -> DatasetRow:
    folder = write_mini(tmp_path / "source" / "mini")
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        for path in sorted(folder.rglob("*")):
            archive.write(path, path.relative_to(folder.parent))
    server.content = packed.getvalue()
    return DatasetRow(name, "test", 3, 6, 6, "none", (file_of(server),), folder="mini")


def test_a_row_is_downloaded_unpacked_and_loaded(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    row = mini_row(server, tmp_path)
    monkeypatch.setattr(datasets, "DATASETS", {"mini": row})
    dataset = datasets.load("mini", data_dir=tmp_path / "data")
    assert (len(dataset.queries), len(dataset.corpus), dataset.row) == (3, 6, row)
    datasets.load("mini", data_dir=tmp_path / "data", offline=True)
    assert server.asked == [None]


def packed_zip(files: dict[str, str]) -> bytes:
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as archive:
        for name, text in files.items():
            archive.writestr(name, text)
    return data.getvalue()


def stand_in(row: DatasetRow, folder: Path) -> dict[str, bytes]:
    """File name -> content: a small collection, packed like the row's archive."""
    if row.layout == "beir":
        source = write_mini(folder)
        (source / "qrels" / "test.tsv").rename(source / "qrels" / f"{row.split}.tsv")
        inside = {f"{row.folder}/{p.relative_to(source)}": p.read_text() for p in source.rglob("*") if p.is_file()}
        return {row.files[0].path: packed_zip(inside)}
    if row.layout == "scrolls":
        line = json.dumps({"input": "a long talk", "output": "talk"})
        return {row.files[0].path: packed_zip({f"{row.folder}/{row.split}.jsonl": line})}
    if row.layout.startswith("qasper"):
        paper = {"title": "talk", "abstract": "talk", "full_text": [{"section_name": "a", "paragraphs": ["long talk"]}]}
        text, data = json.dumps({"p": paper}).encode(), io.BytesIO()
        with tarfile.open(fileobj=data, mode="w:gz") as tar:
            member = tarfile.TarInfo("qasper-test-v0.3.json")
            member.size = len(text)
            tar.addfile(member, io.BytesIO(text))
        return {row.files[0].path: data.getvalue()}
    if row.layout == "anthropic-docs":
        chunks = [{"chunk_link": "x", "chunk_heading": "a", "text": "long talk"}]
        questions = [{"id": "q", "question": "talk", "correct_chunks": ["x"]}]
        return {"anthropic_docs.json": json.dumps(chunks).encode(),
                "docs_evaluation_dataset.json": json.dumps(questions).encode()}  # fmt: skip
    reference = '[{""content"": ""long"", ""start_index"": 2, ""end_index"": 6}]'
    texts = {file.path: b"a long talk" for file in row.files if file.path.endswith(".md")}
    return {"questions_df.csv": f'question,references,corpus_id\ntalk,"{reference}",chatlogs\n'.encode(), **texts}


DOWNLOADED = [row for row in DATASETS.values() if row.files]


@pytest.mark.parametrize("row", DOWNLOADED, ids=lambda row: row.name)
def test_every_row_is_fetched_unpacked_and_read(server: Server, tmp_path: Path, row: DatasetRow) -> None:
    """Under the published file name, into the folder that the row's layout reads; only the host is replaced."""
    contents = stand_in(row, tmp_path / "source")
    base = f"http://127.0.0.1:{server.server_address[1]}/"
    files = []
    for file in row.files:
        name, content = file.url.rpartition("/")[2], contents[file.path]
        server.contents[f"/{name}"] = content
        files.append(file._replace(url=base + name, md5=None, sha256=hashlib.sha256(content).hexdigest()))
    folder = obtain(replace(row, files=tuple(files)), tmp_path / "data", offline=False)
    parts = LAYOUTS[row.layout](folder, row.split, None)
    assert len(server.asked) == len(row.files)
    assert {query for query, judged in parts.qrels.items() if any(judged.values())} <= parts.queries.keys()
    assert all(doc in parts.corpus for judged in parts.qrels.values() for doc in judged)


def test_offline_says_what_to_put_where(server: Server, tmp_path: Path) -> None:
    row = mini_row(server, tmp_path)
    with pytest.raises(InputError, match=r"file\.zip {2}-> {2}.*\.downloads/file\.zip") as caught:
        obtain(row, tmp_path / "data", offline=True)
    assert str(tmp_path / "data" / "mini") in str(caught.value)
    assert server.asked == []
    (tmp_path / "data" / ".downloads").mkdir(parents=True)
    (tmp_path / "data" / ".downloads" / "file.zip").write_bytes(server.content)
    assert (obtain(row, tmp_path / "data", offline=True) / "corpus.jsonl").exists()


def test_an_archive_cannot_write_outside_its_folder(server: Server, tmp_path: Path) -> None:
    row = mini_row(server, tmp_path)
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        archive.writestr("../evil.txt", "x")
    server.content = packed.getvalue()
    row = DatasetRow(row.name, "test", 3, 6, 6, "none", (file_of(server),), folder="mini")
    with pytest.raises(InputError, match=r"inside one folder, got '\.\./evil\.txt'"):
        obtain(row, tmp_path / "data", offline=False)
    assert not (tmp_path / "evil.txt").exists()


def test_a_row_without_a_download_says_where_it_belongs(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=rf"expected robust04 at {tmp_path}/robust04.*agreement"):
        datasets.load("robust04", data_dir=tmp_path)
