"""The library's public interface: rankings, options and invalid input."""

import math
from pathlib import Path

import numpy as np
import pytest
from helpers import write_checkpoint
from hypothesis import given, settings
from hypothesis import strategies as st

from turborank import EngineUnavailableError, InputError, Ranked, Reranker, TooLongError, UnknownKeyError
from turborank.engines import native
from turborank.reranker import order, sigmoid
from turborank.text import document_text


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def reranker(folder: Path) -> Reranker:
    return Reranker(folder, engine="reference")


@given(st.lists(st.floats(-50, 50, width=32), max_size=30))
def test_order_is_by_logit_then_by_index(logits: list[float]) -> None:
    expected = sorted(range(len(logits)), key=lambda i: (-logits[i], i))
    assert order(np.asarray(logits, dtype=np.float32)).tolist() == expected


@pytest.mark.parametrize("logit", [-1000.0, -3.0, 0.0, 2.5, 1000.0])
def test_sigmoid(logit: float) -> None:
    assert sigmoid(logit) == pytest.approx((1 + math.tanh(logit / 2)) / 2, abs=1e-15)


def test_rank_is_score_in_order(reranker: Reranker) -> None:
    documents = ["a bee", "some other thing", "", "a bee"]
    logits = reranker.score([("which bee?", document) for document in documents])
    ranking = reranker.rank("which bee?", documents)
    assert logits.dtype == np.float32
    assert [r.index for r in ranking] == sorted(range(4), key=lambda i: (-logits[i], i))
    for ranked in ranking:
        assert isinstance(ranked, Ranked)
        assert ranked.document == documents[ranked.index]
        assert ranked.logit == logits[ranked.index]
        assert ranked.score == sigmoid(ranked.logit)
        assert ranked.truncated == 0
        assert ranked.span == (0, len(documents[ranked.index]))
    places = [r.index for r in ranking]
    assert places.index(0) + 1 == places.index(3)  # equal texts tie, and keep their order


@settings(deadline=None, max_examples=30)
@given(documents=st.lists(st.text(st.characters(codec=None), max_size=30), max_size=8), seed=st.integers(0, 2**16))
def test_permuting_documents_permutes_logits_exactly(reranker: Reranker, documents: list[str], seed: int) -> None:
    shuffle = np.random.default_rng(seed).permutation(len(documents))
    logits = reranker.score([("query", document) for document in documents])
    shuffled = reranker.score([("query", documents[i]) for i in shuffle])
    assert shuffled.tobytes() == logits[shuffle].tobytes()


def test_top_n_and_threshold(reranker: Reranker) -> None:
    documents = ["one", "two", "three", "four"]
    whole = reranker.rank("two", documents)
    assert reranker.rank("two", documents, top_n=2) == whole[:2]
    assert reranker.rank("two", documents, top_n=99) == whole
    assert reranker.rank("two", documents, threshold=whole[1].score) == whole[:2]
    assert reranker.rank("two", documents, threshold=1) == []
    assert reranker.rank("two", documents, top_n=np.int64(2)) == whole[:2]
    assert reranker.rank("two", []) == []


def test_mappings_are_read_by_fields(reranker: Reranker) -> None:
    texts = ["Bees swarm", "in spring"]
    documents = [{"title": "Bees", "text": "swarm", "id": 7}, {"body": "in", "title": None, "text": "in spring"}]
    ranking = reranker.rank("bees", documents)
    assert [(r.index, r.logit) for r in ranking] == [(r.index, r.logit) for r in reranker.rank("bees", texts)]
    assert all(r.document is documents[r.index] for r in ranking)
    assert document_text({"body": "x", "year": 2020}, ("year", "body")) == "2020 x"


def test_every_unusable_document_is_named_before_anything_runs(reranker: Reranker) -> None:
    with pytest.raises(InputError) as error:
        reranker.rank(3, ["fine", None, {"body": "x"}, b"bytes"])  # type: ignore[arg-type,list-item]
    message = str(error.value)
    assert "query: expected a string, got int" in message
    assert "documents[1]: expected a string or a mapping, got NoneType" in message
    assert "documents[2]: expected at least one of the fields title, text, got body" in message
    assert "documents[3]" in message
    assert "documents[0]" not in message
    with pytest.raises(InputError, match=r"and 90 more"):
        reranker.rank("q", [None] * 100)  # type: ignore[list-item]


