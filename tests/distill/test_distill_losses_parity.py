"""The losses against those of sentence-transformers on the same logits; skipped where it is not installed."""

from types import SimpleNamespace

import pytest

torch = pytest.importorskip("torch")
theirs = pytest.importorskip("sentence_transformers.cross_encoder.losses", reason="needs sentence-transformers")

from turborank.distill.losses import LOSSES, Targets  # noqa: E402

pytestmark = pytest.mark.filterwarnings("default")  # theirs

K = 7


class Given:
    """A stand-in model for their losses: it scores document i with the i-th given logit."""

    num_labels, device = 1, torch.device("cpu")

    def __init__(self, logits):
        self.logits = logits

    def preprocess(self, pairs, **_):
        return {"places": torch.tensor([int(document) for _, document in pairs])}

    def __call__(self, features):
        return {"scores": self.logits[features["places"]]}


def case(seed):
    """One list: logits, teacher scores, grades; with ties among the grades."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(K, generator=generator).requires_grad_()
    return SimpleNamespace(
        logits=logits,
        teacher=torch.randn(K, generator=generator) * 3,
        grades=torch.randint(0, 4, (K,), generator=generator).float(),
        inputs=[["q"], [[str(i) for i in range(K)]]],
    )


def ours(name, found, **parameter):
    yes = torch.ones(1, K, dtype=torch.bool)
    targets = Targets(found.teacher[None], found.grades[None], yes, yes)
    loss = LOSSES[name].function(found.logits[None], targets, **parameter)
    return loss, torch.autograd.grad(loss, found.logits)[0]


def same(mine, other, found, times=1.0):
    """Their value and gradient, times ``times``, equal turborank's."""
    loss, gradient = mine
    torch.testing.assert_close(loss, other * times)
    torch.testing.assert_close(gradient, torch.autograd.grad(other, found.logits)[0] * times)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("mu", [10.0, 1.0])
def test_lambda_loss(seed, mu):
    """They take the mean over pairs, turborank the paper's sum."""
    found = case(seed)
    pairs = (found.grades[:, None] > found.grades[None, :]).sum()
    their = theirs.LambdaLoss(Given(found.logits), weighting_scheme=theirs.NDCGLoss2PPScheme(mu))
    same(ours("lambda", found, mu=mu), their(found.inputs, [found.grades]), found, pairs)


@pytest.mark.parametrize("seed", range(5))
def test_ranknet(seed):
    found = case(seed)
    their = theirs.RankNetLoss(Given(found.logits), reduction_log="natural")
    same(ours("ranknet", found), their(found.inputs, [found.teacher]), found)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("temperature", [1.0, 0.25])
def test_adr_mse(seed, temperature):
    found = case(seed)
    their = theirs.ADRMSELoss(Given(found.logits), alpha=1 / temperature)
    same(ours("adr_mse", found, temperature=temperature), their(found.inputs, [found.teacher]), found)


@pytest.mark.parametrize("seed", range(5))
def test_kl_is_their_list_net_less_the_teacher_s_entropy(seed):
    found = case(seed)
    shares = found.teacher.softmax(0)
    entropy = -(shares * shares.log()).sum()
    same(ours("kl", found), theirs.ListNetLoss(Given(found.logits))(found.inputs, [found.teacher]) - entropy, found)
