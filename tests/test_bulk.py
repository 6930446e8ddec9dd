"""``turborank score``: the library's bits in every format; interrupted runs lose and repeat no pair."""

import csv
import gzip
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import heed_interrupts, native_config, write_checkpoint

from turborank import InputError, Reranker, TooLongError, bulk
from turborank.bulk import BulkOptions
from turborank.cli.main import run as command
from turborank.cli.rank import duration
from turborank.engines import native

QUERIES = ["which bee", "trees", "naïve 🐝", ""]
ROWS = [
    {"id": f"r{n}", "query": QUERIES[n % 4], "document": f"a bee, {n} \"trees\"\nand one " * (1 + n % 11)}
    for n in range(250)
]  # fmt: skip
PAIRS = [(str(row["query"]), str(row["document"])) for row in ROWS]
Rows = list[dict[str, Any]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("model"), native_config())


@pytest.fixture(scope="module")
def reranker(folder: Path) -> Reranker:
    return Reranker(folder, engine="native" if native.available() is None else "reference")


def write_jsonl(path: Path, rows: Rows) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def write_gz(path: Path, rows: Rows) -> None:
    path.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))


def write_csv(path: Path, rows: Rows) -> None:
    with path.open("w", newline="", encoding="utf-8-sig") as file:
        writer = csv.DictWriter(file, rows[0], delimiter="\t" if path.suffix == ".tsv" else ",")
        writer.writeheader()
        writer.writerows(rows)


def write_parquet(path: Path, rows: Rows) -> None:
    arrow = pytest.importorskip("pyarrow", reason="pyarrow is not installed in this environment")
    import pyarrow.parquet

    pyarrow.parquet.write_table(arrow.Table.from_pylist(rows), path)


def read(path: Path) -> Rows:
    if path.suffix == ".jsonl":
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    if path.suffix == ".parquet":
        import pyarrow.parquet

        return list(pyarrow.parquet.read_table(path).to_pylist())
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file, delimiter="\t" if path.suffix == ".tsv" else ","))


def shards(out: Path) -> list[Path]:
    return sorted(path for path in out.iterdir() if path.name.startswith("part-"))


FORMATS: dict[str, Callable[[Path, Rows], None]] = {
    "pairs.jsonl": write_jsonl, "pairs.jsonl.gz": write_gz, "pairs.csv": write_csv, "pairs.tsv": write_csv,
    "pairs.parquet": write_parquet,
}  # fmt: skip


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_gets_the_bits_of_the_library(name: str, reranker: Reranker, tmp_path: Path) -> None:
    FORMATS[name](tmp_path / name, ROWS)
    summary = bulk.run(reranker, tmp_path / name, tmp_path / "out", BulkOptions(shard_pairs=100))
    assert (summary.shards, summary.pairs, summary.complete) == (3, 250, True)
    found = [row for path in shards(tmp_path / "out") for row in read(path)]
    assert [{key: row[key] for key in ("id", "query", "document")} for row in found] == ROWS
    expected = reranker.score(PAIRS)
    assert np.array([row["logit"] for row in found], dtype=np.float32).tobytes() == expected.tobytes()
    assert [float(row["score"]) for row in found] == pytest.approx(1 / (1 + np.exp(-expected.astype(float))))
    lengths = [len(one[0]) for one in reranker.encoder.encode([bulk.Pair(*pair) for pair in PAIRS])]
    assert [int(row["tokens"]) for row in found] == lengths
    assert summary.tokens == sum(lengths)
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert [one["pairs"] for one in manifest["shards"]] == [100, 100, 50]
    assert (manifest["pairs"], manifest["tokens"]) == (250, sum(lengths))


