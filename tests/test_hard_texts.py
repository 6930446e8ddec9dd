"""Texts that break other programs: scores are finite, spans are slices in code points, and a limit that is not reached
changes no bit. On the native and the reference engine, with four kinds of tokenizers."""

import functools
import itertools
import string
import tempfile
from pathlib import Path

import numpy as np
import pytest
from helpers import native_config, write_checkpoint
from hypothesis import example, given, settings
from hypothesis import strategies as st
from sample_tokenizers import bpe_tokenizer, wordpiece_tokenizer
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

from turborank import Reranker
from turborank.text import plain
from turborank.tokens import LENGTH_POLICIES, Limits, pack
from turborank.types import Pair

SPECIALS = ["<s>", "<pad>", "</s>", "<unk>"]


def unigram() -> Tokenizer:
    """Like XLM-RoBERTa's: NFKC, which can expand one character to several, and a word-boundary mark."""
    pieces = [(special, 0.0) for special in SPECIALS] + [("▁bee", -4.0)]
    tokenizer = Tokenizer(models.Unigram(pieces + [(one, -8.0) for one in ("▁", *string.ascii_letters)], unk_id=3))
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    return framed(tokenizer)


def bytes_of_utf_8() -> Tokenizer:
    """Like the jina rerankers': a token is a byte, so a cut may fall inside a character."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate([*SPECIALS, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return framed(tokenizer)


def framed(tokenizer: Tokenizer) -> Tokenizer:
    tokenizer.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0), True, False)
    tokenizer.add_special_tokens(SPECIALS)
    return tokenizer


TOKENIZERS = {"letters": bpe_tokenizer, "words": wordpiece_tokenizer, "unigram": unigram, "bytes": bytes_of_utf_8}
ENGINES = ("native", "reference")
EACH = pytest.mark.parametrize("kind", TOKENIZERS)
BOTH = pytest.mark.parametrize("engine", ENGINES)
HARD = (
    "\u200b", "\u200d", "\u2060", "\ufeff", "\u00ad",  # nothing to be seen
    "\u00a0", "\u202f", "\u3000", "\u2028", "\t", "\r\n", "\v", " ",  # white space
    "e\u0301", "\u0301", "a\u0300\u0316\u0327", "\u1112\u1161\u11ab", "İ", "ß", "ﬁ", "㎏",  # marks, letters that grow
    "שלום", "مرحبا", "\u202e", "\u2066", "﷽",  # right to left
    "🐝", "👩\u200d👩\u200d👧", "🇫🇷", "𝔹", "\U0010ffff",  # four bytes
    "\ud83d", "\udc1d", "\udc1d\ud83d",  # halves of a character
    "\x00", "\x1f", "\x7f", "\x85", "\ufffd", "\uffff",
    "</s>", "[SEP]", "<unk>", "bee", "red", "a", ".", "日本語", "한국어",
)  # fmt: skip
TEXTS = st.lists(st.sampled_from(HARD) | st.text(max_size=3), max_size=60).map("".join)
SHORT = st.lists(st.sampled_from(HARD), max_size=4).map("".join)  # fits into 512 tokens, whatever the tokenizer


@functools.cache
def folder(kind: str) -> Path:
    tokenizer = TOKENIZERS[kind]()
    config = native_config(vocab_size=max(40, tokenizer.get_vocab_size()))
    return write_checkpoint(Path(tempfile.mkdtemp()) / kind, config, tokenizer=tokenizer)


@functools.cache
def reranker(kind: str, engine: str, length: str = "truncate", max_length: int = 512) -> Reranker:
    return Reranker(folder(kind), engine=engine, threads=1, length=length, max_length=max_length)


@BOTH
@EACH
@settings(max_examples=25, deadline=None)
@given(query=TEXTS, document=TEXTS)
@example(query="", document="")
@example(query="\ud83d", document="\x00")
@example(query="🐝" * 100, document="\u0301" * 500)
@example(query="bee", document="﷽" * 300)
def test_scores_are_finite_and_spans_are_slices(kind: str, engine: str, query: str, document: str) -> None:
    for length in ("truncate", "windows"):
        scores = reranker(kind, engine, length, 32).score_detailed([Pair(query, document), Pair(document, query)])
        assert np.isfinite(scores.logits).all()
        for text, (start, end), cut in zip((document, query), scores.spans.tolist(), scores.truncated, strict=True):
            assert 0 <= start <= end <= len(text)
            units = plain(text).encode("utf-16-le")  # what a client with UTF-16 strings holds
            first, last = (sum(1 + (ord(one) > 0xFFFF) for one in text[:place]) for place in (start, end))
            assert units[2 * first : 2 * last].decode("utf-16-le") == plain(text)[start:end]
            if length == "truncate":
                assert start == 0
                assert cut or end == len(text)


@EACH
@settings(max_examples=50, deadline=None)
@given(document=TEXTS)
def test_windows_leave_no_character_out(kind: str, document: str) -> None:
    """The spans of a document's windows reach from its first token to its last, without gaps."""
    encoder = reranker(kind, "native", "windows", 32).encoder
    [windows] = encoder.encode([Pair("bee", document)])
    if len(windows) > 1:
        read = encoder.tokenizer.encode(plain(document), add_special_tokens=False)
        assert (windows[0].span[0], windows[-1].span[1]) == (read.offsets[0][0], read.offsets[-1][1])
        for one, other in itertools.pairwise(windows):
            assert one.span[0] <= other.span[0] <= one.span[1] <= other.span[1]


