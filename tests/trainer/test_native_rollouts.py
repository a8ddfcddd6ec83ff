"""Students that learn from completions which other experts sampled for themselves (opd.rollouts=native), or that answer
their own prompts once more (opd.prompts=student)."""
import math

import pytest
import torch

from copd_megatron.trainer.batching import Microbatch
from support.plain_copd import PlainCopd
from support.plain_model import PlainModel
from support.ranks import run_ranks
from support.tiny_models import tiny_model
from support.toy_run import randomise, run_steps, toy_config, toy_trainer
from support.watched_step import one_step

EXPERTS = ("text", "image", "video")


def make_config(experts=EXPERTS, **sections):
    return toy_config("qwen3", experts, **{
        "exchange": {"topology": "full"}, "schedule": {"rl_steps": 0, "opd_steps": 1},
        "rollout": {"prompts_per_step": 4, "group_size": 2},
        "optimizer": {"lr": 0.03, "warmup_steps": 0, "microbatch_tokens": 300},
        "metrics": {"rollouts": False, "overlap_tokens": 1}, **sections})


@pytest.mark.parametrize("signal, whose", [("sampled", "teacher"), ("sampled", "both"), ("full", "teacher")])
def test_gradients_are_those_of_the_formulas(signal, whose, tmp_path):
    opd = {"rollouts": "native", "prompts": whose, "signal": signal, "importance_cap": 1.02, "beta": 0.7}
    config = make_config(EXPERTS[:2], opd=opd)
    metrics, samples, start, gradients = one_step(config, tmp_path / "run")
    assert {s.expert for s in samples if s.is_off_policy} == set(EXPERTS[:2])
    plain = _plain_with_equal_gradients(config, samples, start, gradients)
    reused = [s for s in samples if s.is_off_policy and s.expert == "text"]
    weights = torch.cat([plain._reuse(s, _own(plain, s), torch.tensor(s.completion.token_ids)) for s in reused])
    assert metrics["edge/image->text/reuse_weight"] == pytest.approx(float(weights.mean()), abs=1e-9)
    assert metrics["edge/image->text/reuse_clipped"] == pytest.approx(float((weights >= 1.02).double().mean()))
    assert 0 < metrics["edge/image->text/reuse_clipped"] < 1
    assert metrics["tokens/reused"] == sum(s.length for s in samples if s.edge)


def _plain_with_equal_gradients(config, samples, start, gradients):
    plain = PlainCopd(config, PlainModel(tiny_model("qwen3"), scaling=2.0), start, None)
    for expert, found in gradients.items():
        want = plain.gradient([s for s in samples if s.expert == expert], samples, start[expert])
        for name, gradient in found.items():
            torch.testing.assert_close(gradient, want[name], rtol=0, atol=1e-8, msg=f"{expert} {name}")
    return plain


def test_students_answer_their_own_prompts_anew(tmp_path):
    """Fresh completions of the prompts whose native ones earn the rewards."""
    config = make_config(EXPERTS[:2], opd={"prompts": "student", "beta": 0.7})
    _, samples, start, gradients = one_step(config, tmp_path / "run")
    assert gradients.keys() == set(EXPERTS[:2])
    _plain_with_equal_gradients(config, samples, start, gradients)
    native, crossing = ({e: [s.completion for s in samples if s.is_native == own and s.expert == e]
                         for e in EXPERTS[:2]} for own in (True, False))
    for expert in EXPERTS[:2]:
        assert len(native[expert]) == len(crossing[expert]) == 4 * 2
        assert {c.expert for c in crossing[expert]} == {expert}
        assert {c.prompt.key for c in crossing[expert]} == {c.prompt.key for c in native[expert]}
    answers = [[c.token_ids for e in EXPERTS[:2] for c in some[e]] for some in (native, crossing)]
    assert answers[0] != answers[1], "sampled anew"


def _own(plain, sample):
    """[R] log-probs of the student at the start of the step."""
    with torch.no_grad():
        return plain._logprobs(sample, plain.start[sample.expert]).gather(
            1, torch.tensor(sample.completion.token_ids)[:, None])[:, 0]


