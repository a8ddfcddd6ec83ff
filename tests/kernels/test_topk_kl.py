"""topk_kl: the reference is differentiable, finite at its limits, and a divergence."""
import pytest
import torch

from copd_kernels.topk_kl import triton_impl
from copd_kernels.topk_kl.reference import topk_divergence

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
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


@pytest.mark.interpreted
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("vocab", "k"), [(7, 1), (30, 5), (40, 40)])
def test_triton_equals_float64_in_value_and_gradient(kind, vocab, k):
    torch.manual_seed(k)
    logits, teacher = 2 * torch.randn(2, 6, vocab, dtype=torch.float64)
    ids = teacher.topk(k, 1).indices
    teacher = teacher.log_softmax(1)
    tail = (1 - teacher.gather(1, ids).exp().sum(1)).clamp_min(0).log()
    if k == vocab:
        tail = torch.full_like(tail, -torch.inf)
    weight = torch.randn(6, dtype=torch.float64)

    def outcome(implementation, dtype):
        # By the logits: at k = V the gradients of the log-probs hold a multiple of p, rounding noise that softmax ends.
        x = logits.to(DEVICE, dtype).requires_grad_()
        student = x.log_softmax(1).gather(1, ids.to(DEVICE))
        value = implementation(student, teacher.gather(1, ids).to(DEVICE, dtype), tail.to(DEVICE, dtype), kind, 0.3)
        return value.detach().double(), torch.autograd.grad(value, x, weight.to(DEVICE, dtype))[0].double()

    for ours, theirs in zip(outcome(triton_impl.topk_divergence, torch.float32),
                            outcome(topk_divergence, torch.float64)):
        torch.testing.assert_close(ours, theirs, rtol=3e-5, atol=2e-5 if k == vocab else 3e-6)


@pytest.mark.interpreted
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("implementation", [topk_divergence, triton_impl.topk_divergence])
def test_rows_that_count_for_nothing_have_no_gradient(implementation, kind):
    """Masked rows of either side without a tail, of point masses: exactly 0, and the others are as without them. As
    the stack gives them: columns beside the sampled token's, a teacher in bfloat16, one gradient for all rows."""
    torch.manual_seed(3)
    both = (3 * torch.randn(2, 6, 9)).log_softmax(2)
    both[0, 1, 1:5], both[1, 2, 1:5] = torch.tensor([[0.7, 0.1, 0.1, 0.1], [0.25, 0.25, 0.25, 0.25]]).log()
    both[:, 3] = torch.tensor([0.0, *(-80.0,) * 8])
    teacher = both[1, :, 1:5].to(DEVICE, torch.bfloat16)
    tail = torch.log1p(-teacher.float().exp().sum(1).clamp_max(1))
    mask = torch.tensor([1.0, 0, 0, 0, 1, 1])

    def gradient(rows, function, dtype):
        student = both[0, rows].to(DEVICE, dtype).requires_grad_()
        value = function(student[:, 1:5], teacher[rows].to(dtype if dtype == torch.float64 else teacher.dtype),
                         tail[rows].to(dtype), kind, 0.3)
        assert value.isfinite().all()
        return torch.autograd.grad((value * mask[rows].to(DEVICE)).sum(), student)[0].double()

    found, counted = gradient(slice(None), implementation, torch.float32), mask.bool()
    assert not found[~counted].any() and not found[:, 0].any() and not found[:, 5:].any()
    torch.testing.assert_close(found[counted], gradient(counted, topk_divergence, torch.float64), rtol=3e-5, atol=3e-6)


@pytest.mark.interpreted
def test_triton_at_its_limits():
    """More mass than 1, no teacher's tail, no tokens, another dtype."""
    student, teacher = torch.tensor([[0.75, 0.25 + 1e-3]]).log(), torch.tensor([[0.25, 0.5]]).log()
    for kind in KINDS:
        for tail in (-torch.inf, -1.4):
            pair = [(s := student.clone().to(DEVICE).requires_grad_(),
                     f(s, teacher.to(DEVICE), torch.tensor([tail], device=DEVICE), kind))
                    for f in (triton_impl.topk_divergence, topk_divergence)]
            torch.testing.assert_close(pair[0][1], pair[1][1])
            torch.testing.assert_close(*(torch.autograd.grad(value, s)[0] for s, value in pair))
    none = torch.zeros(0, 2, device=DEVICE)
    assert triton_impl.topk_divergence(none, none, none[:, 0]).shape == (0,)
    with pytest.raises(ValueError, match="reverse, forward or jsd"):
        triton_impl.topk_divergence(none, none, none[:, 0], "kl")
    with pytest.raises(ValueError, match="model.kernels=reference"):
        triton_impl.topk_divergence(none.double(), none, none[:, 0])
