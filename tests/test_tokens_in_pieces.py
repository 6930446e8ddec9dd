"""Very long texts are tokenised in pieces: tokens, their characters and counts are those of the whole text, with every
kind of tokenizer that the families have. Where that is not certain, the text is not cut."""

import dataclasses
import functools
from collections.abc import Callable
from itertools import product
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from sample_tokenizers import PUBLISHED, bpe_tokenizer, published_tokenizer, wordpiece_tokenizer
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers, processors, trainers

from turborank import catalog, tokens
from turborank.tokens import PairEncoder, pieces, splits_at_spaces
from turborank.types import Pair

SENTENCES = (
    "the bees dance on the comb, and the others follow them", "don't you'll we've 3.14 2,000 x=y a_b",
    "Пчёлы танцуют на сотах", "οι μέλισσες χορεύουν ΣΟΦΟΣ", "النحل يرقص على القرص", "벌은 벌집에서 춤을 춘다",
)  # fmt: skip
SPECIALS = ("<s>", "<pad>", "</s>", "<unk>")


def framed(tokenizer: Tokenizer) -> Tokenizer:
    """In RoBERTa's template, which trims offsets."""
    tokenizer.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0), True, True)
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in SPECIALS])
    return tokenizer


def unigram(scheme: str = "always", normalizer: Any = None, *, split: bool = True, spaces: bool = False) -> Tokenizer:
    """As XLM-RoBERTa's and DeBERTa's: pieces of several letters that overlap, so that the best split is not obvious."""
    texts = {f"▁{word}"[:size] for line in SENTENCES for word in line.split() for size in (1, 2, 3, 5)}
    letters = {letter for line in SENTENCES for letter in line} | {"an", "the", "nce", "ar", "ий", "ов"}
    vocabulary = [(special, 0.0) for special in SPECIALS]
    vocabulary += [(piece, -3.0 - (7 * len(piece)) % 5) for piece in sorted((texts | letters) - {" "})]
    tokenizer = Tokenizer(models.Unigram(vocabulary, unk_id=3))
    tokenizer.normalizer = normalizer or normalizers.NFKC()
    mark = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=split)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), mark]) if spaces else mark
    return framed(tokenizer)


def byte_level(prefix: bool = False, *, added: tuple[AddedToken, ...] = (), **model: Any) -> Tokenizer:
    """As RoBERTa's and ModernBERT's."""
    tokenizer = Tokenizer(models.BPE(**model))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=list(SPECIALS), initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([*SENTENCES, *SENTENCES], trainer)
    tokenizer.add_tokens(list(added))
    return framed(tokenizer)


def embedded() -> Tokenizer:
    folder = catalog.lookup(catalog.DEFAULT).folder
    assert folder is not None
    return Tokenizer.from_file(str(folder / "tokenizer.json"))


SPACES = tuple(AddedToken(" " * size, normalized=False) for size in (2, 3, 4))
AS_DEBERTA = normalizers.Sequence(
    [normalizers.Strip(), normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), " "), normalizers.Replace(" ", "▁")]
)
SAFE: dict[str, Callable[[], Tokenizer]] = {
    "WordPiece": embedded,
    "jina": published_tokenizer,
    "letters": bpe_tokenizer,
    "bytes": byte_level,
    "bytes, prefix": lambda: byte_level(True),
    "bytes, added spaces": lambda: byte_level(added=SPACES),
    **{
        f"unigram {scheme}{', words' if words else ''}": functools.partial(unigram, scheme, spaces=words)
        for scheme, words in product(("always", "first", "never"), (False, True))
    },
    "unigram, stripped": lambda: unigram(normalizer=AS_DEBERTA),
}
UNSAFE: dict[str, Callable[[], Tokenizer]] = {
    "words are not split": lambda: unigram(split=False),
    "unknown pattern": lambda: replaced(byte_level(), pre_tokenizers.Split(Regex(r"\d+ \w+"), "isolated")),
    "no words": lambda: replaced(byte_level(), None),
    "sampling": lambda: byte_level(dropout=0.1),
    "token with a space inside": lambda: byte_level(added=(AddedToken("bees dance"),)),
    "token that takes spaces": lambda: byte_level(added=(AddedToken("bees", rstrip=True),)),
    "prepended": lambda: unigram(normalizer=normalizers.Prepend("x")),
}


