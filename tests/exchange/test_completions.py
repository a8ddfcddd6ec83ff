"""Completions survive the wire as they are, and come from whoever sampled them."""
from __future__ import annotations

import pytest

from copd_megatron.exchange.completions import (
    fetch_completions,
    read_completions,
    write_integers,
    write_logprobs,
)
from copd_megatron.parallel.groups import Groups
from copd_megatron.parallel.layout import Layout
from copd_megatron.parallel.placement import Placement
from copd_megatron.types import Completion, Segment
from support.random_backbone import make_prompt
from support.ranks import run_ranks

EXPERTS = ("text", "image", "video")


def completions(expert: str, slot: int) -> list[Completion]:
    """A group of two, one of several turns."""
    start = 100 * EXPERTS.index(expert) + 10 * slot
    one = Segment([start, start + 1], "policy", [-0.1 * slot, -1 / 3], [-0.1 * slot, -1 / 3])
    last = Segment([start + 5], "policy", [-1e-17 - slot], [-1e-17 - slot])
    return [Completion(make_prompt(slot, 9), expert, 0, [one], "length", "said", 0.5, {"accuracy": 0.5}, "x"),
            Completion(make_prompt(slot, 9), expert, 1, [one, Segment([7, 8, 9], "environment"), last])]


def facts(group: list[Completion]) -> list:
    return [(c.expert, c.sample, c.finish, c.segments, c.reward, c.reward_parts, c.extracted) for c in group]


def test_what_is_read_is_what_was_written():
    places = [("image", 3), ("text", 0)]
    given = [(place, c) for place in places for c in completions(*place)]
    read = read_completions(write_integers(given, EXPERTS), write_logprobs(given), EXPERTS,
                            {place: completions(*place)[0].prompt for place in places})
    assert [place for place, _ in read] == [place for place, _ in given]
    assert [(c.token_ids, c.loss_mask, c.logprobs, c.sample, c.finish) for _, c in read] == [
        (c.token_ids, c.loss_mask, c.logprobs, c.sample, c.finish) for _, c in given]
    assert [c.segments for _, c in read] == [c.segments for _, c in given]


OWNERS = {0: [("text", 0), ("text", 2)], 1: [("text", 1)], 2: [("image", 0), ("image", 1)], 3: [("video", 0)]}
"""Replica -> what it has sampled; text lives on two."""
WANTED = {0: [("image", 1), ("text", 0)], 1: [("text", 2), ("image", 1), ("video", 0)], 2: [], 3: [("text", 1)]}


def _fetch():
    groups = Groups.create(Layout(replicas=4), Placement.build(EXPERTS, 4))
    here = groups.coords.replica
    own = {place: completions(*place) for place in OWNERS[here]}
    found = fetch_completions({place: make_prompt(place[1], 9) for place in WANTED[here]}, own, groups, checked=True)
    with pytest.raises(RuntimeError, match=r"no replica has native completions of \('text', 9\) \(1 places"):
        fetch_completions({("text", 9): make_prompt(9, 9)}, own, groups)
    groups.destroy()
    return {place: facts(group) for place, group in found.items()}


def test_everybody_gets_what_it_wants():
    for replica, found in enumerate(run_ranks(4, _fetch)):
        assert list(found) == WANTED[replica]
        for place, group in found.items():
            want = [(c.expert, c.sample, c.finish, c.segments, 0.0, {}, None) for c in completions(*place)]
            assert group == want