def test_candidates_of_a_corpus(reranker: Reranker, tmp_path: Path) -> None:
    corpus = [{"_id": f"d{n}", "title": f"note {n}", "text": f"on bees {n} " * (n + 1)} for n in range(30)]
    write_jsonl(tmp_path / "corpus.jsonl", corpus)
    lists = [
        {"query_id": f"q{n}", "query": QUERIES[n], "candidates": [f"d{n + k * 5}" for k in range(n + 1)]}
        for n in range(4)
    ]
    lists[2]["candidates"] = " ".join(lists[2]["candidates"])
    write_jsonl(tmp_path / "lists.jsonl", lists)
    bulk.run(
        reranker,
        tmp_path / "lists.jsonl",
        tmp_path / "out",
        BulkOptions(corpus=tmp_path / "corpus.jsonl", shard_pairs=4),
    )
    found = [read(path) for path in shards(tmp_path / "out")]
    assert [len(one) for one in found] == [6, 4]  # 1 + 2 + 3 pairs: a list is never cut
    rows = [row for one in found for row in one]
    assert [(row["query_id"], row["document_id"]) for row in rows] == [
        (f"q{n}", f"d{n + k * 5}") for n in range(4) for k in range(n + 1)
    ]
    texts = {one["_id"]: f"{one['title']} {one['text']}".strip() for one in corpus}
    expected = reranker.score([(row["query"], texts[row["document_id"]]) for row in rows])
    assert np.array([row["logit"] for row in rows], dtype=np.float32).tobytes() == expected.tobytes()
    assert "candidates" not in rows[0]


def test_parts_of_a_job_array_make_the_whole(reranker: Reranker, tmp_path: Path) -> None:
    """Parts may run in any order; manifest.json is written when the last one ends."""
    write_jsonl(tmp_path / "pairs.jsonl", ROWS)
    bulk.run(reranker, tmp_path / "pairs.jsonl", tmp_path / "whole", BulkOptions(shard_pairs=20))
    for part in (3, 1, 2):
        assert not (tmp_path / "parts" / "manifest.json").exists()
        options = BulkOptions(shard_pairs=20, part=(part, 3))
        summary = bulk.run(reranker, tmp_path / "pairs.jsonl", tmp_path / "parts", options)
        assert summary.complete is (part == 2)
        assert summary.shards in (4, 5)
    whole, parts = ({path.name: path.read_bytes() for path in shards(tmp_path / name)} for name in ("whole", "parts"))
    assert whole == parts
    manifests = [json.loads((tmp_path / name / "manifest.json").read_text()) for name in ("whole", "parts")]
    assert manifests[0] == manifests[1]
    again = bulk.run(reranker, tmp_path / "pairs.jsonl", tmp_path / "parts", BulkOptions(shard_pairs=20))
    assert (again.shards, again.found, again.complete) == (0, 13, True)


SLOW = """
import sys, time
from pathlib import Path
from turborank import Reranker, bulk
reranker = Reranker(sys.argv[1])
real = reranker.score_detailed
def slow(pairs):
    time.sleep(0.15)  # the model is too small to be caught in the middle
    return real(pairs)
reranker.score_detailed = slow
bulk.run(reranker, Path(sys.argv[2]), Path(sys.argv[3]), bulk.BulkOptions(shard_pairs=20))
"""


def test_a_run_killed_repeatedly_loses_no_pair(reranker: Reranker, folder: Path, tmp_path: Path) -> None:
    """At most the shard that is being written is computed again; no pair is lost or repeated."""
    write_jsonl(tmp_path / "pairs.jsonl", ROWS)
    out = tmp_path / "out"
    for kept in (1, 4):
        process = subprocess.Popen([sys.executable, "-c", SLOW, folder, tmp_path / "pairs.jsonl", out])
        deadline = time.monotonic() + 120
        while (len(shards(out)) if out.exists() else 0) < kept and time.monotonic() < deadline:
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        process.wait()
        there = shards(out)
        assert kept <= len(there) < 13
        assert all(len(read(path)) == 20 for path in there)
    before = {path.name: path.stat().st_mtime_ns for path in there}
    listed = json.loads((out / "manifest.1-of-1.json").read_text())["shards"]
    assert len(there) - len(listed) in (0, 1)
    summary = bulk.run(reranker, tmp_path / "pairs.jsonl", out, BulkOptions(shard_pairs=20))
    assert (summary.found, summary.shards) == (len(listed), 13 - len(listed))
    for one in listed:
        assert (out / one["file"]).stat().st_mtime_ns == before[one["file"]]
    assert [row["id"] for path in shards(out) for row in read(path)] == [row["id"] for row in ROWS]
    assert not [path for path in out.iterdir() if path.name.startswith(".")]


