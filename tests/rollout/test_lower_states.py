"""What the engine keeps where adapters begin: the states of the packed pass, within a budget, until the step ends."""
from __future__ import annotations

from dataclasses import replace

import pytest
import torch

pytest.register_assert_rewrite("rollout.engine_contract", "rollout.megatron_harness")

from copd_megatron.model.shared_prefix import KeptRows, Leaf, LeafGroup, build_pack  # noqa: E402
from copd_megatron.types import Segment  # noqa: E402
from rollout.megatron_harness import (  # noqa: E402
    AMPLE,
    CPU,
    MegatronHarness,
    assert_same_bits,
    features,
    mixed_requests,
    outcome_of,
)
from support.random_backbone import MOE_SPEC, SPEC, one_rank_groups  # noqa: E402

ROW = SPEC.hidden_size * 8


@pytest.fixture(scope="module")
def groups():
    made = one_rank_groups()
    yield made
    made.destroy()


@torch.no_grad()
def _truth(backbone, prompt, token_ids):
    """(states of the prefix, of the completion) of a pack of these alone."""
    pack = build_pack([LeafGroup(prompt, [Leaf(None, token_ids)])], backbone.rules, CPU)
    entering = []
    backbone(pack, features([prompt]) if len(prompt.visual_index) else None, at_border=entering.append)
    return entering[0].split([len(prompt.token_ids) - backbone.rules.forced(prompt),
                              backbone.rules.forced(prompt) + len(token_ids) - 1])


def _held(states, key):
    rows = states._rows[key]
    return states.rows(KeptRows(((key,),), rows, rows))


@pytest.mark.parametrize("scope, first_layer, options, spec", [
    ("sequence", 1, {}, SPEC), ("sequence", 2, {"decode_lanes": 5}, SPEC), ("completion", 2, {}, SPEC),
    ("sequence", 2, {"prefix_store_bytes": AMPLE}, SPEC), ("completion", 1, {"prefix_store_bytes": AMPLE}, SPEC),
    ("sequence", 1, {"decode_lanes": 9}, MOE_SPEC)], ids=str)
def test_kept_states_are_those_of_the_packed_pass(groups, scope, first_layer, options, spec):
    """Of every prompt and completion, whichever step its lane ended in, a continuation included."""
    harness = MegatronHarness(groups, scope=scope, first_layer=first_layer, spec=spec)
    engine, requests = harness.engine(lower_states_bytes=AMPLE, **options), mixed_requests()
    states = engine.lower_states
    with states.step():
        answers = engine.generate(requests, features)
        lengths = {len(c.token_ids) for group in answers[:-1] for c in group}
        assert len(lengths) > 3, "lanes end at different times"
        wanted = {}
        for completion in (c for group in answers for c in group):
            prompt, ids = completion.prompt, completion.token_ids
            prefix, own = _truth(harness.backbone, prompt, ids)
            wanted[prompt.content_hash, tuple(ids)] = own
            stored = scope == "completion" and "prefix_store_bytes" in options
            if len(prefix) and not stored:  # what the store serves to training is in no stream there
                wanted[prompt.content_hash, None] = prefix
        assert dict.fromkeys(wanted, 0) == states.owners
        for key, want in wanted.items():
            torch.testing.assert_close(_held(states, key), want, rtol=0, atol=1e-12, msg=str(key))
        assert states.bytes == ROW * sum(map(len, wanted.values()))
        assert states.work() == {"memory/lower_states_bytes": (states.bytes, 1)}
    assert not states.owners and states.bytes == 0 and not states._states
    without = harness.engine(**options)
    assert_same_bits(outcome_of(answers), outcome_of(without.generate(requests, features)))


def test_what_finds_no_room_is_not_kept_and_prompts_give_way(groups):
    harness, requests = MegatronHarness(groups, first_layer=1), mixed_requests()
    held = {}
    for rows in (100, AMPLE):
        engine = harness.engine(lower_states_bytes=rows * ROW, decode_lanes=20)
        states = engine.lower_states
        with states.step():
            answers = engine.generate(requests, features)
            assert states.bytes <= rows * ROW
            for key in states.owners:
                assert len(_held(states, key)) == states._rows[key]
            held[rows] = dict(states._rows)
    everything = sum(held[AMPLE].values())
    completions = {key: n for key, n in held[AMPLE].items() if key[1] is not None}
    assert len(completions) == len({(c.prompt.key, *c.token_ids) for group in answers for c in group})
    some = sum(completions.values()) + 20
    engine = harness.engine(lower_states_bytes=some * ROW, decode_lanes=20)
    with engine.lower_states.step():
        engine.generate(requests, features)
        assert 100 < some < everything and completions.keys() < engine.lower_states.owners.keys()
    assert 0 < len(held[100]) and all(ids is not None for _, ids in held[100])


def test_nothing_is_kept_between_steps_or_without_a_budget(groups):
    harness = MegatronHarness(groups, first_layer=1)
    for engine, inside in ((harness.engine(lower_states_bytes=AMPLE), False), (harness.engine(), True)):
        if inside:
            with engine.lower_states.step():
                engine.generate(mixed_requests()[:2], features)
                assert not engine.lower_states.owners
            assert engine.lower_states.work() == {}
        else:
            engine.generate(mixed_requests()[:2], features)
        assert not engine.lower_states.owners and engine.lower_states.bytes == 0


def test_a_step_that_fails_leaves_nothing_behind(groups):
    engine = MegatronHarness(groups, first_layer=1).engine(lower_states_bytes=AMPLE)
    with pytest.raises(KeyError), engine.lower_states.step():
        engine.generate(mixed_requests()[:2], features)
        raise KeyError
    assert not engine.lower_states.owners and not engine.lower_states.recording


def test_a_longer_answer_takes_the_place_of_the_one_it_continues(groups):
    engine = MegatronHarness(groups, first_layer=2).engine(lower_states_bytes=AMPLE)
    first = mixed_requests()[3]
    with engine.lower_states.step():
        (answers,) = engine.generate([replace(first, samples=1)], features)
        old = first.prompt.content_hash, tuple(answers[0].token_ids)
        assert old in engine.lower_states.owners
        turn = replace(first, samples=1, prior=(*answers[0].segments, Segment([13, 14], "environment")))
        ((longer,),) = engine.generate([turn], features)
        assert set(engine.lower_states.owners) == {(old[0], None), (old[0], tuple(longer.token_ids))}
        assert longer.token_ids[:len(old[1])] == list(old[1])


def test_of_what_several_context_ranks_keep_the_first_counts(groups):
    states = MegatronHarness(groups, first_layer=1).engine(lower_states_bytes=AMPLE).lower_states
    with states.step():
        states.heard([[("p", None)], [("p", None), ("p", (1, 2))]])
        assert states.owners == {("p", None): 0, ("p", (1, 2)): 1}
        states.forget([("p", None), ("never", None)])
        assert states.owners == {("p", (1, 2)): 1} and states.bytes == 0
