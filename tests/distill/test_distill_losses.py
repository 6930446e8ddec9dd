"""Losses against numbers computed by hand, and properties that hold for any list."""

import itertools
import math

import pytest

torch = pytest.importorskip("torch")

from turborank.distill.losses import LABELS, LOSSES, MU, TEACHER, Targets, lambda_loss, mix  # noqa: E402
from turborank.errors import InputError, UnknownKeyError  # noqa: E402

NAN = math.nan


def table(rows):
    return torch.tensor(rows, dtype=torch.float64)


def targets(teacher=None, labels=None, real=None, trusted=None):
    shape = table(teacher if teacher is not None else labels).shape
    yes = torch.ones(shape, dtype=torch.bool)
    return Targets(
        None if teacher is None else table(teacher),
        None if labels is None else table(labels),
        yes if real is None else torch.tensor(real, dtype=torch.bool),
        yes if trusted is None else torch.tensor(trusted, dtype=torch.bool),
    )


def value(name, logits, known, **parameter):
    return LOSSES[name].function(table(logits), known, **parameter).item()


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


# ---------------------------------------------------------------- numbers


def test_margin_mse_of_three_documents():
    """Margins of s: 1-0, 1-3, 0-3; of t: 4-1, 4-2, 1-2. Squares of their differences: (1-3)², (-2-2)², (-3+1)²."""
    known = targets(teacher=[[4.0, 1.0, 2.0]])
    assert value("margin_mse", [[1.0, 0.0, 3.0]], known) == pytest.approx((4 + 16 + 4) / 3)


def test_margin_mse_of_two_documents_is_the_paper_s():
    known = targets(teacher=[[7.5, 2.0]])
    assert value("margin_mse", [[1.0, 0.25]], known) == pytest.approx(((1 - 0.25) - (7.5 - 2.0)) ** 2)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_kl_of_two_documents(temperature):
    """t / T = ln 3, 0: shares 3/4 and 1/4. s / T = 0, 0: halves. KL = ¾·ln(¾ / ½) + ¼·ln(¼ / ½); times T²."""
    known = targets(teacher=[[temperature * math.log(3), 0.0]])
    expected = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    assert value("kl", [[0.0, 0.0]], known, temperature=temperature) == pytest.approx(temperature**2 * expected)


def test_kl_weighs_by_the_teacher_not_by_the_student():
    """The other way round it would be ½·ln(½ / 0.99) + ½·ln(½ / 0.01) = 1.61."""
    known = targets(teacher=[[math.log(99), 0.0]])
    expected = 0.99 * math.log(0.99 / 0.5) + 0.01 * math.log(0.01 / 0.5)
    assert value("kl", [[0.0, 0.0]], known) == pytest.approx(expected)


def test_the_gradient_of_kl_is_the_difference_of_shares():
    """d/ds of T²·KL = T·(softmax(s/T) - softmax(t/T)): with T = 2, 2·(½ - ¾) and 2·(½ - ¼)."""
    logits = table([[0.0, 0.0]]).requires_grad_()
    LOSSES["kl"].function(logits, targets(teacher=[[2 * math.log(3), 0.0]]), temperature=2.0).backward()
    assert logits.grad.tolist() == [pytest.approx([-0.5, 0.5])]


def test_ranknet_of_three_documents():
    """Teacher's order: b > c > a, so the pairs are (b, c), (b, a), (c, a)."""
    a, b, c = 1.0, 0.5, -2.0
    expected = sum(math.log(1 + math.exp(low - high)) for high, low in ((b, c), (b, a), (c, a))) / 3
    assert value("ranknet", [[a, b, c]], targets(teacher=[[-3.0, 9.0, 0.0]])) == pytest.approx(expected)


