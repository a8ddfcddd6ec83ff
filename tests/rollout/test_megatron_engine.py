"""The embedded engine keeps the contract; sharing, compaction, attention and layout change nothing."""
from __future__ import annotations

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch

pytest.register_assert_rewrite("rollout.engine_contract")

from copd_megatron.config.model import AdapterConfig, ModelConfig  # noqa: E402
from copd_megatron.config.rollout import RolloutConfig  # noqa: E402
from copd_megatron.model.backbone import Backbone  # noqa: E402
from copd_megatron.model.hf_config import read_spec  # noqa: E402
from copd_megatron.model.shared_prefix import Leaf, LeafGroup, build_pack  # noqa: E402
from copd_megatron.model.translate import load_backbone_weights  # noqa: E402
from copd_megatron.model.vocab_parallel import score  # noqa: E402
from copd_megatron.parallel.groups import Groups  # noqa: E402
from copd_megatron.parallel.layout import Layout  # noqa: E402
from copd_megatron.parallel.placement import Placement  # noqa: E402
from copd_megatron.parallel.seeding import generator_for  # noqa: E402
from copd_megatron.rollout import megatron_engine, prefill  # noqa: E402
from copd_megatron.rollout.engine import Request, SamplingParams  # noqa: E402
from copd_megatron.rollout.megatron_engine import MegatronEngine  # noqa: E402
from copd_megatron.rollout.prefix_store import PrefixStore  # noqa: E402
from copd_megatron.types import Segment, UserError  # noqa: E402
from rollout.engine_contract import EngineContract, tokens  # noqa: E402
from support.random_backbone import MOE_SPEC, SPEC, make_backbone, make_prompt, one_rank_groups  # noqa: E402
from support.ranks import run_ranks  # noqa: E402
from support.tiny_models import tiny_model  # noqa: E402

CPU = torch.device("cpu")
AMPLE = 1 << 20
"""Bytes of a store that evicts nothing."""
LENGTHS = {1: 9, 2: 6, 3: 13}
"""Number -> length of the contract's prompts."""


def features(prompts, spec=SPEC):
    """Invented features that depend on the prompt alone: (merged, deepstack)."""
    stacked = torch.cat([torch.randn(1 + spec.deepstack_layers, len(p.visual_index), spec.hidden_size,
                                     dtype=torch.float64, generator=generator_for(0, p.key))
                         for p in prompts if len(p.visual_index)], 1)
    return stacked[0], list(stacked[1:])


class MegatronHarness:
    """The engine over a random backbone on one rank; truth is the naive trainer with plain attention."""

    experts, vocab_size, tolerance, max_prompt_tokens = ("a", "b"), SPEC.vocab_size, 1e-11, 40
    visual = staticmethod(features)

    def __init__(self, groups, store=None, **options):
        self.groups, self.store = groups, store
        self.backbone = make_backbone(groups, **options)
        self.trainer = make_backbone(groups, **{**options, "sharing": False, "attention": "reference"})

    def engine(self, **rollout):
        config = RolloutConfig(**{"max_prompt_tokens": self.max_prompt_tokens, **rollout})
        engine = MegatronEngine(self.backbone, self.groups, config, seed=7)
        if self.store is not None:  # what one engine leaves, the next one finds
            engine.prefill.store = self.store
        return engine

    def prompt(self, number, visual=False):
        return make_prompt(number, LENGTHS[number], visual_tokens=4 if visual else 0)

    @torch.no_grad()
    def logprobs(self, prompt, expert, token_ids, temperature):
        pack = build_pack([LeafGroup(prompt, [Leaf(expert, token_ids)])], self.trainer.rules, CPU)
        hidden = self.trainer(pack, features([prompt]) if len(prompt.visual_index) else None)
        everything = torch.arange(self.vocab_size).expand(len(token_ids), -1)
        return score(hidden, self.trainer.head, pack.target_ids, temperature=temperature,
                     at_ids_TK=everything).at_logprobs_TK.numpy()


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


class TestWithAPrefixStore(EngineContract):
    """The contract, with prefixes that other engines left in a store."""

    @pytest.fixture(scope="class")
    @classmethod
    def harness(cls, groups):
        """One store for all engines of these tests."""
        return MegatronHarness(groups, PrefixStore(AMPLE, SPEC.num_layers), first_layer=1)


PARAMS = SamplingParams(max_tokens=7, stop_token_ids=(7, 20, 33))


