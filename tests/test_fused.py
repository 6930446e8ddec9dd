"""The GPU kernels against the reference: on a GPU if there is one, else the same source in Triton's interpreter."""

import os
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
CUDA = torch.cuda.is_available()
if not CUDA:
    os.environ["TRITON_INTERPRET"] = "1"  # read where the kernels are defined
pytest.importorskip("triton")

from families import FAMILIES, family_config, family_weights  # noqa: E402
from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from random_models import model_config, packed, random_weights  # noqa: E402

from turborank.architectures import ARCHITECTURES  # noqa: E402
from turborank.architectures.jinabert import standard_slopes  # noqa: E402
from turborank.engines.reference import ReferenceEngine  # noqa: E402
from turborank.engines.torch import converted  # noqa: E402
from turborank.ops import reference  # noqa: E402
from turborank.ops import triton as triton_ops  # noqa: E402
from turborank.types import Float32, Int32, ModelConfig, PackedBatch  # noqa: E402

DEVICE = "cuda" if CUDA else "cpu"
# numpy, which the interpreter computes with, has no bf16.
PRECISIONS = {"float32": 1e-4, "float16": 5e-3} | ({"bfloat16": 2e-2} if CUDA else {})
pytestmark = pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")  # in filling, which nobody reads


def layout(lengths: list[int]) -> tuple[Int32, triton_ops.RowLayout]:
    cu = np.cumsum([0, *lengths]).astype(np.int32)
    return cu, triton_ops.RowLayout(
        *(torch.from_numpy(table).to(DEVICE) for table in triton_ops.tables(cu)), max(lengths)
    )


def random_qkv(lengths: list[int], heads: int, scale: float, dtype: str = "float32") -> Any:
    drawn = np.random.default_rng(0).normal(size=(3, sum(lengths), heads * 32)).astype(np.float32)
    drawn[:2] *= np.float32(scale)
    return torch.from_numpy(drawn).to(DEVICE, getattr(torch, dtype))


def compare(lengths: list[int], scale: float, slopes: tuple[float, ...], dtype: str, tolerance: float) -> None:
    """Attention of all tokens, and of each pair's first, against the reference on the same rounded queries and keys."""
    heads = len(slopes) or 4
    q, k, v = random_qkv(lengths, heads, scale, dtype)
    cu, where = layout(lengths)
    exact = [x.float().cpu().numpy() for x in (q, k, v)]
    firsts = cu[:-1].tolist()
    for asked, rows in ((False, slice(None)), (True, firsts)):
        got = triton_ops.attention(q[rows], k, v, where, heads, slopes, asked)
        expected = reference.attention(exact[0][rows], exact[1], exact[2], cu, heads, slopes, asked)
        np.testing.assert_allclose(got.float().cpu().numpy(), expected, atol=tolerance)


@pytest.mark.parametrize("dtype", PRECISIONS)
@pytest.mark.parametrize("scale", [1.0, 8.0], ids=["usual", "wide logits"])
@pytest.mark.parametrize("lengths", [[130, 3, 64, 1], [700, 3, 65]], ids=["short", "long enough to skip"])
def test_attention_equals_the_reference(lengths: list[int], scale: float, dtype: str) -> None:
    compare(lengths, scale, standard_slopes(4), dtype, PRECISIONS[dtype])


def test_attention_without_slopes_reads_everything() -> None:
    compare([600, 40], 1.0, (), "float32", 1e-4)


@settings(deadline=None, max_examples=8)
@given(st.lists(st.integers(1, 140), min_size=1, max_size=5), st.floats(0.5, 4))
def test_attention_equals_the_reference_for_any_lengths(lengths: list[int], scale: float) -> None:
    compare(lengths, scale, standard_slopes(2), "float32", 1e-4)


def test_keys_out_of_reach_are_not_read() -> None:
    """Distant values are NaN; reading them gives NaN, even with weight 0. Steep heads skip them, flat ones do not."""
    slopes = (1.0, 1e-4)
    q, k, v = random_qkv([1024], 2, 1.0)
    _, where = layout([1024])
    v[512:] = torch.nan
    out = triton_ops.attention(q, k, v, where, 2, slopes, False).view(1024, 2, 32)
    assert not out[:300, 0].isnan().any()
    assert out[:, 1].isnan().all()


