"""The embedded engine keeps the contract; sharing, compaction and attention change nothing."""
from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

pytest.register_assert_rewrite("rollout.engine_contract", "rollout.megatron_harness")

from copd_megatron.rollout import megatron_engine, prefill  # noqa: E402
from copd_megatron.rollout.engine import Request, SamplingParams  # noqa: E402
from copd_megatron.types import UserError  # noqa: E402
from rollout.engine_contract import EngineContract, tokens  # noqa: E402
from rollout.megatron_harness import (  # noqa: E402
    LENGTHS,
    PARAMS,
    MegatronHarness,
    assert_same,
    check_logprobs,
    features,
    mixed_requests,
    outcome_of,
)
from support.random_backbone import SPEC, make_prompt, one_rank_groups  # noqa: E402


@pytest.fixture(scope="module")
def groups():
    made = one_rank_groups()
    yield made
    made.destroy()


@pytest.fixture(scope="module", params=[("sequence", 0), ("completion", 1)], ids=lambda p: f"{p[0]}-{p[1]}")
def harness(request, groups):
    scope, first_layer = request.param
    return MegatronHarness(groups, scope=scope, first_layer=first_layer)


class TestMegatronEngine(EngineContract):
    """The contract, in both scopes."""


def test_completions_end_where_rotary_frequencies_change(groups):
    """Refused before anything is sampled; a prompt of 9 and 7 tokens, the last of them not fed, reach position 15."""
    engine = MegatronHarness(groups).engine()
    request = Request(make_prompt(1, 9), "a", 1, PARAMS, (1,))
    for limit in (15, 14):
        engine.rules = replace(engine.rules, rope=replace(SPEC.rope, max_positions=limit))
        if limit == 15:
            assert len(engine.generate([request])) == 1
        else:
            with pytest.raises(UserError, match="^model.path: .* reaches position 15, .* beyond 14; "):
                engine.generate([request])


@pytest.mark.parametrize("first_layer", [0, 1, 2])
@pytest.mark.parametrize("scope", ["sequence", "completion"])
def test_sharing_changes_the_work_only(groups, scope, first_layer):
    options = {"scope": scope, "first_layer": first_layer}
    shared = MegatronHarness(groups, **options).engine()
    naive = MegatronHarness(groups, sharing=False, **options).engine()
    got, want = (outcome_of(engine.generate(mixed_requests(), features)) for engine in (shared, naive))
    assert_same(got, want)
    assert naive.counters.prompt_tokens_computed == naive.counters.prompt_tokens_asked
    forced = 1 if scope == "sequence" else 3
    upper = sum(n - forced for n in (9, 6, 30, 3)) * (3 if scope == "sequence" else 1)
    lower = sum(n - forced for n in (9, 6, 30, 3))
    leaves = forced * (4 * 3 * 4 + 2)
    layers = SPEC.num_layers
    assert shared.counters.prompt_tokens_computed == pytest.approx(
        leaves + (lower * first_layer + upper * (layers - first_layer)) / layers)


@pytest.mark.parametrize("scope", ["sequence", "completion"])
def test_plain_attention_gives_the_same(groups, scope):
    fused, plain = (MegatronHarness(groups, scope=scope, attention=name) for name in ("flash", "reference"))
    assert_same(outcome_of(fused.engine().generate(mixed_requests(), features)),
          outcome_of(plain.engine().generate(mixed_requests(), features)))


@pytest.mark.parametrize("compact_at", [0.0, 1.0])
def test_dropping_ended_lanes_changes_nothing(harness, monkeypatch, compact_at):
    usual = outcome_of(harness.engine().generate(mixed_requests(), features))
    monkeypatch.setattr(megatron_engine, "COMPACT_AT", compact_at)
    assert_same(outcome_of(harness.engine().generate(mixed_requests(), features)), usual)


def test_many_steps(harness):
    """Caches grow and noise is drawn in blocks: long answers are still the trainer's."""
    request = Request(make_prompt(1, 9), "a", 3, SamplingParams(max_tokens=70, stop_token_ids=()), (2,))
    completions, = harness.engine().generate([request])
    check_logprobs(harness, [completions])
    for completion in completions:
        assert len(set(completion.token_ids)) > 15, "the noise repeats"


def test_a_completion_cut_in_two_is_the_same(harness):
    """Noise is keyed by the position in the completion, so going on equals never having stopped."""
    whole = Request(make_prompt(1, 9), "a", 1, SamplingParams(max_tokens=8, stop_token_ids=()), (2,))
    (want,), = harness.engine().generate([whole])
    (half,), = harness.engine().generate([replace(whole, params=replace(whole.params, max_tokens=5))])
    rest = replace(whole, params=replace(whole.params, max_tokens=3), prior=tuple(half.segments))
    (got,), = harness.engine().generate([rest])
    assert got.token_ids == want.token_ids
    np.testing.assert_allclose(got.logprobs, want.logprobs, rtol=0, atol=1e-12)


