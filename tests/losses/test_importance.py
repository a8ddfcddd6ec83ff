"""Importance weights and mismatch measures against values written out."""
import math

import pytest
import torch

from copd_megatron.losses.importance import importance_weights, mismatch

RATIOS = [0.4, 0.5, 1.0, 2.0, 2.5]


@pytest.mark.parametrize(("kind", "wanted"), [
    ("none", [1.0, 1.0, 1.0, 1.0, 1.0]),
    ("truncated", [0.4, 0.5, 1.0, 2.0, 2.0]),
    ("masked", [0.0, 0.5, 1.0, 2.0, 0.0]),
])
def test_weights(kind, wanted):
    engine = torch.full((5,), -3.0, dtype=torch.float64)
    trainer = (engine + torch.tensor(RATIOS, dtype=torch.float64).log()).requires_grad_()
    found = importance_weights(trainer, engine, kind, cap=2.0 + 1e-9)
    torch.testing.assert_close(found, torch.tensor(wanted, dtype=torch.float64))
    assert not found.requires_grad


def test_truncated_weights_make_the_engines_samples_stand_for_the_trainer():
    """By enumeration: sum_v engine(v) w(v) f(v) = sum_v trainer(v) f(v) while no weight reaches the cap."""
    torch.manual_seed(0)
    engine, trainer = (0.3 * torch.randn(2, 9, dtype=torch.float64)).log_softmax(1)
    values = torch.randn(9, dtype=torch.float64)
    weights = importance_weights(trainer, engine, "truncated", cap=10.0)
    torch.testing.assert_close((engine.exp() * weights * values).sum(), (trainer.exp() * values).sum())


def test_mismatch():
    found = mismatch(torch.tensor([-1.0, -2.0]), torch.tensor([-1.0, -3.0]))
    torch.testing.assert_close(found["logprob_gap"], torch.tensor([0.0, 1.0]))
    torch.testing.assert_close(found["prob_gap"], torch.tensor([0.0, math.exp(-2) - math.exp(-3)]))
    torch.testing.assert_close(found["kl"], torch.tensor([0.0, math.e - 2]))
    torch.testing.assert_close(found["weight"], torch.tensor([1.0, math.e]))
    far = mismatch(torch.tensor([0.0]), torch.tensor([-1000.0]))
    assert all(value.isfinite().all() for value in far.values())


def test_bad_input():
    with pytest.raises(ValueError, match="none, truncated or masked"):
        importance_weights(torch.zeros(2), torch.zeros(2), "clip")
    with pytest.raises(ValueError, match="cap"):
        importance_weights(torch.zeros(2), torch.zeros(2), "masked", cap=1.0)
    with pytest.raises(ValueError, match="trainer"):
        mismatch(torch.zeros(2), torch.zeros(3))


def test_what_truncated_weights_estimate():
    """Off-policy sums over q with weights min(p / q, C) are sums over min(p, C q): p itself where p <= C q."""
    p, q = (torch.randn(50, generator=torch.Generator().manual_seed(n), dtype=torch.float64).log_softmax(0)
            for n in (1, 2))
    for cap in (1.2, 3.0, 1e6):
        weights = importance_weights(p, q, "truncated", cap)
        torch.testing.assert_close(q.exp() * weights, torch.minimum(p.exp(), cap * q.exp()), rtol=1e-12, atol=0)
