"""Rank arithmetic: a bijection, in Megatron's own order."""
import pytest
from hypothesis import given
from hypothesis import strategies as st
from megatron.core import parallel_state

from copd_megatron.parallel.layout import Coordinates, Layout
from copd_megatron.types import UserError
from support.ranks import run_ranks

SIZES = st.integers(1, 5)


@given(tp=SIZES, pp=SIZES, replicas=SIZES)
def test_rank_and_coordinates_are_inverse(tp, pp, replicas):
    layout = Layout(tp=tp, pp=pp, replicas=replicas)
    seen = set()
    for rank in range(layout.world_size):
        at = layout.coordinates(rank)
        assert layout.rank_of(at.replica, at.pp, at.cp, at.tp) == rank
        seen.add(at)
    assert len(seen) == layout.world_size == tp * pp * replicas


@given(tp=SIZES, pp=SIZES, replicas=SIZES)
def test_replicas_partition_the_ranks(tp, pp, replicas):
    layout = Layout(tp=tp, pp=pp, replicas=replicas)
    ranks = [rank for replica in range(replicas) for rank in layout.replica_ranks(replica)]
    assert sorted(ranks) == list(range(layout.world_size))
    peers = [rank for cell in layout.cells() for rank in layout.peers(*cell)]
    assert sorted(peers) == list(range(layout.world_size))


def megatron_coordinates(tp, pp):
    parallel_state.initialize_model_parallel(tp, pp, order="tp-cp-ep-dp-pp", create_gloo_process_groups=False)
    return Coordinates(replica=parallel_state.get_data_parallel_rank(),
                       pp=parallel_state.get_pipeline_model_parallel_rank(),
                       cp=parallel_state.get_context_parallel_rank(),
                       tp=parallel_state.get_tensor_model_parallel_rank())


@pytest.mark.parametrize(("world", "tp", "pp"), [(2, 2, 1), (6, 1, 2), (6, 2, 1), (8, 2, 2)])
def test_coordinates_are_megatrons(world, tp, pp):
    layout = Layout.fit(world, tp, pp)
    assert run_ranks(world, megatron_coordinates, tp, pp) == [layout.coordinates(r) for r in range(world)]


def test_fit_leaves_the_rest_to_replicas():
    assert Layout.fit(12, tp=2, pp=3) == Layout(tp=2, pp=3, replicas=2)
    assert Layout(tp=2, pp=3, replicas=2).key == "tp2-cp1-ep1-etp1-pp3-replicas2"


@pytest.mark.parametrize(("world", "tp", "pp"), [(3, 2, 1), (4, 3, 1), (2, 2, 2), (1, 1, 2)])
def test_fit_refuses_what_does_not_divide(world, tp, pp):
    with pytest.raises(UserError, match=rf"^parallel\.tensor, .*: {tp} x {pp} .* {world} ranks started"):
        Layout.fit(world, tp, pp)


@pytest.mark.parametrize(("sizes", "field"), [({"cp": 2}, "context"), ({"ep": 2}, "moe_expert"),
                                              ({"etp": 2}, "moe_expert_tensor"), ({"tp": 0}, "tensor"),
                                              ({"pp": -1}, "pipeline"), ({"replicas": 0}, "replicas")])
def test_sizes_that_are_not_supported_are_refused(sizes, field):
    with pytest.raises(UserError, match=rf"parallel\.{field}: "):
        Layout(**sizes)


def test_places_outside_the_layout_are_refused():
    layout = Layout(tp=2, replicas=2)
    for rank in (-1, 4):
        with pytest.raises(IndexError):
            layout.coordinates(rank)
    for place in ({"replica": 2}, {"pp": 1}, {"cp": 1}, {"tp": -1}):
        with pytest.raises(IndexError):
            layout.rank_of(**place)
