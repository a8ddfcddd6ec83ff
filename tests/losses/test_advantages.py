"""Advantages against arithmetic written out, and the invariants of on-policy distillation."""
import math
import statistics

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from copd_megatron.losses.advantages import (
    distillation_advantages,
    group_advantages,
    has_signal,
    overlong_penalty,
)
from copd_megatron.losses.policy_gradient import surrogate

REWARDS = [[1.0, 0.0, 0.1, 1.0], [0.0, 0.9, 0.0, 0.0], [0.1, 0.1, 0.1, 0.1]]


def expected(kind: str, rewards: list[float]) -> list[float]:
    mean = statistics.fmean(rewards)
    if len(set(rewards)) == 1:
        return [0.0] * len(rewards)
    if kind == "grpo":
        return [(r - mean) / (statistics.stdev(rewards) + 1e-6) for r in rewards]
    if kind == "dr_grpo":
        return [r - mean for r in rewards]
    return [r - (sum(rewards) - r) / (len(rewards) - 1) for r in rewards]


@pytest.mark.parametrize("kind", ["grpo", "dr_grpo", "rloo"])
def test_group_advantages(kind):
    found = group_advantages(torch.tensor(REWARDS, dtype=torch.float64), kind)
    wanted = torch.tensor([expected(kind, row) for row in REWARDS], dtype=torch.float64)
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("kind", ["grpo", "dr_grpo", "rloo"])
@pytest.mark.parametrize("reward", [0.1, 1 / 3, 1e6, 0.0])
def test_equal_rewards_give_exactly_zero_in_float32(kind, reward):
    rewards = torch.full((1, 7), reward)
    assert group_advantages(rewards, kind).tolist() == [[0.0] * 7]
    assert not has_signal(rewards).any()


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(-2, 2, width=32), min_size=2, max_size=6),
       st.sampled_from(["grpo", "dr_grpo", "rloo"]))
def test_advantages_of_a_group_sum_to_zero_and_keep_the_order(rewards, kind):
    found = group_advantages(torch.tensor([rewards], dtype=torch.float64), kind)[0]
    assert abs(float(found.sum())) < 1e-6
    assert all((found[i] >= found[j]) for i, a in enumerate(rewards) for j, b in enumerate(rewards) if a > b)


@pytest.mark.parametrize(("rewards", "kind", "message"), [
    (torch.ones(4, 1), "grpo", "at least 2"),
    (torch.ones(4), "grpo", "at least 2"),
    (torch.tensor([[1.0, float("nan")]]), "rloo", "finite"),
    (torch.ones(2, 2), "ppo", "grpo, dr_grpo or rloo"),
])
def test_bad_rewards(rewards, kind, message):
    with pytest.raises(ValueError, match=message):
        group_advantages(rewards, kind)


def test_overlong_penalty():
    lengths = torch.tensor([10, 80, 90, 100, 120])
    found = overlong_penalty(lengths, max_tokens=100, buffer=20, penalty=2.0)
    assert found.tolist() == [0.0, 0.0, -1.0, -2.0, -2.0]
    assert overlong_penalty(lengths, 100, 0, 2.0).tolist() == [0.0] * 5
    with pytest.raises(ValueError, match="buffer"):
        overlong_penalty(lengths, 100, 101, 1.0)


def test_identical_policies_teach_nothing():
    logprobs = torch.randn(5).log_softmax(0)
    advantages, kept = distillation_advantages(logprobs, logprobs.clone(), beta=3.0)
    assert advantages.tolist() == [0.0] * 5 and kept.all()


def test_guard_drops_at_and_above_the_bound():
    teacher, student = torch.tensor([-1.0, -4.0, -0.5]), torch.tensor([-3.0, -1.0, -0.5])
    advantages, kept = distillation_advantages(teacher, student, 2.0, delta_guard=2.0)
    assert kept.tolist() == [False, False, True] and advantages.tolist() == [0.0, 0.0, 0.0]
    advantages, kept = distillation_advantages(teacher, student, 2.0, delta_guard=2.5)
    assert kept.tolist() == [True, False, True] and advantages.tolist() == [4.0, 0.0, 0.0]
    advantages, kept = distillation_advantages(teacher, student, 2.0)
    assert kept.all() and advantages.tolist() == [4.0, -6.0, 0.0]


def test_distillation_advantages_carry_no_gradient():
    teacher, student = torch.zeros(2, 3, requires_grad=True)
    assert not distillation_advantages(teacher, student, 1.0)[0].requires_grad


def test_distillation_shapes_must_agree():
    with pytest.raises(ValueError, match="student"):
        distillation_advantages(torch.zeros(3), torch.zeros(1), 1.0)


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 1000), st.integers(2, 9))
def test_mean_delta_is_minus_the_reverse_kl_by_enumeration(seed, vocab):
    generator = torch.Generator().manual_seed(seed)
    student, teacher = torch.randn(2, vocab, generator=generator, dtype=torch.float64).mul(3).log_softmax(1)
    advantages, _ = distillation_advantages(teacher, student, beta=1.0)
    mean_delta = float((student.exp() * advantages).sum())
    assert mean_delta <= 1e-12
    assert math.isclose(-mean_delta, float((student.exp() * (student - teacher)).sum()), abs_tol=1e-12)


@pytest.mark.parametrize("kind", ["clip", "cispo"])
def test_expected_gradient_of_sampled_distillation_is_the_gradient_of_the_reverse_kl(kind):
    """The surrogate's mean over every token the student may sample, against dense autograd."""
    torch.manual_seed(0)
    teacher = torch.randn(9, dtype=torch.float64).log_softmax(0)
    logits = torch.randn(9, dtype=torch.float64, requires_grad=True)
    student = logits.log_softmax(0)
    advantages, _ = distillation_advantages(teacher, student, beta=0.7)
    loss, _ = surrogate(kind, student, student.detach(), advantages)
    found, = torch.autograd.grad((student.exp().detach() * loss).sum(), logits, retain_graph=True)
    wanted, = torch.autograd.grad(0.7 * (student.exp() * (student - teacher)).sum(), logits)
    torch.testing.assert_close(found, wanted)
