"""Rerankers in threads and processes: the same bits, one model per process, no hang, nothing on standard error."""

import concurrent.futures
import copy
import gc
import multiprocessing
import os
import pickle
import subprocess
import sys
import threading
import warnings
from pathlib import Path

import numpy as np
import pytest
from helpers import native_config, write_checkpoint

from turborank import CheckpointError, InputError, Reranker
from turborank.engines import native
from turborank.score_cache import ScoreCache

needs_native = pytest.mark.skipif(native.available() is not None, reason="the native engine is not compiled")
needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
QUERY = "which bee"
DOCUMENTS = [f"a bee of {place} in the trees " * (1 + place % 9) for place in range(120)]
PAIRS = [(QUERY, document) for document in DOCUMENTS]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("model"), native_config())


def bits(reranker: Reranker) -> bytes:
    return reranker.score(PAIRS).tobytes()


def bits_and_models(rerankers: list[Reranker]) -> tuple[set[bytes], int, int]:
    """In a worker: the scores' bits, the process id, and the number of open models."""
    found = {bits(reranker) for reranker in rerankers}
    return found, os.getpid(), len({id(reranker.checkpoint) for reranker in rerankers})


@pytest.mark.parametrize("engine", ["reference", pytest.param("native", marks=needs_native)])
def test_a_pickle_holds_the_recipe_and_not_the_weights(folder: Path, engine: str) -> None:
    reranker = Reranker(folder, engine=engine, max_length=64, length="windows", threads=2, faithful=True)
    sent = pickle.dumps(reranker)
    assert len(sent) < 1000
    arrived, again = pickle.loads(sent), pickle.loads(sent)
    assert arrived.checkpoint is again.checkpoint is not reranker.checkpoint  # opened once
    assert bits(arrived) == bits(reranker)
    assert (arrived.max_length, arrived.encoder.policy, arrived.encoder.faithful) == (64, "windows", True)
    assert (arrived.engine.name, arrived.engine.precision) == (reranker.engine.name, reranker.engine.precision)
    assert pickle.dumps(arrived) == sent
    arrived.close()


def test_a_relative_folder_is_found_from_elsewhere(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder.parent)
    sent = pickle.dumps(Reranker(f"./{folder.name}", engine="reference"))
    monkeypatch.chdir("/")
    with pickle.loads(sent) as arrived:
        assert len(bits(arrived)) == 4 * len(PAIRS)


def test_other_files_of_the_same_name_are_refused(folder: Path, tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path / "model", native_config())
    sent = pickle.dumps(Reranker(path, engine="reference"))
    weights = path / "model.safetensors"
    changed = bytearray(weights.read_bytes())
    changed[-2:] = b"\x00\x3f"  # 0.5 in bfloat16
    weights.write_bytes(changed)
    with pytest.raises(CheckpointError, match="expected the model files that the reranker was opened with"):
        pickle.loads(sent)


def test_an_assigned_cache_is_pickled(folder: Path, tmp_path: Path) -> None:
    reranker = Reranker(folder, engine="reference")
    reranker.cache = ScoreCache(50, tmp_path / "scores.db")
    bits(reranker)
    with pickle.loads(pickle.dumps(reranker)) as arrived:
        assert (arrived.cache.entries, arrived.cache.path) == (50, str(tmp_path / "scores.db"))
        assert len(arrived.cache) == 50


def test_copies_share_the_engine_and_close_alone(folder: Path) -> None:
    reranker = Reranker(folder, engine="reference")
    for copied in (copy.copy(reranker), copy.deepcopy(reranker)):
        assert copied.engine is reranker.engine
        copied.close()
        with pytest.raises(InputError, match="expected an open reranker, got one that was closed"):
            copied.score(PAIRS[:1])
    assert bits(reranker)


def test_with_closes_and_repr_shows_the_state(folder: Path) -> None:
    with Reranker(folder, engine="reference") as reranker:
        words = repr(reranker)
    for word in (folder.name, "engine='reference'", "precision='fp32'", "isa=", "threads="):
        assert word in words
    assert "closed" not in words
    assert "closed" in repr(reranker)
    reranker.close()
    with pytest.raises(InputError, match="closed"):
        reranker.rank(QUERY, DOCUMENTS)
    with pytest.raises(InputError, match="closed"):
        pickle.dumps(reranker)


