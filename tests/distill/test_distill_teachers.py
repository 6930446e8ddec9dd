"""Teachers: scores against direct computation, the cache, and runs that are killed."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from helpers import native_config, write_checkpoint
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from little import pairs, read_lines, shuffled, tree, write_lines

import turborank
from turborank.cli import main
from turborank.data.trec import read_run
from turborank.distill import sources, teachers
from turborank.distill.batches import build_folder
from turborank.distill.folder import TrainingFolder, read_pairs
from turborank.distill.scores import Question, key, open_cache, score_pairs
from turborank.distill.sources import ListOptions, TrainingSource
from turborank.errors import EngineError, InputError
from turborank.types import Float32, no_progress

PLAN = sources.PoolPlan(bm25=4, bm25_depth=8, dense=0, dense_depth=0, random=3)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_checkpoint(tmp_path_factory.mktemp("teachers") / "slow", native_config(max_length=96)))


@pytest.fixture
def folder(tmp_path: Path) -> TrainingFolder:
    source = TrainingSource("animals", write_lines(tmp_path / "animals.jsonl", pairs()[:24]))
    build_folder(ListOptions((source,)), tmp_path / "lists", PLAN)
    return TrainingFolder.load(tmp_path / "lists")


def texts_of(folder: TrainingFolder, values: Float32) -> dict[tuple[str, str], float]:
    """Scores by (query, document) text."""
    rows = zip(folder.query_index.tolist(), folder.doc_index.tolist(), values.tolist(), strict=True)
    return {(folder.queries[query], folder.texts[place]): score for query, place, score in rows}


def spec(text: str) -> teachers.TeacherSpec:
    return teachers.parse(text)


class Counting:
    """A teacher that scores by text lengths, counts the requested pairs and can be made to fail."""

    max_documents = 3

    def __init__(self, last: int | None = None) -> None:
        self.asked: list[tuple[str, str]] = []
        self.last = last

    def about(self) -> dict[str, object]:
        return {"kind": "counting"}

    def answer(self, questions: Iterator[Question]) -> Iterator[tuple[Question, Float32]]:
        for question in questions:
            if self.last is not None and len(self.asked) >= self.last:
                raise InputError("expected to go on, got enough")
            assert len(question.documents) <= self.max_documents
            self.asked += [(question.query, document) for document in question.documents]
            yield question, np.array([len(question.query) + len(one) / 128 for one in question.documents], np.float32)


def test_bm25_is_the_first_stage(folder):
    teachers.score(folder, spec("bm25"))
    assert folder.scores("bm25").tolist() == folder.first_stage.tolist()


def test_a_checkpoint_says_what_it_says_elsewhere(folder, model):
    teachers.score(folder, spec(f"slow=checkpoint:{model}"), teachers.TeacherOptions({"engine": "reference"}))
    reranker = turborank.Reranker(model, engine="reference")
    found = texts_of(folder, folder.scores("slow"))
    asked = list(found)
    assert [found[pair] for pair in asked] == reranker.score(asked).tolist()
    about = json.loads((folder.path / "scores" / "slow.json").read_text())
    assert about["engine"] == "reference"
    assert about["sha256"]
    run = read_run(folder.path / "scores" / "slow.trec")
    assert {query: len(documents) for query, documents in run.items()} == {
        query: folder.pool(at).stop - folder.pool(at).start for at, query in enumerate(folder.query_ids)
    }


def test_a_run_file_is_a_teacher_of_what_it_holds(folder, tmp_path):
    values = np.arange(len(folder.doc_index), dtype=np.float32) / 8
    folder.write_scores("mine", values, {})
    moved = tmp_path / "other.trec"
    (folder.path / "scores" / "mine.trec").rename(moved)
    moved.write_text("\n".join(shuffled(moved.read_text().splitlines(), 0)) + "\n")
    teachers.score(folder, spec(f"old=run:{moved}"))
    assert folder.scores("old").tolist() == values.tolist()
    moved.write_text("\n".join(moved.read_text().splitlines()[2:]) + "\n")
    with pytest.raises(InputError, match=f"expected scores of all {len(values)} pool entries, got 2 without"):
        teachers.score(folder, spec(f"old=run:{moved}"))


def test_no_score_is_requested_twice(folder):
    different = len(texts_of(folder, folder.first_stage))
    cache = folder.path / "cache"
    first = Counting()
    values = score_pairs(first, folder, cache, no_progress)
    assert len(first.asked) == len(set(first.asked)) == different == len(values)
    again = Counting()
    assert score_pairs(again, folder, cache, no_progress).tolist() == values.tolist()
    assert again.asked == []


def test_what_was_answered_before_a_fault_is_not_asked_again(folder):
    whole = score_pairs(Counting(), folder, folder.path / "other", no_progress)
    asked: list[tuple[str, str]] = []
    for last in (20, 50):
        broken = Counting(last)
        with pytest.raises(InputError, match="got enough"):
            score_pairs(broken, folder, folder.path / "cache", no_progress)
        asked += broken.asked
    rest = Counting()
    values = score_pairs(rest, folder, folder.path / "cache", no_progress)
    asked += rest.asked
    assert len(asked) == len(set(asked)) == len(values)
    assert values.tobytes() == whole.tobytes()


def test_equal_texts_under_other_ids_are_asked_about_once(tmp_path):
    """Three documents, of which two are equal, and two equal queries."""
    lists = tmp_path / "lists"
    write_lines(lists / "corpus.jsonl", [{"_id": i, "text": t} for i, t in (("a", "x"), ("b", "x"), ("c", "y z"))])
    write_lines(lists / "queries.jsonl", [{"_id": i, "text": "why?"} for i in "pq"])
    write_lines(lists / "candidates.trec", [f"{q} Q0 {d} 1 1.0 t" for q in "qp" for d in "cba"])
    folder = TrainingFolder.load(lists)
    counting = Counting()
    values = score_pairs(counting, folder, lists / "cache", no_progress)
    assert sorted(counting.asked) == [("why?", "x"), ("why?", "y z")]
    assert [folder.doc_ids[place] for place in folder.doc_index] == ["c", "b", "a"] * 2
    assert values.tolist() == [4 + 3 / 128, 4 + 1 / 128, 4 + 1 / 128] * 2


def test_another_teacher_shares_no_answer(folder, model):
    keys = {key(revision, q, d) for revision in ("a", "ab") for q in ("b", "bc") for d in ("c", "d", "bc")}
    assert len(keys) == 12
    score_pairs(Counting(), folder, folder.path / "cache", no_progress)
    other = Counting()
    other.about = lambda: {"kind": "counting", "revision": 2}
    score_pairs(other, folder, folder.path / "cache", no_progress)
    assert len(other.asked) == len(folder.doc_index)


def test_the_order_of_documents_and_of_pools_is_irrelevant(folder, model, tmp_path):
    other = tmp_path / "shuffled"
    for name in ("corpus.jsonl", "queries.jsonl"):
        write_lines(other / name, shuffled(read_lines(folder.path / name), 5))
    lines = shuffled((folder.path / "candidates.trec").read_text().splitlines(), 5)
    write_lines(other / "candidates.trec", lines)
    again = TrainingFolder.load(other)
    options = teachers.TeacherOptions({"engine": "reference"})
    for one in (folder, again):
        for text in ("bm25", f"slow=checkpoint:{model}"):
            teachers.score(one, spec(text), options)
    for name in ("bm25", "slow"):
        assert texts_of(folder, folder.scores(name)) == texts_of(again, again.scores(name))


def test_scores_of_other_pools_are_refused(folder):
    teachers.score(folder, spec("bm25"))
    lines = (folder.path / "candidates.trec").read_text().splitlines()
    write_lines(folder.path / "candidates.trec", lines[:-1])
    with pytest.raises(InputError, match=r"got those of other texts or pools at .*bm25.json"):
        TrainingFolder.load(folder.path).scores("bm25")
    with pytest.raises(InputError, match=r"expected the scores of 'nobody' at .*, got those of bm25"):
        folder.scores("nobody")


def test_an_answer_that_is_no_score_ends_the_run(folder):
    broken = Counting()
    broken.answer = lambda questions: ((one, np.full(len(one.documents), np.nan, np.float32)) for one in questions)
    with pytest.raises(EngineError, match="expected 3 finite scores, got"):
        score_pairs(broken, folder, folder.path / "cache", no_progress)


SLOWLY = """
import sys, time
from turborank.cli import main
from turborank.distill import scores
put = scores.TeacherScoreCache.put
def slowly(self, keys, scores):  # time for the test to kill us between two answers
    put(self, keys, scores)
    print("kept", len(keys), flush=True)
    time.sleep(0.05)
