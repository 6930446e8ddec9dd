"""Tokenisation of pairs, the length policy, and packing of encodings into a batch.

A pair becomes ``prefix query middle document suffix``. The template comes from the model's tokenizer
(``<s> q </s></s> d </s>`` for the jina rerankers, ``[CLS] q [SEP] d [SEP]`` for BERT). The length policy applies
to pairs of more than ``max_length`` tokens; the :class:`Encoding` counts the tokens that it drops:

``truncate``  cut by ``longest_first``, the rule of the published models (docs/model.md §4.3)
``windows``   read the whole document in overlapping windows; the pair's logit is the maximum of its windows
``error``     raise :class:`TooLongError`
"""

from __future__ import annotations

import copy
import functools
import itertools
import json
import os
import re
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt
import tokenizers
from tokenizers import Tokenizer, models

from turborank.errors import CheckpointError, InputError, TooLongError, UnknownKeyError
from turborank.text import plain
from turborank.types import Encoding, Int32, PackedBatch, Pair

_Result = TypeVar("_Result")
LENGTH_POLICIES = ("truncate", "windows", "error")
WINDOW_OVERLAP = 0.25  # share of a window's document tokens that the next window repeats
CHARACTERS_PER_TOKEN = 12  # a text of more than max_length times as many characters is expected to be cut
PARALLELISM = "TOKENIZERS_PARALLELISM"  # the library's variable: whether it starts threads of its own
THREAD_CHARACTERS = 10_000  # minimum text per thread; starting a thread costs about 50 µs
PIECE_CHARACTERS = 100_000  # a longer text is tokenised in pieces, because the library takes 200 bytes per character
MIN_LENGTH = 16  # minimum max_length: the special tokens and a few tokens of query and document


class Template(NamedTuple):
    """The special tokens around query and document, and the type id of each part."""

    prefix: tuple[int, ...]
    middle: tuple[int, ...]
    suffix: tuple[int, ...]
    types: tuple[int, int, int, int, int]  # of prefix, query, middle, document, suffix

    @property
    def size(self) -> int:
        return len(self.prefix) + len(self.middle) + len(self.suffix)


def read_template(tokenizer: Tokenizer) -> Template:
    """The pair template of a tokenizer, found by encoding a pair and reading which tokens are special.

    Raises CheckpointError when the encoded pair lacks one of its texts, cannot be encoded, or has ids beyond int32.
    """
    probe = _checked(tokenizer.encode, "a", "b")
    owners = probe.sequence_ids  # 0 for the query, 1 for the document, None for template tokens
    if 0 not in owners or 1 not in owners:
        raise CheckpointError("expected the tokenizer to encode a pair of texts, got a template without both texts")
    first, last = owners.index(0), len(owners) - 1 - owners[::-1].index(0)
    begin, end = owners.index(1), len(owners) - 1 - owners[::-1].index(1)
    ids, types = _int32(probe.ids).tolist(), _int32(probe.type_ids).tolist()
    return Template(
        prefix=tuple(ids[:first]),
        middle=tuple(ids[last + 1 : begin]),
        suffix=tuple(ids[end + 1 :]),
        types=(
            types[0] if first else types[first],
            types[first],
            types[last + 1] if begin > last + 1 else types[last],
            types[begin],
            types[-1],
        ),
    )


def longest_first(query: int, document: int, room: int) -> tuple[int, int]:
    """Tokens to keep of (query, document) so that both fit into ``room`` tokens, by docs/model.md §4.3.

    The longer text is cut first, down to the length of the shorter; then both get half of the room.
    With equal lengths the query counts as the shorter.
    """
    if query + document <= room:
        return query, document
    shorter, longer = min(query, document), max(query, document)
    longer = shorter if shorter > room else max(shorter, room - shorter)
    if shorter + longer > room:
        shorter = room // 2
        longer = shorter + room % 2
    return (shorter, longer) if query <= document else (longer, shorter)


