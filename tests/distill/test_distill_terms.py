"""Hidden-state and attention-relation losses against numbers computed by hand and naive loops."""

import itertools
import math

import pytest

torch = pytest.importorskip("torch")

from turborank.distill.losses import attention_relations, hidden_states, layer_map, projection, relations  # noqa: E402
from turborank.errors import InputError  # noqa: E402


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# ---------------------------------------------------------------- hidden states


def test_hidden_states_by_hand():
    """Target features (0, 4) and (10, 10): means 2 and 10, variance (4 + 4 + 0 + 0) / 4 = 2.

    The student is off by 1, 0, 0 and 3: error (1 + 9) / 4.
    """
    teacher = [torch.tensor([[0.0, 10.0], [4.0, 10.0]])]
    student = [torch.tensor([[1.0, 10.0], [4.0, 7.0]])]
    assert hidden_states(student, teacher, [(0, 0)]).item() == pytest.approx((10 / 4) / 2)


def test_knowing_the_means_only_costs_one_at_any_scale():
    teacher = random(50, 8) * 300 + random(8, seed=1) * 1e3
    student = teacher.mean(dim=0).expand(50, 8)
    assert hidden_states([student], [teacher], [(0, 0)]).item() == pytest.approx(1.0, rel=1e-4)


def test_hidden_states_are_averaged_over_layers():
    teacher, student = [random(6, 4, seed=i) for i in range(4)], [random(6, 4, seed=9 + i) for i in range(3)]
    layers = [(0, 0), (1, 2), (2, 3)]
    alone = [hidden_states(student, teacher, [pair]).item() for pair in layers]
    assert len(set(alone)) == 3
    assert hidden_states(student, teacher, layers).item() == pytest.approx(sum(alone) / 3)


def test_a_projection_is_learnt_and_can_make_the_error_vanish():
    """The teacher is a linear function of the student: minimising the error brings it to zero."""
    student = random(64, 3)
    teacher = student @ random(5, 3, seed=1).T
    matrix = projection(3, 5, seed=2).requires_grad_()
    assert matrix.shape == (5, 3)
    first = hidden_states([student], [teacher], [(0, 0)], [matrix]).item()
    optimiser = torch.optim.LBFGS([matrix], max_iter=50)

    def step():
        optimiser.zero_grad()
        loss = hidden_states([student], [teacher], [(0, 0)], [matrix])
        loss.backward()
        return loss

    optimiser.step(step)
    assert first > 0.1
    assert hidden_states([student], [teacher], [(0, 0)], [matrix]).item() < 1e-6


def test_a_projection_keeps_lengths_on_average():
    x = random(400, 64)
    assert (x @ projection(64, 512, seed=5).T).square().mean().item() == pytest.approx(1.0, rel=0.1)


def test_the_teacher_gets_no_gradient():
    teacher, student = random(4, 4).requires_grad_(), random(4, 4, seed=1).requires_grad_()
    hidden_states([student], [teacher], [(0, 0)]).backward()
    relations(student, teacher, torch.tensor([0, 4]), 2).backward()
    assert teacher.grad is None
    assert student.grad.abs().sum() > 0


def test_states_of_two_shapes_are_refused():
    with pytest.raises(InputError, match=r"got \(2, 4\) of the student's 1 and \(5, 4\) of the teacher's 0"):
        hidden_states([random(5, 4), random(2, 4)], [random(5, 4)], [(1, 0)])


@pytest.mark.parametrize(
    ("student", "teacher", "expected"),
    [
        (4, 12, ((0, 0), (1, 3), (2, 6), (3, 9), (4, 12))),  # TinyBERT-4's own map
        (6, 12, ((0, 0), (1, 2), (2, 4), (3, 6), (4, 8), (5, 10), (6, 12))),
        (3, 3, ((0, 0), (1, 1), (2, 2), (3, 3))),
        (4, 6, ((0, 0), (1, 2), (2, 3), (3, 4), (4, 6))),
    ],
)
def test_layers_are_spread_evenly(student, teacher, expected):
    assert layer_map(student, teacher) == expected


