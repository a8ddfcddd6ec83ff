"""Each surrogate against a float64 reference with gradients derived by hand, over four minibatches."""
import math
import statistics
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from copd_megatron.losses.advantages import group_advantages
from copd_megatron.losses.policy_gradient import LOG_RATIO_LIMIT, sequence_mean, surrogate
from copd_megatron.losses.reduction import token_weights

PROMPTS, GROUP, VOCAB, FEATURES, MAX_TOKENS, STEP = 16, 4, 5, 3, 6, 2.5
MINIBATCHES = 4


@dataclass(frozen=True)
class Variant:
    advantage: str = "grpo"
    loss: str = "clip"
    low: float = 0.2
    high: float = 0.2
    dual: float | None = None
    reduction: str = "seq_mean"


VARIANTS = {
    "grpo": Variant(),
    "clip_higher": Variant(high=0.28),
    "dual_clip": Variant(dual=1.3),
    "gspo": Variant(loss="gspo", low=0.1, high=0.1),
    "cispo": Variant(loss="cispo"),
    "dr_grpo": Variant(advantage="dr_grpo", low=0.1, high=0.1, reduction="constant"),
    "rloo": Variant(advantage="rloo"),
    "dapo": Variant(high=0.28, reduction="token_mean"),
}


@dataclass(frozen=True)
class Batch:
    """A frozen rollout batch of a linear softmax policy: log pi(y_t) = log_softmax(theta x_t)[y_t]."""

    lengths: np.ndarray  # [sequences]
    features: np.ndarray  # [T, FEATURES]
    tokens: np.ndarray  # [T]
    rewards: np.ndarray  # [PROMPTS, GROUP]
    start: np.ndarray  # [VOCAB, FEATURES]


@pytest.fixture(scope="module")
def batch() -> Batch:
    rng = np.random.default_rng(3)
    lengths = rng.integers(1, MAX_TOKENS + 1, PROMPTS * GROUP)
    total = int(lengths.sum())
    return Batch(lengths, rng.normal(size=(total, FEATURES)), rng.integers(0, VOCAB, total),
                 rng.integers(0, 3, (PROMPTS, GROUP)) / 2, rng.normal(size=(VOCAB, FEATURES)))


def log_policy(theta: np.ndarray, features: np.ndarray) -> np.ndarray:
    logits = features @ theta.T
    return logits - np.log(np.exp(logits).sum(1, keepdims=True))


def slope(variant: Variant, ratio: float, advantage: float) -> float:
    """d loss_t / d log pi_t, derived by hand case by case."""
    if variant.loss == "cispo":
        return -min(max(ratio, 1 - variant.low), 1 + variant.high) * advantage
    if advantage >= 0:
        return -ratio * advantage if ratio <= 1 + variant.high else 0.0
    stopped = ratio < 1 - variant.low or (variant.dual is not None and ratio > variant.dual)
    return 0.0 if stopped else -ratio * advantage


def advantage_of(variant: Variant, rewards: list[float]) -> list[float]:
    mean = statistics.fmean(rewards)
    if variant.advantage == "rloo":
        return [r - (sum(rewards) - r) / (len(rewards) - 1) for r in rewards]
    scale = 1.0
    if variant.advantage == "grpo":
        scale = statistics.stdev(rewards) + 1e-6 if len(set(rewards)) > 1 else math.inf
    return [(r - mean) / scale for r in rewards]


