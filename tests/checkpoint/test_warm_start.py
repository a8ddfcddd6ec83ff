"""Experts that begin as a PEFT adapter: bit by bit, on any layout, with ranks and weights left over to learn."""
from __future__ import annotations

import functools
from pathlib import Path

import pytest
import torch

from copd_megatron.checkpoint.adapter import Adapter
from copd_megatron.checkpoint.peft import full_factors, read_peft_adapter, save_peft_adapter
from copd_megatron.checkpoint.warm_start import start_expert
from copd_megatron.config.model import AdapterConfig
from copd_megatron.model.adapter_bank import AdapterBank
from copd_megatron.model.prompt import PromptEncoder
from copd_megatron.model.translate import TEXT_PREFIX
from copd_megatron.parallel.groups import Groups
from copd_megatron.parallel.layout import Layout
from copd_megatron.parallel.placement import Placement
from copd_megatron.types import UserError
from support.policies import make_bank
from support.ranks import run_ranks
from support.tiny_models import tiny_model

FEW = AdapterConfig(rank=3, alpha=6.0, targets=("q_proj", "down_proj"), first_layer=1)


@functools.cache
def _encoder() -> PromptEncoder:
    return PromptEncoder(tiny_model("qwen3"))


def _export(bank: AdapterBank, folder: Path, **changes) -> Adapter:
    header = _encoder().header_token_ids if bank.config.scope == "completion" else None
    adapter = Adapter(**{"factors": full_factors(bank, "a"), "scaling": bank.scaling_of("a"),
                         "invocation_token_ids": header} | changes)
    save_peft_adapter(folder, adapter, TEXT_PREFIX["qwen3"], _encoder().path)
    return adapter


def _started(groups: Groups, config: AdapterConfig, folder: Path) -> AdapterBank:
    bank = make_bank(groups, _encoder().spec, config)
    bank.add_expert("a", seed=7)
    start_expert(bank, "a", folder, _encoder().header_token_ids)
    return bank


def _check_import_of_export(tp: int, pp: int, folder: Path, scope: str) -> None:
    groups = Groups.create(Layout(tp=tp, pp=pp), Placement.build(("a",), 1))
    config = FEW.model_copy(update={"scope": scope})
    bank = make_bank(groups, _encoder().spec, config)
    adapter = full_factors(bank, "a")  # every rank of the stage takes part
    if groups.is_main:
        _export(bank, folder, factors=adapter) if tp * pp == 1 else None
    before = bank.parameters_of("a")
    after = _started(groups, config, folder).parameters_of("a")
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) and after[name].requires_grad for name in before)


@pytest.mark.parametrize("scope", ["sequence", "completion"])
def test_import_of_an_export_is_the_expert(tmp_path, scope):
    """On one rank, and on others the shards of the same adapter."""
    _encoder()
    run_ranks(1, _check_import_of_export, 1, 1, tmp_path / "a", scope)
    run_ranks(4, _check_import_of_export, 2, 2, tmp_path / "a", scope)


def test_what_the_adapter_lacks_begins_as_a_new_experts(one_rank, tmp_path):
    """More ranks, more projections, more layers and another scaling: the same function, and everything can learn."""
    groups = one_rank("a")
    given = _export(make_bank(groups, _encoder().spec, FEW), tmp_path / "a")
    config = AdapterConfig(rank=5, alpha=20.0)  # scaling 4 against 2: a power of two
    bank = _started(groups, config, tmp_path / "a")
    fresh = make_bank(groups, _encoder().spec, config)
    fresh.add_expert("a", seed=7)
    for name, parameter in bank.parameters_of("a").items():
        new = fresh.parameters_of("a")[name]
        if name not in given.factors:
            assert torch.equal(parameter, new), name
        elif name.endswith("A"):
            assert torch.equal(parameter[:3], given.factors[name]) and torch.equal(parameter[3:], new[3:])
            assert parameter[3:].any()
        else:
            assert torch.equal(parameter[:, :3] * 4.0, given.factors[name] * 2.0) and not parameter[:, 3:].any()


def test_an_irregular_adapter_of_mixed_ranks_survives_a_folder(one_rank, tmp_path):
    """PEFT knows one rank, and projections times layers: others are filled up, or named one by one."""
    bank = make_bank(one_rank("a"), _encoder().spec, FEW)
    factors = full_factors(bank, "a")
    for factor in "AB":
        del factors[f"layers.2.mlp.down_proj.lora_{factor}"]
    short = "layers.1.self_attn.q_proj.lora_"
    factors |= {f"{short}A": factors[f"{short}A"][:2], f"{short}B": factors[f"{short}B"][:, :2]}
    _export(bank, tmp_path / "a", factors=factors)
    again = read_peft_adapter(tmp_path / "a", _encoder().spec)
    assert set(again.factors) == set(factors) and again.scaling == 2.0
    for module in again.modules():
        (a, b), (want_a, want_b) = again.pair(module), Adapter(factors, 2.0).pair(module)
        assert a.shape[0] == b.shape[1] == 3
        torch.testing.assert_close(b @ a, want_b @ want_a, rtol=0, atol=1e-7)


UNFIT = {
    "larger rank": ({}, {"rank": 2, "alpha": 4.0}, r"rank 3; adapter.rank is 2, .*; raise adapter.rank to 3 or more"),
    "another scaling": ({"scaling": 1.3}, {}, r"scaling .* 1.3; .*power of two.*; set adapter.alpha=3.9"),
    "too many targets": ({}, {"targets": ("q_proj",)}, "adapts down_proj, which adapter.targets leaves out"),
    "too low a layer": ({}, {"first_layer": 2}, "adapts layer 1; .*lower adapter.first_layer"),
    "another scope": ({}, {"scope": "completion"}, "a plain LoRA under adapter.scope=completion"),
    "another header": ({"invocation_token_ids": (9, 9)}, {"scope": "completion"}, r"alora_invocation_tokens \[9, 9\]"),
}


@pytest.mark.parametrize("case", UNFIT)
def test_what_does_not_fit_is_refused(one_rank, tmp_path, case):
    made, section, message = UNFIT[case]
    groups = one_rank("a")
    _export(make_bank(groups, _encoder().spec, FEW), tmp_path / "a", **made)
    with pytest.raises(UserError, match=rf"experts.a.init_from: adapter .*: {message}"):
        _started(groups, FEW.model_copy(update=section), tmp_path / "a")


def test_numbers_that_float32_cannot_hold_are_refused(one_rank, tmp_path):
    groups = one_rank("a")
    bank = make_bank(groups, _encoder().spec, FEW)
    doubles = {name: factor.double() / 3 for name, factor in full_factors(bank, "a").items()}
    _export(bank, tmp_path / "a", factors=doubles)
    with pytest.raises(UserError, match="is torch.float64, which torch.float32 cannot hold"):
        _started(groups, FEW, tmp_path / "a")
