"""Adapters outside a bank: sums are exact, truncations are the best of their rank and know what they lose."""
from __future__ import annotations

import pytest
import torch

from copd_megatron.checkpoint.adapter import Adapter, Truncation, combined, merge_weights
from copd_megatron.config.trainer import MergeConfig
from copd_megatron.types import UserError
from support.policies import noise

SHAPES = {"layers.0.self_attn.q_proj": (12, 8), "layers.1.mlp.up_proj": (16, 8), "layers.10.mlp.up_proj": (16, 8),
          "layers.2.mlp.down_proj": (8, 16)}


def make(name: str, rank: int, scaling: float = 2.0, modules=tuple(SHAPES), tokens=None) -> Adapter:
    factors = {}
    for module in modules:
        out, inp = SHAPES[module]
        factors[f"{module}.lora_A"] = noise(name, module, "A", shape=(rank, inp))
        factors[f"{module}.lora_B"] = noise(name, module, "B", shape=(out, rank))
    return Adapter(factors, scaling, tokens)


def delta(adapter: Adapter, module: str) -> torch.Tensor:
    if module not in adapter.modules():
        return torch.zeros(SHAPES[module], dtype=torch.float64)
    a, b = adapter.pair(module)
    return adapter.scaling * b.double() @ a.double()


def test_a_combination_is_the_sum_of_deltas_in_layer_order():
    """Of adapters with other ranks, scalings and weights."""
    first, second = make("a", 3), make("b", 2, 0.5, ("layers.10.mlp.up_proj", "layers.2.mlp.down_proj"))
    both = combined([second, first], [0.25, -1.5])
    assert both.modules() == ["layers.0.self_attn.q_proj", "layers.1.mlp.up_proj", "layers.2.mlp.down_proj",
                              "layers.10.mlp.up_proj"]
    for module in SHAPES:
        want = 0.25 * delta(second, module) - 1.5 * delta(first, module)
        torch.testing.assert_close(delta(both, module), want, rtol=0, atol=1e-6)
    with pytest.raises(KeyError):
        both.factors["layers.9.mlp.up_proj.lora_A"]


def test_only_adapters_that_act_on_the_same_tokens_add_up():
    with pytest.raises(UserError, match="adapters: they begin to act at .*; combine those of one adapter.scope"):
        combined([make("a", 2), make("b", 2, tokens=(1, 2))], [1, 1])
    assert combined([make("a", 2, tokens=(1, 2)), make("b", 2, tokens=(1, 2))], [1, 1]).invocation_token_ids == (1, 2)


@pytest.mark.parametrize("rank", [1, 3, 5, 9])
def test_a_truncation_is_the_best_of_its_rank(rank):
    adapter = combined([make("a", 3), make("b", 2)], [1.0, 0.5])
    cut = Truncation(adapter, rank)
    lost = whole = 0.0
    worst = {}
    for module in SHAPES:
        exact = delta(adapter, module)
        u, s, vh = torch.linalg.svd(exact, full_matrices=False)
        best = u[:, :rank] * s[:rank] @ vh[:rank]
        torch.testing.assert_close(delta(cut.adapter, module), best, rtol=0, atol=2e-6)
        assert cut.adapter.pair(module)[0].shape[0] == min(rank, 5)
        lost += float((exact - best).square().sum())
        whole += float(exact.square().sum())
        worst[module] = float((exact - best).norm() / exact.norm())
    error, worst_error, module = cut.error()
    assert error == pytest.approx((lost / whole) ** 0.5, abs=1e-7)
    assert worst_error == pytest.approx(max(worst.values()), abs=1e-7)
    assert worst[module] == pytest.approx(max(worst.values()), abs=1e-7)
    assert (rank >= 5) == (error < 1e-7)


def test_a_zero_adapter_is_truncated_without_error():
    zero = make("a", 3)
    zero = Adapter({name: factor * 0 if name.endswith("B") else factor for name, factor in zero.factors.items()}, 1.0)
    cut = Truncation(zero, 1)
    assert all(not cut.adapter.pair(module)[1].any() for module in SHAPES)
    assert cut.error()[:2] == (0.0, 0.0)


@pytest.mark.parametrize("config, want", [
    ({"rule": "uniform"}, {"a": 0.5, "b": 0.5}), ({"rule": "concat"}, {"a": 1.0, "b": 1.0}),
    ({"rule": "task_arithmetic", "scale": 0.4}, {"a": 0.4, "b": 0.4}),
    ({"rule": "weighted", "weights": {"b": 0.2, "a": 0.9}}, {"a": 0.9, "b": 0.2})])
def test_rules_are_weights_of_deltas(config, want):
    assert merge_weights(["a", "b"], MergeConfig(**config)) == want


@pytest.mark.parametrize("weights", [{}, {"a": 1.0}, {"a": 1.0, "b": 1.0, "c": 1.0}])
def test_weighted_wants_a_weight_for_each(weights):
    with pytest.raises(UserError, match="merge.weights: .*one weight for each of a, b and no other"):
        merge_weights(["a", "b"], MergeConfig(rule="weighted", weights=weights))
