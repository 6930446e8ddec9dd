"""The benchmark counts the right tokens, computes the right figures and runs each contestant in its own process."""

import importlib.util
import json
import math
import os
import platform
import shutil
import statistics
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from turborank import benchmark, catalog, checkpoint
from turborank.benchmark import BATCH, WORKLOADS, Contestant
from turborank.errors import EngineError, UnknownKeyError

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One layer of the turbo shape."""
    folder = tmp_path_factory.mktemp("model")
    benchmark.write_model(folder, catalog.lookup(catalog.DEFAULT).folder / "tokenizer.json", layers=1)
    return folder


def test_ragged_is_like_search_results_and_the_others_are_what_their_names_say() -> None:
    lengths = WORKLOADS["ragged"].lengths
    assert len(lengths) == 100
    assert 160 <= statistics.mean(lengths) <= 180
    assert min(lengths) >= 16
    assert max(lengths) <= 1024
    assert statistics.stdev(lengths) > 50
    for name in ("32x128", "8x512", "2x2048", "1x64", "1x8192"):
        pairs, tokens = map(int, name.split("x"))
        assert WORKLOADS[name].lengths == (tokens,) * pairs


def test_tokens_are_the_same_every_time_and_inside_the_vocabulary() -> None:
    one, two = benchmark.encodings("ragged", 500), benchmark.encodings("ragged", 500)
    assert [len(e) for e in one] == list(WORKLOADS["ragged"].lengths)
    assert all(np.array_equal(a.input_ids, b.input_ids) for a, b in zip(one, two, strict=True))
    assert max(int(e.input_ids.max()) for e in one) < 500


def test_the_whole_model_has_the_published_number_of_parameters() -> None:
    weights = benchmark.random_weights(benchmark.turbo_config())
    assert sum(w.size for w in weights.values()) == 37_771_777


def test_the_checkpoint_written_is_read_back_rounded_to_bfloat16(model: Path) -> None:
    drawn = benchmark.random_weights(benchmark.turbo_config(layers=1))
    given = checkpoint.read(model)
    assert given.config.slopes[:9] == (0.5, 0.25, 0.125, 2**-4, 2**-5, 2**-6, 2**-7, 2**-8, 2**-1.5)
    for name, exact in drawn.items():
        np.testing.assert_allclose(given.weights[name], exact, rtol=2**-8)  # 8 significant bits
        assert not np.any(given.weights[name].view(np.uint32) & 0xFFFF)


def test_error_by_hand() -> None:
    found = benchmark.error([1.0, 2.0, 3.0, 5.0], [1.0, 2.0, 4.0, 3.0])
    assert found["max"] == 2.0
    assert found["rms"] == pytest.approx(math.sqrt((1 + 4) / 4))
    assert found["rms_share"] == pytest.approx(math.sqrt(5 / 4) / statistics.pstdev([1, 2, 4, 3]))
    assert found["spearman"] == pytest.approx(1 - 6 * 2 / (4 * 15))  # two neighbours exchanged


def test_speed_counts_real_tokens() -> None:
    found = benchmark.speed("8x512", [2.0, 1.0, 4.0])
    assert (found["min_s"], found["median_s"], found["tokens_s"], found["calls"]) == (1.0, 2.0, 4096.0, 3)


def test_contestants_work_in_processes_of_their_own_with_their_environment(model: Path, tmp_path: Path) -> None:
    script = tmp_path / "contestant.py"
    script.write_text(
        "import os\n"
        "def load(model, threads, options):\n"
        "    print('a library that prints')\n"
        "    return lambda pairs, batch: [len(p) + batch + options['add'] + int(os.environ['ADD']) for p in pairs]\n"
    )
    contestants = [
        Contestant("first", "first", f"{script}:load", {"add": 1000}, {"ADD": "10000"}),
        Contestant("second", "second", f"{script}:load", {"add": 2000}, {"ADD": "20000"}),
    ]
    with benchmark.processes(contestants, model, 1) as running:
        assert running["first"].logits("1x64", 4) == [11068.0]
        assert running["second"].logits("1x64", 8) == [22072.0]
        took = benchmark.in_turns(running, {"1x64": [("first", 1), ("second", 2)]}, rounds=2)
        assert running["first"].peak() > 10_000_000  # bytes: no Python is smaller
    assert set(took["1x64"]) == {("first", 1), ("second", 2)}
    assert all(len(seconds) >= 2 and min(seconds) > 0 for seconds in took["1x64"].values())


def test_a_contestant_that_fails_says_why(model: Path) -> None:
    broken = Contestant("broken", "broken", options={"engine": "no such engine"})
    with pytest.raises(EngineError, match=r"broken.*no such engine"), benchmark.processes([broken], model, 1):
        pass


def test_our_engine_in_a_process_gives_the_logits_of_the_reference(model: Path) -> None:
    exact = benchmark.exact_logits(model, "1x64")
    with benchmark.processes(
        [Contestant("reference", "reference", options={"engine": "reference"})], model, 1
    ) as running:
        logits = running["reference"].logits("1x64", BATCH)
    assert logits == pytest.approx(exact, abs=1e-5)  # numpy rounds by its number of threads: one there, here any


def test_unknown_workloads_are_named() -> None:
    with pytest.raises(UnknownKeyError, match="32x128"):
        benchmark.compare(workloads=["32x129"], rounds=1)


def peers() -> object:
    pytest.importorskip("torch")
    spec = importlib.util.spec_from_file_location("peers", ROOT / "bench" / "peers.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["peers"] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("cls", [False, True])
@pytest.mark.parametrize("fused", [False, True])
def test_the_peers_torch_module_is_the_same_model(model: Path, cls: bool, fused: bool) -> None:
    """The module that all peers are exported from agrees with the reference, padded, in any batch."""
    import torch

    table = peers()
    module = table.jinabert(checkpoint.read(model), cls=cls, fused=fused)  # type: ignore[attr-defined]

    def run(batch: dict[str, np.ndarray]) -> np.ndarray:
        with torch.inference_mode():
            return np.asarray(module(**{name: torch.from_numpy(value) for name, value in batch.items()}).numpy())

    pairs = [*benchmark.encodings("1x64", 61056), *benchmark.encodings("ragged", 61056)[:5]]
    exact = benchmark.load_engine(model, 1, {"engine": "reference"})(pairs, BATCH)
    for size in (1, 4):
        got = table.by_batches(run)(pairs, size)  # type: ignore[attr-defined]
        np.testing.assert_allclose(got, exact, atol=1e-4)


def test_the_report_keeps_losing_rows_and_says_when_a_target_is_missed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    report = pytest.importorskip("report")

    def row(seconds: float) -> dict[str, float]:
        return {"min_s": seconds, "median_s": 2 * seconds, "tokens_s": 64 / seconds, "max": 0.0, "rms": 0.0,
                "rms_share": None, "spearman": None}  # fmt: skip

    rows = {"turborank-int8 b32": row(1.0), "ov b32": row(1.5), "ov-cls b32": row(1.2), "torch b32": row(9.0)}
    text = "\n".join(report.ratios({"1x64": rows}, {}, targets=True))
    assert "1.50 (1.50; target 1.7: **no**)" in text  # as users run it: the cut graph is not what they have
    assert "1.20 (1.20; target 1.5: **no**)" in text
    assert "9.00 (9.00; target 8: yes)" in text
    every = "\n".join(report.every_row("1x64", rows, {}))
    assert all(name.split()[0] in every for name in rows)


ASKS_CPUID = """
#include <cpuid.h>
unsigned decoy(void) { return 0x1234a20f; } /* the bytes of CPUID inside another instruction */
unsigned leaf7(void) { unsigned a, b, c, d; __cpuid_count(7, 0, a, b, c, d); return b; }
"""
ASK = "import ctypes, sys; asked = ctypes.CDLL(sys.argv[1]); print(asked.decoy(), asked.leaf7() % 2**32)"
AVX512F = 1 << 16


@pytest.mark.skipif(
    (sys.platform, platform.machine()) != ("linux", "x86_64") or not (shutil.which("gcc") and shutil.which("objdump")),
    reason="needs gcc and objdump on x86-64 Linux",
)
def test_a_library_with_planted_traps_believes_in_an_older_processor(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    caps = pytest.importorskip("caps")
    (tmp_path / "asks.c").write_text(ASKS_CPUID)
    real, planted = tmp_path / "asks.so", tmp_path / "planted.so"
    subprocess.run(["gcc", "-O2", "-shared", "-fPIC", "-o", real, tmp_path / "asks.c"], check=True)
    assert caps.plant(real, planted) == 1  # not the decoy
    env = os.environ | caps.preload("avx2", tmp_path) | {"CPU_CAP_PLANTED": "1", "CPU_CAP_COUNT": "1"}

    def ask(library: Path, env: Mapping[str, str]) -> tuple[int, int, str]:
        done = subprocess.run([sys.executable, "-c", ASK, library], env=env, check=True, capture_output=True, text=True)
        decoy, features = map(int, done.stdout.split())
        return decoy, features, done.stderr

    decoy, features, _ = ask(real, os.environ)
    same, fewer, said = ask(planted, env)
    assert same == decoy == 0x1234A20F
    assert not fewer & AVX512F
    assert fewer & 0xFFFF == features & 0xFFFF  # AVX2 and what is older is as it was
    assert "CPUIDs answered" in said


def test_peers_that_cannot_be_held_back_are_dropped_and_it_is_said_why(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    caps = pytest.importorskip("caps")
    failed = subprocess.CompletedProcess(["true"], 77)
    monkeypatch.setattr(caps, "preload", lambda cap, work: {})
    monkeypatch.setattr(caps, "package_folder", lambda package: tmp_path / "package")
    monkeypatch.setattr(caps.importlib.metadata, "version", lambda package: "1.0")
    monkeypatch.setattr(caps.subprocess, "run", lambda *_, **__: failed)
    monkeypatch.setattr(caps.shutil, "which", lambda program: None)
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "library.so").write_bytes(b"..\x0f\xa2..")
    held = caps.held("avx2", tmp_path, ["ov", "ort", "ort-int8"])
    assert set(held.environments) == {"turborank", "ov"}
    assert held.environments["ov"]["ONEDNN_MAX_CPU_ISA"] == "AVX2"
    assert held.notes == [caps.SWITCHES_NOTE]
    assert "left out ort, ort-int8: objdump (binutils)" in capsys.readouterr().err


def test_operations_of_one_layer_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    report = pytest.importorskip("report")
    # docs/model.md §3.7: 2,359,296 multiply-adds a token in five layers. In the last one each of twelve
    # heads reads a row of 384 twice, for its score and its sum; q, K^T q, V y, output and pooler are 384 x 384.
    linear = 64 * (5 * 2_359_296 + 2 * 12 * 384) + 5 * 384 * 384 + 3 * 384 * 1536
    assert report.operations("1x64", attention=False) == 2 * linear


def test_results_on_record_hold_every_workload() -> None:
    for file in (ROOT / "bench" / "results").glob("*.json"):
        found = json.loads(file.read_text())
        if "device" in found:  # a GPU's
            assert set(WORKLOADS) < set(found["workloads"])
            continue
        families = found.get("families", {})
        measured = [found["runs"].get("none", {})]
        measured += [each.get("runs", each) for each in families.values()]  # pages before 2026-11-29 have no "runs"
        assert any(measured)
        assert all(set(workloads) <= set(WORKLOADS) for workloads in measured)
        assert found["versions"]
        assert found["machine"]["processor"]


def test_readme_says_how_many_times_as_fast_each_family_is() -> None:
    """By division of the least times on record: ours in int8, and the fastest row of any peer."""
    pages = ("2026-11-29-intel-xeon-families.json", "2026-11-29-amd-epyc-zen-5.json")
    found = [json.loads((ROOT / "bench" / "results" / page).read_text())["families"] for page in pages]
    readme = (ROOT / "README.md").read_text()
    rows = {
        ("ms-marco-MiniLM-L-6-v2",): "BERT", ("bge-reranker-base",): "XLM-RoBERTa",
        ("mxbai-rerank-xsmall-v1",): "DeBERTa",
        ("ettin-reranker-17m-v1", "gte-reranker-modernbert-base"): "ModernBERT",
    }  # fmt: skip

    def ratios(families: dict[str, Any], models: tuple[str, ...]) -> str:
        values = [
            min(row["min_s"] for name, row in rows.items() if not name.startswith("turborank"))
            / rows["turborank-int8 b32"]["min_s"]
            for model in models
            for rows in families[model]["runs"].values()
        ]
        return "–".join(sorted({f"{min(values):.1f}", f"{max(values):.1f}"}, key=float))

    for models, family in rows.items():
        shapes = f"shape{'s' * (len(models) > 1)} of {' and '.join(models)}"
        amx, zen5 = (ratios(families, models) for families in found)
        assert f"{family} in the {shapes} | {amx} | {zen5} |" in readme


def test_a_gpus_page_is_what_its_figures_say(tmp_path: Path) -> None:
    """The page is generated again, and its ratios are checked by division."""
    (file,) = (f for f in (ROOT / "bench" / "results").glob("*.json") if "device" in json.loads(f.read_text()))
    copy = tmp_path / file.name
    shutil.copyfile(file, copy)
    subprocess.run([sys.executable, str(ROOT / "bench" / "gpu.py"), "report", str(copy)], check=True)
    page = copy.with_suffix(".md").read_text()
    assert page == file.with_suffix(".md").read_text()
    long = json.loads(file.read_text())["workloads"]["1x8192"]
    best = min(row["median_s"] for name, row in long.items() if not name.startswith("turborank"))
    ours = [best / long[f"turborank-{precision}"]["median_s"] for precision in ("bf16", "fp16")]
    assert f"Over the best peer: {ours[0]:.2f} times in bf16, {ours[1]:.2f} in fp16." in page
