"""The benchmark of other families: shapes of the catalog, pairs cut to the positions, graphs that are the model."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from turborank import benchmark, catalog
from turborank.benchmark import WORKLOADS

ROOT = Path(__file__).resolve().parent.parent
VOCABULARY = 30522  # that of the tokenizer, which is checked
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Any:
    """A module of bench/."""
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    return pytest.importorskip(request.param)


@pytest.mark.parametrize("module", ["catalog_models"], indirect=True)
def test_shapes_have_the_published_number_of_parameters(module: Any) -> None:
    assert len(module.SHAPED) > 20
    for name in module.SHAPED:
        row = catalog.lookup(name)
        with torch.device("meta"):
            count = sum(p.numel() for p in module.network(row).parameters())
        bias = row.hidden_size if name.startswith("ettin") else 0  # of their head's norm, which this class lacks
        assert count == row.parameters - bias, name


def small(folder: Path, family: str) -> Path:
    """Two layers of the family with 200 positions; weights large enough that the logits differ."""
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
             "intermediate_size": 96, "num_labels": 1, "initializer_range": 0.2}  # fmt: skip
    torch.manual_seed(0)
    if family == "ModernBert":
        special = {f"{name}_token_id": 0 for name in ("pad", "bos", "eos", "cls", "sep")}
        config = transformers.ModernBertConfig(**sizes, **special, max_position_embeddings=200, local_attention=16)
    else:
        config = transformers.XLMRobertaConfig(**sizes, max_position_embeddings=202, type_vocab_size=1)
    getattr(transformers, f"{family}ForSequenceClassification")(config).save_pretrained(folder)
    shutil.copyfile(catalog.lookup(catalog.DEFAULT).folder / "tokenizer.json", folder / "tokenizer.json")
    return folder


@pytest.mark.parametrize("family", ["XLMRoberta", "ModernBert"])
def test_pairs_are_cut_to_the_positions_and_counted_so(tmp_path: Path, family: str) -> None:
    _, types, longest = benchmark.sizes(small(tmp_path, family))
    assert (types, longest) == (int(family == "XLMRoberta"), 200)
    pairs = benchmark.encodings("ragged", VOCABULARY, types, longest)
    assert [len(pair) for pair in pairs] == [min(n, 200) for n in WORKLOADS["ragged"].lengths]
    assert not any(pair.type_ids.any() for pair in pairs)
    assert benchmark.speed("ragged", [2.0], longest)["tokens_s"] == sum(map(len, pairs)) / 2


@pytest.mark.filterwarnings("ignore")  # torch's, of the exporter
@pytest.mark.parametrize("family", ["XLMRoberta", "ModernBert"])
@pytest.mark.parametrize("module", ["peers"], indirect=True)
def test_an_exported_graph_has_the_logits_of_transformers(module: Any, tmp_path: Path, family: str) -> None:
    pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    folder = small(tmp_path, family)
    module.export_onnx(folder, {})
    pairs = benchmark.encodings("ragged", *benchmark.sizes(folder))[:9]
    want = module.load_transformers(folder, 1, {})(pairs, 9)
    assert want.std() > 0.01
    np.testing.assert_allclose(module.load_onnx(folder, 1, {})(pairs, 4), want, atol=1e-4)
    np.testing.assert_allclose(benchmark.load_engine(folder, 1, {"engine": "reference"})(pairs), want, atol=1e-3)


@pytest.mark.parametrize("module", ["report"], indirect=True)
def test_a_familys_table_keeps_losing_rows_and_shows_batch_32_and_the_best(module: Any) -> None:
    def row(seconds: float) -> dict[str, Any]:
        return {"min_s": seconds, "tokens_s": 64 / seconds, "max": 0.0, "rms_share": None, "label": "a library"}

    rows = {"turborank-int8 b32": row(2.0), "ov b32": row(4.0), "ov b8": row(3.0), "ov/2 b8": row(1.0),
            "ort b32": row(5.0), "ort b2": row(6.0)}  # fmt: skip
    assert module.family_rows(rows) == ["ov/2 b8", "turborank-int8 b32", "ov b32", "ort b32"]
    found = {"longest": 7999, "runs": {"1x8192": rows}, "left_out": {"ov-weights": "it failed"}}
    text = "\n".join(module.families({"families": {"a-model": found}}))
    assert "| 1 × 8,192, cut to 7,999 tokens | **a library** | 32 | 0.50 |" in text
    assert "| a library, batch 8, 2 streams | 64 | 1.00 |" in text
    assert "- Left out: ov-weights: it failed" in text


@pytest.mark.parametrize("module", ["report"], indirect=True)
def test_quality_stands_beside_speed_the_fastest_first(module: Any) -> None:
    found = {"rows": {"ettin-reranker-17m-v1": {"min_s": 0.32}, "ms-marco-MiniLM-L-6-v2": {"min_s": 0.16}},
             "left_out": {"ettin-reranker-1b-v1": "7 GB needed"}}  # fmt: skip
    lines = module.quality({"catalog": found})
    first = lines.index("| ms-marco-MiniLM-L-6-v2 | 50.82 | 63.12 | 48.64 | 200 | 5.00 |")
    assert lines[first + 1] == "| ettin-reranker-17m-v1 | 55.76 | 67.46 | – | 100 | 10.00 |"
    assert "- Left out: ettin-reranker-1b-v1: 7 GB needed" in lines
