"""The score cache: hits have the bits of a computed score, keys include all that scores depend on, size is bounded."""

import sqlite3
import threading

import numpy as np
import pytest
from helpers import write_checkpoint

from turborank import InputError, Reranker, TooLongError
from turborank.score_cache import ScoreCache, key
from turborank.tokens import Limits
from turborank.types import Pair

PAIRS = [Pair("bees", f"scouts {'dance ' * n}for it") for n in range(8)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("models") / "bees")


def counted(reranker):
    """Pairs that the engine computes from now on."""
    seen, compute = [], reranker.engine.logits

    class Counting:
        def __getattr__(self, name):
            return getattr(reranker_engine, name)

        def logits(self, batch):
            seen.append(batch.pairs)
            return compute(batch)

    reranker_engine = reranker.engine
    reranker.engine = Counting()
    return seen


@pytest.mark.parametrize("place", ["memory", "disk"])
def test_hits_have_the_bits_of_computed_scores_and_are_not_computed(folder, tmp_path, place):
    reranker = Reranker(folder, max_length=64, length="windows")
    want = reranker.score_detailed(PAIRS)
    reranker.cache = ScoreCache(path=tmp_path / "scores.sqlite3" if place == "disk" else None)
    first = reranker.score_detailed(PAIRS[:5])
    seen = counted(reranker)
    mixed = reranker.score_detailed(PAIRS[::-1])
    again = reranker.score_detailed(PAIRS)
    assert sum(seen) >= 3
    assert len(seen) == 1  # only the three that were new, once
    for got, places in ((first, range(5)), (mixed, range(7, -1, -1)), (again, range(8))):
        for column, wanted in zip(got, want, strict=True):
            assert column.dtype == wanted.dtype
            np.testing.assert_array_equal(column, wanted[list(places)])
    assert reranker.rank("bees", [d for _, d in PAIRS]) == Reranker(folder, max_length=64, length="windows").rank(
        "bees", [d for _, d in PAIRS]
    )
    assert (reranker.cache.hits, reranker.cache.misses) == (5 + 8 + 8, 5 + 3)


def test_a_file_outlives_the_process_and_is_shared(folder, tmp_path):
    path = tmp_path / "scores.sqlite3"
    one, other = Reranker(folder), Reranker(folder)
    one.cache, other.cache = ScoreCache(path=path), ScoreCache(path=path)
    want = one.score_detailed(PAIRS)
    seen = counted(other)
    np.testing.assert_array_equal(other.score_detailed(PAIRS).logits, want.logits)
    assert seen == []
    one.cache.close()
    assert len(ScoreCache(path=path)) == len(PAIRS)


def test_the_key_holds_all_that_a_score_depends_on(folder, tmp_path):
    other_weights = write_checkpoint(tmp_path / "bees", dtype="F32")
    base = Reranker(folder, engine="reference")
    others = [
        Reranker(folder, engine="reference", max_length=64),
        Reranker(folder, engine="reference", length="windows"),
        Reranker(folder, engine="reference", faithful=True),
        Reranker(other_weights, engine="reference"),
    ]
    prints = {base.fingerprint(), *(one.fingerprint() for one in others)}
    prints |= {base.fingerprint(Limits(max_document=5)), base.fingerprint(Limits(max_query=5))}
    assert len(prints) == 7
    # what changes nothing shares an entry
    assert base.fingerprint(Limits(policy="truncate", max_length=512)) == base.fingerprint(Limits(max_length=9_999))
    assert base.fingerprint() == Reranker(folder, engine="reference", threads=1).fingerprint() == base.fingerprint()
    assert key("m", "ab", "c") != key("m", "a", "bc") != key("ma", "", "bc")


def test_the_least_recently_used_goes_first(folder):
    reranker = Reranker(folder)
    cache = reranker.cache = ScoreCache(entries=4)
    reranker.score_detailed(PAIRS[:4])
    reranker.score_detailed(PAIRS[:1])  # used again
    reranker.score_detailed(PAIRS[4:6])
    assert len(cache) == 4
    missing = cache.find(reranker.fingerprint(), PAIRS[:6]).missing
    assert 0 not in missing
    assert {4, 5}.isdisjoint(missing)
    assert len(missing) == 2
    reranker.score_detailed(PAIRS)  # more than fit at once
    assert len(cache) == 4


def test_threads_share_one(folder):
    reranker = Reranker(folder)
    want = reranker.score_detailed(PAIRS).logits
    reranker.cache = ScoreCache(entries=6)
    got = []
    threads = [
        threading.Thread(target=lambda: got.append(reranker.score_detailed(PAIRS).logits), daemon=True)
        for _ in range(6)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(got) == 6
    assert all((one == want).all() for one in got)


def test_errors_of_the_file_are_counted_and_scores_are_computed(folder, tmp_path):
    path = tmp_path / "scores.sqlite3"
    reranker = Reranker(folder)
    reranker.cache = ScoreCache(path=path)
    want = reranker.score_detailed(PAIRS).logits
    with sqlite3.connect(path) as other:
        other.execute("UPDATE scores SET row = x'00'")  # damaged entries are entries that are not there
    np.testing.assert_array_equal(reranker.score_detailed(PAIRS).logits, want)
    with sqlite3.connect(path) as other:
        other.execute("DROP TABLE scores")
    np.testing.assert_array_equal(reranker.score_detailed(PAIRS).logits, want)
    assert reranker.cache.faults > 0


def test_what_is_refused(folder, tmp_path):
    (tmp_path / "text").write_text("no database, but long enough to be taken for one" * 30)
    for entries, path in ((0, None), (1.5, None), (10, tmp_path / "text"), (10, tmp_path / "nowhere" / "scores")):
        with pytest.raises(InputError):
            ScoreCache(entries, path)
    reranker = Reranker(folder, length="error", max_length=64)
    reranker.cache = ScoreCache()
    reranker.rank("bees", ["a"])
    with pytest.raises(TooLongError, match=r"documents\[1\]"):
        reranker.rank("bees", ["a", "b" * 600])