def test_a_student_deeper_than_its_teacher_is_refused():
    with pytest.raises(InputError, match="a student of 1 to 3 layers, got 4"):
        layer_map(4, 3)


# ---------------------------------------------------------------- relations


def test_relations_by_hand():
    """One pair of two tokens, one head of size 1. Teacher 1, 0: products over √1 are (1, 0) and (0, 0), so the first
    token's relation is (e, 1) / (e + 1), the second's even. Student 0, 0: even. KL of the first only, over two tokens.
    """
    p = math.e / (math.e + 1)
    expected = (p * math.log(p / 0.5) + (1 - p) * math.log((1 - p) / 0.5)) / 2
    teacher, student = torch.tensor([[1.0], [0.0]]), torch.tensor([[0.0], [0.0]])
    assert relations(student, teacher, torch.tensor([0, 2]), 1).item() == pytest.approx(expected)


def naive(student, teacher, bounds, heads):
    """As the paper writes it, one token and head at a time, in float64 with torch's KL."""
    total = 0.0
    for start, end in itertools.pairwise(bounds):
        for head in range(heads):
            parts = []
            for x in (teacher, student):
                size = x.shape[1] // heads
                part = x[start:end, head * size : (head + 1) * size].double()
                parts.append(torch.softmax(part @ part.T / math.sqrt(size), dim=1))
            for i in range(end - start):
                total += torch.nn.functional.kl_div(parts[1][i].log(), parts[0][i], reduction="sum").item()
    return total / (heads * bounds[-1])


@pytest.mark.parametrize("heads", [1, 2, 4])
def test_relations_are_the_paper_s(heads):
    """Widths differ, as a student's and a teacher's do; pairs are ragged."""
    student, teacher, bounds = random(20, 8) * 2, random(20, 12, seed=1) * 2, [0, 7, 8, 20]
    found = relations(student, teacher, torch.tensor(bounds), heads).item()
    assert found == pytest.approx(naive(student, teacher, bounds, heads), rel=1e-5)


def test_relations_stay_within_a_pair():
    student, teacher = random(9, 8), random(9, 8, seed=1)
    bounds = torch.tensor([0, 4, 9])
    together = relations(student, teacher, bounds, 2).item()
    first = relations(student[:4], teacher[:4], torch.tensor([0, 4]), 2).item()
    second = relations(student[4:], teacher[4:], torch.tensor([0, 5]), 2).item()
    assert together == pytest.approx((4 * first + 5 * second) / 9)
    assert relations(student, teacher, torch.tensor([0, 9]), 2).item() != pytest.approx(together, rel=1e-2)


def test_relations_are_invariant_to_a_rotation_within_heads():
    """Dot products do not change under an orthogonal transformation; different widths therefore need no projection."""
    x, basis = random(10, 8), torch.linalg.qr(random(4, 4, seed=1)).Q
    turned = torch.cat([x[:, :4] @ basis, x[:, 4:] @ basis], dim=1)
    assert relations(turned, x, torch.tensor([0, 10]), 2).item() == pytest.approx(0.0, abs=1e-6)
    assert relations(random(10, 8, seed=3), x, torch.tensor([0, 10]), 2).item() > 0.01


def test_attention_relations_are_the_sum_of_three():
    student, teacher = [random(6, 8, seed=i) for i in range(3)], [random(6, 4, seed=7 + i) for i in range(3)]
    bounds = torch.tensor([0, 2, 6])
    alone = [relations(s, t, bounds, 2).item() for s, t in zip(student, teacher, strict=True)]
    assert attention_relations(student, teacher, bounds, 2).item() == pytest.approx(sum(alone))


def test_heads_that_do_not_divide_are_refused():
    with pytest.raises(InputError, match="divide the teacher's size 9, got 2"):
        relations(random(4, 8), random(4, 9), torch.tensor([0, 4]), 2)
