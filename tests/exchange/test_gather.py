"""Adapters of other replicas: exact frozen copies inside the block, nothing left after it."""
from __future__ import annotations

import pytest
import torch

from copd_megatron.config.model import AdapterConfig
from copd_megatron.exchange.gather import gathered_adapters, gathered_teachers, teacher_copies
from copd_megatron.exchange.wire import CHECKSUM_BYTES, Wire
from copd_megatron.model.adapter_bank import AdapterBank
from copd_megatron.parallel.groups import Groups
from copd_megatron.parallel.layout import Layout
from copd_megatron.parallel.placement import Placement
from copd_megatron.types import Edge
from support.policies import make_bank, noise
from support.random_backbone import SPEC
from support.ranks import run_ranks

EXPERTS = ("text", "image", "video")


def _setup(layout: tuple[int, int, int], first_layer: int = 0) -> tuple[Groups, AdapterBank]:
    tp, pp, replicas = layout
    groups = Groups.create(Layout(tp=tp, pp=pp, replicas=replicas), Placement.build(EXPERTS, replicas))
    return groups, make_bank(groups, SPEC, AdapterConfig(rank=2, alpha=3.0, first_layer=first_layer))


def _expected(bank: AdapterBank, expert: str) -> dict[str, torch.Tensor]:
    """This rank's shards of what the hosts drew."""
    return {name: bank.shard(name, noise(expert, name, shape=bank.full_shape(name, 2))) for name in bank.factor_names()}


def _check_block(layout: tuple[int, int, int], first_layer: int) -> tuple[int, int]:
    groups, bank = _setup(layout, first_layer)
    own = {name: parameter for name, parameter in bank.named_parameters()}
    versions = {name: parameter._version for name, parameter in own.items()}
    for parameter in own.values():
        parameter.grad = torch.ones_like(parameter)
    with gathered_adapters(bank, groups, EXPERTS):
        for expert in EXPERTS:
            held, expected = bank.parameters_of(expert), _expected(bank, expert)
            assert held.keys() == expected.keys()
            for name, parameter in held.items():
                assert torch.equal(parameter, expected[name])
                assert parameter.requires_grad == (expert in groups.hosted)
            assert bank.scaling_of(expert) == 1.5
        foreign = len(bank.slots) - len(groups.hosted)
    assert set(bank.slots) == set(groups.hosted)
    after = dict(bank.named_parameters())
    assert after.keys() == own.keys()
    for name, parameter in after.items():
        assert parameter is own[name] and parameter._version == versions[name] and parameter.requires_grad
        assert torch.equal(parameter.grad, torch.ones_like(parameter))
    assert not any(set(by_expert) - set(groups.hosted) for by_expert in bank._linears.values())
    return len(bank.factor_names()), foreign


@pytest.mark.parametrize("layout,first_layer,foreign", [
    ((1, 1, 1), 0, [0]), ((1, 1, 2), 0, [1, 2]), ((2, 1, 2), 0, [1, 1, 2, 2]), ((1, 1, 4), 0, [2] * 4),
    ((1, 2, 2), 2, [1, 2, 1, 2])])
def test_every_replica_holds_every_expert(layout, first_layer, foreign):
    """Co-hosted, alone on a replica, or in blocks of replicas; under TP, and on a stage without adapters."""
    results = run_ranks(layout[0] * layout[1] * layout[2], _check_block, layout, first_layer)
    assert [count for _, count in results] == foreign
    if first_layer:
        assert [factors for factors, _ in results] == [0, 0, 14, 14]


def _train_and_gather() -> list[float]:
    """The copies are those of the moment of entering."""
    groups, bank = _setup((1, 1, 2))
    seen = []
    for _ in range(2):
        with gathered_adapters(bank, groups, EXPERTS):
            seen.append([float(p.detach().sum()) for e in EXPERTS for p in bank.parameters_of(e).values()])
        for expert in groups.hosted:
            for parameter in bank.parameters_of(expert).values():
                parameter.data.add_(1.0)
    return seen


