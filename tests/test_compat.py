"""``turborank.compat.CrossEncoder`` against sentence-transformers' own, on the same random checkpoints."""

import inspect
import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
sentence_transformers = pytest.importorskip("sentence_transformers")
transformers = pytest.importorskip("transformers")

from families import save_family  # noqa: E402  needs torch and transformers
from safetensors.numpy import load_file, save_file  # noqa: E402

from turborank import Reranker  # noqa: E402
from turborank.compat import CrossEncoder, activate, published_activation  # noqa: E402
from turborank.errors import EngineUnavailableError, InputError, TurborankError  # noqa: E402

QUERY = "What is the capital of France?"
DOCUMENTS = ["Berlin is the capital of Germany.", "Paris is the capital of France.", "Bread bakes.", "", "the " * 9]
PAIRS = [(QUERY, document) for document in DOCUMENTS]
IDENTITY = {"sbert_ce_default_activation_function": "torch.nn.modules.linear.Identity"}  # the ms-marco models' config


def save(folder: Path, family: str = "bert", **config: Any) -> Path:
    """A random checkpoint that both libraries load, with ``config`` added to its config.json."""
    save_family(folder, family)
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "tokenizer.json"),
        model_max_length=512,
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
        **({"pad_token": "<pad>"} if family == "xlm_roberta" else {"pad_token": "[PAD]"}),
    )
    tokenizer.save_pretrained(folder)
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**raw, **config}))
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("bert"))


@pytest.fixture(scope="module")
def theirs(folder: Path) -> Any:
    return sentence_transformers.CrossEncoder(str(folder), device="cpu")


@pytest.fixture(scope="module")
def ours(folder: Path) -> CrossEncoder:
    return CrossEncoder(folder, precision="fp32")


@pytest.mark.parametrize("family", ["bert", "xlm_roberta", "deberta"])
@pytest.mark.parametrize("config", [{}, IDENTITY, {"sentence_transformers": {"activation_fn": "torch.nn.Identity"}}])
def test_scores_equal_those_of_sentence_transformers(tmp_path: Path, family: str, config: dict[str, Any]) -> None:
    save(tmp_path, family, **config)
    pairs = [*PAIRS, (QUERY, "the " * 700)]  # the last is cut to 512 tokens
    expected = sentence_transformers.CrossEncoder(str(tmp_path), device="cpu").predict(pairs)
    got = CrossEncoder(str(tmp_path), precision="fp32").predict(pairs)
    assert got.dtype == expected.dtype == np.float32
    np.testing.assert_allclose(got, expected, atol=1e-5)
    assert (expected.min() < 0) == bool(config)  # logits and not sigmoids, or the reverse


def test_every_form_of_predict(ours: CrossEncoder, theirs: Any) -> None:
    one = ours.predict(PAIRS[0])
    assert np.shape(one) == np.shape(theirs.predict(PAIRS[0])) == ()
    for name, inputs in {"lists": [list(p) for p in PAIRS], "array": np.array(PAIRS), "one": PAIRS[:1]}.items():
        expected = theirs.predict(inputs)
        got = ours.predict(inputs, batch_size=2)
        assert got.shape == expected.shape, name
        np.testing.assert_allclose(got, expected, atol=1e-5)
    assert ours.predict(sentences=PAIRS)[0] == one
    assert ours.predict([]).shape == theirs.predict([]).shape == (0,)
    tensor = ours.predict(PAIRS, convert_to_tensor=True)
    np.testing.assert_allclose(tensor.numpy(), theirs.predict(PAIRS, convert_to_tensor=True).numpy(), atol=1e-5)
    listed, expected = (model.predict(PAIRS, convert_to_numpy=False) for model in (ours, theirs))
    assert [type(x) for x in listed] == [type(x) for x in expected]
    assert [x.shape for x in listed] == [x.shape for x in expected]


@pytest.mark.parametrize("function", [torch.nn.Identity(), torch.nn.Sigmoid(), torch.tanh, lambda x: -x])
def test_activation_functions_are_called_as_theirs_are(ours: CrossEncoder, theirs: Any, function: Any) -> None:
    got, expected = (model.predict(PAIRS, activation_fn=function) for model in (ours, theirs))
    np.testing.assert_allclose(got, expected, atol=1e-5)
    ranked, wanted = (model.rank(QUERY, DOCUMENTS, activation_fn=function) for model in (ours, theirs))
    assert [row["corpus_id"] for row in ranked] == [row["corpus_id"] for row in wanted]