@BOTH
@EACH
@settings(max_examples=15, deadline=None)
@given(query=SHORT, document=SHORT)
def test_a_limit_that_does_not_bind_changes_no_bit(kind: str, engine: str, query: str, document: str) -> None:
    pairs = [Pair(query, document)]
    plainly = reranker(kind, engine).score(pairs)
    for length in LENGTH_POLICIES:
        for max_length in (512, 400):
            assert reranker(kind, engine, length, max_length).score(pairs).tobytes() == plainly.tobytes()
    encoder, runs = reranker(kind, engine).encoder, reranker(kind, engine).engine
    for limits in (
        Limits(max_length=10_000), Limits(max_query=500), Limits(max_document=500), Limits(max_windows=1),
        Limits("windows", 500, 500, 500, 9), Limits("error", 500, 500, 500),
    ):  # fmt: skip
        [[one]] = encoder.encode(pairs, limits)
        assert (one.truncated, one.span) == (0, (0, len(document)))
        assert runs.logits(pack([one])).tobytes() == plainly.tobytes()


@EACH
@settings(max_examples=10, deadline=None)
@given(documents=st.lists(TEXTS, min_size=1, max_size=8))
def test_neighbours_change_no_bit(kind: str, documents: list[str]) -> None:
    native = reranker(kind, "native")
    together = native.score([Pair("bee", one) for one in documents])
    alone = [native.score([Pair("bee", one)])[0] for one in documents]
    assert together.tobytes() == np.array(alone, dtype=np.float32).tobytes()


def test_a_lone_surrogate_is_the_replacement_character() -> None:
    for engine in ENGINES:
        found = reranker("bytes", engine).score([("a\ud83d", "\udc1d b"), ("a\ufffd", "\ufffd b")])
        assert found[0] == found[1]


@EACH
def test_a_word_without_end(kind: str) -> None:
    """One word of a million letters: the model reads up to its limit, and all tokens are counted."""
    size = 1_000_000
    scores = reranker(kind, "native").score_detailed([Pair("bee", "b" * size)])
    assert np.isfinite(scores.logits).all()
    [[start, end]] = scores.spans.tolist()
    if kind == "words":  # WordPiece takes a word of more than 100 letters for unknown, as a whole
        assert (scores.truncated[0], start, end) == (0, 0, size)
        return
    query = {"letters": 3, "bytes": 3, "unigram": 1}[kind]  # "▁bee" is a piece
    room = 512 - 4 - query
    before = 1 if kind == "unigram" else 0  # a piece of its own for the word's beginning
    assert (start, end) == (0, room - before)
    assert (scores.tokens[0], scores.truncated[0]) == (512, size + before - room)


@pytest.mark.slow
def test_a_word_of_ten_megabytes() -> None:
    scores = reranker("letters", "native").score_detailed([Pair("bee", "b" * 10_000_000)])
    assert (scores.tokens.tolist(), scores.truncated.tolist()) == ([512], [10_000_000 - (512 - 4 - 3)])
    assert np.isfinite(scores.logits).all()


@pytest.mark.parametrize(("engine", "count"), [("native", 100_000), ("reference", 1_000)])
def test_many_documents_of_one_character(engine: str, count: int) -> None:
    characters = "aé🐝\u200b"
    logits = reranker("letters", engine).score([("bee", characters[number % 4]) for number in range(count)])
    assert len(logits) == count
    assert np.isfinite(logits).all()
    for place in range(4):
        assert len(set(logits[place::4].tolist())) == 1
