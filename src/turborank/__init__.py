"""turborank: rerank search results with a cross-encoder that reads 8,192 tokens.

>>> from turborank import Reranker
>>> Reranker().rank("how do bees choose a home?", ["Bees scout for hollow trees.", "Rents rose."])[0].index
0
"""

from __future__ import annotations

from turborank.errors import (
    CheckpointError,
    EngineError,
    EngineUnavailableError,
    InputError,
    ModelNotFoundError,
    TooLongError,
    TrainingError,
    TurborankError,
    UnknownKeyError,
)
from turborank.reranker import Reranker
from turborank.types import Ranked

__version__ = "0.1.0"

__all__ = [
    "CheckpointError",
    "EngineError",
    "EngineUnavailableError",
    "InputError",
    "ModelNotFoundError",
    "Ranked",
    "Reranker",
    "TooLongError",
    "TrainingError",
    "TurborankError",
    "UnknownKeyError",
    "__version__",
]
