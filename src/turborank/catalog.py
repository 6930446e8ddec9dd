"""MODELS: the rerankers known by name, one row each, with the facts and figures that their publishers state.

Quality figures are the publishers', × 100; all figures of one column come from one publisher. Measure models yourself
with ``turborank evaluate``:

``beir``, ``loco``, ``hit_rate``  nDCG@10 over 17 BEIR collections and over the five LoCo collections, and the share of
                    relevant documents among the first ten; the model card of jina-reranker-v1
``mteb``, ``nanobeir``            nDCG@10 of MTEB(eng, v2) retrieval, mean of six first stages, and of NanoBEIR; the
                    announcement of the Ettin rerankers, https://huggingface.co/blog/ettin-reranker
``mkqa``                          nDCG@10 of MKQA, 26 languages; the model card of jina-reranker-v2
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType

from turborank.errors import ModelNotFoundError, UnknownKeyError

DEFAULT = "turborank-embedded-v2"
# Names of models that earlier versions had, and the model that replaced each.
RETIRED: Mapping[str, str] = MappingProxyType({"turborank-embedded-v1": DEFAULT})

_MINILM_L6 = 6 * (4 * 384**2 + 2 * 384 * 1536)
# Speed class -> largest ``Model.work`` of the class.
SPEEDS = (("very fast", 0.5), ("fast", 1.5), ("medium", 5.0), ("slow", 12.0), ("very slow", float("inf")))

# The two published jina rerankers have identical tokenizer files.
_JINA_TOKENIZER = {
    "tokenizer.json": "0046da43cc8c424b317f56b092b0512aaaa65c4f925d2f16af9d9eeb4d0ef902",
    "tokenizer_config.json": "d291c6652d96d56ffdbcf1ea19d9bae5ed79003f7648c627e725a619227ce8fa",
    "special_tokens_map.json": "06e405a36dfe4b9604f484f6a1e619af1a7f7d09e34a8555eb0b77b66318067f",
}


def forbids_commerce(licence: str) -> bool:
    """Whether a licence identifier forbids commercial use: a Creative Commons "NC" licence such as CC-BY-NC-4.0."""
    return "nc" in licence.lower().split("-")


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """One reranker. ``repo`` and ``revision`` are those on the Hugging Face Hub."""

    name: str
    architecture: str  # a row of ARCHITECTURES
    parameters: int
    layers: int
    hidden_size: int
    intermediate_size: int
    max_length: int  # tokens of a pair, template included
    licence: str
    languages: str = "English"
    activation: str  # published score: "sigmoid" of the logit, or "identity", the logit itself (docs/model.md §5.4)
    repo: str | None = None  # None: not on the Hub
    revision: str | None = None  # commit; None: the default branch, because no commit could be confirmed
    aliases: tuple[str, ...] = ()
    hashes: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))  # file name -> sha256
    embedded: bool = False  # ships inside the package
    beir: float | None = None
    loco: float | None = None
    hit_rate: float | None = None
    mteb: float | None = None
    nanobeir: float | None = None
    mkqa: float | None = None
    note: str = ""

    @property
    def noncommercial(self) -> bool:
        """Whether the licence forbids commercial use."""
        return forbids_commerce(self.licence)

    @property
    def work(self) -> float:
        """Multiply-adds per token in the linear layers, relative to MiniLM-L6 (10.6 million), from the model's shape.

        Attention, whose work grows with the length of the pair, is not included.
        """
        products = 3 if self.architecture in ("jinabert", "modernbert") else 2  # GEGLU has a third matrix
        layer = 4 * self.hidden_size**2 + products * self.hidden_size * self.intermediate_size
        return self.layers * layer / _MINILM_L6

    @property
    def speed(self) -> str:
        """The model's speed class by ``work``."""
        return next(name for name, limit in SPEEDS if self.work <= limit)

    @property
    def folder(self) -> Path:
        """The folder with the files of an embedded model."""
        return Path(__file__).parent / "models" / self.name


