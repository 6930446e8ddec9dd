"""Tokenizers for tests: the published one where it is available, and two tiny ones with real templates."""

from pathlib import Path

import pytest
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers, processors

SHARED = Path(__file__).resolve().parents[2] / "shared"
PUBLISHED = SHARED / "reference/jina_tokenizer/tokenizer.json"
WORDS = ("red", "blue", "bee", "tree")


def published_tokenizer() -> Tokenizer:
    """The jina rerankers' tokenizer; the test is skipped where it is not available."""
    if not PUBLISHED.exists():
        pytest.skip(f"needs the published tokenizer, {PUBLISHED.name}, which is not on this machine")
    return Tokenizer.from_file(str(PUBLISHED))


def bpe_tokenizer() -> Tokenizer:
    """Characters a-z in the jina rerankers' template: ``<s> q </s></s> d </s>``, ids 0 and 2."""
    specials = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    vocab = {token: i for i, token in enumerate([*specials, *"abcdefghijklmnopqrstuvwxyz</>?.,"])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0), True, False)
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in specials])
    return tokenizer


def wordpiece_tokenizer() -> Tokenizer:
    """Four words in BERT's template: ``[CLS] q [SEP] d [SEP]`` with segments 0 and 1."""
    specials = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    vocab = {token: i for i, token in enumerate([*specials, *WORDS])}
    tokenizer = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    tokenizer.add_special_tokens(specials)
    return tokenizer