def test_ranknet_ignores_ties():
    known = targets(teacher=[[2.0, 2.0, 0.0]])
    expected = (math.log(1 + math.exp(-1.0)) + math.log(1 + math.exp(-5.0))) / 2
    assert value("ranknet", [[1.0, 5.0, 0.0]], known) == pytest.approx(expected)


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_adr_mse_of_two_documents(temperature):
    """π = 2, 1. π̂ = 1 + σ((0.3 - 1) / T), 1 + σ((1 - 0.3) / T)."""
    first, second = 1 + sigmoid((0.3 - 1) / temperature), 1 + sigmoid((1 - 0.3) / temperature)
    expected = ((2 - first) ** 2 / math.log2(3) + (1 - second) ** 2 / math.log2(2)) / 2
    known = targets(teacher=[[-1.0, 4.0]])
    assert value("adr_mse", [[1.0, 0.3]], known, temperature=temperature) == pytest.approx(expected)


def test_adr_mse_gives_equal_scores_the_middle_of_their_ranks():
    """π = 1.5, 1.5, 3; equal logits everywhere mean π̂ = 2 for all."""
    expected = (2 * 0.25 / math.log2(2.5) + 1 / math.log2(4)) / 3
    assert value("adr_mse", [[0.0, 0.0, 0.0]], targets(teacher=[[5.0, 5.0, 1.0]])) == pytest.approx(expected)


def test_lambda_loss_of_three_documents():
    """Grades 0, 2, 1: gains 0, 3, 1. By the logits the ranks are 1, 3, 2. maxDCG = 3/log₂2 + 1/log₂3.

    Pairs (b, a): ranks 3 and 1, two apart; (b, c): ranks 3 and 2, one apart; (c, a): ranks 2 and 1, one apart.
    """
    d1, d2, d3 = 1.0, 1 / math.log2(3), 1 / math.log2(4)
    best = 3 * d1 + 1 * d2
    a, b, c = 2.0, -1.0, 0.5
    pairs = (
        (3 - 0, b - a, d1 - d3, d2 - d3),  # two apart: 1/D(2) - 1/D(3)
        (3 - 1, b - c, d2 - d3, d1 - d2),  # one apart: 1/D(1) - 1/D(2)
        (1 - 0, c - a, d1 - d2, d1 - d2),
    )
    expected = sum((rho + MU * delta) * gain / best * math.log2(1 + math.exp(-m)) for gain, m, rho, delta in pairs)
    known = targets(labels=[[0.0, 2.0, 1.0]])
    assert value("lambda", [[a, b, c]], known) == pytest.approx(expected)


def test_lambda_loss_without_ndcg_loss2_is_lambdarank():
    """μ = 0, grades 1, 0 in the wrong order: (1/log₂2 - 1/log₂3)·1·log₂(1 + e)."""
    known = targets(labels=[[1.0, 0.0]])
    expected = (1 - 1 / math.log2(3)) * math.log2(1 + math.e)
    assert value("lambda", [[0.0, 1.0]], known, mu=0.0) == pytest.approx(expected)


def test_infonce_of_one_positive_and_two_negatives():
    """exp(s) = 2 against 1 and 5."""
    logits = [[math.log(2), 0.0, math.log(5)]]
    assert value("infonce", logits, targets(labels=[[1.0, 0.0, -1.0]])) == pytest.approx(-math.log(2 / 8))


def test_infonce_s_positives_do_not_compete():
    """exp(s) = 2 and 3, each against 5 alone."""
    logits = [[math.log(2), math.log(3), math.log(5)]]
    expected = -(math.log(2 / 7) + math.log(3 / 8)) / 2
    assert value("infonce", logits, targets(labels=[[1.0, 2.0, 0.0]])) == pytest.approx(expected)


def test_softmax_of_grades():
    """exp(s) = 1, 2, 5 of 8; grades 2, 1, 0: shares ⅔, ⅓, 0."""
    logits = [[0.0, math.log(2), math.log(5)]]
    expected = -(2 / 3 * math.log(1 / 8) + 1 / 3 * math.log(2 / 8))
    assert value("softmax", logits, targets(labels=[[2.0, 1.0, -1.0]])) == pytest.approx(expected)