@needs_native
def test_closing_frees_the_weights(folder: Path) -> None:
    import weakref

    reranker = Reranker(folder, engine="native")
    engine = weakref.ref(reranker.engine)
    mapped = weakref.ref(reranker.checkpoint.weights)
    reranker.close()
    gc.collect()
    assert engine() is None
    assert mapped() is None


@needs_native
@pytest.mark.parametrize("start", ["spawn", pytest.param("fork", marks=needs_fork), "forkserver"])
def test_worker_processes(folder: Path, start: str, capfd: pytest.CaptureFixture[str]) -> None:
    """After use in the parent with threads: a fork inherits no thread, a spawned worker opens the model once."""
    if start not in multiprocessing.get_all_start_methods():
        pytest.skip(f"this system cannot {start}")
    reranker = Reranker(folder, engine="native", threads=3)
    expected = bits(reranker)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 on forks in a process of several threads
        with multiprocessing.get_context(start).Pool(2) as pool:
            answers = [pool.apply_async(bits_and_models, ([reranker, reranker],)) for _ in range(4)]
            found = [answer.get(timeout=120) for answer in answers]
            pool.close()
            pool.join()
    for their_bits, process, models in found:
        assert their_bits == {expected}
        assert process != os.getpid()
        assert models == 1
    assert capfd.readouterr().err == ""
    assert bits(reranker) == expected


@needs_native
def test_concurrent_futures(folder: Path) -> None:
    reranker = Reranker(folder, engine="native")
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=context) as pool:
        assert list(pool.map(bits, [reranker] * 3)) == [bits(reranker)] * 3


@needs_native
def test_joblib(folder: Path) -> None:
    joblib = pytest.importorskip("joblib", reason="joblib is not installed in this environment")
    reranker = Reranker(folder, engine="native")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = joblib.Parallel(n_jobs=2)(joblib.delayed(bits)(reranker) for _ in range(3))
    assert found == [bits(reranker)] * 3


@needs_native
def test_eight_threads_have_the_bits_of_one(folder: Path) -> None:
    reranker = Reranker(folder, engine="native", threads=2)
    expected = bits(reranker)
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        assert set(pool.map(lambda _: bits(reranker), range(24))) == {expected}


FORKED_WHILE_BUSY = """
import os, signal, sys, threading
from turborank import Reranker
reranker = Reranker(sys.argv[1], engine="native", threads=2)
pairs = [("which bee", "a bee in the trees " * 8)] * 200
expected = reranker.score(pairs).tobytes()
stop = threading.Event()
def work():
    while not stop.is_set():
        reranker.score(pairs)
threads = [threading.Thread(target=work) for _ in range(2)]
for thread in threads: thread.start()
codes = []
for _ in range(6):
    child = os.fork()
    if child == 0:
        signal.alarm(60)  # a child that hangs is killed, which its status tells
        same = reranker.score(pairs).tobytes() == expected and reranker.rank("q", ["d"]) is not None
        sys.stderr.flush()
        os._exit(0 if same else 3)
    codes.append(os.waitpid(child, 0)[1])
stop.set()
for thread in threads: thread.join()
sys.exit(str(codes) if any(codes) else 0)
"""


def python(code: str, *arguments: str, environment: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "ignore::DeprecationWarning", "-c", code, *arguments], capture_output=True, text=True,
        timeout=240, env={**os.environ, **(environment or {})},
    )  # fmt: skip


@needs_native
@needs_fork
def test_a_fork_while_other_threads_compute(folder: Path) -> None:
    """At the fork, a thread that does not exist in the child holds the engine's lock."""
    ended = python(FORKED_WHILE_BUSY, str(folder))
    assert (ended.returncode, ended.stderr) == (0, "")


