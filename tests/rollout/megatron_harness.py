"""The embedded engine over a random backbone, what tests ask it, and how they compare its answers."""
from __future__ import annotations

import numpy as np
import torch

from copd_megatron.config.rollout import RolloutConfig
from copd_megatron.model.shared_prefix import Leaf, LeafGroup, build_pack
from copd_megatron.model.vocab_parallel import score
from copd_megatron.parallel.seeding import generator_for
from copd_megatron.rollout.engine import Request, SamplingParams
from copd_megatron.rollout.megatron_engine import MegatronEngine
from copd_megatron.types import Segment
from rollout.engine_contract import tokens
from support.random_backbone import SPEC, make_backbone, make_prompt

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


PARAMS = SamplingParams(max_tokens=7, stop_token_ids=(7, 20, 33))


def mixed_requests():
    """Several policies and prompts, one with media, one of a header alone, and a continuation."""
    prompts = [make_prompt(1, 9, visual_tokens=4), make_prompt(2, 6), make_prompt(3, 30), make_prompt(4, 3)]
    requests = [Request(p, expert, 4, PARAMS, (2,)) for p in prompts for expert in ("b", None, "a")]
    prior = (Segment([11, 12], "policy", [-1.0, -1.0], [-1.0, -1.0]), Segment([13], "environment"))
    return [*requests, Request(prompts[0], "a", 2, PARAMS, (3,), prior=prior)]


def outcome_of(completions):
    """Tokens, ends, and all log-probs in one array."""
    flat = [c for group in completions for c in group]
    logprobs = np.concatenate([[c.segments[-1].logprobs, c.segments[-1].sampled_logprobs] for c in flat], 1)
    return tokens(completions), [c.finish for c in flat], logprobs


def assert_same(one, other):
    assert one[:2] == other[:2]
    np.testing.assert_allclose(one[2], other[2], rtol=0, atol=1e-12)


def check_logprobs(harness, completions, atol=1e-11):
    """The engine's log-probs are the naive trainer's."""
    for completion in (c for group in completions for c in group):
        truth = harness.logprobs(completion.prompt, completion.expert, completion.token_ids, 1.0)
        picked = truth[np.arange(len(truth)), completion.token_ids]
        np.testing.assert_allclose(completion.logprobs, picked, rtol=0, atol=atol)


def assert_same_bits(one, other):
    assert one[:2] == other[:2]
    assert np.array_equal(one[2], other[2])
