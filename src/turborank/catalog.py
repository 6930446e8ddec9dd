"""MODELS: the rerankers known by name, one row each, with what their authors published about them.

Numbers are those of Jina AI's model card (docs/model.md §6.1): nDCG@10 over 17 BEIR collections, nDCG@10
over the five LoCo collections, and the hit rate, the share of relevant documents among the first ten; all × 100.
They are the publishers' own; what turborank measures stands elsewhere (``turborank evaluate``).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType

from turborank.errors import UnknownKeyError

DEFAULT = "turborank-embedded-v1"

# The two published jina rerankers share their tokenizer, byte for byte.
_JINA_TOKENIZER = {
    "tokenizer.json": "0046da43cc8c424b317f56b092b0512aaaa65c4f925d2f16af9d9eeb4d0ef902",
    "tokenizer_config.json": "d291c6652d96d56ffdbcf1ea19d9bae5ed79003f7648c627e725a619227ce8fa",
    "special_tokens_map.json": "06e405a36dfe4b9604f484f6a1e619af1a7f7d09e34a8555eb0b77b66318067f",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """One reranker. ``repo`` and ``revision`` are those of the Hugging Face Hub."""

    name: str
    architecture: str  # a row of ARCHITECTURES
    parameters: int
    layers: int
    hidden_size: int
    max_length: int  # tokens of a pair
    licence: str
    activation: str  # what the published score is: "sigmoid" of the logit, or the logit itself ("identity")
    repo: str | None = None  # None: not on the Hub
    revision: str | None = None  # commit; None: the default branch, no revision could be confirmed
    aliases: tuple[str, ...] = ()
    hashes: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))  # file name -> sha256
    embedded: bool = False  # ships inside the package
    beir: float | None = None
    loco: float | None = None
    hit_rate: float | None = None
    note: str = ""

    @property
    def folder(self) -> Path:
        """Where the files of an embedded model are."""
        return Path(__file__).parent / "models" / self.name


_ROWS = (
    Model(
        name=DEFAULT,
        architecture="jinabert",
        parameters=22_368_771,
        layers=6,
        hidden_size=384,
        max_length=8192,
        licence="Apache-2.0",
        activation="sigmoid",
        embedded=True,
        note="the default; ships with the package, works offline; English",
    ),
    Model(
        name="jina-reranker-v1-turbo-en",
        architecture="jinabert",
        parameters=37_771_777,
        layers=6,
        hidden_size=384,
        max_length=8192,
        licence="Apache-2.0",
        activation="sigmoid",
        repo="jinaai/jina-reranker-v1-turbo-en",
        revision="b8c14f4e723d9e0aab4732a7b7b93741eeeb77c2",
        hashes=MappingProxyType(
            {"config.json": "e050ff6a15ae9295e84882fa0e98051bd8754856cd5201395ebf00ce9f2d609b", **_JINA_TOKENIZER}
        ),
        beir=49.60,
        loco=69.21,
        hit_rate=85.13,
        note="distilled from base; English",
    ),
    Model(
        name="jina-reranker-v1-tiny-en",
        architecture="jinabert",
        parameters=33_046_273,
        layers=4,
        hidden_size=384,
        max_length=8192,
        licence="Apache-2.0",
        activation="sigmoid",
        repo="jinaai/jina-reranker-v1-tiny-en",
        revision="aca45de6945b5dc6399abcd2a9c55ded5dc9111f",
        hashes=MappingProxyType(
            {"config.json": "dc70646aa6c9e75e3c513cc9c037f35ad54308001c3961d45c0f69749bcfb022", **_JINA_TOKENIZER}
        ),
        beir=48.54,
        loco=70.29,
        hit_rate=85.00,
        note="distilled from base; English",
    ),
    Model(
        name="jina-reranker-v1-base-en",
        architecture="jinabert",
        parameters=137_369_089,
        layers=12,
        hidden_size=768,
        max_length=8192,
        licence="not released",
        activation="sigmoid",
        aliases=("jinaai/jina-reranker-v1-base-en",),
        beir=52.45,
        loco=87.31,
        hit_rate=85.53,
        note="teacher of turbo and tiny; its weights are not public, so it cannot be loaded",
    ),
    Model(
        name="mxbai-rerank-base-v1",
        architecture="deberta",
        parameters=184_422_913,
        layers=12,
        hidden_size=768,
        max_length=512,
        licence="Apache-2.0",
        activation="sigmoid",
        repo="mixedbread-ai/mxbai-rerank-base-v1",
        beir=49.19,
        hit_rate=82.50,
    ),
    Model(
        name="mxbai-rerank-xsmall-v1",
        architecture="deberta",
        parameters=70_830_337,
        layers=12,
        hidden_size=384,
        max_length=512,
        licence="Apache-2.0",
        activation="sigmoid",
        repo="mixedbread-ai/mxbai-rerank-xsmall-v1",
        revision="b5c6e9da73abc3711f593f705371cdbe9e0fe422",
        beir=48.80,
        hit_rate=83.69,
    ),
    Model(
        name="ms-marco-MiniLM-L-6-v2",
        architecture="bert",
        parameters=22_713_601,
        layers=6,
        hidden_size=384,
        max_length=512,
        licence="Apache-2.0",
        activation="identity",
        repo="cross-encoder/ms-marco-MiniLM-L-6-v2",
        revision="c5ee24cb16019beea0893ab7796b1df96625c6b8",
        aliases=("cross-encoder/ms-marco-MiniLM-L6-v2",),  # the repository's newer name
        beir=48.64,
        hit_rate=82.63,
    ),
    Model(
        name="ms-marco-MiniLM-L-4-v2",
        architecture="bert",
        parameters=19_164_673,
        layers=4,
        hidden_size=384,
        max_length=512,
        licence="Apache-2.0",
        activation="identity",
        repo="cross-encoder/ms-marco-MiniLM-L-4-v2",
        aliases=("cross-encoder/ms-marco-MiniLM-L4-v2",),
        beir=47.81,
        hit_rate=83.82,
    ),
    Model(
        name="bge-reranker-base",
        architecture="xlm_roberta",
        parameters=278_044_417,
        layers=12,
        hidden_size=768,
        max_length=512,
        licence="MIT",
        activation="sigmoid",
        repo="BAAI/bge-reranker-base",
        revision="2cfc18c9415c912f9d8155881c133215df768a70",
        beir=47.89,
        hit_rate=83.03,
        note="English and Chinese",
    ),
)

MODELS: dict[str, Model] = {row.name: row for row in _ROWS}


def find(name: str) -> Model | None:
    """The row called ``name``, or whose repository or alias it is; None if there is none."""
    if name in MODELS:
        return MODELS[name]
    return next((row for row in MODELS.values() if name == row.repo or name in row.aliases), None)


def lookup(name: str) -> Model:
    """The row called ``name``, or whose repository or alias it is. Raises UnknownKeyError, printing the table."""
    row = find(name)
    if row is None:
        raise UnknownKeyError(
            "the model", name, MODELS, hint="or give the path of a model folder, or a Hugging Face id as owner/name"
        )
    return row
