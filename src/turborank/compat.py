"""The faces other libraries expect of a cross-encoder, over the same :class:`~turborank.Reranker`.

``CrossEncoder``      sentence-transformers': ``predict(pairs)`` and ``rank(query, documents)``. Change the import, keep
                      the code. It knows the parameters of sentence-transformers 4 to 6: what does not change a score
                      (batch sizes, pools of processes) is accepted, what would and cannot be done (prompts) is refused.
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

# Where a config.json names its activation, newest first; values end in a torch class name.
_NAMED_IN_CONFIG = (("sentence_transformers", "activation_fn"), ("sbert_ce_default_activation_function", None))
_ACTIVATIONS = ("sigmoid", "identity")


def published_activation(reranker: Reranker) -> str:
    """How a model's published scores are made of its logits: "sigmoid", or "identity".

    Decided as sentence-transformers does, by ``config.json``, with the catalog's word where that is silent, and else
    the sigmoid of a model with one label. Raises InputError for a function turborank does not know.
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
    """Scores (P,), float32, of logits (P,). A function is given a torch tensor, as in sentence-transformers."""
    if callable(activation):
        import torch

        scores: Float32 = np.asarray(activation(torch.from_numpy(logits[:, None])), dtype=np.float32)
        if scores.size != logits.size:
            raise InputError(f"expected one number a pair from activation_fn, got {scores.shape} for {logits.size}")
        return scores.reshape(-1)
    if activation not in _ACTIVATIONS:
        raise InputError(f"expected activation_fn to be a function or one of {_ACTIVATIONS}, got {activation!r}")
    if activation == "identity":
        return logits
    # 1 / (1 + e^-logit), without overflow
    return np.exp(-np.logaddexp(0.0, -logits.astype(np.float64))).astype(np.float32)


_PRECISIONS = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16", "auto": "auto"}


def _precision_of(model_kwargs: Mapping[str, Any]) -> str:
    """Our name of the dtype, given by its name or as torch's own object."""
    wanted = model_kwargs.get("dtype", model_kwargs.get("torch_dtype"))
    name = "auto" if wanted is None else str(wanted).removeprefix("torch.")
    if name not in _PRECISIONS:
        raise InputError(f"expected dtype in model_kwargs to be one of {', '.join(_PRECISIONS)}, got {wanted!r}")
    return _PRECISIONS[name]


def _check_revision(reranker: Reranker, revision: str | None) -> None:
    """A revision of the Hub that was asked for must be the one that was loaded; folders have none."""
    checkpoint = reranker.checkpoint
    if checkpoint.origin in ("hub", "cache") and revision not in (None, "main", checkpoint.revision):
        raise InputError(
            f"expected revision {checkpoint.revision or 'None'} of {checkpoint.name}, got {revision!r}",
            hint="download that revision and give its folder",
        )


class CrossEncoder:
    """``sentence_transformers.CrossEncoder`` for models with one label, run by turborank.

    Differences, all on purpose: a pair is read to the model's own length (8,192 tokens for the jina rerankers), where
    sentence-transformers stops at the tokenizer's 512 (``max_length=512`` brings that back); special tokens in texts
    are plain text (``faithful=True`` brings their power back); and ``rank`` sorts by logit, so scores that
    round to the same float still come in order.

    Args:
        model_name_or_path: what :class:`~turborank.Reranker` takes; by default the embedded model.
        num_labels: 1, or None for the model's own, which must be 1.
        max_length: tokens of a pair that are read.
        activation_fn: "sigmoid", "identity" or a function of a torch tensor; by default the published one.
        device: "cpu", "cuda" (the torch engine, which must then find one), a torch.device of these, or None.
        trust_remote_code: of no effect: turborank never runs code from a checkpoint.
        local_files_only: never touch the network.
        revision: for models of the catalog, the one it names; of no effect on a folder.
        model_kwargs: ``dtype`` (or ``torch_dtype``) chooses the precision where ``precision`` does not; what else is in
            it has no influence on a score.
        cache_folder, token, backend: of no effect: ``HF_HOME`` and ``HF_TOKEN`` say where models are kept and who asks.
        engine: of :class:`~turborank.Reranker`, as are the next two.
        precision: "auto" is the engine's default, int8 on CPUs; "fp32" for the published scores to 1e-5.
        faithful: honour special-token strings in texts.

    Raises:
        TurborankError: as :class:`~turborank.Reranker` does.
        EngineUnavailableError: ``device="cuda"`` and there is none.

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
        """Tokens of a pair that are read, template included."""
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
        """Scores of (query, document) pairs, in the order given; of one pair, its score.

        Args:
            inputs: a list of pairs, or one pair; ``sentences`` is the older name.
            batch_size: checked, and otherwise of no effect: batches are planned by tokens, and no score depends on
                them.
            show_progress_bar: whether to show one (on stderr); None means no.
            activation_fn: instead of the model's, for this call.
            apply_softmax: of no effect on models with one label.
            convert_to_numpy: a float32 array; else a list of torch scalars.
            convert_to_tensor: a torch tensor; wins over ``convert_to_numpy``.
            sentences: see ``inputs``.
            prompt_name: must be None: rerankers of these families have no prompts.
            prompt: the same.
            device: of no effect: where to compute is decided once, at construction.
            pool: of no effect, like ``chunk_size``.
            chunk_size: of no effect.

        Raises:
            InputError: not exactly one of ``inputs`` and ``sentences``, or something in them is no pair of strings.

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
        """Documents by relevance, best first: ``corpus_id``, ``score`` and, if asked for, ``text`` of each.

        Ties keep the order given. ``top_k`` keeps the best so many. Arguments are those of :meth:`predict`.
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
        raise InputError(f"expected no prompt, got {given[0]!r}: put it before the query yourself if you mean it")


def _with_bar(reranker: Reranker, pairs: Iterable[tuple[str, str]], shown: bool) -> Float32:
    """Logits of pairs, with a bar on stderr where it is asked for."""
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
    """A reranker as mteb wants it. Scores are logits: mteb only orders them."""

    def __init__(self, reranker: Reranker) -> None:
        self.reranker = reranker

    @property
    def mteb_model_meta(self) -> Any:
        """The ModelMeta: who scored, so that results are filed under the right name."""
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

        The task, its split and mteb's batch size and embedding precision have no influence on a score.
        """
        queries, documents = ([text for batch in inputs for text in batch["text"]] for inputs in (inputs1, inputs2))
        if len(queries) != len(documents):
            raise InputError(f"expected as many queries as documents, got {len(queries)} and {len(documents)}")
        return _with_bar(self.reranker, list(zip(queries, documents, strict=True)), show_progress_bar)
