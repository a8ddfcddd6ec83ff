"""Tensor-parallel linears whose weight is in FP8 rows: values and input gradients are those of the stored weight."""
from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from copd_kernels.rowwise_fp8.reference import dequantise, quantise_rows
from copd_megatron.config.model import AdapterConfig, ModelConfig
from copd_megatron.model.backbone import Backbone
from copd_megatron.model.fp8 import is_fp8, quantised
from copd_megatron.parallel.groups import Groups
from copd_megatron.parallel.layout import Layout
from copd_megatron.parallel.placement import Placement
from support.random_backbone import SPEC
from support.ranks import run_ranks

WIDE = replace(SPEC, hidden_size=64, ffn_hidden_size=96, head_dim=16)
LINEARS = {"linear_qkv": (128, 64), "linear_proj": (64, 64), "linear_fc1": (192, 64), "linear_fc2": (64, 96)}
"""[out, in] of the whole weights; the second and the last are row-parallel."""
TOKENS = 8
ROUNDING = 0.04


def drawn(name: str, *shape: int) -> torch.Tensor:
    """The same on every rank; rows of weights differ in size."""
    generator = torch.Generator().manual_seed(sum(map(ord, name)))
    return torch.randn(*shape, generator=generator) * torch.logspace(-1, 1, shape[0])[(slice(None), *(None,) * (
        len(shape) - 1))]


def on_a_rank(layout: Layout, kernels: str) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Output and input gradient of every linear, without adapted rows."""
    groups = Groups.create(layout, Placement.build(("a",), 1))
    model = ModelConfig(path="-", dtype="float32", kernels=kernels, fp8="frozen_rowwise")
    backbone, at, tp, found = Backbone(WIDE, groups, model, AdapterConfig()), groups.coords.tp, layout.tp, {}
    backbone.bank.routing.set((), () if layout.sequence_parallel else None)
    split = layout.sequence_parallel
    for name, (out, inp) in LINEARS.items():
        linear = next(m for n, m in backbone.layers[0].named_modules() if n.endswith(name))
        column, full = name in ("linear_qkv", "linear_fc1"), drawn(name, out, inp)
        own = full.chunk(tp)[at] if column else full
        rows, scales = quantised(own, slice(None) if column else slice(at * inp // tp, (at + 1) * inp // tp))
        assert is_fp8(linear.weight) and linear.weight.shape == rows.shape
        linear.weight.data.copy_(rows), linear.weight_scale.copy_(scales)
        x, pull = drawn(f"x{name}", TOKENS, 1, inp), drawn(f"pull{name}", TOKENS, 1, out)
        x = x.chunk(tp)[at] if split and column else x if column else x.chunk(tp, 2)[at]
        pull = pull.chunk(tp, 2)[at] if column else pull.chunk(tp)[at] if split else pull
        x = x.contiguous().requires_grad_()
        y = linear(x)[0]
        found[name] = y.detach(), torch.autograd.grad((y * pull).sum(), x)[0]
    groups.destroy()
    return found


@pytest.mark.parametrize("kernels", ["reference", "triton"])
@pytest.mark.parametrize("layout", [Layout(), Layout(tp=2), Layout(tp=2, sequence_parallel=True)],
                         ids=["one rank", "TP", "SP"])
def test_values_and_gradients_are_those_of_the_stored_weight(layout, kernels):
    results, split = run_ranks(layout.tp, on_a_rank, layout, kernels), layout.sequence_parallel
    for name, (out, inp) in LINEARS.items():
        column = name in ("linear_qkv", "linear_fc1")
        weight = dequantise(*quantise_rows(drawn(name, out, inp))).double()
        y, dx = (torch.cat([result[name][n] for result in results], dim) if cut else results[0][name][n]
                 for n, dim, cut in ((0, 2 if column else 0, column or split), (1, 0 if column else 2,
                                                                               split or not column)))
        x, pull = drawn(f"x{name}", TOKENS, inp).double(), drawn(f"pull{name}", TOKENS, out).double()
        for found, truth in ((y, x @ weight.T), (dx, pull @ weight)):
            error = (found[:, 0].double() - truth).norm(dim=1) / truth.norm(dim=1)
            assert float(error.max()) < ROUNDING, (name, error)
        if column:  # tokens are rounded whole
            rounded = dequantise(*quantise_rows(x.float())).double()
            torch.testing.assert_close(y[:, 0].double(), rounded @ weight.T, rtol=1e-5, atol=1e-3)
