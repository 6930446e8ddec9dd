"""ONNX graphs in ONNX Runtime against the reference engine, for every family; and the command's errors."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from helpers import small_config, write_checkpoint
from random_models import packed

pytest.importorskip("torch")
pytest.importorskip("onnxscript", reason="needs pip install 'turborank[onnx]'")
pytest.importorskip("onnxruntime", reason="needs pip install 'turborank[onnx]'")

import onnx
import onnxruntime
from families import save_family
from sample_tokenizers import bpe_tokenizer, wordpiece_tokenizer
from tokenizers import Tokenizer

from turborank import Reranker, catalog, checkpoint
from turborank import export as exporting
from turborank.architectures import ARCHITECTURES
from turborank.checkpoint.tensors import dense
from turborank.cli import main
from turborank.errors import CheckpointError, EngineError, InputError, UnknownKeyError
from turborank.export import EXPORTS, export
from turborank.export import onnx as onnx_export
from turborank.ops import reference

pytestmark = pytest.mark.slow

TOLERANCE = 1e-4
# Lengths of the pairs of a batch. The models of this test read 512 tokens, the exporter saw 40.
BATCHES = ([2], [7], [33, 5], [2, 512], [90, 41, 90, 3, 17], [511])
TOKENIZERS = {"geglu": bpe_tokenizer} | dict.fromkeys(("cosine", "focus", "sum"), wordpiece_tokenizer)
MODELS = ("geglu", "cosine", "focus", "sum", "bert", "xlm_roberta", "deberta")


def save(folder: Path, name: str) -> Path:
    """A random model of a family in its published layout."""
    if name in ("bert", "xlm_roberta", "deberta"):
        save_family(folder, name, seed=3, num_hidden_layers=2)  # the exporter takes seconds a layer
        return folder
    changes = {} if name == "geglu" else {"head": name, "feed_forward": "gelu"}
    return write_checkpoint(folder, small_config(**changes), tokenizer=TOKENIZERS[name]())


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory):
    """name -> (checkpoint, folder of the export), made when first asked for."""
    done = {}

    def get(name: str):
        if name not in done:
            base = tmp_path_factory.mktemp(name)
            model = save(base / "model", name)
            export(str(model), "onnx", base / "out")
            done[name] = checkpoint.read(model), base / "out"
        return done[name]

    return get


def padded_inputs(batch, session, fill=0):
    """The batch as a user pads it; positions after a pair hold ``fill`` and are masked."""
    lengths = np.diff(batch.cu_seqlens)
    shape = len(lengths), int(lengths.max())
    arrays = {
        "input_ids": np.full(shape, fill, np.int64),
        "attention_mask": np.zeros(shape, np.int64),
        "token_type_ids": np.full(shape, min(fill, 1), np.int64),
    }
    for row, (start, end) in enumerate(zip(batch.cu_seqlens, batch.cu_seqlens[1:], strict=False)):
        arrays["input_ids"][row, : end - start] = batch.input_ids[start:end]
        arrays["attention_mask"][row, : end - start] = 1
        arrays["token_type_ids"][row, : end - start] = batch.type_ids[start:end]
    return {value.name: arrays[value.name] for value in session.get_inputs()}


def session_of(folder: Path):
    return onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])


@pytest.mark.parametrize("name", MODELS)
def test_onnx_runtime_computes_our_logits(name, exported):
    source, folder = exported(name)
    config, weights, session = source.config, dense(source.weights), session_of(folder)
    for seed, lengths in enumerate(BATCHES):
        batch = packed(lengths, config.vocab_size, seed)
        expected = ARCHITECTURES[config.architecture].forward(weights, config, batch, reference)
        (found,) = session.run(["logits"], padded_inputs(batch, session))
        assert found.shape == (len(lengths), 1)
        assert found.dtype == np.float32
        np.testing.assert_allclose(found[:, 0], expected, atol=TOLERANCE, rtol=0, err_msg=f"lengths {lengths}")


@pytest.mark.parametrize("name", MODELS)
def test_the_batches_would_tell_models_apart(name, exported):
    """Logits differ between pairs by far more than the tolerance of the comparison above."""
    source, folder = exported(name)
    session = session_of(folder)
    (logits,) = session.run(["logits"], padded_inputs(packed(BATCHES[4], source.config.vocab_size, 4), session))
    assert np.ptp(logits) > 100 * TOLERANCE


@pytest.mark.parametrize("name", MODELS)
def test_padding_and_neighbours_do_not_matter(name, exported):
    source, folder = exported(name)
    session = session_of(folder)
    batch = packed([40, 3, 21], source.config.vocab_size, 1)
    (clean,), (dirty,) = (session.run(["logits"], padded_inputs(batch, session, fill)) for fill in (0, 9))
    np.testing.assert_allclose(clean, dirty, atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", MODELS)
def test_a_graph_takes_any_batch_and_holds_no_table_of_distances(name, exported):
    source, folder = exported(name)
    graph = onnx.load(folder / "model.onnx")
    onnx.checker.check_model(graph, full_check=True)
    assert [(entry.domain, entry.version) for entry in graph.opset_import] == [("", 18)]
    for value in graph.graph.input:
        assert [d.dim_param for d in value.type.tensor_type.shape.dim] == ["batch", "length"]
        assert value.type.tensor_type.elem_type == onnx.TensorProto.INT64
    stored = sum(onnx.numpy_helper.to_array(tensor).nbytes for tensor in graph.graph.initializer)
    weights = sum(value.nbytes for value in dense(source.weights).values())
    # deberta: one 8-byte row number for each of the 2·512 - 1 distances; a table of them all would be 512² of them
    assert weights <= stored <= weights + 8 * 1023 + 1024


@pytest.mark.parametrize(
    ("name", "inputs"),
    [
        ("geglu", ["input_ids", "attention_mask", "token_type_ids"]),
        ("bert", ["input_ids", "attention_mask", "token_type_ids"]),
        ("xlm_roberta", ["input_ids", "attention_mask"]),  # one segment
        ("deberta", ["input_ids", "attention_mask"]),  # none
    ],
)
def test_inputs_are_what_the_family_s_tokenizers_give(name, inputs, exported):
    _, folder = exported(name)
    assert [value.name for value in session_of(folder).get_inputs()] == inputs
    told = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    assert set(told["model_input_names"]) == set(inputs)
    assert told["model_max_length"] == 512


def test_the_model_is_described_in_its_metadata(exported):
    source, folder = exported("geglu")
    about = session_of(folder).get_modelmeta()
    assert about.producer_name == "turborank"
    assert about.custom_metadata_map["model"] == source.name
    assert about.custom_metadata_map["max_length"] == "512"


def test_a_graph_of_other_weights_does_not_pass_the_check(exported):
    source, folder = exported("geglu")
    weights = dict(dense(source.weights))
    assert onnx_export.check(weights, source.config, folder / "model.onnx") < TOLERANCE
    weights["classifier.bias"] = weights["classifier.bias"] + 2e-4
    with pytest.raises(EngineError, match=r"within 0\.0001 of ours, got 2\.0\de-04"):
        onnx_export.check(weights, source.config, folder / "model.onnx")
    weights["classifier.bias"] = weights["classifier.bias"] * np.float32(np.nan)
    with pytest.raises(EngineError, match="got nan"):
        onnx_export.check(weights, source.config, folder / "model.onnx")


# ---------------------------------------------------------------- what is said


def test_the_embedded_model_from_text_to_logits(tmp_path, capsys):
    """Run the command, then only tokenizers and onnxruntime, without turborank. The model's weights are int8."""
    assert main.run(["export", catalog.DEFAULT, "--to", "onnx", "--out", str(tmp_path / "out")]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0] == f"{tmp_path / 'out'}: config.json, model.onnx, tokenizer.json, tokenizer_config.json"
    assert float(said[1].removeprefix("logits of ONNX Runtime and ours differ by at most ")) < TOLERANCE
    pairs = [("how do bees find a home", "Scouts dance for it. " * 40), ("who lights the lamp", "The keeper does.")]
    tokenizer = Tokenizer.from_file(str(tmp_path / "out/tokenizer.json"))
    tokenizer.enable_padding(pad_id=0)
    rows = tokenizer.encode_batch(pairs)
    names = {"input_ids": "ids", "attention_mask": "attention_mask", "token_type_ids": "type_ids"}
    feed = {name: np.asarray([getattr(row, field) for row in rows], np.int64) for name, field in names.items()}
    (found,) = session_of(tmp_path / "out").run(["logits"], feed)
    expected = Reranker(engine="reference").score(pairs)
    assert np.ptp(expected) > 0.1
    np.testing.assert_allclose(found[:, 0], expected, atol=TOLERANCE, rtol=0)