def train_reference(variant: Variant, batch: Batch) -> np.ndarray:
    """Plain loops over sequences and tokens; no autograd."""
    theta = batch.start.copy()
    ends = np.cumsum(batch.lengths)
    advantages = [a for row in batch.rewards for a in advantage_of(variant, row.tolist())]
    old = log_policy(theta, batch.features)[np.arange(len(batch.tokens)), batch.tokens]
    per_minibatch = len(batch.lengths) // MINIBATCHES
    for first in range(0, len(batch.lengths), per_minibatch):
        sequences = range(first, first + per_minibatch)
        minibatch_tokens = sum(int(batch.lengths[s]) for s in sequences)
        logs, gradient = log_policy(theta, batch.features), np.zeros_like(theta)
        for s in sequences:
            length, positions = int(batch.lengths[s]), range(ends[s] - batch.lengths[s], ends[s])
            log_ratios = [logs[t, batch.tokens[t]] - old[t] for t in positions]
            for t, log_ratio in zip(positions, log_ratios):
                ratio = math.exp(sum(log_ratios) / length if variant.loss == "gspo" else log_ratio)
                weight = {"seq_mean": 1 / (length * per_minibatch), "token_mean": 1 / minibatch_tokens,
                          "constant": 1 / (MAX_TOKENS * per_minibatch)}[variant.reduction]
                direction = -np.exp(logs[t])
                direction[batch.tokens[t]] += 1
                coefficient = weight * slope(variant, ratio, advantages[s])
                gradient += coefficient * np.outer(direction, batch.features[t])
        theta -= STEP * gradient
    return theta


def train_ours(variant: Variant, batch: Batch) -> tuple[np.ndarray, float]:
    """The same training with the package's functions and autograd; also the share of clipped tokens."""
    theta = torch.tensor(batch.start, requires_grad=True)
    features, tokens = torch.tensor(batch.features), torch.tensor(batch.tokens)
    lengths = torch.tensor(batch.lengths)
    sequence = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
    advantages = group_advantages(torch.tensor(batch.rewards), variant.advantage).flatten()[sequence]

    def logprobs(rows):
        return (features[rows] @ theta.T).log_softmax(1).gather(1, tokens[rows, None])[:, 0]

    with torch.no_grad():
        old = logprobs(torch.arange(len(tokens)))
    clipped = 0.0
    for chosen in torch.arange(len(lengths)).chunk(MINIBATCHES):
        rows = torch.isin(sequence, chosen).nonzero()[:, 0]
        loss, facts = surrogate(variant.loss, logprobs(rows), old[rows], advantages[rows], sequence[rows],
                                variant.low, variant.high, variant.dual)
        weights = token_weights(lengths[chosen], variant.reduction, len(chosen), len(rows), MAX_TOKENS,
                                dtype=torch.float64)
        gradient, = torch.autograd.grad((weights * loss).sum(), theta)
        clipped += float(facts["clipped"].sum() + facts["dual_clipped"].sum()) / len(tokens)
        with torch.no_grad():
            theta -= STEP * gradient
    return theta.detach().numpy(), clipped


@pytest.mark.parametrize("name", VARIANTS)
def test_four_minibatches_equal_the_reference(batch, name):
    theta, clipped = train_ours(VARIANTS[name], batch)
    np.testing.assert_allclose(theta, train_reference(VARIANTS[name], batch), rtol=0, atol=1e-12)
    assert clipped > 0.01, "the batch never leaves the clip range, so it proves nothing"


def test_every_variant_changes_the_update(batch):
    thetas = {name: train_ours(variant, batch)[0] for name, variant in VARIANTS.items()}
    names = list(thetas)
    for i, first in enumerate(names):
        for second in names[i + 1:]:
            assert np.abs(thetas[first] - thetas[second]).max() > 1e-3, (first, second)


@pytest.mark.parametrize("kind", ["clip", "gspo", "cispo"])
def test_on_policy_gradient_is_the_plain_policy_gradient(kind):
    logprobs = torch.randn(7, dtype=torch.float64, requires_grad=True)
    advantages = torch.randn(7, dtype=torch.float64)
    ids = torch.tensor([0, 0, 0, 1, 1, 2, 2])
    loss, facts = surrogate(kind, logprobs, logprobs.detach(), advantages, ids)
    gradient, = torch.autograd.grad(loss.sum(), logprobs)
    torch.testing.assert_close(gradient, -advantages)
    assert facts["ratio"].tolist() == [1.0] * 7 and not facts["clipped"].any()


@pytest.mark.parametrize("kind", ["clip", "gspo", "cispo"])
def test_only_the_policy_gets_a_gradient(kind):
    policy, old, advantages = torch.tensor([[-1.0, -2.0], [-1.1, -2.1], [1.0, -1.0]]).unbind()
    for tensor in (policy, old, advantages):
        tensor.requires_grad_()
    surrogate(kind, policy, old, advantages, torch.tensor([0, 1]))[0].sum().backward()
    assert old.grad is None and advantages.grad is None and policy.grad.abs().min() > 0


