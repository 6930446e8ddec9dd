"""Order, other pairs of the batch, budgets and chunks must not change a bit of a score."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from instruction_sets import PRECISIONS
from random_models import model_config, random_weights
from sample_tokenizers import WORDS, wordpiece_tokenizer

from turborank import engines, scheduler
from turborank.errors import EngineError
from turborank.tokens import PairEncoder
from turborank.types import Engine, Float32, PackedBatch, Pair

CONFIG = model_config(vocab_size=8, hidden_size=64, num_attention_heads=2, intermediate_size=128, slopes=(0.5, 0.01))
WEIGHTS = random_weights(CONFIG)
# The engines that keep a pair's bits. What the native one has depends on the machine, and on TURBORANK_ISA.
PREPARED = [("reference", "fp32"), *(("native", precision) for precision in PRECISIONS)]

texts = st.lists(st.sampled_from(WORDS), max_size=40).map(" ".join)
pairs_of_texts = st.lists(st.builds(Pair, texts, texts), min_size=1, max_size=12)


def prepared(name: str, precision: str, threads: int = 1) -> Engine:
    return engines.prepare(WEIGHTS, CONFIG, name=name, precision=precision, threads=threads)


def encoder(policy: str = "truncate", max_length: int = 64) -> PairEncoder:
    return PairEncoder(wordpiece_tokenizer(), max_length=max_length, policy=policy)


@pytest.fixture(scope="module", params=PREPARED, ids="-".join)
def engine(request: pytest.FixtureRequest) -> Engine:
    return prepared(*request.param)


@given(st.lists(st.integers(1, 100)), st.integers(1, 300))
def test_plan_covers_everything_once_within_budget(lengths: list[int], budget: int) -> None:
    batches = scheduler.plan(lengths, budget)
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    for batch in batches:
        assert len(batch) == 1 or sum(lengths[i] for i in batch) <= budget
    flat = [lengths[i] for batch in batches for i in batch]
    assert flat == sorted(flat, reverse=True)


@settings(deadline=None, max_examples=25)
@given(pairs=pairs_of_texts, seed=st.integers(0, 2**16), budget=st.integers(1, 500))
def test_order_and_budget_do_not_change_a_bit(engine: Engine, pairs: list[Pair], seed: int, budget: int) -> None:
    coder = encoder()
    alone = np.concatenate([scheduler.score([pair], coder, engine).logits for pair in pairs])
    shuffle = np.random.default_rng(seed).permutation(len(pairs))
    together = scheduler.score([pairs[i] for i in shuffle], coder, engine, token_budget=budget).logits
    assert together.tobytes() == alone[shuffle].tobytes()


def square(lengths: list[int]) -> scheduler.Work:
    return scheduler.Work(sum(lengths), sum(n * n for n in lengths))


@given(
    st.lists(st.lists(st.integers(10, 2000), min_size=1, max_size=20), min_size=8, max_size=20),
    st.floats(1e-6, 1e-2),
    st.floats(0, 1e-2),
)
def test_pace_finds_both_terms_of_an_engine(batches: list[list[int]], each: float, ratio: float) -> None:
    """The engine takes each x tokens + each x ratio x squares seconds; batches of 32, 512 and 2,048 tokens."""
    pace = scheduler.Pace()
    assert (pace.known, pace.speed, pace.seconds(square([100]))) == (False, None, 0.0)
    for batch in [*batches, *[[32] * 8, [512] * 4, [2048]] * 20]:
        work = square(batch)
        pace.measure(work, each * (work.tokens + ratio * work.squares))
    for batch in ([32] * 8, [512] * 4, [2048]):
        work = square(batch)
        assert pace.seconds(work) == pytest.approx(each * (work.tokens + ratio * work.squares), rel=0.2)


def test_pace_of_one_length_predicts_that_length_and_more_for_longer_pairs() -> None:
    pace = scheduler.Pace()
    for _ in range(5):
        pace.measure(square([100] * 10), 1.0)
    assert pace.speed == pytest.approx(1000)
    assert pace.seconds(square([100] * 20)) == pytest.approx(2.0)
    assert pace.seconds(square([2000])) > 2 * 1.5


def test_pace_forgets_and_does_not_take_a_pause_for_slowness() -> None:
    pace = scheduler.Pace()
    for _ in range(50):
        pace.measure(square([100] * 10), 0.1)
    pace.measure(square([100] * 10), 100.0)  # the machine was asleep
    assert pace.seconds(square([100] * 10)) < 0.2
    for _ in range(50):
        pace.measure(square([100] * 10), 1.0)  # it became ten times slower
    assert pace.seconds(square([100] * 10)) == pytest.approx(1.0, rel=0.1)


@pytest.mark.parametrize(("name", "precision"), PREPARED)
def test_threads_do_not_change_a_bit(name: str, precision: str) -> None:
    rng = np.random.default_rng(0)
    pairs = [Pair("red bee", " ".join(rng.choice(WORDS, size=n))) for n in rng.integers(0, 60, 40)]
    one, three = (scheduler.score(pairs, encoder(), prepared(name, precision, threads)).logits for threads in (1, 3))
    assert one.tobytes() == three.tobytes()


def test_chunks_do_not_change_a_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = prepared("reference", "fp32")
    pairs = [Pair("red", " ".join(["blue", "tree"] * n)) for n in range(20)]
    seen: list[tuple[int, int]] = []
    whole = scheduler.score(pairs, encoder(), engine).logits
    monkeypatch.setattr(scheduler, "FIRST_CHUNK_CHARACTERS", 30)
    monkeypatch.setattr(scheduler, "CHUNK_CHARACTERS", 200)
    parts = scheduler.score(pairs, encoder(), engine, progress=lambda done, total: seen.append((done, total))).logits
    assert whole.tobytes() == parts.tobytes()
    assert len(seen) > 3
    assert [done for done, _ in seen] == sorted({done for done, _ in seen})
    assert seen[-1] == (20, 20)


def test_windows_take_the_best_and_point_at_it() -> None:
    """Each window is scored as a short document: the pair has the maximal logit and the span of that window."""
    engine = prepared("reference", "fp32")
    words = np.random.default_rng(3).choice(WORDS, size=60)
    text = " ".join(words)
    coder = encoder("windows", 20)
    scores = scheduler.score([Pair("red bee", text)], coder, engine)
    [windows] = coder.encode([Pair("red bee", text)])
    pieces = [text[slice(*window.span)] for window in windows]
    alone = scheduler.score([Pair("red bee", piece) for piece in pieces], coder, engine).logits
    assert len(pieces) > 3
    assert scores.logits[0] == alone.max()
    assert scores.spans[0].tolist() == list(windows[int(alone.argmax())].span)
    assert (scores.tokens[0], scores.truncated[0]) == (60 + 2 + 3, 0)


def test_truncation_is_reported_per_pair() -> None:
    scores = scheduler.score(
        [Pair("red", "blue"), Pair("red", " ".join(["blue"] * 100))],
        encoder(max_length=20),
        prepared("reference", "fp32"),
    )
    assert scores.tokens.tolist() == [5, 20]
    assert scores.truncated.tolist() == [0, 104 - 20]


def test_no_pairs() -> None:
    assert scheduler.score([], encoder(), prepared("reference", "fp32")).logits.shape == (0,)


def test_a_logit_that_is_not_a_number_is_an_error() -> None:
    class Broken:
        name, precision, isa, threads = "broken", "fp32", "none", 1

        def logits(self, batch: PackedBatch) -> Float32:
            return np.where(np.arange(batch.pairs) == 1, np.nan, 0).astype(np.float32)

    with pytest.raises(EngineError, match="finite logit, got nan"):
        scheduler.score([Pair("red", "blue")] * 3, encoder(), Broken())
