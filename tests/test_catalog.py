import json
import math
import re
from pathlib import Path
from typing import Any

import pytest

from turborank import Reranker, catalog
from turborank.architectures import ARCHITECTURES, recognise
from turborank.catalog import MODELS, find, lookup
from turborank.cli import main
from turborank.distill.teachers import TEACHERS, TeacherOptions
from turborank.errors import ModelNotFoundError, UnknownKeyError


@pytest.mark.parametrize("row", MODELS.values(), ids=MODELS)
def test_rows_are_whole(row: catalog.Model) -> None:
    assert MODELS[row.name] is row
    assert row.activation in ("sigmoid", "identity")
    assert row.architecture in ARCHITECTURES
    assert row.revision is None or re.fullmatch("[0-9a-f]{40}", row.revision)
    assert all(re.fullmatch("[0-9a-f]{64}", sha256) for sha256 in row.hashes.values())
    assert row.repo is None or not row.embedded
    assert row.licence


def test_names_and_aliases_mean_one_row_each() -> None:
    names = [name for row in MODELS.values() for name in (row.name, row.repo, *row.aliases) if name]
    assert len(set(names)) == len(names)
    for row in MODELS.values():
        for name in (row.name, *row.aliases, *([row.repo] if row.repo else [])):
            assert lookup(name) is row


# name -> parameters; docs/model.md and the publishers' own counts (MTEB's metadata, sizes of files)
PARAMETERS = {
    "jina-reranker-v1-base-en": 137_369_089, "jina-reranker-v1-turbo-en": 37_771_777,
    "jina-reranker-v1-tiny-en": 33_046_273, "mxbai-rerank-base-v1": 184_422_913, "mxbai-rerank-xsmall-v1": 70_830_337,
    "ms-marco-MiniLM-L-6-v2": 22_713_601, "ms-marco-MiniLM-L-4-v2": 19_164_673, "bge-reranker-base": 278_044_417,
    "bge-reranker-v2-m3": 567_755_777, "bge-reranker-large": 559_891_457,
    "jina-reranker-v2-base-multilingual": 278_437_633, "mmarco-mMiniLMv2-L12-H384-v1": 117_641_089,
    "ms-marco-MiniLM-L-12-v2": 33_360_385, "ms-marco-MiniLM-L-2-v2": 15_615_745,
    "ms-marco-TinyBERT-L-2-v2": 4_386_049, "ms-marco-TinyBERT-L-4": 14_350_561, "ms-marco-electra-base": 109_483_009,
    "ettin-reranker-17m-v1": 16_863_745, "ettin-reranker-32m-v1": 32_031_745, "ettin-reranker-68m-v1": 68_408_321,
    "ettin-reranker-150m-v1": 149_606_401, "ettin-reranker-400m-v1": 395_833_345,
    "ettin-reranker-1b-v1": 1_031_267_329, "gte-reranker-modernbert-base": 149_605_633,
    "granite-embedding-reranker-english-r2": 149_605_633,
}  # fmt: skip
# The model card of jina-reranker-v1: BEIR-17 nDCG@10, LoCo-5 nDCG@10, hit rate.
CARD = {
    "jina-reranker-v1-base-en": (52.45, 87.31, 85.53),
    "jina-reranker-v1-turbo-en": (49.60, 69.21, 85.13),
    "jina-reranker-v1-tiny-en": (48.54, 70.29, 85.00),
    "mxbai-rerank-base-v1": (49.19, None, 82.50),
    "mxbai-rerank-xsmall-v1": (48.80, None, 83.69),
    "ms-marco-MiniLM-L-6-v2": (48.64, None, 82.63),
    "ms-marco-MiniLM-L-4-v2": (47.81, None, 83.82),
    "bge-reranker-base": (47.89, None, 83.03),
}
# The announcement of the Ettin rerankers: MTEB(eng, v2) retrieval and NanoBEIR, nDCG@10 as it prints them.
ETTIN = {
    "ettin-reranker-17m-v1": (0.5576, 0.6746), "ettin-reranker-32m-v1": (0.5779, 0.6825),
    "ettin-reranker-68m-v1": (0.5915, 0.6915), "ettin-reranker-150m-v1": (0.5994, 0.7086),
    "gte-reranker-modernbert-base": (0.5843, 0.7017), "granite-embedding-reranker-english-r2": (0.5656, 0.6909),
    "ms-marco-MiniLM-L-6-v2": (0.5082, 0.6312), "ms-marco-MiniLM-L-12-v2": (0.5066, 0.6369),
    "bge-reranker-v2-m3": (0.5526, 0.6971), "bge-reranker-large": (0.5098, 0.6379),
    "bge-reranker-base": (0.4890, 0.6027), "mxbai-rerank-xsmall-v1": (0.4968, 0.6136),
}  # fmt: skip


def test_published_numbers() -> None:
    assert {name: row.parameters for name, row in MODELS.items() if not row.embedded} == PARAMETERS
    for name, row in MODELS.items():
        assert (row.beir, row.loco, row.hit_rate) == CARD.get(name, (None, None, None))
        mteb, nanobeir = ETTIN.get(name, (None, None))
        assert row.mteb == (None if mteb is None else pytest.approx(100 * mteb))
        assert row.nanobeir == (None if nanobeir is None else pytest.approx(100 * nanobeir))