def _requests():
    """Several policies and prompts, one with media, one of a header alone, and a continuation."""
    prompts = [make_prompt(1, 9, visual_tokens=4), make_prompt(2, 6), make_prompt(3, 30), make_prompt(4, 3)]
    requests = [Request(p, expert, 4, PARAMS, (2,)) for p in prompts for expert in ("b", None, "a")]
    prior = (Segment([11, 12], "policy", [-1.0, -1.0], [-1.0, -1.0]), Segment([13], "environment"))
    return [*requests, Request(prompts[0], "a", 2, PARAMS, (3,), prior=prior)]


def _outcome(completions):
    """Tokens, ends, and all log-probs in one array."""
    flat = [c for group in completions for c in group]
    logprobs = np.concatenate([[c.segments[-1].logprobs, c.segments[-1].sampled_logprobs] for c in flat], 1)
    return tokens(completions), [c.finish for c in flat], logprobs


def _same(one, other):
    assert one[:2] == other[:2]
    np.testing.assert_allclose(one[2], other[2], rtol=0, atol=1e-12)


def _check_logprobs(harness, completions, atol=1e-11):
    """The engine's log-probs are the naive trainer's."""
    for completion in (c for group in completions for c in group):
        truth = harness.logprobs(completion.prompt, completion.expert, completion.token_ids, 1.0)
        picked = truth[np.arange(len(truth)), completion.token_ids]
        np.testing.assert_allclose(completion.logprobs, picked, rtol=0, atol=atol)


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
    _same(_outcome(shared.generate(_requests(), features)), _outcome(naive.generate(_requests(), features)))
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
    _same(_outcome(fused.engine().generate(_requests(), features)),
          _outcome(plain.engine().generate(_requests(), features)))


@pytest.mark.parametrize("compact_at", [0.0, 1.0])
def test_dropping_ended_lanes_changes_nothing(harness, monkeypatch, compact_at):
    usual = _outcome(harness.engine().generate(_requests(), features))
    monkeypatch.setattr(megatron_engine, "COMPACT_AT", compact_at)
    _same(_outcome(harness.engine().generate(_requests(), features)), usual)


def test_many_steps(harness):
    """Caches grow and noise is drawn in blocks: long answers are still the trainer's."""
    request = Request(make_prompt(1, 9), "a", 3, SamplingParams(max_tokens=70, stop_token_ids=()), (2,))
    completions, = harness.engine().generate([request])
    _check_logprobs(harness, [completions])
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
    _same(_outcome(whole.generate([request])), _outcome(cut.generate([request])))
    assert whole.counters == cut.counters
    assert cut.counters.prompt_tokens_computed == 29 + 10


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
    cut = _outcome(harness.engine(max_prompt_tokens=30).generate(_requests(), features))
    assert len(seen) > 1
    assert all(pack.upper.tokens <= 30 or len(pack.prompts) == 1 for pack in seen)
    _same(cut, _outcome(harness.engine(max_prompt_tokens=10 ** 4).generate(_requests(), features)))


@pytest.mark.parametrize("scope,length", [("sequence", 1), ("completion", 3)])
def test_prompt_without_a_prefix(groups, scope, length):
    """All of the prompt is forced; there is no trunk."""
    harness = MegatronHarness(groups, scope=scope)
    requests = [Request(make_prompt(8, length, header=length), "a", 3, PARAMS, (2,)),
                Request(make_prompt(9, 11), "a", 3, PARAMS, (2,))]
    together = harness.engine().generate(requests)
    assert tokens(together)[:1] == tokens(harness.engine().generate(requests[:1]))
    _check_logprobs(harness, together)


def test_headers_of_different_length(groups):
    """Lanes whose forced rows differ in number are fed them while others answer already."""
    harness = MegatronHarness(groups, scope="completion")
    prompts = [make_prompt(seed, 9, header=header) for seed, header in ((1, 2), (2, 5), (3, 3))]
    requests = [Request(prompt, "a", 2, PARAMS, (2,)) for prompt in prompts]
    together = harness.engine().generate(requests)
    assert tokens(together) == [tokens(harness.engine().generate([r]))[0] for r in requests]
    _check_logprobs(harness, together)


def test_scope_completion_needs_a_header(groups):
    request = Request(make_prompt(1, 9, header=0), "a", 1, PARAMS, (2,))
    with pytest.raises(Exception, match="generation header"):
        MegatronHarness(groups, scope="completion").engine().generate([request])
    assert MegatronHarness(groups, scope="sequence").engine().generate([request])