def test_copies_follow_the_experts():
    (first, second), other = run_ranks(2, _train_and_gather)
    assert [first, second] == other
    assert all(b > a for a, b in zip(first, second))


def _raise_inside() -> set[str]:
    groups, bank = _setup((1, 1, 2))
    with pytest.raises(ZeroDivisionError), gathered_adapters(bank, groups, EXPERTS):
        raise ZeroDivisionError
    return set(bank.slots)


def test_an_error_inside_leaves_nothing_behind():
    assert run_ranks(2, _raise_inside) == [{"text", "image"}, {"video"}]


# ---- the teachers of an OPD step -------------------------------------------

HUB = [Edge("text", "image"), Edge("text", "video"), Edge("image", "text"), Edge("video", "text")]
ONE = [Edge("video", "image")]


def _check_teachers(layout: tuple[int, int, int], edges: list[Edge], first_layer: int, checked: bool):
    groups, bank = _setup(layout, first_layer)
    own, wire = dict(bank.named_parameters()), Wire(groups.exchange, checked)
    with gathered_teachers(bank, groups, edges, wire):
        held = set(bank.slots)
        for expert in held:
            parameters, expected = bank.parameters_of(expert), _expected(bank, expert)
            assert parameters.keys() == expected.keys()
            for name, parameter in parameters.items():
                assert torch.equal(parameter, expected[name])
                assert parameter.requires_grad == (expert in groups.hosted)
            assert bank.scaling_of(expert) == 1.5
    after = dict(bank.named_parameters())
    assert after.keys() == own.keys() and all(parameter is own[name] for name, parameter in after.items())
    wanted = {e.teacher for e in edges if e.student in groups.hosted}
    assert held == wanted | set(groups.hosted)  # what a replica's students do not learn from does not come
    return wire.sent_bytes, sum(p.numel() * 4 for p in bank.parameters_of(groups.hosted[0]).values())


@pytest.mark.parametrize("layout,edges,first_layer,checked,copies", [
    ((1, 1, 1), HUB, 0, False, 0), ((1, 1, 2), HUB, 0, True, 2), ((1, 1, 3), HUB, 0, False, 4),
    ((1, 1, 4), HUB, 0, False, 6), ((2, 1, 2), ONE, 0, True, 2), ((1, 2, 2), HUB, 2, True, 2)])
def test_each_replica_gets_the_teachers_of_its_students(layout, edges, first_layer, checked, copies):
    """``copies``: of whole shards that travel, over all ranks that have any."""
    results = run_ranks(layout[0] * layout[1] * layout[2], _check_teachers, layout, edges, first_layer, checked)
    shard = max(size for _, size in results)
    checksums = CHECKSUM_BYTES * (layout[2] - 1) * checked * len(results)
    assert sum(sent for sent, _ in results) == copies * shard + checksums


def test_copies_are_shared_among_the_replicas_of_a_teacher():
    placement = Placement.build(EXPERTS, 5)  # text 0 1, image 2 3, video 4
    assert teacher_copies(HUB, placement) == [("text", 0, 2), ("text", 1, 3), ("text", 0, 4), ("image", 2, 0),
                                              ("image", 3, 1), ("video", 4, 0), ("video", 4, 1)]
    assert teacher_copies([], placement) == teacher_copies(HUB, Placement.build(EXPERTS, 1)) == []


def _raise_among_teachers() -> set[str]:
    groups, bank = _setup((1, 1, 2))
    with pytest.raises(ZeroDivisionError), gathered_teachers(bank, groups, HUB, Wire(groups.exchange)):
        raise ZeroDivisionError
    return set(bank.slots)


def test_an_error_among_teachers_leaves_nothing_behind():
    assert run_ranks(2, _raise_among_teachers) == [{"text", "image"}, {"video"}]