def window_starts(document: int, window: int) -> list[int]:
    """First document token of each overlapping window; the windows cover all tokens, and the last one is full."""
    if document <= window:
        return [0]
    stride = max(1, window - int(window * WINDOW_OVERLAP))
    starts = list(range(0, document - window, stride))
    return [*starts, document - window]


class Limits(NamedTuple):
    """Length limits of one request; None means the encoder's own value."""

    policy: str | None = None
    max_length: int | None = None  # tokens of a pair, special tokens included; at most the encoder's own
    max_query: int | None = None  # tokens of the query
    max_document: int | None = None  # tokens of each document
    max_windows: int | None = None  # windows of each document; text after the last one counts as cut


NO_LIMITS = Limits()


class _Offsets:
    """Offsets (N, 2) of a text tokenised in pieces, with the method of tokenizers.Encoding that is used here."""

    def __init__(self, spans: npt.NDArray[np.int64]) -> None:
        self._spans = spans

    def token_to_chars(self, token: int) -> tuple[int, int]:
        """Character offsets (start, end) of a token."""
        start, end = self._spans[token].tolist()
        return start, end


class _Text:
    """A text, its token ids after tokenisation, and the tokens' characters when they will be needed."""

    __slots__ = ("ids", "offsets", "text")

    def __init__(self, text: str) -> None:
        self.text = text
        self.ids: Int32 = np.empty(0, np.int32)
        self.offsets: tokenizers.Encoding | _Offsets | None = None


def library_parallelism() -> bool:
    """Whether the tokenizers library uses its own threads, as the variable PARALLELISM decides.

    If the variable is not set, it is set to false: the library's pool has one thread per core of the machine, ignores
    affinity and CPU quotas, is never released, and does not survive a fork. turborank's threads are used instead.
    """
    return os.environ.setdefault(PARALLELISM, "false").lower() not in ("", "0", "off", "false", "f", "no", "n")


def _checked(encode: Callable[..., _Result], *texts: Any, **options: bool) -> _Result:
    """``encode`` of texts. The library's errors have no type of their own; they become CheckpointError."""
    try:
        return encode(*texts, **options)
    except Exception as error:
        if type(error) is not Exception:
            raise
        raise CheckpointError(f"expected a tokenizer that encodes any text, got: {error}") from error


def _int32(ids: Sequence[int]) -> Int32:
    """Token or type ids as int32; the file may hold ids of up to 2³² - 1."""
    try:
        return np.asarray(ids, dtype=np.int32)
    except OverflowError as error:
        raise CheckpointError(f"expected a tokenizer with ids below 2,147,483,648, got {max(ids):,}") from error