THREADS = """
import os, sys, time
from turborank import Reranker
reranker = Reranker(sys.argv[1], engine="native", threads=int(sys.argv[2]))
reranker.score([("which bee", "a bee in the trees " * 40)] * 400)
deadline = time.monotonic() + 10  # the kernel lists a thread that has ended until it is reaped
while len(os.listdir("/proc/self/task")) > int(sys.argv[2]) and time.monotonic() < deadline:
    time.sleep(0.05)
print(len(os.listdir("/proc/self/task")), os.environ["TOKENIZERS_PARALLELISM"])
"""


@needs_native
@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="this system does not list threads")
@pytest.mark.parametrize("threads", [1, 3])
def test_threads_after_a_list_are_those_requested(folder: Path, threads: int) -> None:
    """Threads of the engine; the tokenizer's end with the list. Without a limit there would be one for each core."""
    environment = {name: value for name, value in os.environ.items() if name != "TOKENIZERS_PARALLELISM"}
    environment |= {"OPENBLAS_NUM_THREADS": "1", "RAYON_NUM_THREADS": "7"}
    ended = subprocess.run(
        [sys.executable, "-c", THREADS, str(folder), str(threads)], capture_output=True, text=True, env=environment
    )
    assert (ended.stdout.split(), ended.stderr) == ([str(threads), "false"], "")


ENDS = {
    "an exception": "raise RuntimeError('on purpose')",
    "sys.exit": "sys.exit(3)",
    "a frame that is kept": "kept = sys._getframe()",
    "an exception that is kept": "sys.last_exc = ValueError(reranker)",
    "a cycle without end": "import gc; gc.disable(); cycle = [reranker]; cycle.append(cycle)",
}


@needs_native
@pytest.mark.parametrize("end", ENDS)
def test_nothing_is_printed_at_exit(folder: Path, end: str) -> None:
    """While a running pool, a module or a traceback still refers to a reranker."""
    code = (
        "import concurrent.futures, sys, builtins\nfrom turborank import Reranker\n"
        "reranker = builtins.reranker = Reranker(sys.argv[1], engine='native')\n"
        "pool = builtins.pool = concurrent.futures.ThreadPoolExecutor(2)\n"
        "def use():\n    return reranker.score([('a', 'b')] * 50)\n"
        "first = pool.submit(use)\nfirst.result()\n"
        f"later = [pool.submit(use) for _ in range(20)]\n{ENDS[end]}\n"
    )
    ended = python(code, str(folder))
    assert "nanobind" not in ended.stderr
    assert "leak" not in ended.stderr
    assert ended.stderr == "" or "on purpose" in ended.stderr


@needs_native
def test_memory_stays_flat_over_short_calls(folder: Path) -> None:
    resource = pytest.importorskip("resource")
    reranker = Reranker(folder, engine="native", threads=2)
    for _ in range(200):
        reranker.rank(QUERY, DOCUMENTS[:3])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(3000):
        reranker.rank(QUERY, DOCUMENTS[:3])
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 4096  # KiB (of Linux): less than a byte and a half a call is no leak of anything
    assert threading.active_count() < 20


