"""Scoring evaluates what is not known yet, and nothing besides: the policy itself only where several updates follow."""
from collections import Counter

import pytest

from support.toy_run import randomise, toy_config, toy_trainer


@pytest.mark.parametrize("minibatches, epochs", [(1, 1), (2, 1), (1, 2)])
def test_the_policy_itself_is_scored_only_where_several_updates_follow(minibatches, epochs, tmp_path):
    config = toy_config("qwen3", ("text", "image"), rlvr={"minibatches_per_rollout": minibatches, "epochs": epochs},
                        rollout={"prompts_per_step": 2, "group_size": 2, "max_completion_tokens": 3},
                        schedule={"rl_steps": 0, "opd_steps": 1}, metrics={"rollouts": False, "overlap_tokens": 1},
                        optimizer={"lr": 0.01, "microbatch_tokens": 5000})
    lanes, passes, samples = Counter(), Counter(), []
    with toy_trainer(config, tmp_path) as trainer:
        randomise(trainer)
        score, update, runner = trainer.scoring.score, trainer.learner.update, trainer.runner

        def scored(given, *others):
            samples.extend(given)
            runner.on_run = hear
            return score(given, *others)

        def hear(batches, differentiated):
            passes[differentiated] += 1
            if not differentiated:
                lanes.update((lane.sample.expert, lane.policy) for batch in batches for lane in batch.lanes)

        def updated(*given):
            sums = update(*given)
            runner.on_run = None
            return sums

        trainer.scoring.score, trainer.learner.update = scored, updated
        trainer.train_step(0, "opd")
    several = minibatches * epochs > 1
    want = Counter((s.expert, None if s.is_native else s.edge.teacher) for s in samples)
    assert len(want) == 4, "each expert learns from its reward and from the other"
    if several:
        want.update((s.expert, s.expert) for s in samples)
    assert lanes == want
    assert passes == {False: 1, True: minibatches * epochs}
    assert all((s.old_logprobs is not None) == several for s in samples)
