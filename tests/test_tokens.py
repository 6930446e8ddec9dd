"""Templates, the published truncation rule, windows, and adversarial text."""

import itertools
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sample_tokenizers import SHARED, bpe_tokenizer, published_tokenizer, wordpiece_tokenizer
from tokenizers import Tokenizer

from turborank.errors import InputError, TooLongError, UnknownKeyError
from turborank.text import plain
from turborank.tokens import PairEncoder, longest_first, pack, window_starts
from turborank.types import Pair

# Reference encodings of the published tokenizer, docs/model.md §4.2.
PUBLISHED_PAIRS = [
    (
        ("What is the capital of France?", "Paris is the capital of France."),
        [0, 21381, 21152, 21138, 23897, 21155, 26127, 61, 2, 2, 27059, 21152, 21138, 23897, 21155, 26127, 44, 2],
    ),
    (("", ""), [0, 2, 2, 2]),
    (("what is panda?", "hi"), [0, 21381, 21152, 49990, 61, 2, 2, 23233, 2]),
]


def encoder(tokenizer: Tokenizer, max_length: int = 64, **options: object) -> PairEncoder:
    return PairEncoder(tokenizer, max_length=max_length, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize(("pair", "ids"), PUBLISHED_PAIRS)
def test_published_pairs(pair: tuple[str, str], ids: list[int]) -> None:
    [[encoding]] = encoder(published_tokenizer()).encode([Pair(*pair)])
    assert encoding.input_ids.tolist() == ids
    assert encoding.type_ids.tolist() == [0] * len(ids)
    assert encoding.truncated == 0
    assert encoding.read == len(ids)


def test_published_single_texts() -> None:
    path = SHARED / "reference/jina_tokenizer/golden_tokens_transformersjs.json"
    if not path.exists():
        pytest.skip(f"needs the published tokens, {path.name}, which are not on this machine")
    faithful = encoder(published_tokenizer(), max_length=8192, faithful=True)
    cases = json.loads(path.read_text())
    assert len(cases) == 29
    for case in cases:
        [[encoding]] = faithful.encode([Pair(case["text"], "")])
        query = encoding.input_ids.tolist()[: -len(faithful.template.middle) - len(faithful.template.suffix)]
        assert [*query, 2] == case["ids"], case["name"]


def test_wordpiece_pairs_have_two_segments() -> None:
    [[encoding]] = encoder(wordpiece_tokenizer()).encode([Pair("red bee", "blue")])
    tokens = [wordpiece_tokenizer().id_to_token(i) for i in encoding.input_ids]
    assert tokens == ["[CLS]", "red", "bee", "[SEP]", "blue", "[SEP]"]
    assert encoding.type_ids.tolist() == [0, 0, 0, 0, 1, 1]


@pytest.mark.parametrize(
    ("faithful", "separators"), [(False, 3), (True, 4)], ids=["text is text", "published behaviour"]
)
def test_a_document_injects_a_separator_only_if_faithful(faithful: bool, separators: int) -> None:
    [[encoding]] = encoder(bpe_tokenizer(), faithful=faithful).encode([Pair("q", "a</s>b")])
    assert encoding.input_ids.tolist().count(2) == separators


def test_longest_first_is_the_fast_tokenizers_rule() -> None:
    """Against `tokenizers` itself, over every combination of lengths around the limit."""
    tokenizer = wordpiece_tokenizer()
    for limit in (16, 17, 24):
        tokenizer.enable_truncation(limit, strategy="longest_first")
        room = limit - 3
        for q in range(0, 2 * limit + 2):
            for d in range(0, 2 * limit + 2):
                owners = tokenizer.encode(" ".join(["red"] * q), " ".join(["blue"] * d)).sequence_ids
                assert longest_first(q, d, room) == (owners.count(0), owners.count(1)), (q, d, room)


def test_truncation_keeps_first_tokens_and_counts_the_rest() -> None:
    [[encoding]] = encoder(wordpiece_tokenizer(), 16).encode([Pair("red bee", " ".join(["blue"] * 30))])
    assert len(encoding) == encoding.read == 16
    assert (encoding.query_cut, encoding.document_cut) == (0, 30 - (16 - 3 - 2))
    assert encoding.span == (0, len("blue ") * 11 - 1)


def test_error_policy_says_how_long_the_pair_is() -> None:
    with pytest.raises(TooLongError, match=r"at most 16 tokens, got 35 \(2 of the query, 30 of the document\)"):
        encoder(wordpiece_tokenizer(), 16, policy="error").encode([Pair("red bee", " ".join(["blue"] * 30))])


@given(st.integers(0, 500), st.integers(1, 60))
def test_windows_read_every_token_and_overlap(document: int, window: int) -> None:
    starts = window_starts(document, window)
    read = {t for start in starts for t in range(start, min(start + window, document))}
    assert read == set(range(document))
    assert starts == sorted(set(starts))
    if len(starts) > 1:
        assert starts[-1] + window == document
        assert all(b - a <= window for a, b in itertools.pairwise(starts))


def test_windows_of_a_long_document() -> None:
    words = ["red", "blue", "bee", "tree"] * 20
    [windows] = encoder(wordpiece_tokenizer(), 16, policy="windows").encode([Pair("red bee", " ".join(words))])
    tokenizer = wordpiece_tokenizer()
    text = " ".join(words)
    covered: set[int] = set()
    for window in windows:
        assert len(window) == 16
        assert (window.read, window.truncated) == (80 + 2 + 3, 0)
        body = [tokenizer.id_to_token(i) for i in window.input_ids[4:-1]]
        assert text[slice(*window.span)] == " ".join(body)
        covered |= set(range(*window.span))
    assert len(covered) == len(text)


class Counting:
    """A tokenizer, and how many characters it was given."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer, self.characters = tokenizer, 0

    def __getattr__(self, name: str) -> object:
        return getattr(self.tokenizer, name)

    def encode_batch(self, texts: list[str], **options: bool) -> object:
        self.characters += sum(map(len, texts))
        return self.tokenizer.encode_batch(texts, **options)

    def encode_batch_fast(self, texts: list[str], **options: bool) -> object:
        self.characters += sum(map(len, texts))
        return self.tokenizer.encode_batch_fast(texts, **options)

    def encode(self, text: str, *rest: str, **options: bool) -> object:
        self.characters += len(text)
        return self.tokenizer.encode(text, *rest, **options)


@pytest.mark.parametrize("policy", ["truncate", "windows"])
def test_a_text_that_is_much_too_long_is_tokenised_once_and_its_characters_are_known(policy: str) -> None:
    document = "🐝 the bees' dance – naïve, café! " * 200
    counting = Counting(bpe_tokenizer())
    small = encoder(counting, max_length=32, policy=policy)  # type: ignore[arg-type]
    before = counting.characters
    [encodings] = small.encode([Pair("bees", document)])
    assert counting.characters - before == len("bees") + len(document)
    whole = counting.tokenizer.encode(document, add_special_tokens=False)
    query = counting.tokenizer.encode("bees", add_special_tokens=False).ids
    room = 32 - small.template.size
    size = longest_first(len(query), len(whole.ids), room)[1]
    starts = [0] if policy == "truncate" else window_starts(len(whole.ids), room - len(query))
    assert len(encodings) == len(starts)
    for window, start in zip(encodings, starts, strict=True):
        end = start + size
        assert whole.ids[start:end] == window.input_ids.tolist()[-len(small.template.suffix) - size :][:size]
        first = 0 if policy == "truncate" else whole.offsets[start][0]
        assert window.span == (first, whole.offsets[end - 1][1])
    assert encodings[0].document_cut == (len(whole.ids) - size if policy == "truncate" else 0)


def test_a_query_longer_than_the_window_is_cut_to_half_and_counted() -> None:
    [windows] = encoder(wordpiece_tokenizer(), 17, policy="windows").encode(
        [Pair(" ".join(["red"] * 50), " ".join(["blue"] * 50))]
    )
    assert {window.query_cut for window in windows} == {50 - 7}
    assert all(len(window) == 17 for window in windows)


@given(st.lists(st.tuples(st.text(), st.text()), max_size=5))
def test_any_text_becomes_a_well_formed_pair(texts: list[tuple[str, str]]) -> None:
    coder = encoder(bpe_tokenizer(), 32)
    for [encoding] in coder.encode([Pair(*pair) for pair in texts]):
        ids = encoding.input_ids.tolist()
        assert len(ids) <= 32
        assert ids[0] == 0
        assert ids[-1] == 2
        assert ids.count(2) == 3


@pytest.mark.parametrize(
    "text",
    ["", " ", "\x00\x01\x1c", "\ud800 lone \udfff", "x" * 100_000, "🐝👩‍👩‍👧‍👦é", "\u202eabc", "[SEP] [CLS]"],
    ids=["empty", "space", "control", "surrogates", "word", "emoji", "bidi", "specials"],
)
def test_awkward_texts(text: str) -> None:
    for tokenizer in (bpe_tokenizer(), wordpiece_tokenizer()):
        [[encoding]] = encoder(tokenizer, 64).encode([Pair(text, text)])
        assert 3 <= len(encoding) <= 64
        assert encoding.input_ids.dtype == np.int32


def test_lone_surrogates_keep_offsets() -> None:
    assert plain("a\ud800b") == "a\ufffdb"
    assert plain("a\U0001f41db") == "a\U0001f41db"


def test_pack_lays_pairs_end_to_end() -> None:
    encodings = [e for [e] in encoder(wordpiece_tokenizer()).encode([Pair("red", "blue"), Pair("", "bee tree red")])]
    batch = pack(encodings)
    assert batch.cu_seqlens.tolist() == [0, 5, 11]
    assert (batch.pairs, batch.tokens, batch.max_seqlen) == (2, 11, 6)
    assert batch.input_ids[5:].tolist() == encodings[1].input_ids.tolist()
    assert pack([]).pairs == 0


def test_options_are_checked() -> None:
    with pytest.raises(UnknownKeyError, match="did you mean 'truncate'"):
        encoder(wordpiece_tokenizer(), policy="truncat")
    with pytest.raises(InputError, match="at least 16, got 3"):
        encoder(wordpiece_tokenizer(), 3)
