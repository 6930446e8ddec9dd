"""FlexAttention compiled for the CPU: the same kernel source, block tables and bound as on a GPU."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from turborank.architectures.jinabert import standard_slopes  # noqa: E402
from turborank.ops import reference  # noqa: E402
from turborank.ops import torch as torch_ops  # noqa: E402

LENGTHS = [700, 3, 129, 400, 64]


def tensors(heads: int = 4, size: int = 16, scale: float = 1.0) -> tuple[np.ndarray, ...]:
    q, k, v = np.random.default_rng(0).normal(size=(3, sum(LENGTHS), heads * size)).astype(np.float32)
    return q * np.float32(scale), k * np.float32(scale), v, np.cumsum([0, *LENGTHS]).astype(np.int32)


def visited(mask: "torch_ops.BlockMask") -> int:
    return int(mask.kv_num_blocks.sum() + mask.full_kv_num_blocks.sum())


@pytest.mark.slow
@pytest.mark.parametrize("scale", [1.0, 3.0], ids=["usual", "wide logits"])
def test_compiled_flex_attention_equals_the_reference(scale: float) -> None:
    q, k, v, cu = tensors(scale=scale)
    slopes = standard_slopes(4)
    expected = reference.attention(q, k, v, cu, 4, slopes, False)
    with torch.no_grad():
        out = torch_ops.packed_attention(*(torch.from_numpy(x) for x in (q, k, v)), torch.from_numpy(cu), 4, slopes)
    np.testing.assert_allclose(expected, out.numpy(), atol=2e-5)


def test_blocks_of_other_pairs_are_not_visited() -> None:
    cu = torch.tensor([0, 256, 512])
    mask = torch_ops.block_mask(cu, torch.full((1,), torch.inf))
    assert visited(mask) == 2 * 4  # two pairs of two blocks each, all full, instead of 16
    assert int(mask.full_kv_num_blocks.sum()) == 8


def test_blocks_out_of_reach_are_not_visited() -> None:
    cu = torch.tensor([0, 1280])
    mask = torch_ops.block_mask(cu, torch.tensor([torch.inf, 200.0, 1.0]))
    per_head = (mask.kv_num_blocks + mask.full_kv_num_blocks).sum(dim=(0, 2)).tolist()
    # Ten blocks: all 100; reach 200 covers neighbours at distance 1 and 129; reach 1 covers the diagonal only.
    assert per_head == [100, 10 + 2 * 9 + 2 * 8, 10]


def test_reach_keeps_its_promise() -> None:
    """The softmax mass of each row beyond its head's reach, in float64, against eps times the row's mass."""
    q, k, _, _ = tensors()
    slopes, eps = standard_slopes(4), 1e-3
    heads = [torch.from_numpy(np.ascontiguousarray(x.reshape(-1, 4, 16).transpose(1, 0, 2))) for x in (q, k)]
    reaches = torch_ops.reach(heads[0], heads[1], torch.tensor(slopes), eps)
    distance = np.abs(np.subtract.outer(np.arange(len(q)), np.arange(len(q))))
    for head, slope in enumerate(slopes):
        a, b = (x[head].double().numpy() for x in heads)
        weights = np.exp(a @ b.T / 4 - slope * distance)
        beyond = np.where(distance >= float(reaches[head]), weights, 0).sum(axis=1)
        assert (beyond <= eps * weights.sum(axis=1)).all()
        assert float(reaches[head]) < len(q) or head > 0  # the steepest head does skip: the test is not vacuous


def test_no_slope_reaches_everywhere() -> None:
    one = torch.ones(1, 5, 4)
    assert torch_ops.reach(one, one, torch.zeros(1)).isinf().all()