def test_completions_are_the_native_ones_and_nothing_is_decoded_for_students(tmp_path):
    config = make_config(opd={"rollouts": "native", "prompts": "both"})
    with toy_trainer(config, tmp_path) as trainer:
        randomise(trainer)
        samples, update = [], trainer.learner.update
        trainer.learner.update = lambda given, *training: (samples.extend(given), update(given, *training))[1]
        trainer.train_step(0, "opd")
        decoded = trainer.collector.engine.counters.decoded_tokens
    native = {(s.expert, s.completion.prompt.key, s.completion.sample): s for s in samples if s.is_native}
    assert decoded == sum(s.length for s in native.values())
    crossing = [s for s in samples if s.edge]
    assert len(crossing) == 3 * 4 * 2
    for sample in crossing:
        twin = native[sample.completion.expert, sample.completion.prompt.key, sample.completion.sample]
        assert sample.completion.segments == twin.completion.segments and sample.completion.text
        assert sample.completion.expert in (sample.edge.teacher, sample.edge.student)
        assert sample.completion.reward == 0.0
    assert {s.is_off_policy for s in crossing} == {True, False}


def test_one_rollout_is_scored_by_all_its_teachers_in_one_pass(tmp_path):
    """Two teachers and the backbone (KL) look at a student's own native completions: one evaluation of the prompt and
    one microbatch for each, whoever asks."""
    config = make_config(opd={"rollouts": "native", "prompts": "student", "cross_ratio": 2.0})
    with toy_trainer(config, tmp_path) as trainer:
        randomise(trainer)
        passes, score = [], trainer.runner.score
        trainer.runner.score = lambda batches, at_end: (passes.append(batches), score(batches, at_end))[1]
        metrics = trainer.train_step(0, "opd")
    batches: list[Microbatch] = passes[0]  # the second pass measures overlaps
    assert len(passes) == 2
    seen: dict[tuple, list] = {}
    for number, batch in enumerate(batches):
        for lane in batch.lanes:
            completion = lane.sample.completion
            key = lane.sample.expert, completion.prompt.key, tuple(completion.token_ids)
            seen.setdefault(key, []).append((number, lane.policy))
    assert len(seen) > 3 * 4
    for (student, _, _), lanes in seen.items():
        assert len({number for number, _ in lanes}) == 1, "one microbatch"
        assert {policy for _, policy in lanes} == {None, *EXPERTS} - {student}
    prompts = [group.prompt.content_hash for batch in batches for group in batch.groups]
    assert len(prompts) == len(set(prompts)) == 3 * 4
    assert not any(name.endswith("reuse_weight") for name in metrics), "a student's own completions are on-policy"


def test_without_edges_it_changes_nothing(tmp_path):
    one, other = (run_steps(make_config(EXPERTS[:2], exchange={"topology": "none"}, opd={"rollouts": rollouts}),
                            tmp_path / rollouts) for rollouts in ("fresh", "native"))
    assert one["tokens"] == other["tokens"] and "tokens/reused" not in other["metrics"][0]
    assert all(torch.equal(f, other["adapters"][e][n]) for e, own in one["adapters"].items() for n, f in own.items())


@pytest.mark.parametrize("ranks, parallel", [(4, {}), (4, {"pipeline": 2})], ids=str)
def test_several_replicas_train_as_one(ranks, parallel, tmp_path, alone):
    """Three experts on four replicas (one has two, which share its prompts) or on two (one hosts two)."""
    config = alone[0].model_copy(update={"parallel": make_config(parallel={**parallel, "debug_checks": True}).parallel})
    for got in run_ranks(ranks, run_steps, config, tmp_path, timeout_s=120):
        assert got["tokens"] == alone[1]["tokens"]
        for expert, factors in alone[1]["adapters"].items():
            for name, factor in factors.items():
                torch.testing.assert_close(got["adapters"][expert][name], factor, rtol=0, atol=1e-8)
        for name, value in alone[1]["metrics"][0].items():
            if name.startswith("edge/") or name == "tokens/reused":
                assert got["metrics"][0][name] == pytest.approx(value, rel=1e-6, abs=1e-9), name


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """A step of reuse on both experts' prompts, and what one rank makes of it."""
    config = make_config(opd={"rollouts": "native", "prompts": "both"},
                         rollout={"prompts_per_step": 5, "group_size": 2})
    result = run_ranks(1, run_steps, config, tmp_path_factory.mktemp("alone"))[0]
    assert sum(math.isfinite(v) for n, v in result["metrics"][0].items() if n.endswith("reuse_weight")) == 6
    return config, result
