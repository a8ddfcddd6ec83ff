"""Episodes with an environment, and grading: what the collector makes of what an engine samples."""
from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from copd_megatron.config.tasks import RewardConfig
from copd_megatron.model.prompt import PromptEncoder
from copd_megatron.parallel.collectives import all_gather_objects
from copd_megatron.rollout.collector import MAX_TURNS, Collector, sampling_params
from copd_megatron.rollout.engine import Request, SamplingParams
from copd_megatron.tasks.calculator import CalculatorTask
from copd_megatron.tasks.rewards import Scorer
from copd_megatron.types import Completion, Segment
from support.plain_model import PlainModel
from support.ranks import run_ranks
from support.tiny_models import tiny_model
from support.toy_run import adapters_of, randomise, toy_config, toy_trainer
from support.toy_tasks import LetterTask

REWARDS = {"accuracy": RewardConfig(weight=0.9), "format": RewardConfig(weight=0.1)}


class ScriptedEngine:
    """Says the next line of ``script`` in every turn and stops; what does not fit is cut."""

    def __init__(self, encoder: PromptEncoder, script: list[str]):
        self.encoder, self.script, self.calls = encoder, script, []

    def generate(self, requests, visual=None):
        self.calls.append(list(requests))
        return [[self._completion(request, request.sample_offset + i) for i in range(request.samples)]
                for request in requests]

    def _completion(self, request: Request, sample: int) -> Completion:
        turn = sum(segment.origin == "policy" for segment in request.prior)
        ids = [*self.encoder.tokenize(self.script[turn % len(self.script)]), self.encoder.stop_token_ids[0]]
        kept = ids[:request.params.max_tokens]
        new = Segment(kept, "policy", [-1.0] * len(kept), [-1.0] * len(kept))
        return Completion(request.prompt, request.expert, sample, [*request.prior, new],
                          "stop" if kept == ids else "length")


@pytest.fixture(scope="module")
def encoder():
    return PromptEncoder(tiny_model("qwen3"))


@pytest.fixture
def groups(one_rank):
    return one_rank("math")


def episode(encoder, groups, script, max_tokens=200, samples=1, task=None, graded=None):
    task = task or CalculatorTask()
    engine = ScriptedEngine(encoder, script)
    collector = Collector(engine, encoder, {"math": task}, {"math": Scorer(task, REWARDS)}, lambda prompts: None,
                          groups)
    item = task.item("train", 0)
    params = SamplingParams(max_tokens=max_tokens, stop_token_ids=encoder.stop_token_ids)
    request = Request(encoder.encode(item, "math"), "math", samples, params, (0,))
    return item, engine, collector.collect([request], graded)[0]


def test_the_calculator_answers_and_the_policy_goes_on(encoder, groups):
    task = CalculatorTask()
    item = task.item("train", 0)
    _, engine, (done,) = episode(encoder, groups, [f"calc: {item.extra['expression']}", f"answer: {item.answer}"])
    assert [segment.origin for segment in done.segments] == ["policy", "environment", "policy"]
    assert encoder.decode(done.segments[1].token_ids) == f"\n= {item.answer}\n"
    assert done.text == f"calc: {item.extra['expression']}\n= {item.answer}\nanswer: {item.answer}"
    assert (done.reward, done.reward_parts, done.extracted) == (1.0, {"accuracy": 1.0, "format": 1.0}, item.answer)
    assert (done.finish, done.sample) == ("stop", 0)
    # Its tokens carry no loss and have no log-prob.
    asked = len(done.segments[1].token_ids)
    first = len(done.segments[0].token_ids)
    assert done.loss_mask == [True] * first + [False] * asked + [True] * len(done.segments[2].token_ids)
    assert done.logprobs[first:first + asked] == [0.0] * asked
    again = engine.calls[1][0]
    assert again.prior == tuple(done.segments[:2])
    assert again.params.max_tokens == 200 - first - asked


def test_every_sample_has_an_episode_of_its_own(encoder, groups):
    _, engine, group = episode(encoder, groups, ["calc: 1+1", "answer: 2"], samples=3)
    assert [done.sample for done in group] == [0, 1, 2]
    assert [(r.samples, r.sample_offset) for r in engine.calls[1]] == [(1, 0), (1, 1), (1, 2)]


def test_an_episode_ends_after_the_environments_last_word(encoder, groups):
    _, engine, (done,) = episode(encoder, groups, ["calc: 2*3"], task=CalculatorTask(max_calls=3))
    assert [segment.origin for segment in done.segments] == ["policy", "environment"] * 3 + ["policy"]
    assert done.extracted is None and done.reward == 0


