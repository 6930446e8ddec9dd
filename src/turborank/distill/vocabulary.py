"""A vocabulary of one's own, from one's own texts, with the pair template a cross-encoder needs."""

from __future__ import annotations

from collections.abc import Sequence

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from turborank.errors import InputError, UnknownKeyError

KINDS = ("wordpiece", "bpe")
LEAST = 64  # pieces: fewer are not even an alphabet


def train(texts: Sequence[str], *, kind: str = "wordpiece", size: int = 16_384) -> Tokenizer:
    """A tokenizer of at most ``size`` pieces.

    ``wordpiece`` is BERT's (uncased, `[CLS] q [SEP] d [SEP]`, arXiv 1810.04805); ``bpe`` is byte-level, as RoBERTa's
    and the published jina rerankers' (`<s> q </s></s> d </s>`), and so knows every text.
    """
    if kind not in KINDS:
        raise UnknownKeyError("vocabulary", kind, KINDS)
    if size < LEAST or not texts:
        raise InputError(f"expected texts and at least {LEAST} pieces, got {len(texts)} texts and {size} pieces")
    if kind == "wordpiece":
        return _wordpiece(texts, size)
    return _bpe(texts, size)


def _wordpiece(texts: Sequence[str], size: int) -> Tokenizer:
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(vocab_size=size, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    begin, end = (tokenizer.token_to_id(token) for token in ("[CLS]", "[SEP]"))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", begin), ("[SEP]", end)]
    )
    return tokenizer


def _bpe(texts: Sequence[str], size: int) -> Tokenizer:
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=max(size, 256 + len(special)), special_tokens=special, show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    tokenizer.train_from_iterator(texts, trainer)
    begin, end = (tokenizer.token_to_id(token) for token in ("<s>", "</s>"))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> </s> $B:1 </s>:1", special_tokens=[("<s>", begin), ("</s>", end)]
    )
    return tokenizer
