"""topk_kl: the reference is differentiable, finite at its limits, and a divergence."""
import pytest
import torch

from copd_kernels.topk_kl.reference import topk_divergence

KINDS = ["reverse", "forward", "jsd"]


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_equals_finite_differences(kind):
    torch.manual_seed(0)
    logits = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(3, 6, dtype=torch.float64).log_softmax(1)
    tail = teacher[:, 4:].logsumexp(1)

    def divergence(x):
        return topk_divergence(x.log_softmax(1)[:, :4], teacher[:, :4], tail, kind, 0.4)

    assert torch.autograd.gradcheck(divergence, (logits,))
    assert (divergence(logits) > 0).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rounding_of_an_empty_tail_is_harmless(kind, dtype):
    """At K = V the student's tail is rounding noise, above or below 0; the teacher's may be -inf."""
    logits = (3 * torch.randn(200, 50, dtype=dtype)).requires_grad_()
    teacher = (3 * torch.randn(200, 50, dtype=dtype)).log_softmax(1)
    found = topk_divergence(logits.log_softmax(1), teacher, torch.full((200,), -torch.inf, dtype=dtype), kind)
    gradient, = torch.autograd.grad(found.sum(), logits)
    assert found.isfinite().all() and gradient.isfinite().all() and (found >= 0).all()


def test_jensen_shannon_is_symmetric_at_one_half_and_bounded():
    first, second = (4 * torch.randn(2, 20, 30, dtype=torch.float64)).log_softmax(2)
    none = torch.full((20,), -torch.inf, dtype=torch.float64)
    there, back = (topk_divergence(*pair, none, "jsd", 0.5) for pair in ((first, second), (second, first)))
    torch.testing.assert_close(there, back)
    assert (there <= torch.tensor(2.0).log() + 1e-12).all()


def test_a_student_tail_without_mass_adds_exactly_nothing():
    """Rounding can make the student's masses sum to more than 1; here they do by much."""
    student, teacher = torch.tensor([[0.75, 0.25 + 1e-3]]).log(), torch.tensor([[0.25, 0.5]]).log()
    found = topk_divergence(student, teacher, torch.tensor([0.25]).log(), "reverse")
    torch.testing.assert_close(found, (student.exp() * (student - teacher)).sum(1), rtol=1e-6, atol=0)


def test_unknown_kind():
    with pytest.raises(ValueError, match="reverse, forward or jsd"):
        topk_divergence(torch.zeros(1, 1), torch.zeros(1, 1), torch.zeros(1), "kl")