def test_hidden_states_that_overflow_are_an_error(groups):
    harness = MegatronHarness(groups)
    harness.backbone.final_norm.weight.data.fill_(float("inf"))
    with pytest.raises(FloatingPointError, match="not finite"):
        harness.engine().generate(_requests(), features)


@pytest.mark.parametrize("dtype,tolerance", [("float32", 2e-5), ("bfloat16", 0.15)])
def test_other_dtypes(groups, dtype, tolerance):
    """The engine's log-probs stay near the trainer's of the same dtype."""
    harness = MegatronHarness(groups, dtype=dtype)
    requests = [r for r in _requests() if not len(r.prompt.visual_index)]
    _check_logprobs(harness, harness.engine().generate(requests), tolerance)


@pytest.mark.parametrize("scope", ["sequence", "completion"])
def test_moe_layers_decode_as_they_train(groups, scope):
    harness = MegatronHarness(groups, scope=scope, first_layer=1, spec=MOE_SPEC)
    completions = harness.engine().generate(_requests()[3:12])
    _check_logprobs(harness, completions)
    _same(_outcome(completions), _outcome(harness.engine(decode_lanes=7).generate(_requests()[3:12])))
    stored = harness.engine(prefix_store_bytes=AMPLE)
    anew, found = (_outcome(stored.generate(_requests()[3:12])) for _ in range(2))
    _same_bits(found, anew)
    _same(found, _outcome(completions))


def _same_bits(one, other):
    assert one[:2] == other[:2]
    assert np.array_equal(one[2], other[2])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