# fmt: off
_ROWS = (
    Model(
        name=DEFAULT, architecture="jinabert", parameters=29_429_763, layers=10, hidden_size=384,
        intermediate_size=1536, max_length=8192, licence="Apache-2.0", activation="sigmoid", embedded=True,
        note="the default; ships with the package, works offline",
    ),
    Model(
        name="jina-reranker-v1-turbo-en", architecture="jinabert", parameters=37_771_777, layers=6, hidden_size=384,
        intermediate_size=1536, max_length=8192, licence="Apache-2.0", activation="sigmoid",
        repo="jinaai/jina-reranker-v1-turbo-en", revision="b8c14f4e723d9e0aab4732a7b7b93741eeeb77c2",
        hashes=MappingProxyType(
            {"config.json": "e050ff6a15ae9295e84882fa0e98051bd8754856cd5201395ebf00ce9f2d609b", **_JINA_TOKENIZER}
        ),
        beir=49.60, loco=69.21, hit_rate=85.13, note="distilled from base",
    ),
    Model(
        name="jina-reranker-v1-tiny-en", architecture="jinabert", parameters=33_046_273, layers=4, hidden_size=384,
        intermediate_size=1536, max_length=8192, licence="Apache-2.0", activation="sigmoid",
        repo="jinaai/jina-reranker-v1-tiny-en", revision="aca45de6945b5dc6399abcd2a9c55ded5dc9111f",
        hashes=MappingProxyType(
            {"config.json": "dc70646aa6c9e75e3c513cc9c037f35ad54308001c3961d45c0f69749bcfb022", **_JINA_TOKENIZER}
        ),
        beir=48.54, loco=70.29, hit_rate=85.00, note="distilled from base",
    ),
    Model(
        name="jina-reranker-v1-base-en", architecture="jinabert", parameters=137_369_089, layers=12, hidden_size=768,
        intermediate_size=3072, max_length=8192, licence="not released", activation="sigmoid",
        aliases=("jinaai/jina-reranker-v1-base-en",), beir=52.45, loco=87.31, hit_rate=85.53,
        note="teacher of turbo and tiny; its weights are not public, so it cannot be loaded",
    ),
    *(
        Model(
            name=f"ettin-reranker-{size}-v1", architecture="modernbert", parameters=parameters, layers=layers,
            hidden_size=hidden, intermediate_size=inner, max_length=7999, licence="Apache-2.0", activation="identity",
            repo=f"cross-encoder/ettin-reranker-{size}-v1", revision=revision, mteb=mteb, nanobeir=nanobeir,
            note="logits from -12 to 22, so relevance scores saturate: sort by logit",
        )
        for size, parameters, layers, hidden, inner, revision, mteb, nanobeir in (
            ("17m", 16_863_745, 7, 256, 384, "9e4aa35321a6dd1a43ca313f500c4b4f7cfb5cc6", 55.76, 67.46),
            ("32m", 32_031_745, 10, 384, 576, "b33e5ceb5110773ea9cf5e00c9bedc83a8c2afdd", 57.79, 68.25),
            ("68m", 68_408_321, 19, 512, 768, "d166fa88ddde3c42bc3ee92f7df476d941c8204a", 59.15, 69.15),
            ("150m", 149_606_401, 22, 768, 1152, "025501c4e0f9bbeb4c5b198318e0089ff061cc14", 59.94, 70.86),
            ("400m", 395_833_345, 28, 1024, 2624, "5dca36282a5d85f368d2544002513a29159b4c9e", None, None),
            ("1b", 1_031_267_329, 28, 1792, 3840, "7d20e9baad17016fdf5549c08f69a2d7ca3e60c3", None, None),
        )
    ),
    Model(
        name="gte-reranker-modernbert-base", architecture="modernbert", parameters=149_605_633, layers=22,
        hidden_size=768, intermediate_size=1152, max_length=8192, licence="Apache-2.0", activation="sigmoid",
        repo="Alibaba-NLP/gte-reranker-modernbert-base", revision="f7481e6055501a30fb19d090657df9ec1f79ab2c",
        mteb=58.43, nanobeir=70.17,
    ),
    Model(
        name="granite-embedding-reranker-english-r2", architecture="modernbert", parameters=149_605_633, layers=22,
        hidden_size=768, intermediate_size=1152, max_length=8192, licence="Apache-2.0", activation="sigmoid",
        repo="ibm-granite/granite-embedding-reranker-english-r2",
        revision="d09d3d6971b689bf9c23839e45a470874d46e13a", mteb=56.56, nanobeir=69.09,
    ),
    Model(
        name="mxbai-rerank-base-v1", architecture="deberta", parameters=184_422_913, layers=12, hidden_size=768,
        intermediate_size=3072, max_length=512, licence="Apache-2.0", activation="sigmoid",
        repo="mixedbread-ai/mxbai-rerank-base-v1", beir=49.19, hit_rate=82.50,
    ),
    Model(
        name="mxbai-rerank-xsmall-v1", architecture="deberta", parameters=70_830_337, layers=12, hidden_size=384,
        intermediate_size=1536, max_length=512, licence="Apache-2.0", activation="sigmoid",
        repo="mixedbread-ai/mxbai-rerank-xsmall-v1", revision="b5c6e9da73abc3711f593f705371cdbe9e0fe422",
        beir=48.80, hit_rate=83.69, mteb=49.68, nanobeir=61.36,
    ),
    Model(
        name="ms-marco-TinyBERT-L-2-v2", architecture="bert", parameters=4_386_049, layers=2, hidden_size=128,
        intermediate_size=512, max_length=512, licence="Apache-2.0", activation="identity",
        repo="cross-encoder/ms-marco-TinyBERT-L-2-v2", revision="81d1926f67cb8eee2c2be17ca9f793c7c3bd20cc",
        aliases=("cross-encoder/ms-marco-TinyBERT-L2-v2",),  # the repository's newer name, as below
    ),
    Model(
        name="ms-marco-TinyBERT-L-4", architecture="bert", parameters=14_350_561, layers=4, hidden_size=312,
        intermediate_size=1200, max_length=512, licence="Apache-2.0", activation="sigmoid",
        repo="cross-encoder/ms-marco-TinyBERT-L-4", aliases=("cross-encoder/ms-marco-TinyBERT-L4",),
        note="heads of 26 channels: in the native engine not yet, so slow; L-2-v2 is newer",
    ),
    Model(
        name="ms-marco-MiniLM-L-2-v2", architecture="bert", parameters=15_615_745, layers=2, hidden_size=384,
        intermediate_size=1536, max_length=512, licence="Apache-2.0", activation="identity",
        repo="cross-encoder/ms-marco-MiniLM-L-2-v2", aliases=("cross-encoder/ms-marco-MiniLM-L2-v2",),
    ),
    Model(
        name="ms-marco-MiniLM-L-4-v2", architecture="bert", parameters=19_164_673, layers=4, hidden_size=384,
        intermediate_size=1536, max_length=512, licence="Apache-2.0", activation="identity",
        repo="cross-encoder/ms-marco-MiniLM-L-4-v2", aliases=("cross-encoder/ms-marco-MiniLM-L4-v2",),
        beir=47.81, hit_rate=83.82,
    ),
    Model(
        name="ms-marco-MiniLM-L-6-v2", architecture="bert", parameters=22_713_601, layers=6, hidden_size=384,
        intermediate_size=1536, max_length=512, licence="Apache-2.0", activation="identity",
        repo="cross-encoder/ms-marco-MiniLM-L-6-v2", revision="c5ee24cb16019beea0893ab7796b1df96625c6b8",
        aliases=("cross-encoder/ms-marco-MiniLM-L6-v2",), beir=48.64, hit_rate=82.63, mteb=50.82, nanobeir=63.12,
    ),
    Model(
        name="ms-marco-MiniLM-L-12-v2", architecture="bert", parameters=33_360_385, layers=12, hidden_size=384,
        intermediate_size=1536, max_length=512, licence="Apache-2.0", activation="identity",
        repo="cross-encoder/ms-marco-MiniLM-L-12-v2", revision="7b0235231ca2674cb8ca8f022859a6eba2b1c968",
        aliases=("cross-encoder/ms-marco-MiniLM-L12-v2",), mteb=50.66, nanobeir=63.69,
    ),
    Model(
        name="ms-marco-electra-base", architecture="electra", parameters=109_483_009, layers=12, hidden_size=768,
        intermediate_size=3072, max_length=512, licence="Apache-2.0", activation="sigmoid",
        repo="cross-encoder/ms-marco-electra-base",
    ),
    Model(
        name="bge-reranker-base", architecture="xlm_roberta", parameters=278_044_417, layers=12, hidden_size=768,
        intermediate_size=3072, max_length=512, licence="MIT", activation="sigmoid",
        languages="English, Chinese", repo="BAAI/bge-reranker-base",
        revision="2cfc18c9415c912f9d8155881c133215df768a70", beir=47.89, hit_rate=83.03, mteb=48.90, nanobeir=60.27,
    ),
    Model(
        name="bge-reranker-large", architecture="xlm_roberta", parameters=559_891_457, layers=24, hidden_size=1024,
        intermediate_size=4096, max_length=512, licence="MIT", activation="sigmoid", languages="English, Chinese",
        repo="BAAI/bge-reranker-large", revision="55611d7bca2a7133960a6d3b71e083071bbfc312",
        mteb=50.98, nanobeir=63.79,
    ),
    Model(
        name="bge-reranker-v2-m3", architecture="xlm_roberta", parameters=567_755_777, layers=24, hidden_size=1024,
        intermediate_size=4096, max_length=8192, licence="Apache-2.0", activation="sigmoid", languages="multilingual",
        repo="BAAI/bge-reranker-v2-m3", revision="953dc6f6f85a1b2dbfca4c34a2796e7dde08d41e",
        mteb=55.26, nanobeir=69.71, mkqa=54.17,
        note="tuned at 1,024 tokens; its authors advise max_length=1024 although 8,192 work",
    ),
    Model(
        name="mmarco-mMiniLMv2-L12-H384-v1", architecture="xlm_roberta", parameters=117_641_089, layers=12,
        hidden_size=384, intermediate_size=1536, max_length=512, licence="Apache-2.0", activation="identity",
        languages="multilingual", repo="cross-encoder/mmarco-mMiniLMv2-L12-H384-v1",
        revision="1427fd652930e4ba29e8149678df786c240d8825", mkqa=53.37,
    ),
    Model(
        name="jina-reranker-v2-base-multilingual", architecture="xlm_roberta", parameters=278_437_633, layers=12,
        hidden_size=768, intermediate_size=3072, max_length=1024, licence="CC-BY-NC-4.0", activation="sigmoid",
        languages="multilingual", repo="jinaai/jina-reranker-v2-base-multilingual", mkqa=54.83,
        note="no commercial use without an agreement with Jina AI",
    ),
)
# fmt: on