def test_values_of_the_clipped_surrogate():
    ratios = torch.tensor([0.5, 0.5, 1.1, 1.5, 1.5, 9.0])
    advantages = torch.tensor([1.0, -1.0, 1.0, 1.0, -1.0, -1.0])
    loss, facts = surrogate("clip", ratios.log(), torch.zeros(6), advantages, clip_low=0.2, clip_high=0.3,
                            dual_clip=3.0)
    torch.testing.assert_close(loss, torch.tensor([-0.5, 0.8, -1.1, -1.3, 1.5, 3.0]))
    assert facts["clipped"].tolist() == [0, 1, 0, 1, 0, 0]
    assert facts["dual_clipped"].tolist() == [0, 0, 0, 0, 0, 1]


@pytest.mark.parametrize("kind", ["clip", "gspo", "cispo"])
def test_masked_tokens_have_no_loss_no_gradient_and_no_part_in_sequence_means(kind):
    logprobs = torch.tensor([-1.0, -2.0, -float("inf"), -0.5], requires_grad=True)
    old, advantages = torch.tensor([-1.1, -1.7, 0.0, -0.5]), torch.tensor([1.0, 1.0, float("nan"), 2.0])
    mask, ids = torch.tensor([True, True, False, True]), torch.tensor([0, 0, 0, 1])
    loss, facts = surrogate(kind, logprobs, old, advantages, ids, loss_mask_T=mask)
    gradient, = torch.autograd.grad(loss.sum(), logprobs)
    short = logprobs.detach()[mask].requires_grad_()
    short_loss, _ = surrogate(kind, short, old[mask], advantages[mask], ids[mask])
    short_gradient, = torch.autograd.grad(short_loss.sum(), short)
    assert loss[2] == 0 and gradient[2] == 0 and facts["ratio"][2] == 0
    torch.testing.assert_close(loss[mask], short_loss)
    torch.testing.assert_close(gradient[mask], short_gradient)


def test_huge_ratios_stay_finite():
    logprobs = torch.tensor([0.0, -900.0], requires_grad=True)
    loss, _ = surrogate("clip", logprobs, torch.tensor([-900.0, 0.0]), torch.tensor([-1.0, -1.0]))
    gradient, = torch.autograd.grad(loss.sum(), logprobs)
    assert math.isclose(float(loss[0].detach()), math.exp(LOG_RATIO_LIMIT), rel_tol=1e-5)
    assert gradient.isfinite().all()


def test_sequence_means_whatever_the_ids():
    ids = torch.tensor([900, 3, 900, 7, 3, 3])
    means = sequence_mean(torch.tensor([1.0, 2.0, 3.0, 9.0, 4.0, 6.0]), ids)
    assert means.tolist() == [2.0, 4.0, 2.0, 9.0, 4.0, 4.0]


def test_sequence_mean_of_nothing():
    assert sequence_mean(torch.zeros(0), torch.zeros(0, dtype=torch.long)).shape == (0,)
    mask = torch.tensor([True, True, False])
    means = sequence_mean(torch.tensor([1.0, 3.0, 5.0]), torch.tensor([0, 0, 1]), mask)
    assert means.tolist() == [2.0, 2.0, 0.0]


@pytest.mark.parametrize(("change", "message"), [
    ({"kind": "ppo"}, "clip, gspo or cispo"),
    ({"advantages_T": torch.zeros(2)}, "one shape"),
    ({"kind": "gspo"}, "sequence_ids_T"),
    ({"clip_low": -0.1}, "clip_low"),
    ({"dual_clip": 1.0}, "dual_clip"),
    ({"kind": "cispo", "dual_clip": 3.0}, "dual_clip"),
])
def test_bad_input(change, message):
    good = {"kind": "clip", "policy_logprobs_T": torch.zeros(3), "old_logprobs_T": torch.zeros(3),
            "advantages_T": torch.zeros(3)}
    with pytest.raises(ValueError, match=message):
        surrogate(**(good | change))
