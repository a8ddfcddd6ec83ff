"""Rank arithmetic: a bijection, in Megatron's own order."""
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from megatron.core import parallel_state

from copd_megatron.parallel.layout import Coordinates, Layout
from copd_megatron.types import UserError
from support.ranks import run_ranks

SIZES = st.integers(1, 5)


@settings(deadline=None)
@given(tp=SIZES, pp=SIZES, cp=SIZES, replicas=SIZES)
def test_rank_of_is_the_inverse(tp, pp, cp, replicas):
    layout = Layout(tp=tp, pp=pp, cp=cp, replicas=replicas)
    seen = set()
    for rank in range(layout.world_size):
        at = layout.coordinates(rank)
        assert layout.rank_of(at.replica, at.pp, at.cp, at.tp) == rank
        seen.add(at)
    assert len(seen) == layout.world_size == tp * pp * cp * replicas


@settings(deadline=None)
@given(tp=SIZES, cp=SIZES, pp=st.integers(1, 2), replicas=st.integers(1, 2), data=st.data())
def test_moe_expert_axes_fold_inside_a_replica(tp, cp, pp, replicas, data):
    ep = data.draw(st.sampled_from([n for n in range(1, tp * cp + 1) if tp * cp % n == 0]))
    layout = Layout(tp=tp, pp=pp, cp=cp, replicas=replicas, ep=ep, etp=tp * cp // ep)
    places = [layout.coordinates(rank) for rank in range(layout.world_size)]
    assert len({(at.replica, at.pp, at.ep, at.etp) for at in places}) == layout.world_size
    for rank, at in enumerate(places):
        group = layout.moe_expert_peers(at.replica, at.pp, at.etp)
        assert len(group) == ep and group[at.ep] == rank
        assert {places[other].replica for other in group} == {at.replica}


@settings(deadline=None)
@given(tp=SIZES, pp=SIZES, replicas=SIZES)
def test_replicas_partition_the_ranks(tp, pp, replicas):
    layout = Layout(tp=tp, pp=pp, replicas=replicas)
    ranks = [rank for replica in range(replicas) for rank in layout.replica_ranks(replica)]
    assert sorted(ranks) == list(range(layout.world_size))
    peers = [rank for cell in layout.cells() for rank in layout.peers(*cell)]
    assert sorted(peers) == list(range(layout.world_size))


def megatron_coordinates(layout):
    parallel_state.initialize_model_parallel(
        layout.tp, layout.pp, context_parallel_size=layout.cp, expert_model_parallel_size=layout.ep,
        expert_tensor_parallel_size=layout.etp, order="tp-cp-ep-dp-pp", create_gloo_process_groups=False)
    return Coordinates(replica=parallel_state.get_data_parallel_rank(),
                       pp=parallel_state.get_pipeline_model_parallel_rank(),
                       cp=parallel_state.get_context_parallel_rank(),
                       tp=parallel_state.get_tensor_model_parallel_rank(),
                       ep=parallel_state.get_expert_model_parallel_rank(),
                       etp=parallel_state.get_expert_tensor_parallel_rank())


@pytest.mark.parametrize(("world", "sizes"), [
    (6, {"pp": 2}), (8, {"tp": 2, "pp": 2}), (8, {"tp": 2, "cp": 2, "ep": 4}),
    (8, {"cp": 2, "tp": 2, "ep": 2, "etp": 2}), (4, {"cp": 2, "pp": 2})], ids=str)
def test_coordinates_are_megatrons(world, sizes):
    layout = Layout.fit(world, **sizes)
    assert run_ranks(world, megatron_coordinates, layout) == [layout.coordinates(r) for r in range(world)]


def test_fit_leaves_the_rest_to_replicas():
    assert Layout.fit(12, tp=2, pp=3) == Layout(tp=2, pp=3, replicas=2)
    assert Layout(tp=2, pp=3, replicas=2).key == "tp2-cp1-ep1-etp1-pp3-replicas2"
    assert Layout(pp=3, vp=2).key == "tp1-cp1-ep1-etp1-pp3-vp2-replicas1"


def test_microbatches_are_filled_up_for_interleaved_stages():
    assert [Layout(pp=3, vp=2).filled_up(n) for n in (1, 3, 4, 7)] == [3, 3, 6, 9]
    assert [Layout(pp=3).filled_up(n) for n in (1, 4)] == [1, 4]


@pytest.mark.parametrize(("world", "tp", "pp"), [(3, 2, 1), (4, 3, 1), (2, 2, 2), (1, 1, 2)])
def test_fit_refuses_what_does_not_divide(world, tp, pp):
    with pytest.raises(UserError, match=rf"^parallel\.tensor, .*: {tp} x {pp} x 1 .* {world} ranks started"):
        Layout.fit(world, tp, pp)


@pytest.mark.parametrize(("sizes", "field"), [
    ({"cp": 0}, "context"), ({"ep": 2}, "moe_expert"), ({"etp": 2}, "moe_expert_tensor"), ({"tp": 0}, "tensor"),
    ({"pp": -1}, "pipeline"), ({"replicas": 0}, "replicas"), ({"tp": 2, "cp": 2, "ep": 2}, "moe_expert"),
    ({"sequence_parallel": True}, "sequence_parallel"), ({"vp": 0}, "virtual_pipeline"),
    ({"vp": 2}, "virtual_pipeline"), ({"pp": 2, "vp": 2}, "virtual_pipeline")])
def test_sizes_that_do_not_fit_are_refused(sizes, field):
    with pytest.raises(UserError, match=rf"parallel\.{field}[:,] "):
        Layout(**sizes)


def test_places_outside_the_layout_are_refused():
    layout = Layout(tp=2, replicas=2)
    for rank in (-1, 4):
        with pytest.raises(IndexError):
            layout.coordinates(rank)
    for place in ({"replica": 2}, {"pp": 1}, {"cp": 1}, {"tp": -1}):
        with pytest.raises(IndexError):
            layout.rank_of(**place)
