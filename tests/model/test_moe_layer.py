"""The MoE layer by itself: our experts are Megatron's, our router is transformers', idle ranks take part."""
from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from megatron.core.transformer.moe.experts import SequentialMLP
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeTopKRouter

from copd_kernels.rowwise_fp8.reference import dequantise, quantise_rows
from copd_megatron.model.moe_layer import FrozenMoE
from copd_megatron.model.spec import RopeSpec
from support.random_backbone import MOE_SPEC, make_backbone

TOKENS = 11


@pytest.fixture
def layer(one_rank):
    """A MoE layer in float64."""
    found = make_backbone(one_rank("a", "b"), spec=MOE_SPEC).layers[0].mlp
    assert isinstance(found, FrozenMoE)
    return found


def _rows(seed: int = 0, tokens: int = TOKENS) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(tokens, 1, MOE_SPEC.hidden_size, dtype=torch.float64, generator=generator, requires_grad=True)


def test_every_row_passes_the_experts_of_its_choice(layer):
    """The definition, row by row."""
    rows = _rows()
    for row, got in zip(rows[:, 0], layer(rows)[0][:, 0]):
        scores, chosen = (layer.router.weight @ row).softmax(0).topk(2)
        want = torch.zeros_like(row)
        for weight, number in zip(scores / scores.sum(), chosen):
            expert = layer.experts.local_experts[number]
            gate, up = (expert.linear_fc1.weight @ row).chunk(2)
            want += weight * (expert.linear_fc2.weight @ (torch.nn.functional.silu(gate) * up))
        torch.testing.assert_close(got, want, rtol=0, atol=1e-12)


@pytest.mark.parametrize("recompute", [False, True])
def test_experts_are_megatrons(layer, recompute):
    """Outputs and gradients of ``SequentialMLP`` on the same weights."""
    counts, weights = torch.tensor([4, 0, 6, 1]), torch.rand(TOKENS, dtype=torch.float64).requires_grad_()
    layer.experts.recompute = recompute
    results = []
    for forward in (layer.experts.forward, lambda *args: SequentialMLP.forward(layer.experts, *args)):
        rows = _rows()
        out = forward(rows[:, 0], counts, weights)[0]
        results.append((out, *torch.autograd.grad(out.square().sum(), (rows, weights))))
    for ours, theirs in zip(*results):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_router_is_transformers(layer, norm, dtype):
    """The same experts and the same weights to the bit; gradients of the rows only."""
    config = type("Config", (), {"num_experts_per_tok": 2, "num_experts": 4, "norm_topk_prob": norm,
                                 "hidden_size": MOE_SPEC.hidden_size})
    theirs, router, rows = Qwen3MoeTopKRouter(config).to(dtype), layer.router, _rows().to(dtype)
    router.norm_topk, router.weight.data = norm, router.weight.data.to(dtype)
    theirs.weight.data.copy_(router.weight)
    weights, chosen = router(rows)
    _, want, index = theirs(rows)
    assert torch.equal(weights, torch.zeros_like(weights).scatter(1, index, want))
    assert torch.equal(chosen, torch.zeros_like(chosen).scatter(1, index, True))
    assert weights.requires_grad and router.weight.grad is None and not router.weight.requires_grad


def test_no_rows_are_no_trouble(layer):
    layer.join()
    assert layer(_rows(tokens=0))[0].shape == (0, 1, MOE_SPEC.hidden_size)


def test_gradients_are_those_of_differences(layer):
    """Router included: which experts are chosen is constant, how much they count is not."""
    assert torch.autograd.gradcheck(lambda rows: layer(rows)[0], _rows(tokens=3), eps=1e-6, atol=1e-7)


def test_experts_in_fp8_are_their_rows_dequantised(one_rank):
    """The definition with W = scale * rows; activations are rounded, too, so it is near. Rows without experts pass."""
    moe, rope = replace(MOE_SPEC.moe, ffn_hidden_size=48), RopeSpec(1e4, None, (4, 2, 2))
    spec = replace(MOE_SPEC, moe=moe, head_dim=16, rope=rope)
    experts = make_backbone(one_rank("a", "b"), spec=spec, dtype="float32", fp8="frozen_rowwise").layers[0].mlp.experts
    plain = [[torch.randn(96, 32), torch.randn(32, 48)] for _ in experts.local_experts]
    for expert, weights in zip(experts.local_experts, plain):
        for linear, weight in zip((expert.linear_fc1, expert.linear_fc2), weights):
            rows, scales = quantise_rows(weight)
            linear.weight.data.copy_(rows)
            linear.weight_scale.copy_(scales)
            weight.copy_(dequantise(rows, scales))
    counts, weights = torch.tensor([4, 0, 6, 1]), torch.rand(TOKENS)
    x = torch.randn(TOKENS, 32, requires_grad=True)
    want = []
    for (fc1, fc2), rows, share in zip(plain, x.split(counts.tolist()), weights.split(counts.tolist())):
        gate, up = (rows @ fc1.T).chunk(2, -1)
        want.append((F.silu(gate) * up * share[:, None]) @ fc2.T)
    want, got = torch.cat(want), experts(x, counts, weights)[0]
    direction = torch.randn_like(want)
    assert 0 < (got - want).norm() < 0.08 * want.norm()
    ours, true = (torch.autograd.grad((y * direction).sum(), x)[0] for y in (got, want))
    assert 0 < (ours - true).norm() < 0.12 * true.norm()
    assert experts(x[:0], 0 * counts, weights[:0])[0].shape == (0, 32)