def test_without_onnx_runtime_the_remark_says_that_nothing_was_compared(tmp_path, monkeypatch):
    model = save(tmp_path / "model", "geglu")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)  # importing it raises ModuleNotFoundError
    monkeypatch.setattr(onnx_export, "write", lambda *_: None)  # takes seconds
    assert "not compared" in export(str(model), "onnx", tmp_path / "out").remark


@pytest.mark.parametrize("gone", ["torch", "onnxscript"])
def test_a_missing_library_is_named_and_nothing_is_left(gone, tmp_path, monkeypatch):
    model = save(tmp_path / "model", "geglu")
    find = exporting.importlib.util.find_spec
    monkeypatch.setattr(exporting.importlib.util, "find_spec", lambda name: None if name == gone else find(name))
    with pytest.raises(InputError, match=rf"got no {gone}; pip install 'turborank\[torch,onnx\]'"):
        export(str(model), "onnx", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_unknown_format_is_answered_from_the_table(tmp_path):
    with pytest.raises(UnknownKeyError, match=", ".join(sorted(EXPORTS))):
        export(str(save(tmp_path / "model", "geglu")), "onxx", tmp_path / "out")


def test_a_folder_with_files_is_not_written_to(tmp_path):
    model = save(tmp_path / "model", "geglu")
    with pytest.raises(InputError, match="a new or empty folder, got one with files"):
        export(str(model), "onnx", model)


def test_a_jinabert_cannot_be_a_cross_encoder_of_theirs(tmp_path):
    model = save(tmp_path / "model", "geglu")
    with pytest.raises(CheckpointError, match=r"bert, xlm_roberta, deberta\), got jinabert.*turborank.compat"):
        export(str(model), "sentence-transformers", tmp_path / "out")
    assert not (tmp_path / "out").exists()
