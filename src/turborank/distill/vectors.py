"""A bi-encoder's vectors of many texts, kept in blocks under the hash of what they were made from."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from turborank.evaluate.corpus import Step
from turborank.evaluate.files import replacing
from turborank.types import Float32

if TYPE_CHECKING:
    from turborank.distill.biencoder import BiEncoder

BLOCK = 1024  # texts embedded and kept together: what a kill can cost


def embed(model: BiEncoder, texts: Sequence[str], cache: Path, *, progress: Step | None = None) -> Float32:
    """Unit vectors (N, C) of texts, block by block; a block that is in ``cache`` is not computed again."""
    found: list[Float32] = []
    for start in range(0, len(texts), BLOCK):
        block = texts[start : start + BLOCK]
        path = cache / f"{_key(model, block)}.npy"
        if path.is_file():
            found.append(np.load(path))
        else:
            vectors = model.embed(block)
            with replacing(path) as file:
                np.save(file, vectors)
            found.append(vectors)
        if progress is not None:
            progress(start + len(block), len(texts))
    return np.concatenate(found)


def _key(model: BiEncoder, texts: Sequence[str]) -> str:
    digest = hashlib.sha256(f"{model.revision}\0{model.max_tokens}".encode())
    for text in texts:
        raw = text.encode("utf-8", "surrogatepass")
        digest.update(len(raw).to_bytes(8, "little") + raw)
    return digest.hexdigest()[:40]
