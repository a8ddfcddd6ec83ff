"""Every layout of the embedded engine answers alike, with and without MoE layers."""
from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch

pytest.register_assert_rewrite("rollout.engine_contract", "rollout.megatron_harness")

from copd_megatron.config.model import AdapterConfig, ModelConfig  # noqa: E402
from copd_megatron.config.rollout import RolloutConfig  # noqa: E402
from copd_megatron.model.backbone import Backbone  # noqa: E402
from copd_megatron.model.hf_config import read_spec  # noqa: E402
from copd_megatron.model.translate import load_backbone_weights  # noqa: E402
from copd_megatron.parallel.groups import Groups  # noqa: E402
from copd_megatron.parallel.layout import Layout  # noqa: E402
from copd_megatron.parallel.placement import Placement  # noqa: E402
from copd_megatron.parallel.seeding import generator_for  # noqa: E402
from copd_megatron.rollout.engine import Request  # noqa: E402
from copd_megatron.rollout.megatron_engine import MegatronEngine  # noqa: E402
from copd_megatron.rollout.prefix_store import PrefixStore  # noqa: E402
from copd_megatron.types import Segment  # noqa: E402
from rollout.megatron_harness import AMPLE, PARAMS, assert_same, assert_same_bits, features, outcome_of  # noqa: E402
from support.random_backbone import make_prompt  # noqa: E402
from support.ranks import run_ranks  # noqa: E402
from support.tiny_models import tiny_model  # noqa: E402

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
        outcome = outcome_of(ask())
        if case[-1]:
            first = engine.prefill.computed_tokens
            assert_same_bits(outcome_of(ask()), outcome)
            assert engine.prefill.computed_tokens == first, "the second time all was found"
            engine.prefill.store = PrefixStore(1, spec.num_layers)
            assert_same_bits(outcome_of(ask()), outcome)
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
            assert_same(want[:3], got[:3])
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
            assert_same(want[:3], got[:3])
            assert want[3] == got[3]
