"""Interfaces of other libraries' cross-encoders, implemented by :class:`~turborank.Reranker`.

``CrossEncoder``      a drop-in replacement of sentence-transformers' class: ``predict(pairs)`` and
                      ``rank(query, documents)``, with the parameters of versions 4 to 6. Parameters that do not change
                      a score (batch size, process pool) are accepted and ignored; prompts raise an error.
``MtebCrossEncoder``  mteb's ``CrossEncoderProtocol``: ``mteb.evaluate(MtebCrossEncoder(Reranker(…)), tasks)``.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from turborank import catalog
from turborank.errors import EngineUnavailableError, InputError
from turborank.reranker import Reranker, listed, order, whole
from turborank.types import Float32, Progress

Activation = Callable[[Any], Any]  # torch tensor (P, 1) -> as many numbers, such as torch.nn.Sigmoid()

# Keys of config.json that name the activation, newest first; values end in a torch class name.
_NAMED_IN_CONFIG = (("sentence_transformers", "activation_fn"), ("sbert_ce_default_activation_function", None))
_ACTIVATIONS = ("sigmoid", "identity")


def published_activation(reranker: Reranker) -> str:
    """The activation between a model's logits and its published scores: "sigmoid" or "identity".

    Read from ``config.json`` as sentence-transformers does, else from the catalog, else "sigmoid" (the default for
    models with one label). Raises InputError when ``config.json`` names another function.
    """
    for key, inner in _NAMED_IN_CONFIG:
        named = reranker.checkpoint.raw_config.get(key)
        if inner is not None:
            named = named.get(inner) if isinstance(named, Mapping) else None
        if isinstance(named, str):
            short = named.rpartition(".")[2].lower()
            if short not in _ACTIVATIONS:
                raise InputError(
                    f"expected {key} in config.json to name one of {', '.join(_ACTIVATIONS)}, got {named!r}",
                    hint="give activation_fn",
                )
            return short
    row = catalog.find(reranker.name)
    return row.activation if row is not None else "sigmoid"


def activate(logits: Float32, activation: str | Activation) -> Float32:
    """Scores (P,), float32, of logits (P,). A callable gets a torch tensor (P, 1), as in sentence-transformers.

    Raises InputError for an unknown name, and when a callable does not return one number per pair.
    """
    if callable(activation):
        import torch

        scores: Float32 = np.asarray(activation(torch.from_numpy(logits[:, None])), dtype=np.float32)
        if scores.size != logits.size:
            raise InputError(
                f"expected one number per pair from activation_fn, got shape {scores.shape} for {logits.size} pairs"
            )
        return scores.reshape(-1)
    if activation not in _ACTIVATIONS:
        raise InputError(f"expected activation_fn to be a function or one of {_ACTIVATIONS}, got {activation!r}")
    if activation == "identity":
        return logits
    # 1 / (1 + e^-logit), without overflow
    return np.exp(-np.logaddexp(0.0, -logits.astype(np.float64))).astype(np.float32)


_PRECISIONS = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16", "auto": "auto"}


def _precision_of(model_kwargs: Mapping[str, Any]) -> str:
    """Name of the precision for a dtype, which may be a string or a torch.dtype."""
    wanted = model_kwargs.get("dtype", model_kwargs.get("torch_dtype"))
    name = "auto" if wanted is None else str(wanted).removeprefix("torch.")
    if name not in _PRECISIONS:
        raise InputError(f"expected dtype in model_kwargs to be one of {', '.join(_PRECISIONS)}, got {wanted!r}")
    return _PRECISIONS[name]


def _check_revision(reranker: Reranker, revision: str | None) -> None:
    """Raise InputError unless ``revision`` is the one that was loaded; local folders have no revision."""
    checkpoint = reranker.checkpoint
    if checkpoint.origin in ("hub", "cache") and revision not in (None, "main", checkpoint.revision):
        raise InputError(
            f"expected revision {checkpoint.revision or 'None'} of {checkpoint.name}, got {revision!r}",
            hint="download that revision and give its folder",
        )


class CrossEncoder:
    """``sentence_transformers.CrossEncoder`` for models with one label, run by turborank.

    Intended differences: the maximum length is the model's own (8,192 tokens for the jina rerankers), not the
    tokenizer's 512 (``max_length=512`` restores it); special-token strings in texts are plain text
    (``faithful=True`` restores their meaning); ``rank`` sorts by logit, so that scores which round to the same float
    stay in order.

    Args:
        model_name_or_path: as for :class:`~turborank.Reranker`; by default the embedded model.
        num_labels: 1, or None for the model's own, which must be 1.
        max_length: maximum tokens of a pair, special tokens included.
        activation_fn: "sigmoid", "identity" or a function of a torch tensor; by default the published activation.
        device: "cpu", "cuda" (selects the torch engine), a torch.device of these, or None.
        trust_remote_code: no effect; turborank never runs code from a checkpoint.
        local_files_only: do not use the network.
        revision: must be the revision that the catalog names; no effect on a folder.
        model_kwargs: ``dtype`` (or ``torch_dtype``) sets the precision when ``precision`` is "auto"; other keys have no
            effect.
        cache_folder, token, backend: no effect; set ``HF_HOME`` and ``HF_TOKEN`` for the cache folder and the token.
        engine: as for :class:`~turborank.Reranker`.
        precision: "auto" is the engine's default, int8 on CPUs; "fp32" gives the published scores to 1e-5.
        faithful: treat special-token strings in texts as special tokens.

    Raises:
        TurborankError: as :class:`~turborank.Reranker` does.
        EngineUnavailableError: ``device="cuda"`` on a machine without a CUDA device.

    """

    num_labels = 1

    def __init__(
        self,
        model_name_or_path: str | os.PathLike[str] | None = None,
        *,
        num_labels: int | None = None,
        max_length: int | None = None,
        activation_fn: str | Activation | None = None,
        device: Any = None,
        trust_remote_code: bool = False,
        local_files_only: bool = False,
        revision: str | None = None,
        model_kwargs: Mapping[str, Any] | None = None,
        cache_folder: str | None = None,
        token: bool | str | None = None,
        backend: str = "torch",
        engine: str = "auto",
        precision: str = "auto",
        faithful: bool = False,
    ) -> None:
        if num_labels not in (None, 1):
            raise InputError(f"expected num_labels to be 1, got {num_labels}: turborank runs rerankers only")
        kind = "cpu" if device is None else str(device).partition(":")[0]
        cuda = kind == "cuda"
        if kind not in ("cpu", "cuda"):
            raise InputError(f"expected device to be 'cpu', 'cuda' or None, got {device!r}")
        self.reranker = Reranker(
            model_name_or_path,
            engine="torch" if cuda else engine,
            precision=_precision_of(model_kwargs or {}) if precision == "auto" else precision,
            max_length=max_length,
            offline=True if local_files_only else None,
            faithful=faithful,
        )
        _check_revision(self.reranker, revision)
        if cuda and getattr(getattr(self.reranker.engine, "device", None), "type", "cpu") != "cuda":
            raise EngineUnavailableError(f"expected a CUDA device for device={device!r}, got none on this machine")
        self.activation_fn = published_activation(self.reranker) if activation_fn is None else activation_fn

    @property
    def max_length(self) -> int:
        """Maximum tokens of a pair, special tokens included."""
        return self.reranker.max_length

    def predict(
        self,
        inputs: Any = None,
        batch_size: int = 32,
        show_progress_bar: bool | None = None,
        activation_fn: str | Activation | None = None,
        apply_softmax: bool | None = False,
        convert_to_numpy: bool = True,
        convert_to_tensor: bool = False,
        *,
        sentences: Any = None,
        prompt_name: str | None = None,
        prompt: str | None = None,
        device: Any = None,
        pool: Any = None,
        chunk_size: int | None = None,
    ) -> Any:
        """Scores (P,) of (query, document) pairs in the given order; for a single pair, its score.

        Args:
            inputs: a list of pairs, or one pair.
            batch_size: must be positive; no other effect, because batches are planned by tokens.
            show_progress_bar: show a progress bar on stderr; None means no.
            activation_fn: replaces the model's activation in this call.
            apply_softmax: no effect on models with one label.
            convert_to_numpy: return a float32 array; if False, a list of torch scalars.
            convert_to_tensor: return a torch tensor; takes precedence over ``convert_to_numpy``.
            sentences: the older name of ``inputs``.
            prompt_name: must be None; these rerankers have no prompts.
            prompt: must be None.
            device: no effect; the device is set in the constructor.
            pool: no effect.
            chunk_size: no effect.

        Raises:
            InputError: both or neither of ``inputs`` and ``sentences`` are given, an item is not a pair of strings, or
                a prompt is given.

        """
        _refuse_prompts(prompt_name, prompt)
        if (inputs is None) == (sentences is None):
            raise InputError("expected pairs as inputs or as sentences, got both or neither")
        given = sentences if inputs is None else inputs
        if isinstance(given, np.ndarray):
            given = given.tolist()
        if isinstance(given, str) or not isinstance(given, Iterable):
            raise InputError(f"expected a list of (query, document) pairs, got {type(given).__name__}")
        single = isinstance(given, tuple | list) and len(given) == 2 and all(isinstance(text, str) for text in given)
        scores = self._scores([given] if single else given, batch_size, show_progress_bar, activation_fn)[1]
        if convert_to_tensor or not convert_to_numpy:
            import torch

            tensor = torch.from_numpy(scores)
            if single:
                return tensor[0]
            return tensor if convert_to_tensor else list(tensor)
        return scores[0] if single else scores

    def rank(
        self,
        query: str,
        documents: Iterable[str],
        top_k: int | None = None,
        return_documents: bool = False,
        batch_size: int = 32,
        show_progress_bar: bool | None = None,
        activation_fn: str | Activation | None = None,
        *,
        prompt_name: str | None = None,
        prompt: str | None = None,
        device: Any = None,
        pool: Any = None,
        chunk_size: int | None = None,
    ) -> list[dict[str, Any]]:
        """Documents sorted by score, best first: ``corpus_id``, ``score`` and, with ``return_documents``, ``text``.

        Ties keep the input order. ``top_k`` limits the number of results. Other arguments are as for :meth:`predict`.
        """
        _refuse_prompts(prompt_name, prompt)
        documents = listed("documents", documents)
        top_k = None if top_k is None else whole("top_k", top_k, least=0)
        pairs = [(query, text) for text in documents]
        logits, scores = self._scores(pairs, batch_size, show_progress_bar, activation_fn)
        ordered = scores if callable(activation_fn or self.activation_fn) else logits
        ranking = order(ordered)[:top_k].tolist()
        rows: list[dict[str, Any]] = [{"corpus_id": index, "score": float(scores[index])} for index in ranking]
        if return_documents:
            for row in rows:
                row["text"] = documents[row["corpus_id"]]
        return rows

    def _scores(
        self, pairs: Any, batch_size: int, show_progress_bar: bool | None, activation_fn: str | Activation | None
    ) -> tuple[Float32, Float32]:
        """Logits and scores."""
        if not isinstance(batch_size, int) or batch_size < 1:
            raise InputError(f"expected batch_size to be a positive integer, got {batch_size!r}")
        logits = _with_bar(self.reranker, pairs, bool(show_progress_bar))
        return logits, activate(logits, self.activation_fn if activation_fn is None else activation_fn)


def _refuse_prompts(*prompts: str | None) -> None:
    given = [prompt for prompt in prompts if prompt]
    if given:
        raise InputError(
            f"expected no prompt, got {given[0]!r}", hint="these rerankers have no prompts; prepend it to the query"
        )


def _with_bar(reranker: Reranker, pairs: Iterable[tuple[str, str]], shown: bool) -> Float32:
    """Logits (P,) of pairs, with a progress bar on stderr if ``shown``."""
    if not shown:
        return reranker.score(pairs)
    from tqdm.auto import tqdm  # huggingface_hub brings it

    with tqdm(desc="Pairs", leave=False) as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        report: Progress = progress
        return reranker.score(pairs, progress=report)


class MtebCrossEncoder:
    """mteb's ``CrossEncoderProtocol``. Scores are logits, because mteb only sorts by them."""

    def __init__(self, reranker: Reranker) -> None:
        self.reranker = reranker

    @property
    def mteb_model_meta(self) -> Any:
        """The ModelMeta: the name and revision under which mteb stores results."""
        from mteb.models import ModelMeta

        checkpoint = self.reranker.checkpoint
        row = catalog.find(checkpoint.name)
        name = (row.repo if row is not None else None) or checkpoint.name
        about = {
            "name": name if "/" in name else f"turborank/{name}",
            "revision": checkpoint.revision or checkpoint.origin,
            "max_tokens": self.reranker.max_length,
            "model_type": ["cross-encoder"],
            "modalities": ["text"],
        }
        return ModelMeta.create_empty(overwrites=about)

    def predict(
        self,
        inputs1: Iterable[Mapping[str, Any]],
        inputs2: Iterable[Mapping[str, Any]],
        *,
        task_metadata: Any,
        hf_split: str,
        hf_subset: str,
        prompt_type: Any = None,
        batch_size: int = 32,
        show_progress_bar: bool = True,
        precision: str | None = None,
    ) -> npt.NDArray[np.float32]:
        """Logits (P,) of the pairs of ``inputs1`` (queries) and ``inputs2`` (documents), both in mteb's batches.

        The other arguments, except ``show_progress_bar``, have no effect. Raises InputError when there are not as many
        queries as documents.
        """
        queries, documents = ([text for batch in inputs for text in batch["text"]] for inputs in (inputs1, inputs2))
        if len(queries) != len(documents):
            raise InputError(f"expected as many queries as documents, got {len(queries)} and {len(documents)}")
        return _with_bar(self.reranker, list(zip(queries, documents, strict=True)), show_progress_bar)
