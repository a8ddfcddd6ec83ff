"""Placement: every expert is hosted, every replica works, and shares partition the prompts evenly."""
import itertools
import math
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from copd_megatron.parallel.placement import Placement, balanced, split_evenly
from copd_megatron.types import UserError


def build(experts, replicas):
    return Placement.build([f"e{i}" for i in range(experts)], replicas)


@settings(deadline=None)
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


@settings(deadline=None)
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


@settings(deadline=None)
@given(experts=st.integers(1, 6), replicas=st.integers(1, 12), count=st.integers(0, 50))
def test_shares_partition_the_prompts(experts, replicas, count):
    placement = build(experts, replicas)
    for expert in placement.experts:
        shares = [placement.share(expert, replica, count) for replica in range(replicas)]
        assert [prompt for share in shares for prompt in share] == list(range(count))
        lengths = [len(shares[replica]) for replica in placement.replicas_of(expert)]
        assert max(lengths) - min(lengths) <= 1


@settings(deadline=None)
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


WEIGHTS = st.lists(st.integers(1, 20), min_size=1, max_size=7)


def place(weights, replicas):
    names = [f"e{i}" for i in range(len(weights))]
    return Placement.build(names, replicas, dict(zip(names, weights)))


@settings(deadline=None)
@given(weights=WEIGHTS, more=st.integers(0, 9))
def test_blocks_are_weighted_as_well_as_can_be(weights, more):
    replicas = len(weights) + more
    placement = place(weights, replicas)
    flat = [replica for block in placement.hosts for replica in block]
    assert flat == list(range(replicas))  # blocks of neighbours that cover all, and no expert without one
    assert all(placement.hosts)
    answers = sorted({Fraction(w, n) for w in weights for n in range(1, replicas + 1)})
    best = next(a for a in answers if sum(math.ceil(w / a) for w in weights) <= replicas)
    assert max(Fraction(w, len(block)) for w, block in zip(weights, placement.hosts)) == best


@settings(deadline=None, max_examples=60)
@given(weights=st.lists(st.integers(1, 20), min_size=2, max_size=7), data=st.data())
def test_co_hosted_experts_are_balanced_by_weight(weights, data):
    replicas = data.draw(st.integers(1, len(weights) - 1))
    placement = place(weights, replicas)
    assert all(len(hosts) == 1 for hosts in placement.hosts)
    loads = [sum(w for w, (host,) in zip(weights, placement.hosts) if host == r) for r in range(replicas)]
    assert all(loads)
    best = min(max(sum(w for w, r in zip(weights, where) if r == own) for own in range(replicas))
               for where in itertools.product(range(replicas), repeat=len(weights))) if len(weights) < 6 else None
    if best is not None and len(set(weights)) > 1:
        assert 3 * max(loads) <= 4 * best
    assert max(loads) <= sum(weights) / replicas + max(weights)


@settings(deadline=None)
@given(costs=st.lists(st.integers(0, 50), max_size=30), parts=st.integers(1, 6))
def test_balanced_lists_partition_and_are_level(costs, parts):
    lists = balanced(costs, parts)
    assert sorted(i for own in lists for i in own) == list(range(len(costs)))
    assert all(own == sorted(own) for own in lists)
    sums = [sum(costs[i] for i in own) for own in lists]
    assert max(sums) - min(sums) <= max(costs, default=0)
    assert lists == balanced(list(costs), parts)


@settings(deadline=None)
@given(costs=st.lists(st.integers(1, 50), max_size=30), replicas=st.integers(1, 6))
def test_balanced_shares_partition_the_prompts(costs, replicas):
    placement = build(2, replicas)
    for expert in placement.experts:
        shares = [placement.balanced_share(expert, replica, costs) for replica in range(replicas)]
        assert sorted(i for share in shares for i in share) == list(range(len(costs)))
        assert all(not share for replica, share in enumerate(shares) if replica not in placement.replicas_of(expert))


def test_weights_by_example():
    assert place([1, 1, 6], 8).hosts == ((0,), (1,), (2, 3, 4, 5, 6, 7))
    assert place([4, 1, 1, 1], 2).hosts == ((0,), (1,), (1,), (1,))
    assert place([1, 4, 4, 1], 2).hosts == ((0,), (0,), (1,), (1,))
    assert place([5], 3).hosts == ((0, 1, 2),)
    assert balanced([9, 1, 1, 8, 1], 2) == [[0, 2], [1, 3, 4]]


def test_frozen_teachers_are_everywhere_and_no_experts():
    placement = Placement.build(("a", "b"), 2, frozen=("old", "backbone"))
    assert placement.replicas_of("old") == placement.replicas_of("backbone") == (0, 1)
    assert placement.experts_of(0) == ("a",)


@pytest.mark.parametrize("weight", [0.0, -1.0, float("nan"), float("inf")])
def test_bad_weights_are_refused(weight):
    with pytest.raises(UserError, match=r"^experts\.b\.weight: "):
        Placement.build(("a", "b"), 2, {"a": 1.0, "b": weight})
