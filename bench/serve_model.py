"""Write a cross-encoder that every server of bench/serve.py can load: ms-marco-MiniLM-L-6-v2's shape, random weights.

    python bench/serve_model.py FOLDER

Six layers, hidden size 384, 22.7 M parameters, 512 tokens; WordPiece vocabulary trained on examples/texts/.
Needs torch and transformers.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from tokenizers.implementations import BertWordPieceTokenizer
from transformers import BertConfig, BertForSequenceClassification, BertTokenizerFast

EXAMPLES = Path(__file__).resolve().parent.parent / "examples" / "texts"
VOCABULARY = 30_522  # rows of the embedding, as published; the tokenizer uses the first few thousand


def main(folder: str) -> None:
    """Write the model."""
    texts = [path.read_text(encoding="utf-8") for path in sorted(EXAMPLES.glob("*.md"))]
    trained = BertWordPieceTokenizer(lowercase=True)
    trained.train_from_iterator(texts, vocab_size=8000, min_frequency=2, show_progress=False)
    tokenizer = BertTokenizerFast(tokenizer_object=trained._tokenizer, model_max_length=512)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=VOCABULARY, hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536,
        max_position_embeddings=512, num_labels=1,
    )  # fmt: skip
    BertForSequenceClassification(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    main(sys.argv[1])
