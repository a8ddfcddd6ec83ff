"""Placement: every expert is hosted, every replica works, and shares partition the prompts evenly."""
import pytest
from hypothesis import given
from hypothesis import strategies as st

from copd_megatron.parallel.placement import Placement, split_evenly
from copd_megatron.types import UserError


def build(experts, replicas):
    return Placement.build([f"e{i}" for i in range(experts)], replicas)


@given(experts=st.integers(1, 12), replicas=st.integers(1, 12))
def test_every_expert_is_hosted_and_every_replica_hosts(experts, replicas):
    placement = build(experts, replicas)
    for expert in placement.experts:
        hosts = placement.replicas_of(expert)
        assert hosts
        assert all(expert in placement.experts_of(replica) for replica in hosts)
    for replica in range(replicas):
        hosted = placement.experts_of(replica)
        assert hosted
        assert all(replica in placement.replicas_of(expert) for expert in hosted)


@given(experts=st.integers(1, 12), replicas=st.integers(1, 12))
def test_blocks_are_even_and_neighbouring(experts, replicas):
    placement = build(experts, replicas)
    hosts = [len(block) for block in placement.hosts]
    hosted = [len(placement.experts_of(replica)) for replica in range(replicas)]
    assert max(hosts) - min(hosts) <= 1
    assert max(hosted) - min(hosted) <= 1
    assert min(max(hosts), max(hosted)) == 1, "either experts share a replica or replicas share an expert"
    flat = [replica for block in placement.hosts for replica in block]
    assert flat == sorted(flat)


@given(experts=st.integers(1, 6), replicas=st.integers(1, 12), count=st.integers(0, 50))
def test_shares_partition_the_prompts(experts, replicas, count):
    placement = build(experts, replicas)
    for expert in placement.experts:
        shares = [placement.share(expert, replica, count) for replica in range(replicas)]
        assert [prompt for share in shares for prompt in share] == list(range(count))
        lengths = [len(shares[replica]) for replica in placement.replicas_of(expert)]
        assert max(lengths) - min(lengths) <= 1


@given(count=st.integers(0, 100), parts=st.integers(1, 20))
def test_split_evenly_puts_longer_parts_first(count, parts):
    lengths = [len(part) for part in split_evenly(count, parts)]
    assert len(lengths) == parts
    assert sum(lengths) == count
    assert lengths == sorted(lengths, reverse=True)


def test_worked_examples():
    two = Placement.build(("text", "image", "video"), 2)
    assert two.experts_of(0) == ("text", "image")
    assert two.experts_of(1) == ("video",)
    five = Placement.build(("text", "image"), 5)
    assert five.replicas_of("text") == (0, 1, 2)
    assert five.replicas_of("image") == (3, 4)
    assert five.share("text", 1, 8) == range(3, 6)
    assert five.share("text", 4, 8) == range(0)


@pytest.mark.parametrize("experts", [(), ("a", "b", "a")])
def test_bad_expert_lists_are_refused(experts):
    with pytest.raises(UserError, match="^experts: "):
        Placement.build(experts, 2)


def test_bad_places_are_refused():
    with pytest.raises(UserError, match=r"^parallel\.replicas: 0"):
        Placement.build(("a",), 0)
    with pytest.raises(KeyError, match="'b' is no expert"):
        Placement.build(("a",), 1).replicas_of("b")
    with pytest.raises(IndexError):
        Placement.build(("a",), 1).experts_of(1)