MODELS: dict[str, Model] = {row.name: row for row in _ROWS}

# Recommendations: (need, name of the model to start with).
PICKS = (
    ("English, nothing to download", DEFAULT),
    ("English, most quality for little work, long documents too", "ettin-reranker-17m-v1"),
    ("English, best of the measured ones", "ettin-reranker-150m-v1"),
    ("many languages, long documents", "bge-reranker-v2-m3"),
    ("many languages, small", "mmarco-mMiniLMv2-L12-H384-v1"),
    ("the least work of all", "ms-marco-TinyBERT-L-2-v2"),
)


def find(name: str) -> Model | None:
    """The row with this name, repository or alias; None if there is none."""
    if name in MODELS:
        return MODELS[name]
    return next((row for row in MODELS.values() if name == row.repo or name in row.aliases), None)


def lookup(name: str) -> Model:
    """The row with this name, repository or alias.

    Raises UnknownKeyError, which lists the names, and ModelNotFoundError for a model that another one replaced.
    """
    row = find(name)
    if row is None:
        if name in RETIRED:
            raise retired(name)
        raise UnknownKeyError(
            "the model", name, MODELS, hint="or give the path of a model folder, or a Hugging Face id as owner/name"
        )
    return row


def retired(name: str) -> ModelNotFoundError:
    """The error for a name of RETIRED."""
    new = RETIRED[name]
    return ModelNotFoundError(
        f"expected a model of this version of turborank, got {name!r}, which {new} replaced",
        hint=f"use {new}, and set thresholds and calibrations again, because its scores differ",
    )
