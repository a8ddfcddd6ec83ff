"""Requests become waves of lanes: every completion once, prompts together, forced rows and noise as told."""
from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from copd_megatron.model.shared_prefix import PackRules
from copd_megatron.parallel.seeding import stable_hash, uniform
from copd_megatron.rollout.engine import Request, SamplingParams
from copd_megatron.rollout.lanes import ForcedRows, LaneNoise, deal_requests, plan_waves
from copd_megatron.types import Segment
from support.random_backbone import make_prompt

PARAMS = SamplingParams(max_tokens=4, stop_token_ids=())
PROMPTS = [make_prompt(seed, length) for seed, length in ((1, 9), (2, 6), (3, 3), (4, 1))]

asked = st.lists(st.builds(lambda p, e, n, o: Request(PROMPTS[p], e, n, PARAMS, (0,), sample_offset=o),
                           st.integers(0, 3), st.sampled_from(["a", "b", None]), st.integers(1, 5),
                           st.integers(0, 3)), max_size=6)
rules = st.builds(PackRules, st.sampled_from(["sequence", "completion"]), st.just(0), st.booleans())


@settings(max_examples=150, deadline=None)
@given(asked, rules, st.integers(1, 12))
def test_waves(requests, rules, max_lanes):
    waves = list(plan_waves(requests, rules, max_lanes))
    seen = [(r, s) for wave in waves for r, s in zip(wave.request.tolist(), wave.sample.tolist())]
    assert sorted(seen) == sorted((i, s) for i, r in enumerate(requests)
                                  for s in range(r.sample_offset, r.sample_offset + r.samples))
    for wave in waves:
        assert 1 <= len(wave) <= max_lanes
        experts = [requests[index].expert for index in wave.request]
        assert [expert for expert, part in wave.experts for _ in range(part.stop - part.start)] == experts
        assert len({expert for expert, _ in wave.experts}) == len(wave.experts)
        by_number = {number: key for key, number in wave.prefixes.numbers.items()}
        assert sorted(by_number) == list(range(len(by_number)))
        for index, trunk in zip(wave.request.tolist(), wave.trunk.tolist()):
            prompt, forced = requests[index].prompt, rules.forced(requests[index].prompt)
            if len(prompt.token_ids) <= forced:
                assert trunk == -1
                continue
            slot, owner = by_number[trunk]
            assert wave.prefixes.prompts[slot].content_hash == prompt.content_hash
            assert owner == (requests[index].expert if rules.scope == "sequence" else None)
    _check_prefixes_are_evaluated_once(waves, requests, rules)


def _check_prefixes_are_evaluated_once(waves, requests, rules):
    """Without sharing every completion has its own copy; with it, no prompt is in two evaluations."""
    distinct = {id(wave.prefixes): wave.prefixes for wave in waves}.values()
    copies = [prompt.content_hash for prefixes in distinct for prompt in prefixes.prompts]
    if rules.sharing:
        assert len(set(copies)) == len(copies)
    else:
        assert len(copies) == sum(request.samples for request in requests)


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(1, 4), st.integers(1, 5)), max_size=8), st.integers(1, 4))
def test_context_ranks_get_whole_prompts_and_even_loads(asked, ranks):
    params = SamplingParams(max_tokens=2, stop_token_ids=())
    requests = [Request(make_prompt(seed, 5), "a", samples, params, (1,)) for seed, samples in asked]
    rank_of = deal_requests(requests, ranks)
    assert len(rank_of) == len(requests) and all(0 <= rank < ranks for rank in rank_of)
    lanes = [0] * ranks
    of_prompt = {}
    for request, rank in zip(requests, rank_of):
        assert of_prompt.setdefault(request.prompt.content_hash, rank) == rank
        lanes[rank] += request.samples
    largest = max((sum(r.samples for r in requests if r.prompt.content_hash == p) for p in of_prompt), default=0)
    assert max(lanes) - min(lanes) <= largest


def test_a_wave_takes_whole_prompts():
    requests = [Request(prompt, "a", 4, PARAMS, (0,)) for prompt in PROMPTS[:3]]
    waves = list(plan_waves(requests, PackRules(), 9))
    assert [sorted(set(wave.request.tolist())) for wave in waves] == [[0, 1], [2]]


@pytest.mark.parametrize("scope,rows", [("sequence", 1), ("completion", 3)])
def test_forced_rows(scope, rows):
    image = make_prompt(5, 9, visual_tokens=4)
    prior = (Segment([11, 12]), Segment([13], "environment"))
    requests = [Request(image, "a", 2, PARAMS, (0,)), Request(PROMPTS[1], "a", 1, PARAMS, (0,), prior=prior)]
    pack_rules = PackRules(scope)
    wave, = plan_waves(requests, pack_rules, 10)
    forced = ForcedRows.build(wave, requests, pack_rules)
    assert forced.lengths.tolist() == [rows, rows, rows + 3]
    last = [r.prompt.token_ids[-rows:].tolist() for r in requests for _ in range(r.samples)]
    assert forced.token_ids[:, :rows].tolist() == last
    assert forced.token_ids[2, rows:].tolist() == [11, 12, 13]
    assert forced.token_ids[:2, rows:].max(initial=0) == 0
    for lane, index in enumerate(wave.request.tolist()):
        prompt = requests[index].prompt
        later = np.arange(prompt.next_position, prompt.next_position + 3)
        want = np.concatenate([prompt.position_ids[:, -rows:], np.broadcast_to(later, (3, 3))], 1)
        assert np.array_equal(forced.positions[:, lane], want)
        assert forced.offsets[lane] + rows == prompt.next_position
    kept = forced.select(np.array([2]))
    assert kept.token_ids.tolist() == forced.token_ids[2:].tolist()
    assert kept.positions.shape == (3, 1, rows + 3)


def test_noise_is_keyed_by_what_it_is_for():
    requests = [Request(PROMPTS[0], "a", 2, PARAMS, (4, 9)),
                Request(PROMPTS[1], None, 2, PARAMS, (4,), sample_offset=3)]
    wave, = plan_waves(requests, PackRules(), 10)
    positions = np.arange(5) + np.array([[0], [0], [2], [2]])
    got = LaneNoise(17, wave, requests).uniforms(positions)
    for lane, (index, sample) in enumerate(zip(wave.request.tolist(), wave.sample.tolist())):
        request = requests[index]
        expert = 0 if request.expert is None else stable_hash(request.expert)
        key = expert, *request.noise_key, stable_hash(request.prompt.key), sample
        want = uniform(17, *key, positions[lane])
        assert np.array_equal(got[lane], want)


@pytest.mark.parametrize("change", [{"expert": "b"}, {"noise_key": (1,)}, {"sample_offset": 1},
                                    {"prompt": PROMPTS[1]}])
def test_every_word_of_the_key_changes_the_noise(change):
    def noise(request, seed=1, start=0):
        wave, = plan_waves([request], PackRules(), 10)
        return LaneNoise(seed, wave, [request]).uniforms(np.array([[start]]))[0, 0]

    request = Request(PROMPTS[0], "a", 1, PARAMS, (0,))
    other = noise(replace(request, **change))
    assert len({noise(request), other, noise(request, seed=2), noise(request, start=1)}) == 4
