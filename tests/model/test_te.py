"""Transformer Engine: what can be checked without it, and on a GPU that its products are near bfloat16's."""
from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch

from copd_megatron.model.te import HOPPER, RECIPES, check_machine, missing_rows, rounds_what_is_copied
from copd_megatron.types import UserError
from support.random_backbone import SPEC, make_backbone


@pytest.mark.parametrize("capability,installed,message", [
    (None, True, "^model.fp8: te_current without a CUDA device; .*model.fp8=frozen_rowwise runs anywhere"),
    ((8, 9), True, "^model.fp8: te_current on a device of compute capability 8.9; Hopper"),
    ((9, 0), False, r"^model.fp8: te_current without Transformer Engine; .*'copd-megatron\[te\]'")])
def test_machines_without_it_are_refused(capability, installed, message):
    with pytest.raises(UserError, match=message):
        check_machine("te_current", capability, installed)


def test_machines_with_it_are_not():
    for fp8 in RECIPES:
        check_machine(fp8, HOPPER, True)
        check_machine(fp8, (10, 0), True)


def test_rows_are_filled_up():
    for rows in range(1, 40):
        missing = missing_rows(rows)
        assert 0 <= missing < 16 and (rows + missing) % 16 == 0
    assert missing_rows(32) == 0 and missing_rows(0) == 16


def test_the_backbone_is_refused_on_a_cpu_before_its_layers_are_built(one_rank):
    if torch.cuda.is_available():
        pytest.skip("for machines without CUDA")
    groups = one_rank("a", "b")
    with pytest.raises(UserError, match="model.fp8: te_blockwise without a CUDA device"):
        make_backbone(groups, dtype="bfloat16", fp8="te_blockwise")
    with pytest.raises(UserError, match="model.norms: te, but it needs a CUDA device and no float64; .*: torch"):
        make_backbone(groups, norms="te")


def test_plain_weights_are_filled_piece_by_piece():
    assert not rounds_what_is_copied(torch.nn.Parameter(torch.zeros(2, 2)))


@pytest.mark.gpu
@pytest.mark.parametrize("fp8", RECIPES)
def test_products_and_gradients_are_near_bfloat16(one_rank, fp8):
    """For any number of rows; the weight is in FP8 only, and one object under the linear's own name."""
    pytest.importorskip("transformer_engine")
    if torch.cuda.get_device_capability() < HOPPER:
        pytest.skip("needs Hopper")
    spec = replace(SPEC, hidden_size=256, ffn_hidden_size=512, head_dim=64)
    groups = one_rank("a", "b")
    plain = make_backbone(groups, dtype="bfloat16", spec=spec)
    rounded = make_backbone(groups, dtype="bfloat16", spec=spec, fp8=fp8)
    for name in ("self_attention.linear_proj", "mlp.linear_fc1"):
        truth, linear = (model.layers[0].get_submodule(name) for model in (plain, rounded))
        assert rounds_what_is_copied(linear.weight) and linear.product.linear.weight is linear.weight
        with torch.no_grad():
            linear.weight.copy_(truth.weight)
        for rows in (0, 1, 16, 33):
            x = torch.randn(rows, 1, truth.weight.shape[1], device="cuda", dtype=torch.bfloat16)
            results = []
            for one in (truth, linear):
                own = copy.deepcopy(x).requires_grad_()
                one.routing.set(())
                y = one(own)[0]
                y.float().square().sum().backward()
                results.append((y.float(), own.grad.float()))
            for near, true in zip(*results[::-1]):
                assert (near - true).norm() <= 0.08 * true.norm()


@pytest.mark.gpu
@pytest.mark.parametrize("maker, module", [("torch", "torch"), ("te", "transformer_engine"),
                                           ("apex", "apex.normalization")])
def test_norms_are_torchs_also_of_no_rows(one_rank, maker, module):
    pytest.importorskip(module)
    groups = one_rank("a", "b")
    norm, plain = (make_backbone(groups, dtype="bfloat16", norms=name).final_norm for name in (maker, "torch"))
    for rows in (0, 1, 33):
        x = torch.randn(rows, 1, SPEC.hidden_size, device="cuda", dtype=torch.bfloat16)
        torch.testing.assert_close(norm(x), plain(x), rtol=1e-2, atol=1e-2)
