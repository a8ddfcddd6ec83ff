"""Rollout, scoring and update take prompts from one store: each is evaluated once, and no expert learns otherwise."""
import pytest
import torch

from support.toy_run import adapters_of, randomise, toy_config, toy_trainer

AMPLE = 1 << 24
"""Bytes of a store that evicts nothing."""


def two_steps(config, run_dir):
    """(adapters, tokens, metrics and samples of each step) of an RLVR and an OPD step from random adapters."""
    with toy_trainer(config, run_dir) as trainer:
        randomise(trainer)
        seen, metrics, update = [], [], trainer.learner.update
        trainer.learner.update = lambda samples, *training: (seen.append(samples), update(samples, *training))[1]
        for step in range(2):
            metrics.append(trainer.train_step(step, trainer.schedule.phase(step)))
        return adapters_of(trainer), [[s.completion.token_ids for s in own] for own in seen], metrics, seen


def prefix_tokens(samples, forced) -> int:
    """Of the distinct prompts."""
    lengths = {s.completion.prompt.content_hash: len(s.completion.prompt.token_ids) - forced(s.completion.prompt)
               for s in samples}
    return sum(lengths.values())


@pytest.mark.parametrize("first_layer, options, sizes", [(0, {}, (0, 1, 60_000, AMPLE)),
                                                         (2, {"recompute": "full"}, (0, 60_000, AMPLE))], ids=str)
def test_stored_prefixes_train_the_same_experts(first_layer, options, sizes, tmp_path):
    """Whatever is evicted, to the last bit; without a store, up to rounding. With images and videos."""
    results = {}
    for size in sizes:
        config = toy_config(adapter={"rank": 3, "alpha": 6.0, "scope": "completion", "first_layer": first_layer},
                            model={"dtype": "float64", **options}, metrics={"rollouts": False, "overlap_tokens": 20},
                            optimizer={"lr": 1e-2, "warmup_steps": 2, "microbatch_tokens": 80},
                            rollout={"prompts_per_step": 2, "group_size": 3, "prefix_store_bytes": size})
        results[size] = two_steps(config, tmp_path / str(size))
    adapters, tokens, metrics, seen = results[AMPLE]
    for size in sizes[:-1]:
        tolerance = 0 if size else 1e-8
        assert results[size][1] == tokens, size
        for expert, factors in results[size][0].items():
            for name, factor in factors.items():
                torch.testing.assert_close(factor, adapters[expert][name], rtol=0, atol=tolerance, msg=f"{size} {name}")
    once = [prefix_tokens(samples, lambda p: p.header_tokens) for samples in seen]
    # Rollout, the backbone's and all teachers' scores, the update and the overlap of all pairs: one evaluation.
    assert [m["prefix/computed_tokens"] for m in metrics] == pytest.approx(once)
    assert all(m["prefix/recomputed_tokens"] == 0 and m["prefix/hit_rate"] > 0.6 for m in metrics)
    assert metrics[1]["prefix/bytes"] > metrics[0]["prefix/bytes"] > 0
    some, off = results[60_000][2], results[0][2]
    assert all(m["prefix/recomputed_tokens"] > 0 and 0 < m["prefix/bytes"] <= 60_000 for m in some)
    assert [m["prefix/computed_tokens"] for m in off] == pytest.approx(once), "rollout evaluates each once anyway"
    assert not {"prefix/hit_rate", "prefix/bytes"} & off[1].keys()
    assert metrics[1]["tokens/update"] < off[1]["tokens/update"]


def test_a_step_evaluates_each_prompt_once_per_expert_that_answers(tmp_path):
    """Scope sequence, no store: native batch and all students of it share what they can in one batch of requests."""
    config = toy_config("qwen3", exchange={"topology": "full"}, adapter={"rank": 3, "alpha": 6.0, "first_layer": 1},
                        schedule={"rl_steps": 0, "opd_steps": 2}, metrics={"rollouts": False, "overlap_tokens": 1})
    _, _, metrics, seen = two_steps(config, tmp_path)
    for numbers, samples in zip(metrics, seen):
        asked = {(s.completion.prompt.content_hash, s.expert): s for s in samples}
        assert len(asked) > len({prompt for prompt, _ in asked})
        lower = prefix_tokens(samples, lambda p: 1)
        upper = sum(len(s.completion.prompt.token_ids) - 1 for s in asked.values())
        assert numbers["prefix/computed_tokens"] == pytest.approx((lower + 3 * upper) / 4)