def test_bce_of_three_documents():
    expected = -(math.log(sigmoid(0.7)) + math.log(1 - sigmoid(-1.0)) + math.log(1 - sigmoid(2.0))) / 3
    assert value("bce", [[0.7, -1.0, 2.0]], targets(labels=[[3.0, 0.0, -1.0]])) == pytest.approx(expected)


@pytest.mark.parametrize("name", [name for name, row in LOSSES.items() if row.needs == LABELS])
def test_a_suspected_document_is_left_out(name):
    """The second document is neither judged nor trusted: the loss equals that of the list without it."""
    known = targets(labels=[[1.0, -1.0, 0.0]], trusted=[[True, False, True]])
    assert value(name, [[0.5, 3.0, -0.25]], known) == pytest.approx(
        value(name, [[0.5, -0.25]], targets(labels=[[1.0, 0.0]]))
    )


@pytest.mark.parametrize("name", [name for name, row in LOSSES.items() if row.needs == LABELS])
def test_a_judged_document_counts_whether_trusted_or_not(name):
    judged = targets(labels=[[1.0, 0.0, 0.0]], trusted=[[False, False, False]])
    trusted = targets(labels=[[1.0, -1.0, -1.0]], trusted=[[True, True, True]])
    logits = [[0.5, 3.0, -0.25]]
    assert value(name, logits, judged) == pytest.approx(value(name, logits, trusted))


@pytest.mark.parametrize("name", [name for name, row in LOSSES.items() if row.needs == TEACHER])
def test_a_document_the_teacher_has_not_scored_is_left_out(name):
    logits, shorter = [[0.5, 3.0, -0.25]], [[0.5, -0.25]]
    known = targets(teacher=[[1.0, NAN, 4.0]])
    assert value(name, logits, known) == pytest.approx(value(name, shorter, targets(teacher=[[1.0, 4.0]])))


# ---------------------------------------------------------------- what is true of any list

FOUR = targets(teacher=[[3.0, -1.0, 0.5, 2.0]], labels=[[2.0, 0.0, -1.0, 1.0]])
LOGITS = [[0.3, -0.7, 1.1, 0.9]]


@pytest.mark.parametrize("name", LOSSES)
def test_only_bce_depends_on_a_shift_of_the_logits(name):
    shifted = [[x + 5.0 for x in LOGITS[0]]]
    same = value(name, shifted, FOUR) == pytest.approx(value(name, LOGITS, FOUR), abs=1e-9)
    assert same == (name != "bce")


@pytest.mark.parametrize("name", LOSSES)
def test_the_order_of_the_list_does_not_matter(name):
    logits = table(LOGITS)
    for order in itertools.permutations(range(4)):
        moved = Targets(FOUR.teacher[:, order], FOUR.labels[:, order], FOUR.real, FOUR.trusted)
        assert LOSSES[name].function(logits[:, order], moved).item() == pytest.approx(value(name, LOGITS, FOUR))


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("junk", [0.0, 1e9, -1e9, math.inf, -math.inf, NAN])
def test_places_without_a_document_change_nothing_and_get_no_gradient(name, junk):
    padded = Targets(
        table([[9.0, *FOUR.teacher[0].tolist(), -9.0]]),
        table([[3.0, *FOUR.labels[0].tolist(), 0.0]]),
        torch.tensor([[False, True, True, True, True, False]]),
        torch.ones(1, 6, dtype=torch.bool),
    )
    plain, wider = table(LOGITS).requires_grad_(), table([[junk, *LOGITS[0], junk]]).requires_grad_()
    for logits, known in ((plain, FOUR), (wider, padded)):
        LOSSES[name].function(logits, known).backward()
    assert value(name, wider.tolist(), padded) == pytest.approx(value(name, LOGITS, FOUR))
    assert wider.grad[0, [0, 5]].tolist() == [0.0, 0.0]
    torch.testing.assert_close(wider.grad[:, 1:5], plain.grad)
    assert plain.grad.abs().sum() > 0