def test_an_activation_given_at_construction_stays(folder: Path) -> None:
    own = torch.nn.Tanh()
    theirs = sentence_transformers.CrossEncoder(str(folder), device="cpu", activation_fn=own).predict(PAIRS)
    np.testing.assert_allclose(
        CrossEncoder(folder, precision="fp32", activation_fn=own).predict(PAIRS), theirs, atol=1e-5
    )
    assert CrossEncoder(folder, activation_fn="identity").predict(PAIRS).min() < 0


@pytest.mark.parametrize("top_k", [None, 2, 50])
@pytest.mark.parametrize("return_documents", [False, True])
def test_rank_equals_that_of_sentence_transformers(
    ours: CrossEncoder, theirs: Any, top_k: int | None, return_documents: bool
) -> None:
    got, expected = (
        model.rank(QUERY, DOCUMENTS, top_k=top_k, return_documents=return_documents) for model in (ours, theirs)
    )
    assert [{**row, "score": 0} for row in got] == [{**row, "score": 0} for row in expected]
    assert [type(row["score"]) for row in got] == [float] * len(expected)
    assert [row["score"] for row in got] == pytest.approx([row["score"] for row in expected], abs=1e-5)


def test_documents_may_come_one_by_one(ours: CrossEncoder) -> None:
    expected = ours.rank(QUERY, DOCUMENTS, return_documents=True)
    assert ours.rank(QUERY, iter(DOCUMENTS), return_documents=True) == expected


def test_a_device_may_be_a_torch_device(folder: Path, ours: CrossEncoder) -> None:
    model = CrossEncoder(folder, device=torch.device("cpu"), precision="fp32")
    np.testing.assert_array_equal(model.predict(PAIRS), ours.predict(PAIRS))


# What theirs takes and ours does not: objects of training and of torch, and prompts.
THEIRS_ALONE = {
    "modules", "prompts", "default_prompt_name", "processor_kwargs", "config_kwargs", "model_card_data",
    "keep_in_fp32_modules",
}  # fmt: skip


@pytest.mark.parametrize("method", ["__init__", "predict", "rank"])
def test_parameters_equal_those_of_sentence_transformers(folder: Path, ours: CrossEncoder, method: str) -> None:
    """Every parameter, passed by keyword with its default, gives the same scores."""
    parameters = list(inspect.signature(getattr(sentence_transformers.CrossEncoder, method)).parameters.values())[1:]
    defaults = {p.name: p.default for p in parameters if p.default is not p.empty and p.name not in THEIRS_ALONE}
    assert len(defaults) > 7
    if method == "__init__":
        again = CrossEncoder(**{**defaults, "model_name_or_path": str(folder)}, precision="fp32")
        np.testing.assert_array_equal(again.predict(PAIRS), ours.predict(PAIRS))
    elif method == "predict":
        np.testing.assert_array_equal(ours.predict(PAIRS, **defaults), ours.predict(PAIRS))
    else:
        assert ours.rank(QUERY, DOCUMENTS, **defaults) == ours.rank(QUERY, DOCUMENTS)


@pytest.mark.parametrize("dtype", ["float32", torch.float32])
@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
def test_a_dtype_chooses_the_precision(folder: Path, ours: CrossEncoder, key: str, dtype: Any) -> None:
    model = CrossEncoder(folder, model_kwargs={key: dtype, "attn_implementation": "sdpa"}, revision="of no effect")
    assert model.reranker.engine.precision == "fp32"
    np.testing.assert_array_equal(model.predict(PAIRS), ours.predict(PAIRS))
    assert CrossEncoder(folder, engine="torch", model_kwargs={key: torch.bfloat16}).reranker.engine.precision == "bf16"


def test_the_sigmoid_is_exact_at_both_ends() -> None:
    far = activate(np.asarray([20.0, 30.0, -100.0, 1.0], np.float32), "sigmoid")
    assert far[0] == far[1] == 1.0  # float32 knows no difference
    assert far[2] == pytest.approx(math.exp(-100), rel=1e-5)
    assert far[3] == pytest.approx(1 / (1 + math.exp(-1)))


