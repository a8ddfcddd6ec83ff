"""Process groups: the members are those that layout and placement say, on real ranks."""
import socket

import pytest
import torch
import torch.distributed as dist

from copd_megatron.config.parallel import ParallelConfig
from copd_megatron.parallel.groups import Groups, init_distributed, own_gpu, shutdown_distributed
from copd_megatron.parallel.layout import Layout
from copd_megatron.parallel.placement import Placement
from copd_megatron.types import UserError
from support.ranks import run_ranks

EXPERTS = ("text", "image", "video")
TORCHRUN = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "LOCAL_RANK")


def members(tp, pp, cp, experts):
    """Members of every group of this rank, found by gathering, not by asking."""
    layout = Layout.fit(dist.get_world_size(), tp, pp, cp)
    groups = Groups.create(layout, Placement.build(experts, layout.replicas))

    def ranks_in(group):
        everyone = [torch.zeros(1, dtype=torch.int64) for _ in range(dist.get_world_size(group))]
        dist.all_gather(everyone, torch.tensor([groups.rank]), group=group)
        return tuple(int(rank) for rank in everyone)

    names = ("tp", "pp", "cp", "replica", "exchange", "world")
    found = {name: ranks_in(getattr(groups, name)) for name in names}
    found |= {name: group and ranks_in(group) for name, group in groups.adapter.items()}
    ends = (groups.first_rank, groups.first_stage_rank, groups.last_stage_rank, groups.is_first_stage,
            groups.is_last_stage, groups.is_main, groups.is_replica_main, groups.hosted)
    groups.destroy()
    return found, ends


@pytest.mark.parametrize(("world", "tp", "pp", "cp"), [
    (1, 1, 1, 1), (2, 1, 1, 1), (4, 1, 1, 1), (4, 1, 2, 1), (8, 2, 2, 1), (8, 2, 1, 2), (4, 1, 2, 2)])
def test_members_are_those_of_layout_and_placement(world, tp, pp, cp):
    layout = Layout.fit(world, tp, pp, cp)
    placement = Placement.build(EXPERTS, layout.replicas)
    for rank, (found, ends) in enumerate(run_ranks(world, members, tp, pp, cp, EXPERTS)):
        at = layout.coordinates(rank)
        replica = layout.replica_ranks(at.replica)
        assert found["world"] == tuple(range(world))
        assert found["replica"] == replica
        assert found["exchange"] == layout.peers(at.pp, at.cp, at.tp)
        assert found["tp"] == tuple(layout.rank_of(at.replica, at.pp, at.cp, i) for i in range(tp))
        assert found["pp"] == tuple(layout.rank_of(at.replica, i, at.cp, at.tp) for i in range(pp))
        assert found["cp"] == tuple(layout.rank_of(at.replica, at.pp, i, at.tp) for i in range(cp))
        for expert in EXPERTS:
            hosts = placement.replicas_of(expert)
            expected = layout.peers(at.pp, at.cp, at.tp, hosts) if at.replica in hosts else None
            assert found[expert] == expected
        assert ends == (replica[0], found["pp"][0], found["pp"][-1], at.pp == 0, at.pp == pp - 1, rank == 0,
                        rank == replica[0], placement.experts_of(at.replica))


def make_twice():
    shapes = []
    for tp in (2, 1):
        layout = Layout.fit(2, tp)
        groups = Groups.create(layout, Placement.build(EXPERTS, layout.replicas))
        total = torch.ones(1)
        dist.all_reduce(total, group=groups.exchange)
        shapes.append((groups.tp.size(), groups.exchange.size(), total.item()))
        groups.destroy()
    return shapes


def test_groups_can_be_made_again_after_destroy():
    assert run_ranks(2, make_twice) == [[(2, 1, 1.0), (1, 2, 2.0)]] * 2


def test_co_hosted_experts_share_one_group(one_rank):
    groups = one_rank(*EXPERTS)
    assert groups.adapter["text"] is groups.adapter["video"] is groups.exchange


def test_second_creation_is_refused(one_rank):
    one_rank("a")
    with pytest.raises(RuntimeError, match="destroy"):
        one_rank("a")


def test_layout_that_does_not_fit_the_world_is_refused(one_rank):
    one_rank("a").destroy()
    with pytest.raises(ValueError, match="does not fit 1 ranks"):
        Groups.create(Layout(tp=2), Placement.build(("a",), 1))
    with pytest.raises(ValueError, match="does not fit 1 ranks"):
        Groups.create(Layout(), Placement.build(("a",), 2))


@pytest.fixture
def no_world(monkeypatch):
    """No torch.distributed, and no torchrun around us, unless a test says so."""
    shutdown_distributed()
    for name in TORCHRUN:
        monkeypatch.delenv(name, raising=False)
    yield monkeypatch
    shutdown_distributed()


def test_many_ranks_need_a_world(no_world):
    with pytest.raises(RuntimeError, match="init_distributed"):
        Groups.create(Layout(replicas=2), Placement.build(("a",), 2))


def test_single_process_stands_alone(no_world):
    init_distributed(ParallelConfig(backend="gloo"))
    init_distributed(ParallelConfig(backend="gloo"))
    assert (dist.get_rank(), dist.get_world_size()) == (0, 1)


def test_torchrun_environment_is_followed(no_world, free_port):
    for name, value in zip(TORCHRUN, ("0", "1", "127.0.0.1", str(free_port), "0")):
        no_world.setenv(name, value)
    init_distributed(ParallelConfig(backend="gloo"))
    assert dist.get_world_size() == 1
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.1", free_port)) == 0, "the store listens where MASTER_PORT says"


def test_incomplete_environment_is_refused(no_world):
    no_world.setenv("RANK", "0")
    with pytest.raises(UserError, match="WORLD_SIZE, MASTER_ADDR, MASTER_PORT"):
        init_distributed(ParallelConfig(backend="gloo"))


def test_nccl_without_cuda_is_refused(no_world):
    if torch.cuda.is_available():
        pytest.skip("this machine has CUDA")
    with pytest.raises(UserError, match=r"^parallel\.backend: nccl .* set parallel\.backend=auto"):
        init_distributed(ParallelConfig(backend="nccl"))


def test_each_rank_of_a_machine_has_a_gpu():
    assert [own_gpu(rank, 2) for rank in (0, 1)] == [0, 1]
    with pytest.raises(UserError, match="^environment: LOCAL_RANK=1 sees 1 CUDA device; .*set LOCAL_RANK=0 for all"):
        own_gpu(1, 1)


@pytest.fixture
def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.mark.gpu
def test_nccl_world_of_one(no_world):
    init_distributed(ParallelConfig())
    groups = Groups.create(Layout(), Placement.build(EXPERTS, 1))
    total = torch.ones(1, device="cuda")
    dist.all_reduce(total, group=groups.adapter["text"])
    groups.destroy()
    assert total.item() == 1.0