def test_interruption_prints_how_to_continue(folder: Path, tmp_path: Path) -> None:
    """Like Ctrl-C: exit code 130, one line, no traceback, no incomplete file; the same command continues."""
    rows = [{**row, "document": "a bee in the trees " * 80, "id": str(n)} for n in range(120) for row in ROWS[:1]]
    write_jsonl(tmp_path / "pairs.jsonl", rows * 40)
    arguments = ["score", str(tmp_path / "pairs.jsonl"), "--out", str(tmp_path / "out"), "--model", str(folder)]
    arguments += ["--shard-pairs", "50", "--threads", "1"]
    command = [sys.executable, "-m", "turborank", *arguments]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, preexec_fn=heed_interrupts)
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob("out/manifest*")) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    started = time.monotonic()
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert said.splitlines()[-1:] == ["turborank: interrupted; the same command continues from what is complete"]
    assert "Traceback" not in said
    assert time.monotonic() - started < 30
    assert not list((tmp_path / "out").glob(".*"))
    done = json.loads((tmp_path / "out" / "manifest.1-of-1.json").read_text())["shards"]
    there = [path.name for path in shards(tmp_path / "out")]
    assert [one["file"] for one in done] == there[: len(done)]
    assert len(there) - len(done) in (0, 1)  # Ctrl-C may come before a whole shard is listed: it is computed again
    assert len(done) < 96


