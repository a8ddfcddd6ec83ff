"""Agreement of experts is the paper's: overlap and KL on each expert's own states, one product with the head each."""
import itertools

import pytest

from copd_megatron.metrics.names import pair_name
from support.head_products import HeadProducts
from support.plain_model import PlainModel
from support.tiny_models import VOCABULARY, tiny_model
from support.toy_run import adapters_of, randomise, toy_config, toy_trainer

EXPERTS = ("text", "image", "video")
K = 7


@pytest.mark.parametrize("scope", ["sequence", "completion"])
@pytest.mark.parametrize("microbatch_tokens", [60, 5000])
def test_it_is_the_definition_on_own_states(scope, microbatch_tokens, tmp_path):
    config = toy_config("qwen3", EXPERTS, adapter={"rank": 3, "alpha": 6.0, "scope": scope},
                        optimizer={"lr": 0.01, "microbatch_tokens": microbatch_tokens}, rollout={
                            "temperature": 0.7, "prompts_per_step": 3, "group_size": 3, "max_completion_tokens": 4},
                        metrics={"rollouts": False, "overlap_tokens": 9, "overlap_k": K})
    seen = []
    with toy_trainer(config, tmp_path) as trainer:
        randomise(trainer)
        measure, products = trainer.agreement, HeadProducts(VOCABULARY)

        def measured(step, samples):
            seen.append((samples, *products.of(lambda: measure(step, samples)), adapters_of(trainer)))
            return seen[-1][1]

        trainer.agreement = measured
        trainer.train_step(0, "rlvr")
    (samples, found, rows, factors), = seen
    model = PlainModel(tiny_model("qwen3"), scaling=2.0)
    chosen = {expert: first_nine(samples, expert) for expert in EXPERTS}
    assert rows == sum(s.length for own in chosen.values() for s in own) * len(EXPERTS)
    states = {expert: sum(s.length for s in own) for expert, own in chosen.items()}
    for pair in itertools.combinations(EXPERTS, 2):
        overlap = kl = 0.0
        for own, other in (pair, pair[::-1]):
            for sample in chosen[own]:
                p, q = (logprobs_of(model, config, sample, factors[policy]) for policy in (own, other))
                kl += float((p.exp() * (p - q)).sum())
                best = zip(*(side.topk(K).indices.tolist() for side in (p, q)))
                overlap += sum(len({*mine} & {*theirs}) for mine, theirs in best) / K
        count = float(sum(states[expert] for expert in pair))
        assert found[pair_name(*pair, "overlap")] == pytest.approx((overlap, count), rel=1e-6)
        assert found[pair_name(*pair, "symmetric_kl")] == pytest.approx((kl, count), rel=1e-9)
        assert kl > 1e-3


def first_nine(samples, expert):
    """Whole completions, in the order of their prompts, until nine tokens are there."""
    own = sorted((s for s in samples if s.expert == expert), key=lambda s: (s.slot, s.completion.sample))
    taken = []
    while sum(s.length for s in taken) < 9:
        taken.append(own[len(taken)])
    return taken


def logprobs_of(model, config, sample, factors):
    """[R, V] of a completion's states, each sequence on its own."""
    prompt = sample.completion.prompt
    adapted_from = len(prompt.token_ids) - prompt.header_tokens if config.adapter.scope == "completion" else 0
    return model.logprobs(prompt.token_ids.tolist(), sample.completion.token_ids, factors, config.rollout.temperature,
                          adapted_from)