@pytest.mark.parametrize("name", LOSSES)
def test_the_right_order_of_given_scores_is_the_cheapest(name):
    """Labels and teacher agree, all grades differ, and the logits have the same gaps as the teacher's scores."""
    known = targets(teacher=[[3.0, 1.5, 0.0, -1.5]], labels=[[3.0, 2.0, 1.0, 0.0]])
    if name in ("infonce", "bce"):  # which tell positive from negative only
        known = known._replace(labels=table([[1.0, 0.0, 0.0, 0.0]]))
    costs = {order: value(name, [order], known) for order in itertools.permutations((3.0, 1.5, 0.0, -1.5))}
    best = min(costs.values())
    assert costs[3.0, 1.5, 0.0, -1.5] == pytest.approx(best)
    assert max(costs.values()) > best + 0.1
    if name not in ("infonce", "bce"):
        assert [order for order, cost in costs.items() if cost < best + 1e-9] == [(3.0, 1.5, 0.0, -1.5)]


@pytest.mark.parametrize("name", ["margin_mse", "kl"])
def test_the_teacher_s_own_logits_cost_nothing_whatever_their_level(name):
    own = [[x - 7.0 for x in FOUR.teacher[0].tolist()]]
    assert value(name, own, FOUR) == pytest.approx(0.0, abs=1e-12)
    assert value(name, LOGITS, FOUR) > 0.1


def test_adr_mse_vanishes_as_the_right_order_gets_sharper():
    costs = [value("adr_mse", [[scale * x for x in FOUR.teacher[0].tolist()]], FOUR) for scale in (1, 4, 64)]
    assert costs[0] > costs[1] > costs[2]
    assert costs[2] == pytest.approx(0.0, abs=1e-9)


@pytest.mark.parametrize("name", LOSSES)
def test_gradients_are_the_function_s(name):
    """Against finite differences, over ragged lists, some without labels or without a teacher."""
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(5, 6, generator=generator, dtype=torch.float64).requires_grad_()
    teacher = torch.randn(5, 6, generator=generator, dtype=torch.float64)
    labels = torch.randint(-1, 3, (5, 6), generator=generator).double()
    teacher[1], labels[2] = NAN, -1.0
    real = torch.rand(5, 6, generator=generator) < 0.8
    trusted = torch.rand(5, 6, generator=generator) < 0.8
    known = Targets(teacher, labels, real, trusted)
    assert torch.autograd.gradcheck(lambda x: LOSSES[name].function(x, known), (logits,))


@pytest.mark.parametrize("name", LOSSES)
def test_the_mean_is_over_lists_that_have_what_it_needs(name):
    """Lists: two whole ones, one without labels or teacher, one without a document."""
    known = Targets(
        table([FOUR.teacher[0].tolist(), [0.0, 1.0, 2.0, 3.0], [NAN] * 4, [1.0] * 4]),
        table([FOUR.labels[0].tolist(), [1.0, 0.0, 0.0, 0.0], [-1.0] * 4, [1.0] * 4]),
        torch.tensor([[True] * 4] * 3 + [[False] * 4]),
        torch.ones(4, 4, dtype=torch.bool),
    )
    other = targets(teacher=[[0.0, 1.0, 2.0, 3.0]], labels=[[1.0, 0.0, 0.0, 0.0]])
    expected = (value(name, LOGITS, FOUR) + value(name, LOGITS, other)) / 2
    assert value(name, LOGITS * 4, known) == pytest.approx(expected)


@pytest.mark.parametrize("name", LOSSES)
def test_without_what_it_needs_a_loss_is_zero_and_differentiable(name):
    nothing = Targets(None, None, FOUR.real, FOUR.trusted)
    logits = table(LOGITS).requires_grad_()
    loss = LOSSES[name].function(logits, nothing)
    loss.backward()
    assert loss.item() == 0.0
    assert logits.grad.tolist() == [[0.0] * 4]


