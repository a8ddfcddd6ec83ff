"""What a step asks for: native batches, dynamic sampling, cross batches; and what the log says about clipping."""
import logging

import pytest
import torch

from copd_megatron.losses.advantages import overlong_penalty
from copd_megatron.trainer.opd_phase import cross_counts
from copd_megatron.types import Edge
from support.toy_run import toy_config, toy_trainer
from support.toy_tasks import LetterTask


class SomeFlat(LetterTask):
    """All answers to every third question earn the same."""

    def verify(self, item, completion):
        flat = int(item.key.rsplit("/", 1)[1]) % 3 == 0
        return {"accuracy": 0.5, "format": 1.0} if flat else super().verify(item, completion)


class Flat(LetterTask):
    """All answers earn the same."""

    def verify(self, item, completion):
        return {"accuracy": 0.5, "format": 1.0}


def make_config(**sections):
    return toy_config("qwen3", ("text", "image"), **{
        "rollout": {"prompts_per_step": 4}, "metrics": {"rollouts": False, "overlap_tokens": 1}, **sections})


def spied(trainer) -> list:
    """The samples of the steps to come."""
    seen = []
    update = trainer.learner.update
    trainer.learner.update = lambda samples, *training: (seen.extend(samples), update(samples, *training))[1]
    return seen


def test_dynamic_sampling_replaces_groups_with_equal_rewards(tmp_path):
    config = make_config(task=SomeFlat, rlvr={"dynamic_sampling": True, "dynamic_sampling_max_rounds": 4})
    with toy_trainer(config, tmp_path) as trainer:
        samples = spied(trainer)
        metrics = [trainer.train_step(step, trainer.schedule.phase(step)) for step in range(2)]
    for expert in ("text", "image"):
        # Questions 0 and 3 of the first four gave way to 4 and 7, 18 of the second four to 22.
        assert [m[f"{expert}/resampled_groups"] for m in metrics] == [2, 1]
        assert metrics[0][f"{expert}/zero_std_groups"] == 0
        own = [s for s in samples if s.expert == expert and s.is_native]
        assert len(own) == 2 * 4 * 3
        keys = {s.completion.prompt.key for s in own}
        assert {int(key.rsplit("/", 1)[1]) for key in keys} == {4, 1, 2, 7, 16, 17, 22, 19}
        for key in keys:
            rewards = {s.completion.reward for s in own if s.completion.prompt.key == key}
            assert len(rewards) > 1
            assert {s.slot for s in own if s.completion.prompt.key == key} <= {0, 1, 2, 3}
    # A teacher's prompts are those of its first round: any rank can make them without asking.
    cross = {s.completion.prompt.key for s in samples if s.edge == Edge("text", "image")}
    assert cross == {f"a/train/{16 + slot}" for slot in range(4)}


def test_dynamic_sampling_gives_up_after_its_rounds(tmp_path):
    config = make_config(task=Flat, rlvr={"dynamic_sampling": True, "dynamic_sampling_max_rounds": 3})
    with toy_trainer(config, tmp_path) as trainer:
        metrics = trainer.train_step(0, "rlvr")
    assert metrics["text/resampled_groups"] == 2 * 4
    assert metrics["text/zero_std_groups"] == 1
    assert metrics["text/advantage_abs"] == 0


def test_overlong_answers_earn_less_but_are_recorded_as_graded(tmp_path):
    config = make_config(task=Flat, rlvr={"overlong_buffer_tokens": 4, "overlong_penalty": 0.5, "advantage": "dr_grpo"})
    with toy_trainer(config, tmp_path) as trainer:
        asked = trainer.native.requests(0)
        groups = trainer.collector.collect([a.request for a in asked])
        groups[0][0].segments[0].token_ids.pop()  # one answer is shorter than the others
        samples = trainer.native.samples(asked, groups)[:3]
    rewards = 0.55 + overlong_penalty(torch.tensor([s.length for s in samples]), 4, 4, 0.5)
    assert [s.length for s in samples][0] < max(s.length for s in samples)
    assert [s.advantage for s in samples] == pytest.approx((rewards - rewards.mean()).tolist())
    assert {s.completion.reward for s in samples} == {0.55}


@pytest.mark.parametrize(("ratio", "counts"), [(1.0, [2, 2]), (0.5, [1, 1]), (0.75, [2, 1]), (0.25, [1, 0]),
                                               (9.0, [4, 4])])
def test_cross_prompts_are_shared_out_over_teachers(ratio, counts):
    edges = [Edge("text", "image"), Edge("image", "text"), Edge("video", "text")]
    assert list(cross_counts(edges, "text", 4, ratio).values()) == counts
    assert list(cross_counts(edges, "image", 4, ratio).values()) == [min(4, sum(counts))]
    assert cross_counts(edges, "video", 4, ratio) == {}


def test_a_beta_and_a_signal_per_edge_reach_the_samples(tmp_path):
    edges = [{"teacher": "text", "student": "image", "beta": 0.25, "signal": "full"}, ["image", "text"]]
    config = make_config(exchange={"topology": edges}, opd={"beta": 2.0, "cross_ratio": 0.5},
                         schedule={"rl_steps": 0})
    with toy_trainer(config, tmp_path) as trainer:
        samples = spied(trainer)
        trainer.train_step(0, "opd")
    cross = {(s.edge.teacher, s.edge.student, s.edge.beta, s.edge.signal, s.signal.kind)
             for s in samples if not s.is_native}
    assert cross == {("text", "image", 0.25, "full", "full"), ("image", "text", 2.0, "sampled", "sampled")}
    assert sum(s.edge is not None for s in samples) == 2 * 2 * 3


@pytest.mark.parametrize(("rlvr", "inert"), [({}, True), ({"epochs": 2}, False),
                                             ({"minibatches_per_rollout": 2}, False)])
def test_the_log_says_once_that_clipping_is_inert(rlvr, inert, tmp_path, caplog):
    config = toy_config("qwen3", ("text",), rlvr=rlvr, schedule={"rl_steps": 2, "opd_steps": 0},
                        rollout={"prompts_per_step": 2}, evaluation={"final_prompts": 1},
                        checkpoint={"export_merged": False})
    with toy_trainer(config, tmp_path) as trainer, caplog.at_level(logging.INFO, logger="copd_megatron"):
        trainer.run()
    lines = [record.message for record in caplog.records if "clipping is inert" in record.message]
    assert len(lines) == inert


def test_overlap_is_measured_where_a_phase_ends_and_every_few_steps(tmp_path):
    config = make_config(schedule={"rl_steps": 4, "opd_steps": 3},
                         metrics={"rollouts": False, "overlap_tokens": 1, "overlap_every": 5})
    with toy_trainer(config, tmp_path) as trainer:
        samples = spied(trainer)
        trainer.train_step(0, "rlvr")
        measured = [step for step in range(7) if trainer.agreement(step, samples)]
    assert measured == [0, 3, 5, 6]