def _slices(texts: Sequence[str], threads: int) -> list[Sequence[str]]:
    """Consecutive slices with about the same amount of text, one for each thread; fewer if there is little text."""
    ends = list(itertools.accumulate(len(text) for text in texts))
    count = max(1, min(threads, len(texts), ends[-1] // THREAD_CHARACTERS)) if ends else 1
    cuts = [0]
    for index, end in enumerate(ends, 1):
        if len(cuts) < count and end * count >= ends[-1] * len(cuts):
            cuts.append(index)
    return [texts[start:end] for start, end in itertools.pairwise([*cuts, len(texts)]) if start < end]


def _characters(offsets: tokenizers.Encoding | _Offsets, token: int) -> tuple[int, int]:
    """Character offsets (start, end) of a token in its text."""
    span = offsets.token_to_chars(token)
    assert span is not None  # only special tokens have no offsets, and the text was encoded without them
    return span


# Tokenising a text in pieces. A cut is in front of a space between two words. Tokens do not depend on what is on the
# other side, except those of a piece's first word, which some tokenizers treat as the beginning of a text. So a piece
# begins one word before its cut, and the tokens of that word are dropped.

# A letter or digit that is its own grapheme cluster: no mark, nothing that normalisation combines with a space.
_LETTER = "[0-9A-Za-z\\u00c0-\\u024f\\u0391-\\u0482\\u048a-\\u0556\\u05d0-\\u05ea\\u0620-\\u064a\\uac00-\\ud7a3]"
_CUT = re.compile(f"(?<={_LETTER}) (?={_LETTER})")


class Piece(NamedTuple):
    """Characters ``start`` to ``end`` of a text; the tokens from ``cut`` on are the piece's own."""

    start: int
    cut: int
    end: int


def pieces(text: str, size: int) -> list[Piece]:
    """Pieces of about ``size`` characters, more where there is no cut. Their tokens are those of the text if the
    tokenizer is one of :func:`splits_at_spaces`."""
    found, start, cut = [], 0, 0
    while before := _CUT.search(text, cut + size):
        after = _CUT.search(text, before.end())
        if after is None:
            break
        found.append(Piece(start, cut, after.start()))
        start, cut = before.start(), after.start()
    return [*found, Piece(start, cut, len(text))]


_CHARACTERWISE = (
    "BertNormalizer",
    "NFC",
    "NFD",
    "NFKC",
    "NFKD",
    "Lowercase",
    "StripAccents",
    "Strip",
    "Nmt",
    "Precompiled",
)
_AT_SPACES = ("BertPreTokenizer", "Whitespace", "WhitespaceSplit", "ByteLevel", "Metaspace")
_FURTHER = (*_AT_SPACES, "Punctuation", "Digits")
_SPACES = ({"String": " "}, {"Regex": " {2,}"})  # patterns of Replace that concern spaces only


def splits_at_spaces(tokenizer: Tokenizer) -> bool:
    """Whether the tokens on one side of a cut of :func:`pieces` do not depend on the text on the other side.

    True if normalisation is by character or by grapheme cluster, the text is split into words at spaces, the model
    reads one word at a time without sampling, and no added token takes characters from both sides.
    """
    normalizers = _steps(tokenizer.normalizer, "normalizers")
    splits = _steps(tokenizer.pre_tokenizer, "pretokenizers")
    model = tokenizer.model
    added = tokenizer.get_added_tokens_decoder().values()
    return (
        all(one["type"] in _CHARACTERWISE or _replaces_spaces(one) for one in normalizers)
        and all(one["type"] in _FURTHER for one in splits)
        and any(
            one["type"] in _AT_SPACES and one.get("split", True) and one.get("use_regex", True) for one in splits[:1]
        )
        and isinstance(model, models.WordPiece | models.BPE | models.Unigram | models.WordLevel)
        and not getattr(model, "dropout", None)
        and not any(
            token.rstrip or any(map(str.isspace, token.content.lstrip()))
            for token in added
            if not (token.special and tokenizer.encode_special_tokens)
        )
    )


def _steps(component: Any, name: str) -> list[dict[str, Any]]:
    """The settings of a normalizer's or pre-tokenizer's steps; [] for None."""
    if component is None:
        return []
    state = json.loads(component.__getstate__())
    return list(state.get(name, [state]))  # a sequence within a sequence has no type of the tables above


def _replaces_spaces(step: dict[str, Any]) -> bool:
    return step["type"] == "Replace" and step["pattern"] in _SPACES


class PairEncoder:
    """Encode pairs under one length policy.

    ``max_length`` counts the tokens of a pair, special tokens included; ``policy`` is one of LENGTH_POLICIES.
    ``faithful`` reproduces the published tokenizers, which turn strings such as ``</s>`` in a text into special
    tokens. By default these strings are plain text, so that a document cannot inject a separator.

    ``threads`` is the maximum number of threads that tokenise a list; they are started for the list and end with it.

    Raises UnknownKeyError for another policy, InputError for a max_length below MIN_LENGTH, and CheckpointError for a
    tokenizer without a pair template.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        max_length: int,
        policy: str = "truncate",
        faithful: bool = False,
        threads: int = 1,
    ) -> None:
        if policy not in LENGTH_POLICIES:
            raise UnknownKeyError("length", policy, LENGTH_POLICIES)
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self.template = read_template(tokenizer)
        tokenizer.encode_special_tokens = not faithful
        self.faithful = faithful
        self.threads = 1 if library_parallelism() else threads
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.policy = policy
        if max_length < max(MIN_LENGTH, self.template.size + 2):
            raise InputError(f"expected max_length to be at least {MIN_LENGTH}, got {max_length}")

    def with_threads(self, threads: int) -> PairEncoder:
        """The same encoder with another number of threads."""
        encoder = copy.copy(self)
        encoder.threads = 1 if library_parallelism() else threads
        return encoder

    def encode(self, pairs: Sequence[Pair], limits: Limits = NO_LIMITS) -> list[list[Encoding]]:
        """One list for each pair: a single encoding, or the encodings of its windows in reading order.

        The tokenizer runs in parallel outside the GIL; each distinct query is tokenised once.
        Raises TooLongError, with the pair's index, under the policy ``error``, UnknownKeyError for an unknown policy,
        and CheckpointError for a tokenizer that cannot encode a text, say for lack of its unknown token.
        """
        if limits.policy not in (None, *LENGTH_POLICIES):
            raise UnknownKeyError("length", limits.policy, LENGTH_POLICIES)
        queries = list(dict.fromkeys(query for query, _ in pairs))
        texts = [_Text(plain(text)) for text in (*queries, *(document for _, document in pairs))]
        self._tokenise(texts)
        query_ids = {query: text.ids for query, text in zip(queries, texts, strict=False)}
        encodings: list[list[Encoding]] = []
        for (query, _), text in zip(pairs, texts[len(queries) :], strict=True):
            try:
                encodings.append(self._fit(query_ids[query], text, limits))
            except TooLongError as error:
                error.place = len(encodings)
                raise
        return encodings

    def _tokenise(self, texts: Sequence[_Text]) -> None:
        """Set the ids of all texts, and the offsets of the longest, which are expected to be cut.

        Tokenising without offsets is faster; a shorter text that is cut after all is tokenised again.
        """
        limit = CHARACTERS_PER_TOKEN * self.max_length
        whole = [text for text in texts if not self._in_pieces(text)]
        long, short = ([text for text in whole if (len(text.text) > limit) is is_long] for is_long in (True, False))
        for group, encode in ((long, self.tokenizer.encode_batch), (short, self.tokenizer.encode_batch_fast)):
            encodings = self._each_slice(encode, [text.text for text in group]) if group else []
            for text, encoding in zip(group, encodings, strict=True):
                text.ids = _int32(encoding.ids)
                text.offsets = encoding if group is long else None

    @functools.cached_property
    def _splits(self) -> bool:
        return splits_at_spaces(self.tokenizer)

    def _in_pieces(self, text: _Text) -> bool:
        """Tokenise a text of more than PIECE_CHARACTERS in pieces, if that gives the same tokens; whether it does."""
        if len(text.text) <= PIECE_CHARACTERS or not self._splits:
            return False
        parts = pieces(text.text, PIECE_CHARACTERS)
        ids, spans = [], []
        for first in range(0, len(parts), self.threads):
            group = parts[first : first + self.threads]
            encodings = self._each_slice(self.tokenizer.encode_batch, [text.text[p.start : p.end] for p in group])
            for part, encoding in zip(group, encodings, strict=True):
                offsets = np.asarray(encoding.offsets, dtype=np.int64).reshape(-1, 2) + part.start
                own = offsets[:, 0] >= part.cut
                ids.append(_int32(encoding.ids)[own])
                spans.append(offsets[own])
        text.ids, text.offsets = np.concatenate(ids), _Offsets(np.concatenate(spans))
        return True

    def _each_slice(
        self, encode: Callable[..., list[tokenizers.Encoding]], texts: Sequence[str]
    ) -> list[tokenizers.Encoding]:
        """``encode`` of all texts, in as many threads as the amount of text justifies; it runs outside the GIL."""
        first, *others = _slices(texts, self.threads)
        checked: Callable[..., list[tokenizers.Encoding]] = functools.partial(_checked, encode)
        if not others:
            return checked(first, add_special_tokens=False)
        with ThreadPoolExecutor(len(others), thread_name_prefix="turborank-tokens") as pool:
            running = [pool.submit(checked, slice_, add_special_tokens=False) for slice_ in others]
            encodings = checked(first, add_special_tokens=False)
            return [*encodings, *itertools.chain.from_iterable(task.result() for task in running)]

    def _fit(self, query: Int32, source: _Text, limits: Limits) -> list[Encoding]:
        text, document = source.text, source.ids
        max_length = min(limits.max_length or self.max_length, self.max_length)
        room = max_length - self.template.size
        all_query, all_document = len(query), len(document)
        query, document = query[: limits.max_query], document[: limits.max_document]
        fits = len(query) + len(document) <= room
        if fits and len(document) == all_document:
            return [self._assemble(query, document, (0, len(text)), query_cut=all_query - len(query))]
        policy = limits.policy or self.policy
        if policy == "error" and not fits:
            total = len(query) + len(document) + self.template.size
            raise TooLongError(
                f"expected a pair of at most {max_length} tokens, got {total} "
                f"({len(query)} of the query, {len(document)} of the document)",
                hint="shorten it, or choose the length policy 'truncate' or 'windows'",
            )
        offsets = source.offsets or self.tokenizer.encode(text, add_special_tokens=False)
        if policy == "windows" and not fits:
            return self._windows(query, document, offsets, (all_query, all_document), room, limits.max_windows)
        keep_query, keep_document = longest_first(len(query), len(document), room)
        span = (0, _characters(offsets, keep_document - 1)[1] if keep_document else 0)
        if keep_document == all_document:
            span = (0, len(text))
        return [
            self._assemble(
                query[:keep_query],
                document[:keep_document],
                span,
                query_cut=all_query - keep_query,
                document_cut=all_document - keep_document,
            )
        ]

    def _windows(
        self,
        query: Int32,
        document: Int32,
        offsets: tokenizers.Encoding | _Offsets,
        full: tuple[int, int],
        room: int,
        max_windows: int | None,
    ) -> list[Encoding]:
        """Encodings of overlapping windows over the document, up to ``max_windows``, each with the query.

        The query is cut only when it takes more than half of the room. ``full``: tokens of query and document before
        any cut.
        """
        kept = query[: max(room // 2, room - len(document))]
        window = room - len(kept)
        starts = window_starts(len(document), window)[:max_windows]
        ends = [min(start + window, len(document)) for start in starts]
        return [
            self._assemble(
                kept,
                document[start:end],
                (_characters(offsets, start)[0], _characters(offsets, end - 1)[1]) if end else (0, 0),
                read=len(kept) + ends[-1] + self.template.size,
                query_cut=full[0] - len(kept),
                document_cut=full[1] - ends[-1],
            )
            for start, end in zip(starts, ends, strict=True)
        ]

    def _assemble(
        self,
        query: Int32,
        document: Int32,
        span: tuple[int, int],
        *,
        read: int | None = None,
        query_cut: int = 0,
        document_cut: int = 0,
    ) -> Encoding:
        template = self.template
        parts = (template.prefix, query, template.middle, document, template.suffix)
        lengths = [len(part) for part in parts]
        return Encoding(
            input_ids=np.concatenate(parts, dtype=np.int32, casting="unsafe"),
            type_ids=np.repeat(np.asarray(template.types, dtype=np.int32), lengths),
            read=sum(lengths) if read is None else read,
            query_cut=query_cut,
            document_cut=document_cut,
            span=span,
        )


def pack(encodings: Sequence[Encoding]) -> PackedBatch:
    """Concatenate encodings in the given order, without padding."""
    lengths = [len(encoding) for encoding in encodings]
    return PackedBatch(
        input_ids=np.concatenate([np.empty(0, np.int32), *(encoding.input_ids for encoding in encodings)]),
        type_ids=np.concatenate([np.empty(0, np.int32), *(encoding.type_ids for encoding in encodings)]),
        cu_seqlens=np.cumsum([0, *lengths], dtype=np.int32),
        max_seqlen=max(lengths, default=0),
    )