@pytest.mark.parametrize("name", LOSSES)
def test_half_precision_logits_are_summed_in_float32(name):
    logits = table(LOGITS).bfloat16()
    loss = LOSSES[name].function(logits, FOUR)
    assert loss.dtype in (torch.float32, torch.float64)  # float64 where the targets are
    assert loss.item() == pytest.approx(value(name, logits.double().tolist(), FOUR))


def test_far_logits_do_not_overflow():
    for name, row in LOSSES.items():
        logits = torch.tensor([[3e4, -3e4, 0.0, 100.0]], requires_grad=True)
        row.function(logits, FOUR).backward()
        assert torch.isfinite(logits.grad).all(), name


# ---------------------------------------------------------------- several


def test_a_mix_is_the_weighted_sum_and_names_its_parts():
    total, parts = mix("kl@2:1, infonce:0.5,margin_mse")(table(LOGITS), FOUR)
    alone = {
        "kl@2": value("kl", LOGITS, FOUR, temperature=2.0),
        "infonce": value("infonce", LOGITS, FOUR),
        "margin_mse": value("margin_mse", LOGITS, FOUR),
    }
    assert parts == pytest.approx(alone)
    assert total.item() == pytest.approx(alone["kl@2"] + 0.5 * alone["infonce"] + alone["margin_mse"])
    assert mix("kl:1,infonce").needs == {TEACHER, LABELS}
    assert mix("adr_mse").needs == {TEACHER}


def test_a_mix_s_gradient_is_the_sum_of_its_parts():
    logits = table(LOGITS).requires_grad_()
    mix("kl:2,bce:3")(logits, FOUR)[0].backward()
    alone = table(LOGITS).requires_grad_()
    (2 * LOSSES["kl"].function(alone, FOUR) + 3 * LOSSES["bce"].function(alone, FOUR)).backward()
    torch.testing.assert_close(logits.grad, alone.grad)


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("kl:x", "the weight of kl to be a number above 0, got 'x' in 'kl:x'"),
        ("kl:-1", "a number above 0, got '-1'"),
        ("kl:nan", "a number above 0, got 'nan'"),
        ("kl@0:1", "the temperature of kl to be a number above 0, got '0'"),
        ("bce@2", "bce without a parameter, got 'bce@2'"),
        ("kl,kl:2", "each loss once, got kl more than once"),
    ],
)
def test_invalid_mixes_are_refused(spec, said):
    with pytest.raises(InputError) as caught:
        mix(spec)
    assert said in str(caught.value)


def test_an_unknown_loss_is_answered_from_the_table():
    with pytest.raises(UnknownKeyError, match="adr_mse, bce, infonce, kl, lambda, margin_mse, ranknet, softmax") as e:
        mix("marginmse:1")
    assert "did you mean 'margin_mse'" in str(e.value)


def test_lambda_loss_bounds_the_loss_of_ndcg():
    """1 - nDCG is at most the part with μ, Σ δ_ij·|G_i - G_j|·log₂(1 + e^-m), which the paper derives as a bound;
    here for every order of five grades and logits of several scales."""
    grades = (3.0, 2.0, 1.0, 0.0, 0.0)
    ideal = sum((2**g - 1) / math.log2(i + 2) for i, g in enumerate(grades))
    for scale in (0.1, 1.0, 5.0):
        for order in itertools.permutations(range(5)):
            ndcg = sum((2 ** grades[place] - 1) / math.log2(i + 2) for i, place in enumerate(order)) / ideal
            logits = [0.0] * 5
            for i, place in enumerate(order):
                logits[place] = scale * (5 - i)
            known = targets(labels=[list(grades)])
            twice = (
                lambda_loss(table([logits]), known, mu=1.0).item() - lambda_loss(table([logits]), known, mu=0.0).item()
            )
            assert 1 - ndcg <= twice + 1e-9
