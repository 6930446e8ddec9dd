"""Damaged inputs of every format (targets.py): cases that fuzzing found, and a few mutations of well-formed inputs.

`make fuzz` searches for more, for a given time.
"""

import random
import re

import cases
import mutations
import pytest
import targets
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from turborank.errors import CheckpointError
from turborank.tokens import PairEncoder
from turborank.types import Pair

pytest.importorskip("starlette", reason="the service needs pip install 'turborank[serve]'")

BEYOND_INT32 = [
    data for name, data in cases.CASES if name == "tokenizer" and re.search(rb"2147483648|4294967295", data)
]
PIECES = (
    b"\xff",
    b"\0",
    b'"',
    b"{",
    b"[",
    b"\n",
    b",",
    b"\t",
    b"\r",
    b"\xef\xbb\xbf",
    b"1e999",
    b"NaN",
    b"-",
    b"null",
    b"\\ud800",
)


@pytest.mark.parametrize("number", range(len(cases.CASES)))
def test_what_was_found_is_read_or_refused(number: int) -> None:
    targets.attempt(*cases.CASES[number])


@pytest.mark.parametrize("data", BEYOND_INT32, ids=["type", "special token", "vocabulary"])
def test_ids_that_do_not_fit_are_refused_and_not_wrapped(data: bytes) -> None:
    tokenizer = Tokenizer.from_str(data.decode())
    with pytest.raises(CheckpointError, match=r"ids below 2,147,483,648, got (2,147,483,648|4,294,967,295)"):
        PairEncoder(tokenizer, max_length=16).encode([Pair("red", "red red")])


@pytest.mark.parametrize("target", targets.TARGETS)
@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_changed_inputs_are_read_or_refused(target: str, data: st.DataObject) -> None:
    seed = data.draw(st.sampled_from(targets.TARGETS[target].seeds))
    if data.draw(st.booleans(), "JSON"):
        for _ in range(data.draw(st.integers(1, 3))):
            seed = mutations.mutated(seed, random.Random(data.draw(st.integers(0, 2**32)))) or seed
    else:
        start, end = (data.draw(st.integers(0, len(seed))) for _ in range(2))
        seed = seed[:start] + data.draw(st.sampled_from(PIECES) | st.binary(max_size=8)) + seed[max(start, end) :]
    targets.attempt(target, seed)