@pytest.mark.parametrize("scope,first_layer", [("sequence", 0), ("sequence", 2), ("completion", 0), ("completion", 1)])
def test_reuse_is_exact_bit_for_bit(groups, scope, first_layer, dtype):
    """Found, evicted in between, or never kept: the same answers; beside packed prefixes the same up to rounding."""
    harness = MegatronHarness(groups, scope=scope, first_layer=first_layer, dtype=dtype)
    visual = lambda prompts: _cast(features(prompts), harness.backbone.dtype)  # noqa: E731
    never, ample = (harness.engine(prefix_store_bytes=size) for size in (1, AMPLE))
    want = _outcome(never.generate(_requests(), visual))
    _same_bits(_outcome(ample.generate(_requests(), visual)), want)
    some = harness.engine(prefix_store_bytes=ample.prefill.store.bytes // 2)
    for engine in (some, ample, some, never):
        _same_bits(_outcome(engine.generate(_requests(), visual)), want)
    if dtype == "float64":
        _same(_outcome(harness.engine().generate(_requests(), visual)), want)
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
            engine.generate(_requests(), features)
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
    bank, requests = harness.backbone.bank, [r for r in _requests() if r.expert == "a"]
    engine = harness.engine(prefix_store_bytes=AMPLE)
    old = _outcome(engine.generate(requests, features))
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
    new = _outcome(engine.generate(requests, features))
    _same_bits(new, _outcome(harness.engine(prefix_store_bytes=1).generate(requests, features)))
    assert new[0] != old[0] or not np.array_equal(new[2], old[2])
    assert len(engine.prefill.store) == held, "what the old weights left is gone"
    bank.remove("a")
    engine.generate([r for r in _requests() if r.expert == "b"], features)
    assert not any(key.exactness.startswith("a@") for key in engine.prefill.store._entries)


CASES = [("sequence", 0, True, 1024, 0), ("completion", 0, True, 5, AMPLE), ("sequence", 2, True, 1024, AMPLE),
         ("completion", 3, True, 1024, 0), ("sequence", 3, True, 1024, AMPLE), ("sequence", 1, False, 9, 0)]
"""(scope, first layer, sharing, decode lanes, store); the tiny backbone has four layers."""


@pytest.fixture(scope="module")
def path():
    """A tiny checkpoint with an odd vocabulary, so that tensor parallelism pads it."""
    return tiny_model("qwen3_vl", vocab_size=267)


def _loaded_engine(path, groups, scope, first_layer, sharing, decode_lanes, store):
    """An engine whose weights, adapters included, do not depend on the layout."""
    backbone = Backbone(read_spec(path), groups,
                        ModelConfig(path=str(path), dtype="float64", prefix_sharing=sharing),
                        AdapterConfig(rank=3, alpha=6.0, scope=scope, first_layer=first_layer))
    load_backbone_weights(backbone, path)
    bank = backbone.bank
    for expert in ("a", "b"):
        full = {f"{name}.{factor}": torch.randn(bank.full_shape(f"{name}.{factor}", 3), dtype=torch.float64,
                                                generator=generator_for(1, expert, name, factor)) * 0.2
                for name in bank.names() for factor in ("lora_A", "lora_B")}
        bank.put(expert, {name: bank.shard(name, value) for name, value in full.items()}, 2.0)
    return MegatronEngine(backbone, groups, RolloutConfig(decode_lanes=decode_lanes, prefix_store_bytes=store), seed=5)


def _layout_outcomes(path, parallel, cases=CASES):
    """What this rank's engine answers in each case, and its counters."""
    groups = Groups.create(Layout(**parallel), Placement.build(("a", "b"), 1))
    spec = read_spec(path)
    outcomes = []
    for case in cases:
        engine = _loaded_engine(path, groups, *case)
        ask = partial(engine.generate, _layout_requests(spec), partial(features, spec=spec))
        outcome = _outcome(ask())
        if case[-1]:
            first = engine.prefill.computed_tokens
            _same_bits(_outcome(ask()), outcome)
            assert engine.prefill.computed_tokens == first, "the second time all was found"
            engine.prefill.store = PrefixStore(1, spec.num_layers)
            _same_bits(_outcome(ask()), outcome)
        outcomes.append((*outcome, engine.counters))
    groups.destroy()
    return outcomes


def _layout_requests(spec):
    image = make_prompt(1, 9, visual_tokens=4)
    image.token_ids[image.visual_index] = spec.image_token_id
    plain = replace(PARAMS, max_tokens=4)
    greedy = replace(plain, greedy=True)
    nucleus = replace(PARAMS, top_p=0.7, temperature=1.4, max_tokens=2)
    prior = (Segment([11, 12], "policy", [-1.0, -1.0], [-1.0, -1.0]), Segment([200, 255, 266], "environment"))
    return [Request(image, "a", 3, plain, (2,)), Request(make_prompt(2, 6), None, 3, nucleus, (2,)),
            Request(make_prompt(3, 17), "b", 3, plain, (2,)), Request(image, "b", 1, greedy, (2,)),
            Request(image, "a", 2, plain, (3,), prior=prior)]


@pytest.fixture(scope="module")
def one_rank_outcomes(path):
    outcomes, = run_ranks(1, _layout_outcomes, path, {})
    return outcomes


@pytest.mark.parametrize("parallel,cases", [
    ({"tp": 2}, 6), ({"pp": 2}, 6), ({"tp": 2, "pp": 2}, 3), ({"cp": 2}, 6), ({"cp": 4}, 1),
    ({"tp": 2, "cp": 2, "sequence_parallel": True}, 2)], ids=str)
def test_layout_changes_nothing(path, one_rank_outcomes, parallel, cases):
    """Identical tokens on every rank of every layout, and equal log-probs."""
    for outcomes in run_ranks(Layout(**parallel).world_size, _layout_outcomes, path, parallel, CASES[:cases]):
        assert len(outcomes) == cases
        for want, got in zip(one_rank_outcomes, outcomes):
            _same(want[:3], got[:3])
            assert want[3] == got[3]
    assert len({str(outcome[0]) for outcome in one_rank_outcomes}) == len(CASES), "adapters change nothing"


@pytest.fixture(scope="module")
def moe_outcomes():
    """(what every rank of a layout answers with MoE layers, what one rank does)."""
    path = tiny_model("qwen3_vl_moe", mlp_only_layers=[3])
    cases = [(*CASES[1][:-1], 0), CASES[1]]

    def of_layout(parallel):
        # Beside other context ranks' rows nothing is evaluated twice alike: the configuration refuses a store there.
        own = cases if parallel.get("cp", 1) == 1 else cases[:1]
        return run_ranks(Layout(**parallel).world_size, _layout_outcomes, path, parallel, own)

    return of_layout, of_layout({})


@pytest.mark.parametrize("parallel", [
    {"tp": 2, "ep": 2, "sequence_parallel": True}, {"pp": 2, "cp": 2, "ep": 2},
    {"tp": 2, "cp": 2, "ep": 2, "etp": 2, "sequence_parallel": True}], ids=str)
def test_layout_changes_nothing_with_moe_layers(moe_outcomes, parallel):
    """Context ranks take different numbers of turns, and wait for each other in every MoE layer."""
    of_layout, (alone,) = moe_outcomes
    for outcomes in of_layout(parallel):
        for want, got in zip(alone, outcomes):
            _same(want[:3], got[:3])
            assert want[3] == got[3]