def test_an_episode_ends_after_so_many_turns(encoder, groups):
    _, engine, (done,) = episode(encoder, groups, ["calc: 2*3"], 10_000, task=CalculatorTask(max_calls=99))
    assert sum(segment.origin == "policy" for segment in done.segments) == MAX_TURNS == len(engine.calls)


def test_a_cut_answer_is_not_answered(encoder, groups):
    _, engine, (done,) = episode(encoder, groups, ["calc: 2*3"], max_tokens=5)
    assert (done.finish, len(done.segments), len(engine.calls)) == ("length", 1, 1)


def test_no_turn_begins_without_a_token_left(encoder, groups):
    first, reply = len(encoder.tokenize("calc: 2*3")) + 1, len(encoder.tokenize("\n= 6\n"))
    for spare, turns in ((0, 1), (1, 2)):
        _, engine, (done,) = episode(encoder, groups, ["calc: 2*3"], max_tokens=first + reply + spare)
        assert len(engine.calls) == turns
        assert len(done.token_ids) == (first if turns == 1 else first + reply + 1)


def test_only_the_first_groups_are_graded_where_it_is_said(encoder, groups):
    _, _, (done,) = episode(encoder, groups, ["answer: 7"], graded=0)
    assert (done.text, done.reward, done.reward_parts, done.extracted) == ("answer: 7", 0.0, {}, None)


class Chatty(LetterTask):
    """Answers the policy's first two turns, whatever they say."""

    def respond(self, item, turns):
        return f" {len(turns)} " if len(turns) < 4 else None


def chatty_step(config, folder):
    """One RLVR step whose episodes have several turns; half the vocabulary ends a turn."""
    with toy_trainer(config, folder) as trainer:
        randomise(trainer)
        stops = tuple(range(0, 256, 2))
        trainer.native.params = dataclasses.replace(trainer.native.params, stop_token_ids=stops)
        start = {n: f.clone() for n, f in adapters_of(trainer)["text"].items()}
        seen, update = [], trainer.learner.update
        trainer.learner.update = lambda samples, *training: (seen.extend(samples), update(samples, *training))[1]
        metrics = trainer.train_step(0, "rlvr")
        samples = [(s.completion, s.weights) for s in seen]
        after = adapters_of(trainer)
        tokens = [c.token_ids for part in all_gather_objects(samples, trainer.groups.world) for c, _ in part]
    return samples, metrics, start, after, tokens


def make_config(**sections):
    return toy_config("qwen3", ("text",), task=Chatty, rollout={"max_completion_tokens": 14, "group_size": 4},
                      metrics={"rollouts": False}, **sections)


@pytest.fixture(scope="module")
def one_step(tmp_path_factory):
    return chatty_step(make_config(), tmp_path_factory.mktemp("chatty"))


def test_log_probs_of_many_turns_are_those_of_the_whole_text(one_step):
    samples, metrics, start, _, _ = one_step
    model = PlainModel(tiny_model("qwen3"), scaling=2.0)
    turns = {sum(s.origin == "environment" for s in c.segments) for c, _ in samples}
    assert max(turns) == 2
    for completion, weights in samples:
        plain = model.logprobs(completion.prompt.token_ids.tolist(), completion.token_ids, start)
        want = plain.gather(1, torch.tensor(completion.token_ids)[:, None])[:, 0].numpy()
        mask = np.array(completion.loss_mask)
        np.testing.assert_allclose(np.array(completion.logprobs)[mask], want[mask], rtol=0, atol=1e-10)
        assert (weights[~mask] == 0).all() and (weights[mask] > 0).all()
        assert weights.sum() == pytest.approx(1 / len(samples))
    assert metrics["text/mismatch_kl"] == pytest.approx(0, abs=1e-18)
    assert metrics["text/grad_norm"] > 1e-3


def test_every_rank_hears_the_environment(one_step, tmp_path):
    samples, _, _, want, tokens = one_step
    for got in run_ranks(2, chatty_step, make_config(parallel={"pipeline": 2}), tmp_path):
        assert got[4][:len(tokens)] == got[4][len(tokens):] == tokens
        for name, factor in want["text"].items():
            torch.testing.assert_close(got[3]["text"][name], factor, rtol=0, atol=1e-8)


def test_training_samples_as_the_config_says(encoder):
    params = sampling_params(toy_config("qwen3", rollout={"temperature": 0.5}).rollout, encoder)
    assert params == SamplingParams(max_tokens=4, stop_token_ids=encoder.stop_token_ids, temperature=0.5)