def replaced(tokenizer: Tokenizer, pre_tokenizer: Any) -> Tokenizer:
    tokenizer.pre_tokenizer = pre_tokenizer
    return tokenizer


made = functools.cache(lambda kind: SAFE[kind]())
WORDS = st.sampled_from([word for line in SENTENCES for word in line.split()])
HARD = st.sampled_from(
    [
        " ",
        "  ",
        "   ",
        "\u00a0",
        "\n",
        "\t",
        "\u200b",
        "\u0301",
        "\u0e33",
        "\uff9e",
        "\u0d4e",
        "ﬁ",
        "İ",
        "Σ",
        "🐝",
        "</s>",
    ]
) | st.text(max_size=2)
TEXTS = st.lists(WORDS | HARD, max_size=30).map(" ".join) | st.lists(WORDS | HARD, max_size=30).map("".join)


def encoded(kind: str, pairs: list[Pair], policy: str, *, size: int, threads: int = 1) -> list[dict[str, Any]]:
    """All fields of all encodings, with pieces of ``size`` characters."""
    encoder = PairEncoder(made(kind), max_length=16, policy=policy, threads=threads)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokens, "PIECE_CHARACTERS", size)
        windows = [one for windows in encoder.encode(pairs) for one in windows]
    rows = [dataclasses.asdict(one) if dataclasses.is_dataclass(one) else one._asdict() for one in windows]
    return [{name: v.tolist() if isinstance(v, np.ndarray) else v for name, v in row.items()} for row in rows]


AT_HAND = pytest.mark.skipif(
    not PUBLISHED.exists(), reason="needs the published tokenizer, tokenizer.json, which is not on this machine"
)


@pytest.mark.parametrize("kind", [pytest.param(kind, marks=AT_HAND) if kind == "jina" else kind for kind in SAFE])
@settings(max_examples=60, deadline=None)
@given(text=TEXTS, query=TEXTS, size=st.integers(1, 12))
@example(text=" ".join(SENTENCES), query="a b c d", size=1)
@example(text=" " + " ".join(SENTENCES) + " ", query=" a b", size=7)
@example(text="a b c  d e f g \u0301h i j ﬁ k l m 🐝 n o", query="", size=1)
def test_pieces_change_nothing(kind: str, text: str, query: str, size: int) -> None:
    assert splits_at_spaces(made(kind))
    pairs = [Pair(query, text), Pair(text, query)]
    for policy in ("truncate", "windows"):
        assert encoded(kind, pairs, policy, size=size) == encoded(kind, pairs, policy, size=10**9)


def test_threads_change_nothing() -> None:
    pairs = [Pair("bees", " ".join(SENTENCES) * 900)]
    assert encoded("bytes", pairs, "windows", size=30_000, threads=3) == encoded("bytes", pairs, "windows", size=10**9)


def test_pieces_cover_the_text_once_and_begin_a_word_early() -> None:
    text = "aa bb cc dd ee"
    assert pieces(text, 4) == [(0, 0, 8), (5, 8, 14)]
    assert (pieces(text, 100), pieces("", 4)) == ([(0, 0, 14)], [(0, 0, 0)])
    assert pieces("b" * 50, 4) == [(0, 0, 50)]
    assert pieces("a, b, c, d, e, f", 4) == [(0, 0, 16)]  # no space between two letters


@pytest.mark.parametrize("kind", UNSAFE)
def test_what_may_change_tokens_is_not_cut(kind: str) -> None:
    assert not splits_at_spaces(UNSAFE[kind]())


def test_special_tokens_count_where_texts_are_read_for_them() -> None:
    tokenizer = wordpiece_tokenizer()
    tokenizer.add_special_tokens([AddedToken("[MASK]", rstrip=True)])
    assert PairEncoder(tokenizer, max_length=16)._splits
    assert not PairEncoder(tokenizer, max_length=16, faithful=True)._splits
