"""Reranker: scores the documents of a query with a cross-encoder and ranks them."""

from __future__ import annotations

import bisect
import functools
import hashlib
import itertools
import json
import operator
import os
import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from numbers import Real
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from turborank import calibration as calibrations
from turborank import checkpoint as checkpoints
from turborank import engines, scheduler
from turborank.calibration import Calibration, sigmoid
from turborank.checkpoint import Checkpoint
from turborank.checkpoint.tensors import TensorFile
from turborank.engines import ClosedEngine
from turborank.errors import CheckpointError, InputError, TooLongError
from turborank.scheduler import score
from turborank.score_cache import ScoreCache
from turborank.text import DEFAULT_FIELDS, document_text
from turborank.tokens import MIN_LENGTH, NO_LIMITS, Limits, PairEncoder
from turborank.types import Document, Engine, Float32, Pair, Progress, Ranked, RerankerOptions, RerankerRecipe, Scores

MAX_FAULTS = 10  # faults listed in one error; further ones are only counted
MAX_THREADS = 4096  # above the number of cores of any machine


def order(logits: Float32) -> npt.NDArray[np.intp]:
    """Indices (P,) that sort the logits in descending order; ties keep the given order."""
    return np.argsort(-logits, kind="stable")


def whole(name: str, value: object, least: int = 1, most: int | None = None) -> int:
    """A whole-number option as int, from an int or a numpy integer. Raises InputError for anything else."""
    try:
        number = None if isinstance(value, bool) else operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        number = None
    if number is None or number < least or (most is not None and number > most):
        numbers = f"from {least} to {most}" if most is not None else f"of at least {least}"
        raise InputError(f"expected {name} to be a whole number {numbers}, got {value!r:.80}")
    return number


def listed(name: str, given: Any) -> list[Any]:
    """The caller's documents or pairs as a list: any iterable, numpy array, pandas or polars Series, or Arrow array.

    Raises InputError for a single text, a mapping, or a table.
    """
    if isinstance(given, str | bytes | Mapping):
        raise InputError(f"expected a list of {name}, got one {type(given).__name__}", hint="wrap it in a list")
    shape = getattr(given, "shape", None)
    if isinstance(shape, tuple) and len(shape) != 1:
        raise InputError(
            f"expected a list of {name}, got a {type(given).__name__} of {len(shape)} dimensions",
            hint="give one column, or its rows as a list",
        )
    if not isinstance(given, Iterable):
        raise InputError(f"expected a list of {name}, got {type(given).__name__}")
    for method in ("to_pylist", "tolist"):  # Arrow's; numpy's, pandas' and polars'. Both convert to plain Python values
        if callable(convert := getattr(given, method, None)):
            return list(convert())
    return list(given)


def ranking(
    documents: Sequence[Document], scores: Scores, *, top_n: int | None = None, threshold: float | None = None
) -> list[Ranked]:
    """The documents, best first: at most ``top_n``, each with a relevance score of at least ``threshold``."""
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


_arrived: dict[RerankerRecipe, Reranker] = {}  # rerankers opened by unpickling in this process, each once
_arriving: dict[int, threading.Lock] = {}  # process id -> lock; after a fork, the parent's lock may stay held forever


def _process_lock() -> threading.Lock:
    return _arriving.setdefault(os.getpid(), threading.Lock())


def arrive(recipe: RerankerRecipe, luggage: Mapping[str, Any]) -> Reranker:
    """Open the reranker of a recipe, once per process; recipes that differ only in threads share it until it is closed.

    Pickle calls this function when it loads a Reranker. ``luggage``: the assigned attributes that were pickled with it
    (calibration, cache). Raises what Reranker raises, and CheckpointError if the model folder holds other files here.
    """
    key = recipe.with_threads(None)
    with _process_lock():
        opened = _arrived.get(key)
        if opened is None:
            loaded = checkpoints.load(
                recipe.model,
                offline=recipe.options.offline,
                relevant_label=recipe.relevant_label,
                revision=recipe.revision,
            )
            opened = Reranker(loaded, **vars(key.options))
            if recipe.files not in (None, opened._files_hash):
                raise CheckpointError(
                    "expected the model files that the reranker was opened with, got other files in "
                    f"{opened.checkpoint.folder}",
                    hint="put the same files at this path on every machine",
                )
            _arrived[key] = opened
    arrival = opened.__copy__()
    arrival._recipe = recipe
    if (threads := recipe.options.threads) is not None:
        arrival.encoder = arrival.encoder.with_threads(threads)
        arrival.engine = arrival.engine.with_threads(threads)
    vars(arrival).update(luggage)
    return arrival


