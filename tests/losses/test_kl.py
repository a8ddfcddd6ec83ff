"""KL estimators against the exact KL and its gradient, by enumeration of a small vocabulary."""
import pytest
import torch

from copd_megatron.losses.kl import kl_estimate


@pytest.fixture
def policies():
    torch.manual_seed(1)
    logits = torch.randn(8, dtype=torch.float64, requires_grad=True)
    return logits, logits.log_softmax(0), torch.randn(8, dtype=torch.float64).log_softmax(0)


def mean_gradient(kind, logits, policy, reference):
    estimate = kl_estimate(policy, reference, kind)
    return torch.autograd.grad((policy.exp().detach() * estimate).sum(), logits, retain_graph=True)[0]


@pytest.mark.parametrize("kind", ["k1", "k3"])
def test_value_is_unbiased(policies, kind):
    _, policy, reference = policies
    exact = (policy.exp() * (policy - reference)).sum()
    torch.testing.assert_close((policy.exp() * kl_estimate(policy, reference, kind)).sum(), exact)


@pytest.mark.parametrize("kind", ["k1", "k2"])
def test_mean_gradient_is_the_gradient_of_the_reverse_kl(policies, kind):
    logits, policy, reference = policies
    exact, = torch.autograd.grad((policy.exp() * (policy - reference)).sum(), logits, retain_graph=True)
    assert exact.abs().max() > 0.01
    torch.testing.assert_close(mean_gradient(kind, logits, policy, reference), exact)


def test_mean_gradient_of_k3_is_the_gradient_of_the_forward_kl(policies):
    logits, policy, reference = policies
    exact, = torch.autograd.grad((reference.exp() * (reference - policy)).sum(), logits, retain_graph=True)
    torch.testing.assert_close(mean_gradient("k3", logits, policy, reference), exact)


def test_gradients_agree_to_first_order_near_the_reference(policies):
    logits, policy, _ = policies
    reference = (policy.detach() + 1e-5 * torch.randn(8, dtype=torch.float64)).log_softmax(0)
    gradients = [mean_gradient(kind, logits, policy, reference) for kind in ("k1", "k2", "k3")]
    for gradient in gradients[1:]:
        torch.testing.assert_close(gradient, gradients[0], rtol=1e-3, atol=1e-9)


@pytest.mark.parametrize("kind", ["k1", "k2", "k3"])
def test_values_and_signs(kind):
    policy = torch.tensor([-1.0, -2.0, -0.3], requires_grad=True)
    reference = torch.tensor([-1.5, -1.0, -0.3], requires_grad=True)
    found = kl_estimate(policy, reference, kind)
    d = (policy - reference).detach()
    wanted = {"k1": d, "k2": d ** 2 / 2, "k3": (-d).exp() - 1 + d}[kind]
    torch.testing.assert_close(found.detach(), wanted)
    found.sum().backward()
    assert reference.grad is None and policy.grad[2] == 0


def test_an_impossible_reference_token_stays_finite():
    policy = torch.tensor([-900.0], requires_grad=True)
    found = kl_estimate(policy, torch.tensor([0.0]), "k3")
    found.sum().backward()
    assert found.isfinite().all() and policy.grad.isfinite().all()


def test_bad_input():
    with pytest.raises(ValueError, match="k1, k2 or k3"):
        kl_estimate(torch.zeros(2), torch.zeros(2), "k4")
    with pytest.raises(ValueError, match="policy"):
        kl_estimate(torch.zeros(2), torch.zeros(1), "k1")
