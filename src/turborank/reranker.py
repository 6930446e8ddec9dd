"""The face of the library: a question, some documents, and the documents in order."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import numpy.typing as npt

from turborank import checkpoint as checkpoints
from turborank import engines
from turborank.errors import InputError
from turborank.scheduler import Progress, Scores, score
from turborank.tokens import PairEncoder
from turborank.types import Document, Float32, Pair, Ranked

DEFAULT_FIELDS = ("title", "text")
MAX_FAULTS = 10  # faults spelled out in one error; the rest are counted


def order(logits: Float32) -> npt.NDArray[np.intp]:
    """The ranking rule: indices by falling logit, ties in the order given."""
    return np.argsort(-logits, kind="stable")


def sigmoid(logit: float) -> float:
    """1 / (1 + e^-logit), without overflow."""
    return 1.0 / (1.0 + math.exp(-logit)) if logit >= 0 else math.exp(logit) / (1.0 + math.exp(logit))


def document_text(document: object, fields: Sequence[str] = DEFAULT_FIELDS) -> str:
    """The text the model reads: a string as it is, a mapping's ``fields`` joined by spaces.

    Raises InputError for anything else, and for a mapping with none of the fields.
    """
    if isinstance(document, str):
        return document
    if not isinstance(document, Mapping):
        raise InputError(f"expected a string or a mapping, got {type(document).__name__}")
    values = [document[field] for field in fields if document.get(field) is not None]
    if not values:
        found = ", ".join(map(str, document)) or "no fields"
        raise InputError(f"expected at least one of the fields {', '.join(fields)}, got {found}")
    wrong = [type(value).__name__ for value in values if not isinstance(value, str | int | float)]
    if wrong:
        raise InputError(f"expected text in the fields {', '.join(fields)}, got {', '.join(wrong)}")
    return " ".join(str(value) for value in values)


def ranking(
    documents: Sequence[Document], scores: Scores, *, top_n: int | None = None, threshold: float | None = None
) -> list[Ranked]:
    """The documents in order, best first: at most ``top_n``, each with a relevance score of at least ``threshold``."""
    ranked: list[Ranked] = []
    for index in order(scores.logits).tolist():
        logit = float(scores.logits[index])
        relevance = sigmoid(logit)
        if len(ranked) == top_n or (threshold is not None and relevance < threshold):
            break
        start, end = scores.spans[index].tolist()
        tokens, truncated = int(scores.tokens[index]), int(scores.truncated[index])
        ranked.append(Ranked(index, documents[index], logit, relevance, tokens, truncated, (start, end)))
    return ranked


class Reranker:
    """A cross-encoder, ready to rank.

    Args:
        model: a name of the catalog (see ``turborank models``), a folder in the published layout, or a
            Hugging Face id; by default the model that ships with the package.
        engine: ``auto``, ``native``, ``torch`` or ``reference``.
        precision: ``auto``, or one of the engine's (``int8``, ``bf16``, ``fp32``).
        max_length: tokens of a pair that are read, template included; by default what the model was made for.
        length: what to do with longer pairs: ``truncate``, ``windows`` or ``error`` (see turborank.tokens).
        threads: by default the cores this process may use.
        offline: never touch the network; by default as HF_HUB_OFFLINE says.
        faithful: honour special-token strings inside user text, as the published tokenizers do.

    Raises:
        ModelNotFoundError, CheckpointError: the model is not to be had, or is damaged.
        UnknownKeyError, EngineUnavailableError, InputError: an option does not exist or does not fit.

    """

    def __init__(
        self,
        model: str | os.PathLike[str] | None = None,
        *,
        engine: str = "auto",
        precision: str = "auto",
        max_length: int | None = None,
        length: str = "truncate",
        threads: int | None = None,
        offline: bool | None = None,
        faithful: bool = False,
    ) -> None:
        if threads is not None and threads < 1:
            raise InputError(f"expected threads to be a positive integer, got {threads}")
        self.checkpoint = checkpoints.load(model, offline=offline)
        config = self.checkpoint.config
        if max_length is not None and max_length > config.max_length:
            raise InputError(f"expected max_length to be at most {config.max_length} for this model, got {max_length}")
        self.encoder = PairEncoder(
            self.checkpoint.tokenizer, max_length=max_length or config.max_length, policy=length, faithful=faithful
        )
        name, chosen = engines.choose(engine, precision, config)
        self.engine = engines.prepare(self.checkpoint.weights, config, name=name, precision=chosen, threads=threads)

    @property
    def name(self) -> str:
        """The model's name."""
        return self.checkpoint.name

    @property
    def max_length(self) -> int:
        """Tokens of a pair that are read, template included."""
        return self.encoder.max_length

    def rank(
        self,
        query: str,
        documents: Iterable[Document],
        *,
        top_n: int | None = None,
        threshold: float | None = None,
        fields: Sequence[str] = DEFAULT_FIELDS,
        progress: Progress | None = None,
    ) -> list[Ranked]:
        """Documents by relevance to the query, best first; ties keep the order given.

        ``top_n`` keeps the best so many, ``threshold`` those with at least that relevance score.
        Raises InputError naming every unusable document, before anything is computed.
        """
        if isinstance(documents, str | bytes | Mapping):
            came = type(documents).__name__
            raise InputError(f"expected a list of documents, got one {came}", hint="wrap it in a list")
        if top_n is not None and (isinstance(top_n, bool) or not isinstance(top_n, int) or top_n < 1):
            raise InputError(f"expected top_n to be a positive integer, got {top_n!r}")
        given = list(documents)
        faults: list[str] = [] if isinstance(query, str) else [f"query: expected a string, got {type(query).__name__}"]
        texts: list[str] = []
        for index, document in enumerate(given):
            try:
                texts.append(document_text(document, fields))
            except InputError as error:
                faults.append(f"documents[{index}]: {error.message}")
        _raise_faults(faults)
        scores = self.score_detailed([Pair(query, text) for text in texts], progress=progress)
        return ranking(given, scores, top_n=top_n, threshold=threshold)

    def score(self, pairs: Iterable[tuple[str, str]], *, progress: Progress | None = None) -> Float32:
        """Logits (P,), float32, of (query, document) pairs, in the order given."""
        given = list(pairs)
        faults = [
            f"pairs[{index}]: expected (query, document), two strings, got {pair!r:.60}"
            for index, pair in enumerate(given)
            if not (isinstance(pair, tuple | list) and len(pair) == 2 and all(isinstance(text, str) for text in pair))
        ]
        _raise_faults(faults)
        return self.score_detailed([Pair(*pair) for pair in given], progress=progress).logits

    def score_detailed(self, pairs: Sequence[Pair], *, progress: Progress | None = None) -> Scores:
        """Logits with the tokens read, the tokens cut and the characters behind each logit."""
        return score(pairs, self.encoder, self.engine, progress=progress)


def _raise_faults(faults: list[str]) -> None:
    if faults:
        more = f"; and {len(faults) - MAX_FAULTS} more" if len(faults) > MAX_FAULTS else ""
        raise InputError("; ".join(faults[:MAX_FAULTS]) + more)