class Reranker:
    """A cross-encoder model with its tokenizer and engine.

    Args:
        model: a name of the catalog (see ``turborank models``), a folder in a published layout, a Hugging Face id, or
            the result of :func:`turborank.checkpoint.load`, which takes a revision and the label that means relevant;
            by default the embedded model, which ships with the package.
        engine: ``auto``, ``native``, ``torch`` or ``reference`` (docs/engines.md).
        precision: ``auto``, or one that the engine supports (``int8``, ``bf16``, ``fp16``, ``fp32``).
        max_length: maximum tokens of a pair, special tokens included; by default the model's maximum.
        length: policy for longer pairs: ``truncate``, ``windows`` or ``error`` (see turborank.tokens).
        threads: threads of the native engine; by default the cores this process may use. The other engines use the
            settings of numpy and torch (``torch.set_num_threads``).
        offline: True forbids network access; by default HF_HUB_OFFLINE decides.
        faithful: treat special-token strings in texts as special tokens, as published (docs/model.md §4.5).

    Threads may share a reranker. It is a context manager and works after a fork. A pickle holds its arguments and a
    hash of the model files, not the weights; each process that loads it opens the model once (docs/scale.md). Copies
    share the weights.

    Raises:
        ModelNotFoundError: the model does not exist or cannot be fetched.
        CheckpointError: the model is incomplete, damaged or unsupported.
        UnknownKeyError: no such catalog name, engine, precision or length policy.
        EngineUnavailableError: the engine does not run on this machine, or does not run this model.
        InputError: an option has a wrong type or value.

    """

    def __init__(
        self,
        model: str | os.PathLike[str] | Checkpoint | None = None,
        *,
        engine: str = "auto",
        precision: str = "auto",
        max_length: int | None = None,
        length: str = "truncate",
        threads: int | None = None,
        offline: bool | None = None,
        faithful: bool = False,
    ) -> None:
        threads = None if threads is None else whole("threads", threads, most=MAX_THREADS)
        if isinstance(model, Checkpoint):
            self.checkpoint, model = model, None if model.origin == "embedded" else model.name
        else:
            self.checkpoint = checkpoints.load(model, offline=offline)
        config = self.checkpoint.config
        if max_length is not None:
            max_length = whole("max_length", max_length, MIN_LENGTH, config.max_length)
        name, chosen = engines.choose(engine, precision, config)
        self.encoder = PairEncoder(
            self.checkpoint.tokenizer, max_length=max_length or config.max_length, policy=length, faithful=faithful,
            threads=threads or engines.allowed_cores(),
        )  # fmt: skip
        self.engine: Engine = engines.prepare(
            self.checkpoint.weights, config, name=name, precision=chosen, threads=threads
        )
        self._recipe = RerankerRecipe(
            None if model is None else os.fspath(model),
            RerankerOptions(length, max_length, name, chosen, threads, offline, faithful),
            relevant_label=self.checkpoint.relevant_label,
        )
        self.cache: ScoreCache | None = None  # assign one to store scores and reuse them (docs/caching.md)

    def __repr__(self) -> str:
        engine = self.engine
        closed = ", closed" if isinstance(engine, ClosedEngine) else ""
        return (
            f"Reranker({self.name!r}, engine={engine.name!r}, precision={engine.precision!r}, isa={engine.isa!r}, "
            f"threads={engine.threads}{closed})"
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *fault: object) -> None:
        self.close()

    def close(self) -> None:
        """Release the model's memory once running calls have ended. Later calls that rank raise InputError.

        Copies keep the weights they share. Closing twice has no effect.
        """
        engine = self.engine
        self.engine = ClosedEngine(engine.name, engine.precision, engine.isa, engine.threads)
        self.checkpoint = replace(self.checkpoint, weights={})
        with _process_lock():
            _arrived.pop(self._recipe.with_threads(None), None)

    def __copy__(self) -> Self:
        """A reranker with the same weights, engine and tokenizer, which are shared."""
        copied = type(self).__new__(type(self))
        vars(copied).update(vars(self))
        return copied

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self.__copy__()

    def __reduce__(self) -> tuple[Any, ...]:
        luggage = {name: value for name, value in vars(self).items() if name in ("calibration", "cache")}
        if isinstance(self.engine, ClosedEngine):
            raise InputError("expected an open reranker to pickle, got a closed one")
        if not isinstance(self.checkpoint.weights, TensorFile):
            raise InputError(
                "expected a reranker of a model's files to pickle, got one of weights in memory",
                hint="save them first: turborank.checkpoint.save(reranker.checkpoint, FOLDER)",
            )
        return arrive, (self.recipe, luggage)

    @property
    def recipe(self) -> RerankerRecipe:
        """The arguments with which another process opens the same reranker; see :func:`arrive`."""
        checkpoint, recipe = self.checkpoint, self._recipe
        if checkpoint.origin in ("hub", "cache"):
            recipe = replace(recipe, revision=checkpoint.revision)
        elif recipe.files is None:
            model = recipe.model if checkpoint.origin == "embedded" else os.path.abspath(checkpoint.folder)
            recipe = replace(recipe, model=model, files=self._files_hash)
        self._recipe = recipe
        return recipe

    @property
    def name(self) -> str:
        """The model's name."""
        return self.checkpoint.name

    @property
    def max_length(self) -> int:
        """Maximum tokens of a pair, special tokens included."""
        return self.encoder.max_length

    @functools.cached_property
    def weights_hash(self) -> str:
        """The hash of :func:`turborank.checkpoint.weights_hash`, computed once."""
        return checkpoints.weights_hash(self.checkpoint)

    @functools.cached_property
    def calibration(self) -> Calibration | None:
        """The calibration in the model's folder, or None (docs/calibration.md). Another one may be assigned."""
        path = self.checkpoint.folder / calibrations.FILE
        return calibrations.read(path, self.weights_hash) if path.is_file() else None

    def calibrate(self, path: str | os.PathLike[str]) -> None:
        """Load a file written by ``turborank calibrate``. Raises as :func:`turborank.calibration.read`."""
        self.calibration = calibrations.read(Path(path), self.weights_hash)

    def fingerprint(self, limits: Limits = NO_LIMITS) -> str:
        """Everything a score depends on besides the texts, as JSON: a part of the score cache's keys."""
        encoder, engine = self.encoder, self.engine
        asked = limits._replace(
            policy=limits.policy or encoder.policy,
            max_length=min(limits.max_length or encoder.max_length, encoder.max_length),
        )
        return json.dumps([self._files_hash, engine.name, engine.precision, engine.isa, encoder.faithful, *asked])

    @functools.cached_property
    def _files_hash(self) -> str:
        return hashlib.sha256(json.dumps(checkpoints.hashes(self.checkpoint), sort_keys=True).encode()).hexdigest()

    def least_score(self, threshold: float | str | None) -> float | None:
        """The minimum relevance score for a threshold: a number from 0 to 1, or a target such as "precision=0.9".

        Raises InputError for anything else, and for a target if the model has no calibration.
        """
        if isinstance(threshold, str):
            calibrations.parse_target(threshold)
            if self.calibration is None:
                raise InputError(
                    f"expected a calibrated model for the threshold {threshold!r}, got no {calibrations.FILE} in "
                    f"{self.checkpoint.folder}",
                    hint="make one with turborank calibrate, or give a number from 0 to 1",
                )
            return sigmoid(self.calibration.threshold(threshold))
        if threshold is not None and not (isinstance(threshold, Real) and 0 <= threshold <= 1):
            raise InputError(f"expected threshold to be a number between 0 and 1, got {threshold!r:.80}")
        return threshold

    def rank(
        self,
        query: str,
        documents: Iterable[Document],
        *,
        top_n: int | None = None,
        threshold: float | str | None = None,
        fields: Sequence[str] = DEFAULT_FIELDS,
        progress: Progress | None = None,
        depth: int | str | None = None,
    ) -> list[Ranked]:
        """Rank documents by relevance to the query, best first; ties keep the given order.

        Args:
            query: the query text.
            documents: texts, or mappings whose ``fields`` are joined to a text.
            top_n: return at most this many documents.
            threshold: return only documents with at least this relevance score, from 0 to 1; or, for a calibrated
                model, a target: "precision=0.9", "recall=0.95" or "probability=0.5" (docs/calibration.md).
            fields: keys of the text fields in document mappings.
            progress: called with (pairs done, pairs in total).
            depth: score only this many documents, which must be in the order of a first stage; "auto" stops when the
                rest are unlikely to enter the first ``top_n`` (docs/depth.md). Unscored documents are not returned.

        Raises:
            InputError: an argument or document is not usable; the message names each of them, and nothing is computed.
            TooLongError: with ``length="error"``, a pair exceeds ``max_length``.

        """
        given = listed("documents", documents)
        top_n, least, depth = self._asked(top_n, threshold, depth)
        faults: list[str] = [] if isinstance(query, str) else [f"query: expected a string, got {type(query).__name__}"]
        texts = _texts(given, fields, "documents", faults)
        _raise_faults(faults)
        pairs = [Pair(query, text) for text in texts]
        try:
            scores = self._scores(pairs, top_n, depth, progress)
        except TooLongError as error:
            raise error.at(error.place, f"documents[{error.place}]") from None
        return ranking(given, scores, top_n=top_n, threshold=least)

    def rank_many(
        self,
        queries: Iterable[str],
        candidates: Iterable[Iterable[Document]],
        *,
        top_n: int | None = None,
        threshold: float | str | None = None,
        fields: Sequence[str] = DEFAULT_FIELDS,
        progress: Progress | None = None,
        depth: int | str | None = None,
    ) -> list[list[Ranked]]:
        """Rank the candidates of each query; one ranking per query, with the same bits as :meth:`rank` returns.

        All pairs are scored in one packed stream, so that short lists fill whole batches; with ``depth="auto"`` the
        lists are scored one after another. Options and errors are those of :meth:`rank`; InputError also if the numbers
        of queries and of lists of candidates differ.
        """
        asked, lists = listed("queries", queries), listed("candidates", candidates)
        if len(asked) != len(lists):
            raise InputError(f"expected a list of candidates for each of {len(asked)} queries, got {len(lists)} lists")
        top_n, least, depth = self._asked(top_n, threshold, depth)
        faults = [
            f"queries[{index}]: expected a string, got {type(query).__name__}"
            for index, query in enumerate(asked)
            if not isinstance(query, str)
        ]
        given = [listed(f"documents in candidates[{index}]", one) for index, one in enumerate(lists)]
        texts = [_texts(one, fields, f"candidates[{index}]", faults) for index, one in enumerate(given)]
        _raise_faults(faults)
        pairs = [[Pair(query, text) for text in one] for query, one in zip(asked, texts, strict=True)]
        found = self._scores_many(pairs, top_n, depth, progress)
        return [ranking(one, part, top_n=top_n, threshold=least) for one, part in zip(given, found, strict=True)]

    def _asked(
        self, top_n: int | None, threshold: float | str | None, depth: int | str | None
    ) -> tuple[int | None, float | None, int | str | None]:
        """Validate the options of a ranking; return (top_n, threshold as a relevance score, depth)."""
        top_n = None if top_n is None else whole("top_n", top_n)
        return top_n, self.least_score(threshold), scheduler.checked_depth(depth, top_n)

    def _scores(
        self, pairs: Sequence[Pair], top_n: int | None, depth: int | str | None, progress: Progress | None
    ) -> Scores:
        """Scores of one query's first pairs, as many as ``depth`` selects."""
        if depth == scheduler.AUTO_DEPTH and top_n is not None:
            return self.score_adaptively(pairs, top_n, progress=progress)
        return self.score_detailed(pairs if depth is None else pairs[: int(depth)], progress=progress)

    def _scores_many(
        self, lists: Sequence[Sequence[Pair]], top_n: int | None, depth: int | str | None, progress: Progress | None
    ) -> list[Scores]:
        if depth is not None and depth != scheduler.AUTO_DEPTH:
            lists = [one[: int(depth)] for one in lists]
        bounds = list(itertools.accumulate((len(one) for one in lists), initial=0))
        first, done = 0, 0  # with depth="auto": the list that is being scored, and the pairs before it

        def step(now: int, _: int) -> None:
            if progress is not None:
                progress(done + now, bounds[-1])

        try:
            if depth == scheduler.AUTO_DEPTH:
                found = []
                for one in lists:
                    found.append(self._scores(one, top_n, depth, step))
                    first, done = first + 1, done + len(one)
                return found
            scores = self.score_detailed(list(itertools.chain.from_iterable(lists)), progress=progress)
        except TooLongError as error:
            place = bounds[first] + error.place
            row = bisect.bisect_right(bounds, place) - 1
            raise error.at(place, f"candidates[{row}][{place - bounds[row]}]") from None
        logits, tokens, truncated, spans = scores
        return [
            Scores(logits[start:end], tokens[start:end], truncated[start:end], spans[start:end])
            for start, end in itertools.pairwise(bounds)
        ]

    def score(self, pairs: Iterable[tuple[str, str]], *, progress: Progress | None = None) -> Float32:
        """Logits (P,), float32, of (query, document) pairs, in the given order. Raises as :meth:`rank`."""
        given = listed("pairs", pairs)
        faults = [
            f"pairs[{index}]: expected (query, document), two strings, got {pair!r:.60}"
            for index, pair in enumerate(given)
            if not (isinstance(pair, tuple | list) and len(pair) == 2 and all(isinstance(text, str) for text in pair))
        ]
        _raise_faults(faults)
        return self.score_detailed([Pair(*pair) for pair in given], progress=progress).logits

    def score_detailed(self, pairs: Sequence[Pair], *, progress: Progress | None = None) -> Scores:
        """Logits (P,) and, for each pair, the tokens read, the tokens truncated and the span of characters read.

        Scores that ``cache`` holds are not computed again. Raises as :meth:`rank`.
        """
        if self.cache is None:
            return score(pairs, self.encoder, self.engine, progress=progress)
        found = self.cache.find(self.fingerprint(), pairs)
        missing = found.missing
        try:
            computed = score([pairs[place] for place in missing], self.encoder, self.engine, progress=progress)
        except TooLongError as error:
            raise error.at(missing[error.place], f"pairs[{missing[error.place]}]") from None
        return self.cache.complete(found, computed)

    def score_adaptively(self, pairs: Sequence[Pair], top_n: int, *, progress: Progress | None = None) -> Scores:
        """Scores of the first pairs, in blocks until few of the ``top_n`` are expected among the rest (docs/depth.md).

        The pairs must be one query's, in the order of a first stage. The result covers a prefix of them.
        """
        parts: list[Scores] = []
        done = 0
        while done < len(pairs) and not (parts and scheduler.deep_enough(joined(parts).logits, top_n, len(pairs))):
            try:
                parts.append(self.score_detailed(pairs[done : done + scheduler.DEPTH_BLOCK]))
            except TooLongError as error:
                raise error.at(done + error.place, f"pairs[{done + error.place}]") from None
            done = min(done + scheduler.DEPTH_BLOCK, len(pairs))
            if progress is not None:
                progress(done, len(pairs))
        return joined(parts) if parts else self.score_detailed([])


def joined(parts: Sequence[Scores]) -> Scores:
    """Concatenate the Scores of several lists of pairs."""
    return Scores(*(np.concatenate(column) for column in zip(*parts, strict=True)))


def _texts(given: Sequence[Any], fields: Sequence[str], where: str, faults: list[str]) -> list[str]:
    """The texts of the documents. For each unusable document, a message is appended to ``faults``."""
    if isinstance(fields, str):
        raise InputError("expected fields to be a list of names, got one str", hint="wrap it in a tuple")
    texts: list[str] = []
    for index, document in enumerate(given):
        try:
            texts.append(document_text(document, fields))
        except InputError as error:
            faults.append(f"{where}[{index}]: {error.message}")
    return texts


def _raise_faults(faults: list[str]) -> None:
    if faults:
        more = f"; and {len(faults) - MAX_FAULTS} more" if len(faults) > MAX_FAULTS else ""
        raise InputError("; ".join(faults[:MAX_FAULTS]) + more)