scores.TeacherScoreCache.put = slowly
sys.exit(main.run(sys.argv[1:]))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="kills by signal")
def test_a_killed_run_goes_on_to_the_same_bytes(folder, model, monkeypatch, capsys):
    """The process is killed twice; no cached pair is scored again. The scores are computed by the
    native engine, because numpy's last bits may differ between processes."""
    monkeypatch.setattr(teachers, "PAIRS_PER_CALL", 16)
    arguments = ["distill", "score", str(folder.path), "-t", f"slow=checkpoint:{model}", "--engine", "native"]
    kept = 0
    for _ in range(2):
        command = [sys.executable, "-c", SLOWLY, *arguments]
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONWARNINGS": "ignore"}
        ) as run:
            for _ in range(4):
                line = run.stdout.readline().split()
                kept += int(line[1])
            os.kill(run.pid, signal.SIGKILL)
            rest = run.stdout.read().splitlines()  # what it kept before the signal came
            kept += sum(int(line.split()[1]) for line in rest)
        assert run.returncode == -signal.SIGKILL
        assert not (folder.path / "scores").exists()
    assert 0 < kept < len(folder.doc_index)

    scored = 0
    score_detailed = turborank.Reranker.score_detailed

    def counted(self, given, **options):
        nonlocal scored
        scored += len(given)
        return score_detailed(self, given, **options)

    monkeypatch.setattr(turborank.Reranker, "score_detailed", counted)
    assert main.run(arguments) == 0
    assert scored == len(folder.doc_index) - kept
    resumed = tree(folder.path)
    assert main.run([*arguments, "--cache", str(folder.path / "other" / "cache")]) == 0
    assert scored == 2 * len(folder.doc_index) - kept
    assert tree(folder.path) == resumed
    assert capsys.readouterr().out.count("slow.trec") == 2