def test_a_group_larger_than_a_wave_is_prefilled_once(groups):
    harness = MegatronHarness(groups)
    request = Request(make_prompt(3, 30), "a", 10, PARAMS, (2,))
    whole, cut = harness.engine(), harness.engine(decode_lanes=3)
    assert_same(outcome_of(whole.generate([request])), outcome_of(cut.generate([request])))
    assert whole.counters == cut.counters
    assert cut.counters.prompt_tokens_computed == 29 + 10


@pytest.mark.parametrize("policies", [("a",), ("a", "b"), (None, "b", "c", "a")])
def test_all_policies_answer_in_one_decode_batch(groups, policies):
    """One forward of the backbone per decode step, with the lanes of every policy and prompt."""
    harness, rows = MegatronHarness(groups, scope="completion", experts=("a", "b", "c")), []
    step = harness.backbone.forward_step

    def counted(token_ids, *others):
        rows.append(len(token_ids))
        return step(token_ids, *others)

    harness.backbone.forward_step = counted
    params = SamplingParams(max_tokens=5, stop_token_ids=())
    harness.engine().generate([Request(make_prompt(number, LENGTHS[number]), policy, 3, params, (2,))
                               for policy in policies for number in LENGTHS])
    lanes = len(policies) * len(LENGTHS) * 3
    assert rows == [3 * lanes, *[lanes] * 4], "first the header's 3 tokens, then one token a step"


def test_one_prompt_asked_for_twice_is_prefilled_once(groups):
    engine = MegatronHarness(groups).engine()
    engine.generate([Request(make_prompt(3, 30), "a", samples, PARAMS, (samples,)) for samples in (2, 3)])
    assert engine.counters.prompt_tokens_computed == 29 + 5


def test_prefill_is_cut_into_packs(harness, monkeypatch):
    """No pack holds more tokens than the longest allowed prompt, unless it is one prompt."""
    seen = []
    build = prefill.build_pack

    def watched(*args, **kwargs):
        seen.append(build(*args, **kwargs))
        return seen[-1]

    monkeypatch.setattr(prefill, "build_pack", watched)
    cut = outcome_of(harness.engine(max_prompt_tokens=30).generate(mixed_requests(), features))
    assert len(seen) > 1
    assert all(pack.upper.tokens <= 30 or len(pack.prompts) == 1 for pack in seen)
    assert_same(cut, outcome_of(harness.engine(max_prompt_tokens=10 ** 4).generate(mixed_requests(), features)))


@pytest.mark.parametrize("scope,length", [("sequence", 1), ("completion", 3)])
def test_prompt_without_a_prefix(groups, scope, length):
    """All of the prompt is forced; there is no trunk."""
    harness = MegatronHarness(groups, scope=scope)
    requests = [Request(make_prompt(8, length, header=length), "a", 3, PARAMS, (2,)),
                Request(make_prompt(9, 11), "a", 3, PARAMS, (2,))]
    together = harness.engine().generate(requests)
    assert tokens(together)[:1] == tokens(harness.engine().generate(requests[:1]))
    check_logprobs(harness, together)


def test_headers_of_different_length(groups):
    """Lanes whose forced rows differ in number are fed them while others answer already."""
    harness = MegatronHarness(groups, scope="completion")
    prompts = [make_prompt(seed, 9, header=header) for seed, header in ((1, 2), (2, 5), (3, 3))]
    requests = [Request(prompt, "a", 2, PARAMS, (2,)) for prompt in prompts]
    together = harness.engine().generate(requests)
    assert tokens(together) == [tokens(harness.engine().generate([r]))[0] for r in requests]
    check_logprobs(harness, together)


def test_scope_completion_needs_a_header(groups):
    request = Request(make_prompt(1, 9, header=0), "a", 1, PARAMS, (2,))
    with pytest.raises(Exception, match="generation header"):
        MegatronHarness(groups, scope="completion").engine().generate([request])
    assert MegatronHarness(groups, scope="sequence").engine().generate([request])


def test_hidden_states_that_overflow_are_an_error(groups):
    harness = MegatronHarness(groups)
    harness.backbone.final_norm.weight.data.fill_(float("inf"))
    with pytest.raises(FloatingPointError, match="not finite"):
        harness.engine().generate(mixed_requests(), features)


@pytest.mark.parametrize("dtype,tolerance", [("float32", 2e-5), ("bfloat16", 0.15)])
def test_other_dtypes(groups, dtype, tolerance):
    """The engine's log-probs stay near the trainer's of the same dtype."""
    harness = MegatronHarness(groups, dtype=dtype)
    requests = [r for r in mixed_requests() if not len(r.prompt.visual_index)]
    check_logprobs(harness, harness.engine().generate(requests), tolerance)