def test_the_command(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_csv(tmp_path / "pairs.csv", [{"question": q, "title": "bee", "body": d, "document": "x"} for q, d in PAIRS])
    line = ["score", str(tmp_path / "pairs.csv"), "--out", str(tmp_path / "out"), "--model", str(folder), "--query"]
    line += ["question", "--field", "title", "--field", "body", "--no-texts", "--max-length", "40"]
    assert command([*line, "--estimate"]) == 0
    assert "250 pairs in 250 rows" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()
    assert command(line) == 0
    told = capsys.readouterr()
    assert told.out.startswith("250 pairs in 1 shards, ")
    assert "pairs were truncated" in told.out
    assert told.err == ""
    rows = read(tmp_path / "out" / "part-000000.csv")
    assert list(rows[0]) == ["document", "logit", "score", "tokens", "truncated"]
    expected = Reranker(folder, max_length=40).score([(q, f"bee {d}") for q, d in PAIRS])
    assert np.array([row["logit"] for row in rows], dtype=np.float32).tobytes() == expected.tobytes()
    assert command(line) == 0
    assert "1 shards existed already" in capsys.readouterr().out
    assert command([*line, "--shard-pairs", "30"]) == 2
    assert "made from the same inputs, got another options" in capsys.readouterr().err
    assert command([*line, "--shard", "3/2"]) == 2
    assert "1 ≤ K ≤ N, got 3/2" in capsys.readouterr().err
    assert command([*line, "--shard", "3"]) == 2


FAULTS = {
    "no query": (
        '{"query": "a", "document": "b"}\n{"document": "b"}\n',
        r"column 'query', got NoneType at .*:2; choose",
    ),
    "no document": (
        '{"query": "a", "text": 3}\n\n{"query": "a", "x": "b"}\n',
        r"fields title, text, got query, x at .*:3",
    ),
    "a list": ('{"query": "a", "document": ["b"]}\n', r"expected text in the fields document, got list at .*:1"),
    "not JSON": ('{"query": "a", "document": "b"}\n{"query\n', r"expected one JSON object on the line, got .* at .*:2"),
    "a score": ('{"query": "a", "document": "b", "score": 1}\n', r"no column that the output adds, got score at .*:1"),
    "a csv": ("query,document\na,b\nc\n", r"expected 2 columns, got 1 at .*:3"),
    "a csv with one column twice": ("query,query\na,b\n", r"expected each column once, got query, query at .*:1"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_an_unusable_row_is_reported_with_file_and_line(fault: str, reranker: Reranker, tmp_path: Path) -> None:
    text, message = FAULTS[fault]
    path = tmp_path / ("pairs.csv" if "csv" in fault else "pairs.jsonl")
    path.write_text(text)
    with pytest.raises(InputError, match=message):
        bulk.run(reranker, path, tmp_path / "out")
    assert not shards(tmp_path / "out") if (tmp_path / "out").exists() else True


def test_long_pairs_and_unknown_documents_are_reported_with_file_and_line(
    folder: Path, reranker: Reranker, tmp_path: Path
) -> None:
    write_jsonl(tmp_path / "corpus.jsonl", [{"_id": "d1", "text": "bee"}, {"_id": "d2", "text": "bee " * 200}])
    write_jsonl(
        tmp_path / "lists.jsonl",
        [
            {"query": "a", "candidates": ["d1"]},
            {"query": "a", "candidates": ["d1", "d2"]},
            {"query": "b", "candidates": ["d3"]},
        ],
    )
    options = BulkOptions(corpus=tmp_path / "corpus.jsonl", shard_pairs=3)
    strict = Reranker(folder, engine="reference", max_length=64, length="error")
    with pytest.raises(TooLongError, match=r"lists.jsonl:2: expected a pair of at most 64 tokens"):
        bulk.run(strict, tmp_path / "lists.jsonl", tmp_path / "strict", options)
    with pytest.raises(InputError, match=r"expected the id of a document in the corpus, got 'd3' at .*lists.jsonl:3"):
        bulk.run(reranker, tmp_path / "lists.jsonl", tmp_path / "out", options)
    with pytest.raises(InputError, match=r"expected a file that ends in \.jsonl"):
        bulk.run(reranker, tmp_path / "pairs.txt", tmp_path / "out")
    with pytest.raises(InputError, match="expected a readable file, got no such file"):
        bulk.run(reranker, tmp_path / "none.jsonl", tmp_path / "out")


def test_an_estimate_of_tokens_is_within_15_percent(reranker: Reranker, tmp_path: Path) -> None:
    """The rows of the file grow longer, so that no part is representative; a third is sampled."""
    rows = [{"query": "bee", "document": "a " * (1 + n // 200)} for n in range(3 * bulk.SAMPLE_ROWS)]
    write_jsonl(tmp_path / "pairs.jsonl", rows)
    truth = sum(2 * (1 + n // 200) for n in range(len(rows)))  # a token a letter and one a blank, at most
    lengths = [len(one[0]) for one in reranker.encoder.encode([bulk.Pair(r["query"], r["document"]) for r in rows])]
    assert 0.4 * truth < sum(lengths) < 1.6 * truth + 20 * len(rows)
    found = bulk.estimate(reranker, tmp_path / "pairs.jsonl")
    assert (found.rows, found.pairs, found.sampled) == (len(rows), len(rows), bulk.SAMPLE_ROWS)
    assert found.tokens == pytest.approx(sum(lengths), rel=0.15)
    assert found.memory > 2**20
    assert found.seconds == pytest.approx(found.tokens / found.tokens_per_second, rel=0.01)
    assert os.listdir(tmp_path) == ["pairs.jsonl"]


def test_an_empty_input_gives_an_empty_output(reranker: Reranker, tmp_path: Path) -> None:
    (tmp_path / "pairs.jsonl").write_text("")
    summary = bulk.run(reranker, tmp_path / "pairs.jsonl", tmp_path / "out")
    assert (summary.pairs, summary.shards) == (0, 0)
    assert bulk.estimate(reranker, tmp_path / "pairs.jsonl").pairs == 0


@pytest.mark.parametrize(
    ("seconds", "words"), [(0.04, "0.0 s"), (7.25, "7.2 s"), (59, "59 s"), (125, "2 min 5 s"), (7270, "2 h 1 min")]
)
def test_durations(seconds: float, words: str) -> None:
    assert duration(seconds) == words
