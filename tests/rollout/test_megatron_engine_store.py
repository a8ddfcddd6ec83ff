"""The embedded engine with a prefix store: what it finds is what it would compute, bit for bit; MoE layers included."""
from __future__ import annotations

import numpy as np
import pytest
import torch

pytest.register_assert_rewrite("rollout.engine_contract", "rollout.megatron_harness")

from copd_megatron.rollout.prefix_store import PrefixStore  # noqa: E402
from rollout.engine_contract import EngineContract  # noqa: E402
from rollout.megatron_harness import (  # noqa: E402
    AMPLE,
    MegatronHarness,
    assert_same,
    assert_same_bits,
    check_logprobs,
    features,
    mixed_requests,
    outcome_of,
)
from support.random_backbone import MOE_SPEC, SPEC, one_rank_groups  # noqa: E402


@pytest.fixture(scope="module")
def groups():
    made = one_rank_groups()
    yield made
    made.destroy()


class TestWithAPrefixStore(EngineContract):
    """The contract, with prefixes that other engines left in a store."""

    @pytest.fixture(scope="class")
    @classmethod
    def harness(cls, groups):
        """One store for all engines of these tests."""
        return MegatronHarness(groups, PrefixStore(AMPLE, SPEC.num_layers), first_layer=1)


@pytest.mark.parametrize("scope", ["sequence", "completion"])
def test_moe_layers_decode_as_they_train(groups, scope):
    harness = MegatronHarness(groups, scope=scope, first_layer=1, spec=MOE_SPEC)
    completions = harness.engine().generate(mixed_requests()[3:12])
    check_logprobs(harness, completions)
    assert_same(outcome_of(completions), outcome_of(harness.engine(decode_lanes=7).generate(mixed_requests()[3:12])))
    stored = harness.engine(prefix_store_bytes=AMPLE)
    anew, found = (outcome_of(stored.generate(mixed_requests()[3:12])) for _ in range(2))
    assert_same_bits(found, anew)
    assert_same(found, outcome_of(completions))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
@pytest.mark.parametrize("scope,first_layer", [("sequence", 0), ("sequence", 2), ("completion", 0), ("completion", 1)])
def test_reuse_is_exact_bit_for_bit(groups, scope, first_layer, dtype):
    """Found, evicted in between, or never kept: the same answers; beside packed prefixes the same up to rounding."""
    harness = MegatronHarness(groups, scope=scope, first_layer=first_layer, dtype=dtype)
    visual = lambda prompts: _cast(features(prompts), harness.backbone.dtype)  # noqa: E731
    never, ample = (harness.engine(prefix_store_bytes=size) for size in (1, AMPLE))
    want = outcome_of(never.generate(mixed_requests(), visual))
    assert_same_bits(outcome_of(ample.generate(mixed_requests(), visual)), want)
    some = harness.engine(prefix_store_bytes=ample.prefill.store.bytes // 2)
    for engine in (some, ample, some, never):
        assert_same_bits(outcome_of(engine.generate(mixed_requests(), visual)), want)
    if dtype == "float64":
        assert_same(outcome_of(harness.engine().generate(mixed_requests(), visual)), want)
    asked = 3 if scope == "completion" else 4 * 3 * (1 + bool(first_layer))
    distinct = 3 if scope == "completion" else 4 * 3 + 4 * bool(first_layer)
    counters = [engine.prefill.store.counters for engine in (never, some, ample)]
    assert [(own.hits, own.misses) for own in counters[::2]] == [(0, 2 * asked), (2 * asked - distinct, distinct)]
    assert counters[2].recomputed_tokens == 0 < counters[1].recomputed_tokens
    assert never.prefill.computed_tokens == counters[0].computed_tokens > ample.prefill.computed_tokens > 0
    assert some.prefill.store.bytes <= some.prefill.store.budget_bytes


def _cast(visual, dtype):
    merged, deepstack = visual
    return merged.to(dtype), [x.to(dtype) for x in deepstack]


@pytest.mark.parametrize("first_layer", [0, 1])
def test_each_distinct_prefix_is_evaluated_once(groups, first_layer):
    """With a store across calls, without one within a call: the lower layers once for all, the upper per policy."""
    lengths, layers = (9, 6, 30, 3), SPEC.num_layers
    once = sum(n - 1 for n in lengths) * (first_layer + 3 * (layers - first_layer)) / layers
    harness = MegatronHarness(groups, first_layer=first_layer)
    for size, calls in ((0, 1), (AMPLE, 3)):
        engine = harness.engine(prefix_store_bytes=size)
        for _ in range(calls):
            engine.generate(mixed_requests(), features)
        assert engine.prefill.computed_tokens == pytest.approx(once)
        done = engine.prefill.work()
        assert done["prefix/computed_tokens"] == (pytest.approx(once), 0.0)
        if size:
            assert done["prefix/saved_tokens"][0] > (calls - 1) * once - 1e-9
            assert done["prefix/bytes"] == (engine.prefill.store.bytes, 1)
        assert not any(value for name, (value, _) in engine.prefill.work().items() if name != "prefix/bytes")


@pytest.mark.parametrize("how", ["put", "update"])
def test_changed_adapters_never_meet_what_old_ones_left(groups, how):
    harness = MegatronHarness(groups)
    bank, requests = harness.backbone.bank, [r for r in mixed_requests() if r.expert == "a"]
    engine = harness.engine(prefix_store_bytes=AMPLE)
    old = outcome_of(engine.generate(requests, features))
    held = len(engine.prefill.store)
    with torch.no_grad():
        factors = {name: 1.5 * p for name, p in bank.parameters_of("a").items()}
        if how == "put":
            bank.put("a", factors, bank.scaling_of("a"))
        else:
            for name, parameter in bank.parameters_of("a").items():
                parameter.copy_(factors[name])
            with pytest.raises(RuntimeError, match="'a' were written to without AdapterBank.changed"):
                engine.generate(requests, features)
            bank.changed("a")
    new = outcome_of(engine.generate(requests, features))
    assert_same_bits(new, outcome_of(harness.engine(prefix_store_bytes=1).generate(requests, features)))
    assert new[0] != old[0] or not np.array_equal(new[2], old[2])
    assert len(engine.prefill.store) == held, "what the old weights left is gone"
    bank.remove("a")
    engine.generate([r for r in mixed_requests() if r.expert == "b"], features)
    assert not any(key.exactness.startswith("a@") for key in engine.prefill.store._entries)