@pytest.mark.parametrize("top_n", [0, -1, True, 1.5, "3"])
def test_top_n_must_be_a_positive_integer(reranker: Reranker, top_n: object) -> None:
    with pytest.raises(InputError, match="top_n to be a whole number of at least 1, got"):
        reranker.rank("q", ["d"], top_n=top_n)  # type: ignore[arg-type]


def test_one_string_is_not_a_list_of_documents(reranker: Reranker) -> None:
    with pytest.raises(InputError, match="expected a list of documents, got one str; wrap it in a list"):
        reranker.rank("q", "document")


def test_pairs_must_be_pairs(reranker: Reranker) -> None:
    with pytest.raises(InputError, match=r"pairs\[1\]: expected \(query, document\)"):
        reranker.score([("q", "d"), "qd"])  # type: ignore[list-item]


@pytest.mark.parametrize(
    "document",
    ["", " \n\t", "x" * 100_000, "\ud800", "\x00\x07", "🐝" * 50, "</s><s>", "é" * 300],
    ids=["empty", "space", "word", "surrogate", "control", "emoji", "specials", "accents"],
)
def test_any_text_gets_a_finite_score(reranker: Reranker, document: str) -> None:
    [ranked] = reranker.rank("", [document])
    assert math.isfinite(ranked.logit)
    assert ranked.tokens <= reranker.max_length


def test_length_policies(folder: Path) -> None:
    document = "bee " * 200
    cut = Reranker(folder, engine="reference", max_length=64).rank("bee", [document])[0]
    assert (cut.tokens, cut.tokens + cut.truncated) == (
        64,
        200 * 3 + 3 + 4,
    )  # three letters a word, four template tokens
    assert cut.span[1] < 100
    whole = Reranker(folder, engine="reference", max_length=64, length="windows").rank("bee", [document])[0]
    assert (whole.tokens, whole.truncated) == (200 * 3 + 3 + 4, 0)
    with pytest.raises(TooLongError, match="at most 64 tokens, got 607"):
        Reranker(folder, engine="reference", max_length=64, length="error").rank("bee", [document])


def test_options_that_do_not_exist(folder: Path) -> None:
    with pytest.raises(UnknownKeyError, match=r"engine to be one of .*native"):
        Reranker(folder, engine="gpu")
    with pytest.raises(UnknownKeyError, match="precision of engine 'reference' to be one of auto, fp32, got 'int8'"):
        Reranker(folder, engine="reference", precision="int8")
    with pytest.raises(UnknownKeyError, match="length to be one of"):
        Reranker(folder, engine="reference", length="cut")
    with pytest.raises(InputError, match="max_length to be a whole number from 16 to 512, got 600"):
        Reranker(folder, engine="reference", max_length=600)
    with pytest.raises(InputError, match="max_length to be a whole number from 16 to 512, got 4"):
        Reranker(folder, engine="reference", max_length=4)


@pytest.mark.parametrize("wrong", [0, -1, 99_999_999_999, 2.5, True, "2"])
@pytest.mark.parametrize("option", ["threads", "max_length"])
def test_whole_numbers_are_whole_numbers(folder: Path, option: str, wrong: object) -> None:
    with pytest.raises(InputError, match=f"expected {option} to be a whole number from .* to .*, got {wrong!r}"):
        Reranker(folder, **{option: wrong})  # type: ignore[arg-type]
    assert Reranker(folder, **{option: np.int64(16)})  # type: ignore[arg-type]


@pytest.mark.parametrize("threshold", [math.nan, -1, 2, "0.5"])
def test_a_threshold_is_between_0_and_1(reranker: Reranker, threshold: object) -> None:
    with pytest.raises(InputError, match=r"expected (threshold to be a number between 0 and 1|a threshold such as)"):
        reranker.rank("q", ["d"], threshold=threshold)  # type: ignore[arg-type]


def test_one_string_is_not_a_list_of_fields(reranker: Reranker) -> None:
    with pytest.raises(InputError, match="expected fields to be a list of names, got one str; wrap it in a tuple"):
        reranker.rank("q", [{"text": "d"}], fields="text")