def test_a_full_disk_is_reported(folder):
    with open_cache(folder.path / "cache") as kept:
        kept._connection.execute("PRAGMA max_page_count = 2")
        keys = [key("", "", str(n)) for n in range(10_000)]
        with pytest.raises(InputError, match=r"expected to keep scores at .*sqlite3, got database or disk is full"):
            kept.put(keys, np.zeros(len(keys), np.float32))
        assert np.isnan(kept.get(keys)).all()  # all or nothing


def test_a_file_that_is_no_cache_is_reported(folder, tmp_path):
    (tmp_path / "scores.sqlite3").write_text("not a database, but long enough to be taken for one" * 99)
    with (
        pytest.raises(InputError, match=r"expected to keep scores at .*, got file is not a database"),
        open_cache(tmp_path),
    ):
        pass
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="expected a folder for the cache"), open_cache(tmp_path / "file"):
        pass


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("bm25", ("bm25", "bm25", "")),
        ("lexical=bm25", ("lexical", "bm25", "")),
        ("mini=biencoder:a/b=c", ("mini", "biencoder", "a/b=c")),
        ("x=http:tei:http://localhost:8080/rerank?a=b", ("x", "http", "tei:http://localhost:8080/rerank?a=b")),
    ],
)
def test_a_teacher_on_the_command_line(text, expected):
    assert tuple(spec(text)) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("bm52", "did you mean 'bm25'"),
        ("a=bm25:x", "expected bm25, got 'bm25:x'"),
        ("a=checkpoint", "expected checkpoint:MODEL, got 'checkpoint'"),
        ("checkpoint:there", "expected a name for the teacher, as in NAME=checkpoint:there"),
        ("../a=bm25", "expected a teacher's name of letters"),
        (".a=bm25", "expected a teacher's name of letters"),
        ("a=http:jna:https://x", "did you mean 'jina'"),
        ("a=http:jina:ftp://x", "expected a URL of http or https after jina:, got 'ftp://x'"),
        ("a=run:nowhere.trec", "expected a readable file, got No such file or directory at nowhere.trec"),
        ("a=checkpoint:./nowhere", "expected a model folder"),
        ("a=biencoder:nowhere", "expected the folder of a bi-encoder, got none at nowhere"),
    ],
)
def test_a_bad_teacher_is_answered_in_one_line(folder, capsys, text, expected):
    assert main.run(["distill", "score", str(folder.path), "--teacher", text]) == 2
    err = capsys.readouterr().err
    assert expected in err
    assert err.count("\n") == 1


BAD_RUNS = [
    ("q0 Q0 d0 1 1.0", "expected six columns"),
    ("q0 Q0 d0 1 one t", "expected a finite score in column five"),
    ("q0 Q0 d0 1 nan t", "expected a finite score in column five"),
    ("zz Q0 d0 1 1.0 t", "expected a known query, got 'zz'"),
    ("q0 Q0 zz 1 1.0 t", "expected a known document, got 'zz'"),
    ("q0 Q0 d1 2 1.0 t", "expected each document once per query, got 'd1' again"),
]


@pytest.mark.parametrize(("line", "expected"), BAD_RUNS)
def test_a_malformed_run_is_named(folder, line, expected):
    path = write_lines(folder.path / "candidates.trec", ["q1 Q0 d0 1 1.0 t", "q0 Q0 d1 1 1.0 t", "", line])
    with pytest.raises(InputError) as fault:
        TrainingFolder.load(folder.path)
    assert expected in str(fault.value)
    assert str(fault.value).endswith(f"at {path}:4")