def test_a_key_that_matters_is_read_however_far() -> None:
    """One distant key has the largest norm and the first query's direction: exp(40) outweighs the distance."""
    q, k, v = random_qkv([1024], 1, 0.05)
    q[0], k[900] = 0.0, 0.0
    q[0, 0], k[900, 0] = 32**0.5, 2.0**-5 * 900 + 40  # slope 2^-5: score less distance is 40
    cu, where = layout([1024])
    got = triton_ops.attention(q, k, v, where, 1, (2.0**-5,), False)
    expected = reference.attention(*(x.cpu().numpy() for x in (q, k, v)), cu, 1, (2.0**-5,), False)
    np.testing.assert_allclose(got.cpu().numpy(), expected, atol=1e-4)
    np.testing.assert_allclose(expected[0], v[900].cpu().numpy(), atol=1e-4)  # it is all that the first query sees


@pytest.mark.parametrize("width", [96, 384])
def test_rows_equal_the_reference(width: int) -> None:
    rng = np.random.default_rng(0)
    x, residual = rng.normal(size=(2, 37, width)).astype(np.float32)
    weight, bias = rng.normal(size=(2, width)).astype(np.float32)
    gated = rng.normal(size=(512, width)).astype(np.float32) / np.float32(width**0.5)
    args = [torch.from_numpy(a).to(DEVICE) for a in (x, residual, weight, bias)]
    expected = reference.add_norm(x, residual, weight, bias, 1e-5)
    np.testing.assert_allclose(triton_ops.add_norm(*args, 1e-5).cpu().numpy(), expected, atol=1e-5)
    expected = reference.layer_norm(x, weight, bias, 1e-5)
    np.testing.assert_allclose(triton_ops.layer_norm(args[0], *args[2:], 1e-5).cpu().numpy(), expected, atol=1e-5)
    if width % triton_ops.GEGLU_TILE["DEPTH"] == 0:
        got = triton_ops.geglu(args[0], torch.from_numpy(gated).to(DEVICE)).cpu().numpy()
        np.testing.assert_allclose(got, reference.geglu(x, gated), atol=2e-5)


# ------------------------------------------------------------------------------------------- whole models


def engine(config: ModelConfig, weights: dict[str, Float32], dtype: str = "float32") -> triton_ops.GraphRunner:
    """The runner that engines.torch creates on a GPU."""
    moved = converted(weights, getattr(torch, dtype), DEVICE)
    forward = ARCHITECTURES[config.architecture].forward
    fill = config.head == "classifier" and config.architecture != "deberta"
    return triton_ops.GraphRunner(
        lambda batch: forward(moved, config, batch, triton_ops), torch.device(DEVICE), fill=fill
    )


NARROW = {"hidden_size": 64, "num_attention_heads": 2, "intermediate_size": 128, "slopes": standard_slopes(2)}
CONFIGS = {
    "jinabert": model_config(**NARROW),
    "cosine": model_config(**NARROW, head="cosine"),
    "focus": model_config(**NARROW, head="focus"),
    "sum": model_config(**NARROW, head="sum"),
} | {family: family_config(family) for family in FAMILIES}


def batches(config: ModelConfig, *lengths: list[int]) -> list[PackedBatch]:
    made = [packed(each, config.vocab_size, seed) for seed, each in enumerate(lengths)]
    if config.type_vocab_size < 2:
        made = [PackedBatch(b.input_ids, np.zeros_like(b.type_ids), b.cu_seqlens, b.max_seqlen) for b in made]
    return made


@pytest.mark.parametrize("family", CONFIGS)
def test_logits_are_those_of_the_reference_also_when_captured_and_replayed(family: str) -> None:
    """Three batches that share a size: the first runs kernel by kernel, the second is captured, the third replayed."""
    config = CONFIGS[family]
    weights = random_weights(config) if config.architecture == "jinabert" else family_weights(config)
    numpy_engine, ours = ReferenceEngine(weights, config, 1), engine(config, weights)
    for batch in batches(config, [120, 7, 90], [30, 12, 8, 100, 2], [256]):
        np.testing.assert_allclose(ours.logits(batch), numpy_engine.logits(batch), atol=1e-4)
    captured = [size.graph is not None for size in ours.sizes.values()]
    assert captured == ([CUDA] if ours.fill else [])