@needs_native
@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="this system does not tell resident memory")
def test_memory_after_a_burst_is_one_work_space_and_close_releases_it() -> None:
    """The work space of the largest batch is kept (docs/scale.md); it does not grow, and close releases it."""
    code = (
        "import gc, sys\nfrom pathlib import Path\nfrom turborank import Reranker\n"
        "def resident():\n"
        "    gc.collect()\n"
        "    lines = Path('/proc/self/status').read_text().splitlines()\n"
        "    print(next(line for line in lines if line.startswith('RssAnon')).split()[1])\n"
        "reranker = Reranker(engine='native', threads=2)\n"
        "burst = ['a bee in the trees of the hive ' * 20] * 100\n"
        "reranker.rank('which bee', burst[:2])\nresident()\nreranker.rank('which bee', burst)\nresident()\n"
        "for _ in range(2):\n    reranker.rank('which bee', burst)\n    reranker.rank('which bee', burst[:2])\n"
        "resident()\nreranker.close()\nresident()\n"
    )
    ended = python(code)  # a process of its own: other tests leave memory to the allocator
    assert ended.returncode == 0, ended.stderr
    before, once, after, closed = map(int, ended.stdout.split())  # KiB
    assert after - once < max(8192, (once - before) // 4)  # what the allocator rounds up
    assert closed < before  # the work space and the weights are gone


def test_rank_many_has_the_rankings_of_rank(folder: Path) -> None:
    reranker = Reranker(folder, engine="native" if native.available() is None else "reference")
    queries = ["which bee", "trees", "", "which bee"]
    candidates = [DOCUMENTS[:7], [], DOCUMENTS[5:50], [{"title": "a", "text": "bee"}, "the bee"]]
    seen: list[tuple[int, int]] = []
    for options in ({}, {"top_n": 3}, {"top_n": 2, "threshold": 0.4}, {"depth": 4}, {"depth": "auto", "top_n": 3}):
        single = [reranker.rank(query, one, **options) for query, one in zip(queries, candidates, strict=True)]
        many = reranker.rank_many(queries, candidates, progress=lambda *step: seen.append(step), **options)
        assert many == single
    assert seen[-1][1] == 7 + 45 + 2
    assert reranker.rank_many([], []) == []


def test_rank_many_reports_faults_with_their_index(folder: Path) -> None:
    reranker = Reranker(folder, engine="reference", max_length=32, length="error")
    with pytest.raises(InputError, match="a list of candidates for each of 2 queries, got 1"):
        reranker.rank_many(["a", "b"], [["c"]])
    with pytest.raises(InputError) as error:
        reranker.rank_many(["a", 3], [["c", None], ["d", {"x": 1}]])  # type: ignore[list-item]
    for part in (
        "queries[1]: expected a string",
        "candidates[0][1]: expected a string",
        "candidates[1][1]: expected at",
    ):
        assert part in str(error.value)
    with pytest.raises(InputError, match=r"expected a list of documents in candidates\[1\], got one str"):
        reranker.rank_many(["a", "b"], [["c"], "d"])
    for depth in (None, 5, "auto"):
        with pytest.raises(InputError, match=r"^candidates\[1\]\[2\]: expected a pair of at most 32 tokens"):
            reranker.rank_many(["a", "b"], [["c"], ["d", "e", "bee " * 90]], depth=depth, top_n=2)


def test_columns_of_text(folder: Path) -> None:
    """A Series, a numpy or an Arrow array: converted by their elements' values."""
    reranker = Reranker(folder, engine="reference")
    expected = reranker.rank(QUERY, DOCUMENTS[:5])
    columns = [np.array(DOCUMENTS[:5]), np.array(DOCUMENTS[:5], dtype=object), iter(DOCUMENTS[:5])]
    for library, make in (("pandas", "Series"), ("polars", "Series"), ("pyarrow", "array")):
        try:
            module = __import__(library)
        except ImportError:
            continue
        columns.append(getattr(module, make)(DOCUMENTS[:5]))
    for column in columns:
        assert reranker.rank(QUERY, column) == expected
        assert type(expected[0].document) is str


class Table:
    """Like a DataFrame of pandas or polars and a Table of pyarrow: two dimensions, iterates over columns."""

    shape = (3, 2)

    def __iter__(self):  # type: ignore[no-untyped-def]
        return iter(["title", "text"])


def test_a_table_is_not_a_list_of_documents(folder: Path) -> None:
    reranker = Reranker(folder, engine="reference")
    tables = [Table(), np.array([DOCUMENTS[:2], DOCUMENTS[2:4]])]
    for library, make in (("pandas", "DataFrame"), ("polars", "DataFrame"), ("pyarrow", "table")):
        try:
            module = __import__(library)
        except ImportError:
            continue
        tables.append(getattr(module, make)({"title": ["a", "b"], "text": ["c", "d"]}))
    for table in tables:
        with pytest.raises(InputError, match=r"got a \w+ of 2 dimensions; give one column"):
            reranker.rank(QUERY, table)
    with pytest.raises(InputError, match="expected a list of documents, got one dict"):
        reranker.rank(QUERY, {"a": "b"})
    with pytest.raises(InputError, match="expected a list of pairs, got a ndarray of 2 dimensions"):
        reranker.score(np.array(PAIRS[:3]))