def test_a_byte_order_mark_is_no_part_of_a_query_s_id(folder):
    lines = (folder.path / "candidates.trec").read_bytes()
    (folder.path / "candidates.trec").write_bytes(b"\xef\xbb\xbf" + lines)
    loaded = TrainingFolder.load(folder.path)
    assert loaded.query_ids == folder.query_ids
    assert np.array_equal(loaded.bounds, folder.bounds)


def test_an_id_that_is_not_utf_8_is_said_so(folder):
    path = folder.path / "candidates.trec"
    path.write_bytes(b"q0 Q0 d0 1 1.0 t\nq\xe9 Q0 d1 2 0.5 t\n")
    with pytest.raises(InputError) as fault:
        TrainingFolder.load(folder.path)
    assert fault.value.message == f"expected UTF-8, got byte 0xe9 at {path}:2"


def test_labels_of_a_training_query_cannot_be_held_out_too(folder):
    write_lines(folder.path / "qrels" / "dev.tsv", ["q3\td0\t1"])
    with pytest.raises(InputError, match=r"expected held-out queries in .*dev.tsv only, got 'q3'"):
        TrainingFolder.load(folder.path)


def test_read_pairs_keeps_the_bits(folder):
    values = np.random.default_rng(0).normal(size=len(folder.doc_index)).astype(np.float32)
    folder.write_scores("x", values, {})
    assert folder.scores("x").tobytes() == values.tobytes()
    assert read_pairs.__doc__
    with pytest.raises(InputError, match="finite scores of x"):
        folder.write_scores("x", np.full(len(values), np.inf, np.float32), {})


def test_loading_is_quick(tmp_path):
    """A hundred thousand pool entries; the bound is ten times the measured time."""
    lists = tmp_path / "lists"
    write_lines(lists / "corpus.jsonl", [{"_id": f"d{n}", "text": f"text {n}"} for n in range(5000)])
    write_lines(lists / "queries.jsonl", [{"_id": f"q{n}", "text": f"query {n}"} for n in range(2500)])
    lines = [f"q{q} Q0 d{(7 * q + k) % 5000} {k} {40 - k} t" for q in range(2500) for k in range(40)]
    write_lines(lists / "candidates.trec", lines)
    start = time.process_time()
    folder = TrainingFolder.load(lists)
    assert len(folder.doc_index) == 100_000
    assert time.process_time() - start < 5
    assert folder.doc_index.itemsize + folder.first_stage.itemsize + folder.labels.itemsize == 10


@given(stops=st.lists(st.integers(0, 40), max_size=6), max_documents=st.integers(1, 9))
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_wherever_it_stops_and_however_much_is_asked_at_once_the_bytes_are_the_same(folder, stops, max_documents):
    """After any interruptions, each pair is scored once and the file equals that of an uninterrupted run."""
    whole = score_pairs(Counting(), folder, folder.path / "whole", no_progress)
    with tempfile.TemporaryDirectory() as cache:
        asked: list[tuple[str, str]] = []
        for stop in [*stops, None]:
            counting = Counting(stop)
            counting.max_documents = max_documents
            with contextlib.suppress(InputError):
                values = score_pairs(counting, folder, Path(cache), no_progress)
            asked += counting.asked
        assert len(asked) == len(set(asked)) == len(folder.doc_index)
    assert values.tobytes() == whole.tobytes()


def test_scores_are_normalised_within_pools():
    scores = np.asarray([1, 3, 5, 10, 10, 10], dtype=np.float32)
    bounds = np.asarray([0, 3, 3, 6])  # the second pool is empty
    wide = np.sqrt(8 / 3)  # of 1, 3, 5
    expected = {"raw": scores, "minmax": [0, 0.5, 1, 0, 0, 0], "z": [-2 / wide, 0, 2 / wide, 0, 0, 0]}
    for norm, values in expected.items():
        np.testing.assert_allclose(teachers.normalise(scores, bounds, norm), values, rtol=1e-6)
    assert teachers.normalise(scores[:0], np.asarray([0, 0]), "z").tolist() == []
    weighted = [teachers.parse_weighted("a:2:minmax"), teachers.parse_weighted("b")]
    fused = teachers.fuse(weighted, {"a": scores, "b": -scores}, bounds)
    np.testing.assert_allclose(fused, [0 - 1, 1 - 3, 2 - 5, -10, -10, -10], rtol=1e-6)
    with pytest.raises(InputError, match="expected at least one teacher"):
        teachers.fuse([], {}, bounds)
    for text, said in (("a:x", "NAME"), (":1", "NAME"), ("a:1:z:2", "NAME"), ("a:inf", "NAME"), ("a:1:rank", "norm")):
        with pytest.raises(InputError, match=said):
            teachers.parse_weighted(text)
