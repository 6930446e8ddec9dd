"""Limits of one request for the length policies; expected counts are arithmetic on one token per letter."""

import pytest
from sample_tokenizers import bpe_tokenizer

from turborank.errors import TooLongError, UnknownKeyError
from turborank.tokens import Limits, PairEncoder
from turborank.types import Pair

TEMPLATE = 4  # <s> q </s></s> d </s>
QUERY, DOCUMENT = "abcde", "abcdefghijklmnopqrstuvwxyz"  # 5 and 26 tokens


@pytest.fixture
def encoder() -> PairEncoder:
    return PairEncoder(bpe_tokenizer(), max_length=20)  # room for 16


def encode(encoder: PairEncoder, limits: Limits, document: str = DOCUMENT):
    return encoder.encode([Pair(QUERY, document)], limits)[0]


def test_a_cap_on_the_document_is_counted(encoder):
    [cut] = encode(encoder, Limits(max_document=7))
    assert (len(cut), cut.read, cut.query_cut, cut.document_cut, cut.span) == (5 + 7 + TEMPLATE, 16, 0, 19, (0, 7))


def test_a_cap_on_the_query_is_counted(encoder):
    [cut] = encode(encoder, Limits(max_query=2), "xyz")
    assert (len(cut), cut.query_cut, cut.document_cut, cut.span) == (2 + 3 + TEMPLATE, 3, 0, (0, 3))


def test_a_shorter_pair_may_be_asked_for_but_never_a_longer_one(encoder):
    [shorter], [longer] = encode(encoder, Limits(max_length=16)), encode(encoder, Limits(max_length=1000))
    assert (len(shorter), shorter.document_cut) == (16, 26 - 7)
    assert (len(longer), longer.document_cut) == (20, 26 - 11)


def test_the_policy_of_a_request_wins(encoder):
    windows = encode(encoder, Limits(policy="windows"))
    assert [window.span for window in windows] == [(0, 11), (9, 20), (15, 26)]
    assert all(window.truncated == 0 for window in windows)
    with pytest.raises(TooLongError, match="got 35"):
        encode(encoder, Limits(policy="error"))
    with pytest.raises(UnknownKeyError, match="did you mean 'windows'"):
        encode(encoder, Limits(policy="window"))


def test_windows_left_out_are_counted_as_cut(encoder):
    windows = encode(encoder, Limits(policy="windows", max_windows=2))
    assert [window.span for window in windows] == [(0, 11), (9, 20)]
    assert {(window.read, window.document_cut) for window in windows} == {(5 + 20 + TEMPLATE, 6)}


def test_a_capped_document_that_fits_is_no_error(encoder):
    [cut] = encode(encoder, Limits(policy="error", max_document=11))
    assert (len(cut), cut.document_cut) == (20, 15)
