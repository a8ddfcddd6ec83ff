"""Top-k divergences with a tail bucket against dense float64 distributions, and their invariants."""
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from copd_megatron.losses.topk_kl import log_tail, topk_divergence, topk_overlap

KINDS = ["reverse", "forward", "jsd"]
WEIGHT = 0.3


def dense(p: torch.Tensor, q: torch.Tensor, kind: str) -> torch.Tensor:
    """The textbook formula over whole distributions [T, V] of masses."""
    def kl(a, b):
        return torch.where(a > 0, a * (a / b).log(), 0).sum(1)
    mixture = WEIGHT * q + (1 - WEIGHT) * p
    return {"reverse": lambda: kl(p, q), "forward": lambda: kl(q, p),
            "jsd": lambda: WEIGHT * kl(q, mixture) + (1 - WEIGHT) * kl(p, mixture)}[kind]()


def grouped(p: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """[T, K + 1]: the ids' masses, and the sum of everything else."""
    rest = torch.ones_like(p).scatter(1, ids, 0)
    return torch.cat([p.gather(1, ids), (p * rest).sum(1, keepdim=True)], 1)


def policies(seed: int, vocab: int = 12, scale: float = 2.0, tokens: int = 4, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    student, teacher = scale * torch.randn(2, tokens, vocab, generator=generator, dtype=torch.float64)
    return student.to(dtype).requires_grad_(), teacher.to(dtype).log_softmax(1)


def ours(logits: torch.Tensor, teacher: torch.Tensor, ids: torch.Tensor, kind: str) -> torch.Tensor:
    known = teacher.gather(1, ids)
    return topk_divergence(logits.log_softmax(1).gather(1, ids), known, log_tail(known), kind, WEIGHT)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("whose", ["teacher", "student"])
@pytest.mark.parametrize("k", [1, 3, 11])
def test_value_and_gradient_equal_the_dense_reference(kind, whose, k):
    logits, teacher = policies(k)
    ids = (teacher if whose == "teacher" else logits.detach()).topk(k).indices
    weights = torch.tensor([1.0, -2.0, 0.5, 3.0], dtype=torch.float64)
    found = ours(logits, teacher, ids, kind)
    wanted = dense(grouped(logits.softmax(1), ids), grouped(teacher.exp(), ids), kind)
    torch.testing.assert_close(found, wanted)
    gradients = [torch.autograd.grad((weights * loss).sum(), logits)[0] for loss in (found, wanted)]
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_all_of_the_vocabulary_is_the_full_divergence(kind, dtype):
    logits, teacher = policies(5, vocab=300, dtype=dtype)
    ids = teacher.topk(300).indices
    exact_logits = logits.detach().double().requires_grad_()
    found = ours(logits, teacher, ids, kind)
    wanted = dense(exact_logits.softmax(1), teacher.double().exp(), kind)
    tolerance = 1e-12 if dtype == torch.float64 else 3e-6
    torch.testing.assert_close(found.double(), wanted, rtol=tolerance, atol=tolerance)
    gradient, = torch.autograd.grad(found.sum(), logits)
    wanted_gradient, = torch.autograd.grad(wanted.sum(), exact_logits)
    torch.testing.assert_close(gradient.double(), wanted_gradient, rtol=tolerance, atol=tolerance)


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from(KINDS), st.floats(0.1, 8.0))
def test_never_negative_and_a_lower_bound_that_grows_with_nested_ids(seed, kind, scale):
    logits, teacher = policies(seed, scale=scale)
    full, before = dense(logits.softmax(1), teacher.exp(), kind), torch.zeros(4, dtype=torch.float64)
    for k in (1, 2, 5, 12):
        found = ours(logits, teacher, teacher.topk(k).indices, kind)
        assert (found >= before - 1e-9).all() and (found <= full + 1e-9).all()
        before = found


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("k", [1, 4, 12])
def test_identical_policies_diverge_by_nothing(kind, k):
    logits, _ = policies(0, dtype=torch.float32)
    teacher = logits.detach().log_softmax(1)
    found = ours(logits, teacher, teacher.topk(k).indices, kind)
    gradient, = torch.autograd.grad(found.sum(), logits)
    assert found.abs().max() < 1e-6 and gradient.abs().max() < 1e-6


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("student_tail", [0.0, 0.25])
def test_a_teacher_without_a_tail_is_finite_and_empty_tails_add_nothing(kind, student_tail):
    teacher = torch.tensor([[0.75, 0.25]]).log()
    student = (torch.tensor([[0.5, 0.5]]) * (1 - student_tail)).log().requires_grad_()
    found = topk_divergence(student, teacher, torch.tensor([-torch.inf]), kind, WEIGHT)
    gradient, = torch.autograd.grad(found.sum(), student)
    assert found.isfinite().all() and gradient.isfinite().all()
    if student_tail == 0:
        torch.testing.assert_close(found, dense(student.exp(), teacher.exp(), kind), rtol=1e-6, atol=1e-7)
    elif kind == "reverse":
        assert found > 2, "mass where the teacher has none must be expensive"


@pytest.mark.parametrize("kind", KINDS)
def test_point_masses_on_both_sides(kind):
    """A saturated softmax: one log-prob is 0 in float32, the other's mass underflows."""
    logits = torch.tensor([[200.0, 0.0, 0.0]], requires_grad=True)
    teacher = torch.tensor([[0.0, 200.0, 0.0]]).log_softmax(1)
    found = ours(logits, teacher, teacher.topk(2).indices, kind)
    gradient, = torch.autograd.grad(found.sum(), logits)
    assert found.isfinite().all() and gradient.isfinite().all() and (found > 0.5).all()


def test_only_the_student_gets_a_gradient():
    logits, teacher = policies(2)
    ids = teacher.topk(3).indices
    known = teacher.gather(1, ids).requires_grad_()
    tail = log_tail(known.detach()).requires_grad_()
    topk_divergence(logits.log_softmax(1).gather(1, ids), known, tail, "jsd").sum().backward()
    assert known.grad is None and tail.grad is None and logits.grad.abs().max() > 0


def test_log_tail():
    known = torch.tensor([[0.5, 0.25], [0.75, 0.25]]).log()
    assert torch.allclose(log_tail(known), torch.tensor([0.25, 0.0]).log())
    rounded = torch.tensor([[0.6, 0.3]]).log().bfloat16()
    tail = log_tail(rounded)
    assert tail.dtype == torch.float32
    torch.testing.assert_close(rounded.float().exp().sum(1) + tail.exp(), torch.ones(1))


def test_topk_overlap():
    student, teacher = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8]]), torch.tensor([[4, 9, 1, 0], [0, 1, 2, 3]])
    assert topk_overlap(student, teacher).tolist() == [0.5, 0.0]


def test_bad_input():
    logits, teacher = policies(0)
    known = teacher.topk(3).values
    student, tail = logits.log_softmax(1)[:, :3], log_tail(known)
    with pytest.raises(ValueError, match="reverse, forward or jsd"):
        topk_divergence(student, known, tail, "kl")
    with pytest.raises(ValueError, match="jsd_weight"):
        topk_divergence(student, known, tail, "jsd", 1.0)
    with pytest.raises(ValueError, match="T, K"):
        topk_divergence(student, known, tail[:1], "reverse")
    with pytest.raises(RuntimeError, match="sum to 1"):
        topk_divergence(student, known.log_softmax(1), tail, "reverse")  # renormalised inside the k
    with pytest.raises(RuntimeError, match="sum to 1"):
        topk_divergence(student, known, tail.exp(), "reverse")  # a mass instead of its logarithm