def test_saturated_scores_still_rank_by_logit(tmp_path: Path) -> None:
    save(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    weights["classifier.bias"] += 30
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    model = CrossEncoder(tmp_path)
    assert model.predict(PAIRS).tolist() == [1.0] * len(PAIRS)
    logits = model.predict(PAIRS, activation_fn="identity")
    assert [row["corpus_id"] for row in model.rank(QUERY, DOCUMENTS)] == np.argsort(-logits, kind="stable").tolist()
    assert [row["corpus_id"] for row in model.rank(QUERY, DOCUMENTS)] != list(range(len(DOCUMENTS)))


def test_max_length_equals_that_of_sentence_transformers(folder: Path) -> None:
    theirs = sentence_transformers.CrossEncoder(str(folder), device="cpu", max_length=20).predict(PAIRS)
    ours = CrossEncoder(folder, max_length=20, precision="fp32")
    assert ours.max_length == 20
    np.testing.assert_allclose(ours.predict(PAIRS), theirs, atol=1e-5)


def test_a_bar_appears_only_when_asked_for(ours: CrossEncoder, capfd: pytest.CaptureFixture[str]) -> None:
    ours.predict(PAIRS)
    assert capfd.readouterr() == ("", "")
    shown = ours.predict(PAIRS, show_progress_bar=True)
    assert "Pairs" in capfd.readouterr().err
    np.testing.assert_array_equal(shown, ours.predict(PAIRS))


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda m: m.predict(PAIRS, batch_size=0), "batch_size to be a positive integer, got 0"),
        (lambda m: m.predict(PAIRS, "query prompt"), "batch_size to be a positive integer, got 'query prompt'"),
        (lambda m: m.predict(PAIRS, prompt="query: "), "expected no prompt, got 'query: '"),
        (lambda m: m.rank(QUERY, DOCUMENTS, prompt_name="web"), "expected no prompt, got 'web'"),
        (lambda m: CrossEncoder(None, model_kwargs={"dtype": "int4"}), "one of float32, bfloat16, .*, got 'int4'"),
        (lambda m: m.rank(QUERY, "one document"), "a list of documents, got one str; wrap it in a list"),
        (lambda m: m.rank(QUERY, DOCUMENTS, top_k=-1), "top_k to be a whole number of at least 0, got -1"),
        (lambda m: m.predict(), "as inputs or as sentences, got both or neither"),
        (lambda m: m.predict("query"), "a list of .query, document. pairs, got str"),
        (lambda m: m.predict([("a", "b"), ("a", 3)]), r"pairs\[1\]: expected .query, document., two strings"),
        (lambda m: m.predict(PAIRS, activation_fn="softplus"), "activation_fn to be a function or one of"),
        (lambda m: m.predict(PAIRS, activation_fn=lambda x: x.sum()), "one number per pair from activation_fn"),
        (lambda m: CrossEncoder(m.reranker.checkpoint.folder, num_labels=3), "num_labels to be 1, got 3"),
        (lambda m: CrossEncoder(m.reranker.checkpoint.folder, device="tpu"), "'cpu', 'cuda' or None, got 'tpu'"),
    ],
)
def test_bad_input_is_named(ours: CrossEncoder, call: Any, said: str) -> None:
    with pytest.raises(InputError, match=said):
        call(ours)


def test_an_unknown_activation_is_refused(folder: Path, tmp_path: Path) -> None:
    save(tmp_path, sentence_transformers={"activation_fn": "my_package.Curve"})
    with pytest.raises(InputError, match=r"name one of sigmoid, identity, got 'my_package.Curve'; give activation_fn"):
        CrossEncoder(tmp_path)
    assert CrossEncoder(tmp_path, activation_fn="identity").predict(PAIRS).shape == (5,)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_cuda_without_a_gpu_is_refused(folder: Path) -> None:
    with pytest.raises(EngineUnavailableError, match="expected a CUDA device for device='cuda'"):
        CrossEncoder(folder, device="cuda")
    assert issubclass(EngineUnavailableError, TurborankError)


@pytest.mark.parametrize(
    ("name", "raw", "expected"),
    [
        ("ms-marco-MiniLM-L-6-v2", {}, "identity"),  # by the catalog
        ("ms-marco-MiniLM-L-6-v2", {"sentence_transformers": {"activation_fn": "torch.nn.Sigmoid"}}, "sigmoid"),
        ("bge-reranker-base", {}, "sigmoid"),
        ("mxbai-rerank-xsmall-v1", {}, "sigmoid"),
        ("jina-reranker-v1-tiny-en", {}, "sigmoid"),
        ("anything else", {}, "sigmoid"),
        ("anything else", IDENTITY, "identity"),
    ],
)
def test_published_activations(name: str, raw: dict[str, Any], expected: str) -> None:
    """docs/model.md §5.4: jina, mxbai and bge sigmoid, ms-marco logits; config.json takes precedence."""
    stand_in: Any = SimpleNamespace(name=name, checkpoint=SimpleNamespace(raw_config=raw))
    assert published_activation(stand_in) == expected


def test_the_reranker_attribute_is_the_librarys(ours: CrossEncoder, folder: Path) -> None:
    logits = Reranker(folder, precision="fp32").score(PAIRS)
    np.testing.assert_array_equal(ours.predict(PAIRS, activation_fn="identity"), logits)