# Random models that eight bits of mantissa need not hold within 2e-2. fp16, which is what "auto" means here, does.
BEYOND_BF16 = {
    "bert": "its attention is sharp: .021 off on an H100",
    "deberta": "its attention is sharp: .025 off on an H100",
    "cosine": "its head multiplies a cosine by ten: within .2 on an H100, not measured closer",
    "focus": "its head multiplies a cosine by ten: within .2 on an H100, not measured closer",
    "sum": "its head adds a cosine multiplied by ten: not run on a GPU",
}


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("family", CONFIGS)
def test_logits_in_half_precision_are_near_the_reference(
    family: str, dtype: str, request: pytest.FixtureRequest
) -> None:
    if dtype not in PRECISIONS:
        pytest.skip("no CUDA device: the interpreter computes in numpy, which has no bf16")
    if dtype == "bfloat16" and family in BEYOND_BF16:
        request.applymarker(pytest.mark.xfail(reason=BEYOND_BF16[family], strict=False))
    config = CONFIGS[family]
    weights = random_weights(config) if config.architecture == "jinabert" else family_weights(config)
    numpy_engine, ours = ReferenceEngine(weights, config, 1), engine(config, weights, dtype)
    for batch in batches(config, [120, 7, 90], [400, 12, 8, 100, 2]):
        np.testing.assert_allclose(ours.logits(batch), numpy_engine.logits(batch), atol=2e-2)


def test_sizes_beyond_those_kept_run_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_ops, "MAX_GRAPHS", 1)
    config = CONFIGS["bert"]
    weights = family_weights(config)
    numpy_engine, ours = ReferenceEngine(weights, config, 1), engine(config, weights)
    for batch in batches(config, [40, 7], [300, 12], [300, 12], [30, 8]):
        np.testing.assert_allclose(ours.logits(batch), numpy_engine.logits(batch), atol=1e-4)
    assert list(ours.sizes) == [(256, 8, 512)]  # tokens, pairs, length of the first


@pytest.mark.skipif(not CUDA, reason="no CUDA device")
def test_the_engine_on_a_gpu_uses_these_kernels() -> None:
    from turborank import engines

    config = model_config(num_hidden_layers=1)
    prepared: Any = engines.prepare(random_weights(config), config, name="torch", precision="bf16")
    assert prepared.replayed is not None
    assert engines.choose("torch", "auto", config) == ("torch", "fp16")


@pytest.mark.skipif(not CUDA, reason="no CUDA device: tests/test_flex.py runs this kernel's forward on the CPU")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # torch.compile's own doing
def test_gradients_on_a_gpu_are_those_of_the_cpu() -> None:
    from turborank.ops import torch as torch_ops

    config = model_config(num_hidden_layers=2)
    weights, batch = random_weights(config), packed([200, 17, 300])

    def gradients(device: str) -> list[Float32]:
        leaves = {n: torch.from_numpy(w).to(device).requires_grad_() for n, w in weights.items()}
        parts = (torch.from_numpy(x).to(device) for x in (batch.input_ids, batch.type_ids, batch.cu_seqlens))
        moved = PackedBatch(*parts, batch.max_seqlen)
        ARCHITECTURES["jinabert"].forward(leaves, config, moved, torch_ops).square().sum().backward()
        return [leaf.grad.cpu().numpy() for leaf in leaves.values()]

    for ours, theirs in zip(gradients("cuda"), gradients("cpu"), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-3 * np.abs(theirs).max())


@settings(max_examples=50)
@given(st.lists(st.integers(1, 2000), min_size=1, max_size=40))
def test_a_size_has_room_for_its_batches(lengths: list[int]) -> None:
    cu = np.cumsum([0, *lengths]).astype(np.int32)
    tokens, pairs, longest = triton_ops.rounded(int(cu[-1]), len(lengths), max(lengths))
    assert tokens >= cu[-1]
    assert tokens <= max(cu[-1] * 17 / 16 + 1, cu[-1] + triton_ops.MIN_TOKENS)
    assert pairs >= len(lengths)
    assert longest >= max(lengths)
    assert (longest > triton_ops.SKIP_FROM) == (max(lengths) > triton_ops.SKIP_FROM)
    assert tokens // triton_ops.QUERIES + pairs >= len(triton_ops.tables(cu)[2])
