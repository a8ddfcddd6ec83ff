"""AdamW by whoever makes it: moments come out and go in alike."""
from __future__ import annotations

import pytest
import torch

from copd_megatron.config.trainer import OptimizerConfig
from copd_megatron.trainer.adamw import build_adamw, by_age, moments, restore


def parameters(device: str = "cpu") -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(3)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator).to(device)) for shape in ((3, 4), (5,), (2, 2))]


def update(adamw, own, times: int) -> None:
    for number in range(times):
        for p in own:
            p.grad = torch.sin(p.detach() * (number + 2))
        adamw.step()


def test_groups_are_cut_by_age():
    a, b, c = parameters()
    cut = by_age([{"params": [a, b, c], "lr": 0.5, "step": 9}], {a: 4, c: 4})
    assert [(g["step"], g["lr"], [p is q for p, q in zip(g["params"], want)])
            for g, want in zip(cut, ([b], [a, c]))] == [(0, 0.5, [True]), (4, 0.5, [True, True])]
    assert by_age([{"params": []}], {}) == [{"params": [], "step": 0}], "a stage without adapters"


def test_moments_continue_an_optimizer():
    """Two updates, moments out and in, two more: as four in a row."""
    straight, broken = parameters(), parameters()
    first, second, whole = (build_adamw(own, OptimizerConfig(), "torch") for own in (broken, broken, straight))
    update(whole, straight, 2)
    update(first, broken, 2)
    restore(second, {p: moments(first, p) for p in broken})
    for adamw, own in ((whole, straight), (second, broken)):
        update(adamw, own, 2)
    assert all(map(torch.equal, straight, broken))
    assert float(moments(second, broken[0])["step"]) == 4


class LikeApex(torch.optim.Optimizer):
    """What ``restore`` must keep whole of NVIDIA Apex's FusedAdam: a second list of groups, walked beside the first."""

    def __init__(self, groups):
        super().__init__(groups, {"lr": 0.1})
        self.param_groups_master = [{"params": [None for _ in group["params"]]} for group in self.param_groups]


def test_apexs_second_list_of_groups_is_as_long_as_the_first():
    own = parameters()
    adamw, moment = LikeApex([{"params": own}]), torch.zeros(1)
    restore(adamw, {p: {"exp_avg": moment, "exp_avg_sq": moment, "step": torch.tensor(4.0)} for p in own[:2]})
    walked = [p for group, master in zip(adamw.param_groups, adamw.param_groups_master)
              for p, _ in zip(group["params"], master["params"])]
    assert len(adamw.param_groups) == 2 and {id(p) for p in walked} == {id(p) for p in own}


@pytest.mark.gpu
@pytest.mark.parametrize("maker,module", [("te", "transformer_engine"), ("apex", "amp_C")])
def test_fused_ones_are_torchs(maker, module):
    """The same numbers up to rounding, through moments of either, also where one parameter is younger."""
    pytest.importorskip(module)
    ours, theirs = parameters("cuda"), parameters("cuda")
    plain, fused = build_adamw(ours, OptimizerConfig(), "torch"), build_adamw(theirs, OptimizerConfig(), maker)
    for adamw, own in ((plain, ours), (fused, theirs)):
        update(adamw, own, 3)
    again = build_adamw(theirs, OptimizerConfig(), maker)
    # Copies: both go on from there, each in its own memory.
    restore(again, {p: {n: t.clone() for n, t in moments(plain, q).items()} for p, q in zip(theirs[:2], ours)})
    plain.state.pop(ours[2])
    for adamw, own in ((plain, ours), (again, theirs)):
        update(adamw, own, 2)
    for p, q in zip(ours, theirs):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)
