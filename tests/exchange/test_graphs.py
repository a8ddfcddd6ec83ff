"""Graphs of any size: degrees, symmetry, reach, determinism, and never an expert that teaches itself."""
import math
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from copd_megatron.exchange import graphs

COUNTS = st.integers(1, 40)


def check_plain(count, arrows):
    """Arrows between two different experts that exist, each once."""
    assert len(set(arrows)) == len(arrows)
    assert all(t != s and 0 <= t < count and 0 <= s < count for t, s in arrows)


def hops(count, degree):
    """ceil(log_d N) without rounding errors."""
    return next(k for k in range(count + 1) if degree ** k >= count)


@settings(deadline=None, max_examples=60)
@given(count=COUNTS, degree=st.integers(2, 9))
def test_expander_is_regular_connected_and_a_few_hops_wide(count, degree):
    arrows = graphs.expander(count, degree)
    check_plain(count, arrows)
    degree = min(degree, count - 1)
    for end in (0, 1):
        assert Counter(arrow[end] for arrow in arrows) == {e: degree for e in range(count) if degree}
    diameter = graphs.distance(count, arrows)
    assert diameter is not None
    assert diameter <= (hops(count, degree) + 1 if degree > 1 else 1)
    assert arrows == graphs.expander(count, degree)


@pytest.mark.parametrize(("count", "degree", "diameter"), [(16, 2, 4), (32, 3, 4), (64, 3, 4), (500, 3, 6)])
def test_expander_of_known_sizes(count, degree, diameter):
    """A ring of 500 needs 499 hops, the best circulant graph of three offsets 11 or more."""
    arrows = graphs.expander(count, degree)
    assert graphs.distance(count, arrows) == diameter
    assert diameter <= math.ceil(math.log(count, degree))


def test_expander_of_few_experts_is_full():
    assert sorted(graphs.expander(3, 3)) == sorted(graphs.full(3))
    assert sorted(graphs.expander(4, 3)) == sorted(graphs.full(4))
    assert graphs.expander(2, 3) == [(0, 1), (1, 0)]
    assert graphs.expander(1, 3) == []


@settings(deadline=None)
@given(count=COUNTS, seed=st.integers(0, 9), opd_step=st.integers(0, 99))
def test_gossip_is_a_matching_in_both_directions(count, seed, opd_step):
    arrows = graphs.gossip(count, seed, opd_step)
    check_plain(count, arrows)
    assert len(arrows) == count // 2 * 2
    assert {(s, t) for t, s in arrows} == set(arrows)
    assert max(Counter(t for t, _ in arrows).values(), default=0) <= 1
    assert arrows == graphs.gossip(count, seed, opd_step)


def test_gossip_meets_everybody_in_time():
    met = {arrow for step in range(60) for arrow in graphs.gossip(7, 0, step)}
    assert len(met) == 7 * 6
    assert graphs.gossip(7, 0, 0) != graphs.gossip(7, 0, 1)
    assert [graphs.gossip(7, 0, step) for step in range(5)] != [graphs.gossip(7, 1, step) for step in range(5)]


@st.composite
def measured(draw):
    count = draw(st.integers(1, 9))
    pairs = [(a, b) for a in range(count) for b in range(a + 1, count)]
    return count, {pair: draw(st.integers(0, 10)) / 10 for pair in pairs if draw(st.integers(0, 4))}


@settings(deadline=None)
@given(measured(), st.integers(1, 4), st.integers(1, 10))
def test_adaptive_takes_the_widest_useful_gaps(case, degree, cap):
    count, gaps = case
    arrows = graphs.adaptive(count, degree, gaps, cap / 10)
    check_plain(count, arrows)
    fallback = graphs.expander(count, degree) if degree > 1 else graphs.ring(count)
    for student in range(count):
        known = {t: gaps[min(t, student), max(t, student)] for t in range(count)
                 if (min(t, student), max(t, student)) in gaps}
        teachers = [t for t, s in arrows if s == student]
        if not known:
            assert teachers == [t for t, s in fallback if s == student]
            continue
        useful = {t: gap for t, gap in known.items() if gap <= cap / 10}
        if not useful:
            assert [known[t] for t in teachers] == [min(known.values())]
            continue
        assert len(teachers) == min(degree, len(useful))
        assert sorted(useful[t] for t in teachers) == sorted(useful.values())[-len(teachers):]


def test_distance_sees_what_cannot_be_reached():
    assert graphs.distance(5, graphs.ring(5)) == 4
    assert graphs.distance(5, graphs.hub(5, 2)) == 2
    assert graphs.distance(5, graphs.full(5)) == 1
    assert graphs.distance(3, [(0, 1), (1, 2)]) is None
    assert graphs.distance(4, graphs.gossip(4, 0, 0)) is None
