"""Lanes become microbatches: within the budget, every lane once, prompts shared where they are the same."""
import dataclasses

import numpy as np
import pytest

from copd_megatron.model.shared_prefix import PackRules, pack_tokens
from copd_megatron.trainer.batching import Lane, Sample, make_microbatches
from copd_megatron.types import Completion, Segment
from support.random_backbone import make_prompt

RULES = PackRules()


def samples_of(prompt, count, length=5, expert="text"):
    return [Sample(Completion(prompt, expert, i, [Segment([1] * length)]), expert) for i in range(count)]


@pytest.mark.parametrize("budget", [1, 30, 60, 10_000])
@pytest.mark.parametrize("rules", [RULES, PackRules("completion", 1), PackRules(sharing=False)])
def test_every_lane_once_and_within_the_budget(budget, rules):
    samples = [s for seed in range(3) for s in samples_of(make_prompt(seed, 8 + seed), 4)]
    lanes = [Lane(s, policy) for s in samples for policy in ("text", None)]
    batches = make_microbatches(lanes, rules, budget)
    assert sorted(id(lane) for b in batches for lane in b.lanes) == sorted(map(id, lanes))
    for batch in batches:
        assert pack_tokens(batch.groups, rules) <= budget or len(batch.lanes) == 1
        leaves = [(group.prompt, leaf.lane, leaf.token_ids) for group in batch.groups for leaf in group.leaves]
        assert leaves == [(lane.sample.completion.prompt, lane.policy, lane.sample.completion.token_ids)
                          for lane in batch.lanes]
    if budget == 10_000:
        assert len(batches) == 1 and len(batches[0].groups) == 3


def test_the_lanes_of_a_sample_may_be_kept_together():
    samples = samples_of(make_prompt(0, 9), 4)
    lanes = [Lane(s, policy) for s in samples for policy in ("a", "b", "c")]
    for batch in make_microbatches(lanes, RULES, 20, whole_samples=True):
        assert [lane.policy for lane in batch.lanes] == ["a", "b", "c"] * (len(batch.lanes) // 3)
    parted = make_microbatches(lanes, RULES, 20)
    assert any(len(batch.lanes) % 3 for batch in parted)


def test_different_questions_of_one_name_do_not_share_a_prompt():
    """Two experts may have tasks that count their questions alike."""
    one, other = make_prompt(0, 9), make_prompt(1, 9)
    other = dataclasses.replace(other, key=one.key)
    (batch,) = make_microbatches([Lane(s, "a") for p in (one, other) for s in samples_of(p, 1)], RULES, 1000)
    assert [group.prompt for group in batch.groups] == [one, other]


def test_the_facts_of_a_sample():
    segments = [Segment([4, 5], "policy", [-1.0, -2.0]), Segment([6], "environment"), Segment([7], "policy", [-3.0])]
    sample = Sample(Completion(make_prompt(0, 9), "text", 0, segments), "text")
    assert (sample.length, sample.is_native) == (4, True)
    assert sample.loss_mask.tolist() == [True, True, False, True]
    np.testing.assert_array_equal(sample.engine_logprobs, [-1, -2, 0, -3])