def test_nothing_is_not_a_list(reranker: Reranker) -> None:
    with pytest.raises(InputError, match="expected a list of documents, got NoneType"):
        reranker.rank("q", None)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="expected a list of pairs, got NoneType"):
        reranker.score(None)  # type: ignore[arg-type]


def test_what_is_too_long_is_named(folder: Path) -> None:
    """The last pair is in a later chunk of the scheduler than the first."""
    reranker = Reranker(folder, engine="reference", max_length=64, length="error")
    documents = ["bee"] * 8000 + ["bee " * 200]
    with pytest.raises(TooLongError, match=r"^documents\[1\]: expected a pair of at most 64 tokens"):
        reranker.rank("bee", documents[-2:])
    with pytest.raises(TooLongError, match=r"^pairs\[8000\]: expected a pair of at most 64 tokens"):
        reranker.score([("bee", document) for document in documents])


def test_the_environment_overrides_auto_only(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TURBORANK_ENGINE", "reference")
    assert Reranker(folder).engine.name == "reference"
    monkeypatch.setenv("TURBORANK_ENGINE", "abacus")
    assert Reranker(folder, engine="reference").engine.name == "reference"
    with pytest.raises(UnknownKeyError, match=r"expected TURBORANK_ENGINE to be one of .*, got 'abacus'"):
        Reranker(folder)


def test_a_precision_that_no_engine_has_is_no_fault_of_one(folder: Path) -> None:
    with pytest.raises(UnknownKeyError, match=r"expected precision to be one of auto, .*fp32, got 'fp64'"):
        Reranker(folder, precision="fp64")


def test_a_precision_that_the_forced_instruction_set_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "bf16" not in native.precisions("portable")  # the row that every machine has
    monkeypatch.setenv(native.ISA_VARIABLE, "portable")
    with pytest.raises(EngineUnavailableError, match="with TURBORANK_ISA=portable, got 'bf16'"):
        Reranker(precision="bf16")


def test_the_torch_engine_reports_the_threads_it_has(folder: Path) -> None:
    torch = pytest.importorskip("torch")
    threads = torch.get_num_threads()
    assert Reranker(folder, engine="torch", threads=threads + 1).engine.threads == threads


def test_an_engine_that_is_not_installed_says_why(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(EngineUnavailableError, match=r"torch is not installed; pip install 'turborank\[torch\]'"):
        Reranker(folder, engine="torch")


def test_torch_engine_agrees(folder: Path, reranker: Reranker) -> None:
    pytest.importorskip("torch")
    pairs = [("which bee", "a bee in a tree " * n) for n in (0, 1, 5, 20)]
    np.testing.assert_allclose(Reranker(folder, engine="torch").score(pairs), reranker.score(pairs), atol=1e-5)


def test_bf16_in_torch_rounds_neither_norms_nor_the_numbers_of_a_cosine_head() -> None:
    """Rounding them moves these logits, whose standard deviation is 2.8, by -.02 on average and by .058 at most."""
    pytest.importorskip("torch")
    texts = [path.read_text()[:500] for path in sorted((Path(__file__).parents[1] / "examples").rglob("*.md"))]
    pairs = [("how do bees decide where to build a new home?", text) for text in texts]
    exact = Reranker(engine="native", precision="fp32").score(pairs)
    apart = Reranker(engine="torch", precision="bf16").score(pairs) - exact
    assert abs(apart).max() < 0.05
    assert abs(apart.mean()) < 0.015


def test_faithful_honours_special_strings(folder: Path, reranker: Reranker) -> None:
    faithful = Reranker(folder, engine="reference", faithful=True)
    [plain_one], [forged] = (r.rank("a", ["b</s>c"]) for r in (reranker, faithful))
    assert plain_one.tokens == forged.tokens + 3  # '<', '/', 's', '>' or one separator
    assert plain_one.logit != forged.logit


def test_progress_reaches_the_end(reranker: Reranker) -> None:
    calls: list[tuple[int, int]] = []
    reranker.rank("q", ["d"] * 5, progress=lambda done, total: calls.append((done, total)))
    assert calls[-1] == (5, 5)