# What config.json of each family states beside the row's own sizes; heads as published.
STATED: dict[str, dict[str, Any]] = {
    "jinabert": {"model_type": "bert", "position_embedding_type": "alibi", "type_vocab_size": 2},
    "bert": {"model_type": "bert", "type_vocab_size": 2, "vocab_size": 30522},
    "electra": {"model_type": "electra", "type_vocab_size": 2, "vocab_size": 30522},
    "xlm_roberta": {"model_type": "xlm-roberta", "type_vocab_size": 1, "vocab_size": 250002},
    "modernbert": {"model_type": "modernbert", "vocab_size": 50368},
}


@pytest.mark.parametrize("row", [r for r in MODELS.values() if r.architecture in STATED and not r.embedded], ids=str)
def test_a_row_s_shape_has_its_parameters(row: catalog.Model) -> None:
    """The sum over the family's tensor table; deberta, whose vocabulary differs between rows, is left out."""
    raw = STATED[row.architecture] | {
        "hidden_size": row.hidden_size, "num_hidden_layers": row.layers, "num_attention_heads": 4,
        "intermediate_size": row.intermediate_size, "layer_norm_eps": 1e-12,
        "max_position_embeddings": row.max_length + (2 if row.architecture == "xlm_roberta" else 0),
    }  # fmt: skip
    if row.architecture == "jinabert":
        raw["vocab_size"] = 30528 if row.name.endswith("base-en") else 61056
    names = {"encoder.layer.0.mlp.gated_layers.weight": ()} if row.architecture == "jinabert" else {}
    names |= {"head.norm.bias": ()} if row.name.startswith("ettin") else {}
    config = recognise(raw, names)
    shapes = ARCHITECTURES[row.architecture].parameters(config)
    assert sum(math.prod(shape) for shape in shapes.values()) == row.parameters


# Multiply-adds a token of the linear layers, by hand: L(4H² + 2HF), or 3HF with GEGLU.
WORK = {
    "ettin-reranker-17m-v1": 3_899_392, "ettin-reranker-1b-v1": 937_689_088, "bge-reranker-v2-m3": 301_989_888,
    "ms-marco-TinyBERT-L-2-v2": 393_216, "ms-marco-TinyBERT-L-4": 4_552_704, "jina-reranker-v1-turbo-en": 14_155_776,
    "gte-reranker-modernbert-base": 110_297_088, "ms-marco-MiniLM-L-6-v2": 10_616_832,
}  # fmt: skip


@pytest.mark.parametrize("name", WORK)
def test_work_is_that_of_the_shape(name: str) -> None:
    assert MODELS[name].work == pytest.approx(WORK[name] / 10_616_832)


def test_speed_classes_and_picks() -> None:
    speeds = {name: row.speed for name, row in MODELS.items()}
    assert speeds["ettin-reranker-17m-v1"] == speeds["ms-marco-TinyBERT-L-2-v2"] == "very fast"
    assert speeds["ms-marco-MiniLM-L-6-v2"] == "fast"
    assert speeds["ms-marco-MiniLM-L-12-v2"] == speeds[catalog.DEFAULT] == "medium"
    assert (speeds["ettin-reranker-150m-v1"], speeds["bge-reranker-v2-m3"]) == ("slow", "very slow")
    assert all(name in MODELS for _, name in catalog.PICKS)
    assert not any(MODELS[name].noncommercial for _, name in catalog.PICKS)


def test_models_without_commercial_use() -> None:
    assert [row.name for row in MODELS.values() if row.noncommercial] == ["jina-reranker-v2-base-multilingual"]
    assert catalog.forbids_commerce("cc-by-nc-sa-4.0")
    assert not any(catalog.forbids_commerce(licence) for licence in ("Apache-2.0", "MIT", "NCSA", "not released"))


def test_the_default_is_embedded() -> None:
    assert MODELS[catalog.DEFAULT].embedded
    assert MODELS[catalog.DEFAULT].folder.name == catalog.DEFAULT


def test_unknown_names_print_the_table() -> None:
    with pytest.raises(UnknownKeyError, match="did you mean 'jina-reranker-v1-turbo-en'") as caught:
        lookup("jina-reranker-v1-turbo")
    assert all(name in str(caught.value) for name in MODELS)
    assert find("jina-reranker-v1-turbo") is None


@pytest.mark.parametrize("name", catalog.RETIRED)
def test_a_replaced_model_names_the_one_that_replaced_it(name: str, tmp_path: Path, monkeypatch, capsys) -> None:
    """In the library and in every command that takes a model."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text("Scouts dance.\n")
    judged = [
        {"query": "bees", "document": text, "relevant": text == "Scouts dance."} for text in ("Scouts dance.", "Tides.")
    ]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in judged))
    new = catalog.RETIRED[name]
    assert name not in MODELS
    assert MODELS[new].embedded
    said = f"expected a model of this version of turborank, got '{name}', which {new} replaced; use {new}"
    for load in (lookup, Reranker, lambda name: TEACHERS["checkpoint"].open(name, TeacherOptions())):
        with pytest.raises(ModelNotFoundError, match=said):
            load(name)
    for command in (
        f"rank bees a.txt --model {name}", f"calibrate a.jsonl --model {name}", f"export {name} --to onnx --out new",
        f"distill student layers --from {name} --layers 1 --out new",
        f"serve --model {name}", f"serve --alias rerank={name}", f"serve --calibration {name}=calibration.json",
    ):  # fmt: skip
        assert main.run(command.split()) == 2, command
        out, err = capsys.readouterr()
        assert said in " ".join((out + err).split()), command
