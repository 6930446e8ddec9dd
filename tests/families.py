"""The families of the published table as transformers builds them, small and random, with tokenizers of their kind."""

import string
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from random_models import random_weights
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from turborank.architectures import recognise
from turborank.types import Float32, ModelConfig

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

WORDS = ("what", "is", "the", "capital", "of", "france", "paris", "berlin", "germany", "bread", "bakes")
SMALL: dict[str, Any] = {
    "vocab_size": 99, "hidden_size": 96, "num_hidden_layers": 3, "num_attention_heads": 3, "intermediate_size": 192,
    "num_labels": 1,
}  # fmt: skip
# What the families of the table say beyond their sizes (docs/model.md §5).
STATED: dict[str, dict[str, Any]] = {
    "bert": {"max_position_embeddings": 512, "type_vocab_size": 2, "layer_norm_eps": 1e-12},
    "xlm_roberta": {"max_position_embeddings": 514, "type_vocab_size": 1, "layer_norm_eps": 1e-5, "pad_token_id": 1},
    "electra": {"max_position_embeddings": 512, "type_vocab_size": 2, "layer_norm_eps": 1e-12, "embedding_size": 96},
    "deberta": {
        "max_position_embeddings": 512, "type_vocab_size": 0, "layer_norm_eps": 1e-7, "relative_attention": True,
        "position_buckets": 256, "max_relative_positions": -1, "norm_rel_ebd": "layer_norm", "share_att_key": True,
        "pos_att_type": "p2c|c2p", "position_biased_input": False, "pooler_hidden_act": "gelu", "pooler_dropout": 0,
    },
}  # fmt: skip
CLASSES = {"bert": "Bert", "xlm_roberta": "XLMRoberta", "deberta": "DebertaV2", "electra": "Electra"}
PREFIX = {"bert": "bert.", "xlm_roberta": "roberta.", "deberta": "deberta.", "electra": "electra."}
FAMILIES = tuple(CLASSES)


def their_config(family: str, **changes: Any) -> Any:
    return getattr(transformers, CLASSES[family] + "Config")(**{**SMALL, **STATED[family], **changes})


def family_config(family: str, **changes: Any) -> ModelConfig:
    """The ModelConfig that turborank reads from that config.json."""
    return recognise(their_config(family, **changes).to_dict(), {})


def family_weights(config: ModelConfig, seed: int = 0) -> dict[str, Float32]:
    """Random weights whose attention is far from uniform: queries and keys are twice as large as elsewhere."""
    weights = random_weights(config, seed)
    sharp = ("query.weight", "key.weight", "query_proj.weight", "key_proj.weight")
    return {name: value * np.float32(2 if name.endswith(sharp) else 1) for name, value in weights.items()}


def their_model(family: str, weights: dict[str, Float32], **changes: Any) -> Any:
    """transformers' own class holding ``weights``: it must have exactly these tensors, of exactly these shapes."""
    model = getattr(transformers, CLASSES[family] + "ForSequenceClassification")(their_config(family, **changes))
    stored = {name.removeprefix(PREFIX[family]): name for name in model.state_dict()}
    assert set(stored) == set(weights)
    model.load_state_dict({stored[name]: torch.from_numpy(value) for name, value in weights.items()})
    return model.eval()


def wordpiece() -> Tokenizer:
    """BERT's: uncased WordPiece with ``[CLS] q [SEP] d [SEP]``, segments 0 and 1, ids as in its vocabulary's order."""
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS, *string.ascii_lowercase, *",.?!"]
    pieces += [f"##{letter}" for letter in string.ascii_lowercase]
    tokenizer = Tokenizer(models.WordPiece({piece: i for i, piece in enumerate(pieces)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    tokenizer.add_special_tokens(pieces[:4])
    return tokenizer


def unigram(specials: list[str]) -> Tokenizer:
    """A SentencePiece unigram model over words, letters and the word-boundary mark; no template yet."""
    words = [(f"▁{word}", -4.0) for word in WORDS]
    letters = [(letter, -8.0) for letter in ("▁", *string.ascii_letters, *",.?!")]
    pieces = [(special, 0.0) for special in specials] + words + letters
    unknown = next(i for i, special in enumerate(specials) if "unk" in special.lower())
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=unknown))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.add_special_tokens(specials)
    return tokenizer


def family_tokenizer(family: str) -> Tokenizer:
    """A tokenizer of the family's kind, with its template and the ids of its special tokens."""
    if family in ("bert", "electra"):
        return wordpiece()
    if family == "xlm_roberta":
        tokenizer = unigram(["<s>", "<pad>", "</s>", "<unk>"])
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A </s>", pair="<s> $A </s> </s> $B </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
        )
        return tokenizer
    tokenizer = unigram(["[PAD]", "[CLS]", "[SEP]", "[UNK]"])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    return tokenizer


def save_family(folder: Path, family: str, seed: int = 0, **changes: Any) -> Any:
    """A random checkpoint written by transformers itself; its model."""
    tokenizer = family_tokenizer(family)
    sizes = {"vocab_size": tokenizer.get_vocab_size(), **changes}
    model = their_model(family, family_weights(family_config(family, **sizes), seed), **sizes)
    model.save_pretrained(folder)
    tokenizer.save(str(folder / "tokenizer.json"))
    return model


def their_logits(model: Any, folder: Path, pairs: list[tuple[str, str]], max_length: int = 512) -> Float32:
    """transformers from text to logits, with the very same tokenizer.json; one padded batch."""
    pad = "<pad>" if (folder / "tokenizer.json").read_text(encoding="utf-8").find('"<pad>"') > 0 else "[PAD]"
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"), pad_token=pad)
    encoded = tokenizer(
        [query for query, _ in pairs],
        [document for _, document in pairs],
        padding=True,
        truncation="longest_first",
        max_length=max_length,
        return_token_type_ids=True,  # as BERT's own tokenizer class does; the other families ignore them
        return_tensors="pt",
    )
    with torch.no_grad():
        logits: Float32 = model(**encoded).logits[:, 0].numpy()
    return logits
