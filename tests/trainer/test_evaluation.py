"""Evaluations of a run: what is asked, how it is counted, and what stays in the run folder."""
import json
import math

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from copd_megatron.config.run import RESERVED_NAMES
from copd_megatron.metrics.accuracy import wilson
from copd_megatron.metrics.names import RESERVED
from copd_megatron.rollout.engine import Request
from copd_megatron.trainer.evaluate import evaluate_run
from copd_megatron.trainer.evaluator import BASE, Answers, effective_count, paired_bootstrap
from copd_megatron.trainer.merge import MERGED
from copd_megatron.trainer.scoring import REFERENCE
from copd_megatron.types import BACKBONE
from support.toy_run import randomise, toy_config, toy_trainer
from support.toy_tasks import LetterTask

POLICIES = ["base", "text", "image", "merged"]


class Binary(LetterTask):
    """Right if more than a third of the characters fit."""

    def verify(self, item, completion):
        parts = super().verify(item, completion)
        return {**parts, "accuracy": float(parts["accuracy"] > 0.33)}


def make_config(**sections):
    return toy_config("qwen3", ("text", "image"), **{
        "schedule": {"rl_steps": 1, "opd_steps": 1}, "metrics": {"rollouts": False, "overlap_tokens": 1}, **sections})


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A whole run with an evaluation after each step; the requests that evaluations made of the backbone."""
    folder, asked = tmp_path_factory.mktemp("finished"), []
    config = make_config(evaluation={"every": 1, "prompts": 2, "final_prompts": 3}, checkpoint={"every": 1})
    with toy_trainer(config, folder) as trainer:
        generate = trainer.collector.engine.generate

        def remember(requests, visual=None):
            asked.extend(r.prompt.key for r in requests if r.expert is None)
            return generate(requests, visual)

        trainer.collector.engine.generate = remember
        trainer.run()
    return config, folder, asked


def lines(folder, name):
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


def test_evaluations_happen_when_they_are_due(finished):
    config, folder, asked = finished
    tables = lines(folder, "evaluations.jsonl")
    assert [(t["step"], t["mode"], t["samples"]) for t in tables] == [(0, "greedy", 1), (1, "greedy", 1),
                                                                     (2, "greedy", 1)]
    for table, prompts in zip(tables, (2, 2, 3)):
        assert list(table["policies"]) == POLICIES
        for policy, domains in table["policies"].items():
            assert list(domains) == ["text", "image"]
            for row in domains.values():
                assert row["n"] == prompts
                assert 0 <= row["low"] <= row["avg"] <= row["high"] <= 1
                assert ("gain" in row) == (policy != "base")
    # Before the first update every policy is the backbone.
    first = tables[0]["policies"]
    assert all(row["gain"] == row["gain_low"] == row["gain_high"] == 0
               for policy in POLICIES[1:] for row in first[policy].values())
    # The backbone never changes, so each number of prompts is asked once: 2 domains x (2 + 3).
    assert len(asked) == 10 and len(set(asked)) == 6


def test_summary_says_what_the_documentation_promises(finished):
    config, folder, _ = finished
    summary = json.loads((folder / "summary.json").read_text())
    assert list(summary) == ["policies", "held_out", "train_s", "seed"]
    last = lines(folder, "evaluations.jsonl")[-1]["policies"]
    assert summary["policies"] == {p: {d: row["avg"] for d, row in by.items()} for p, by in last.items()}
    assert summary["held_out"] == {"text": 3, "image": 3}
    assert summary["seed"] == 0 and 0 < summary["train_s"] < 3600
    by_prompt = json.loads((folder / "held_out.json").read_text())
    for policy, domains in summary["policies"].items():
        for domain, average in domains.items():
            assert len(by_prompt[policy][domain]) == 3
            assert np.mean(by_prompt[policy][domain]) == pytest.approx(average)


def test_the_best_merged_policy_is_kept(finished):
    config, folder, _ = finished
    means = [np.mean([row["avg"] for row in t["policies"]["merged"].values()])
             for t in lines(folder, "evaluations.jsonl")[1:]]
    best = 1 + int(np.argmax(means))
    kept = load_file(folder / "best" / "adapter_model.safetensors")
    saved = load_file(folder / "checkpoints" / f"step_{best:06d}" / "adapters" / "merged" / "adapter_model.safetensors")
    assert kept.keys() == saved.keys()
    assert all(torch.equal(kept[name], saved[name]) for name in kept)


def test_the_run_ends_with_a_merged_model_and_a_report(finished):
    config, folder, _ = finished
    merged = load_file(folder / "merged" / "model.safetensors")
    before = load_file(f"{config.model.path}/model.safetensors")
    assert merged.keys() == before.keys()
    changed = {name for name in merged if not torch.equal(merged[name], before[name])}
    assert changed == {name for name in before if "_proj." in name}
    assert (folder / "report.html").stat().st_size > 10_000


def test_scope_completion_writes_no_merged_model_and_keep_best_can_be_off(tmp_path):
    config = toy_config("qwen3", ("text",), adapter={"scope": "completion"}, schedule={"rl_steps": 1, "opd_steps": 0},
                        metrics={"rollouts": False}, evaluation={"keep_best": False, "final_prompts": 1})
    with toy_trainer(config, tmp_path) as trainer:
        trainer.run()
    assert not (tmp_path / "merged").exists() and not (tmp_path / "best").exists()
    assert (tmp_path / "checkpoints" / "step_000001" / "adapters" / "merged").is_dir()
    assert (tmp_path / "summary.json").exists()


def test_a_saved_run_is_evaluated_again(finished):
    config, folder, _ = finished
    result = evaluate_run(config, folder)
    assert result["step"] == 2
    last = lines(folder, "evaluations.jsonl")[-1]
    assert {key: last[key] for key in ("step", "mode", "samples", "policies")} == result


def test_a_recipe_is_evaluated_as_its_backbone(finished):
    config, folder, _ = finished
    result = evaluate_run(config, None)
    assert result["policies"] == {"base": lines(folder, "evaluations.jsonl")[-1]["policies"]["base"]}


def test_average_and_pass_at_k_count_the_very_answers(tmp_path):
    config = make_config(task=Binary, evaluation={"greedy": False, "samples": 3, "prompts": 6})
    with toy_trainer(config, tmp_path) as trainer:
        randomise(trainer)
        evaluator = trainer.milestones.evaluator
        table = evaluator.evaluate([None, "image"], ["text"], 6)
        right = {policy: [] for policy in (None, "image")}
        for prompt in trainer.native.source.held_out("text", 6):
            for policy, scores in right.items():  # one request at a time, in another order
                noise = trainer.collector.collect([Request(prompt, policy, 3, evaluator.params,
                                                           _noise_of_evaluations())])
                scores.append([c.reward_parts["accuracy"] for c in noise[0]])
    for policy, scores in right.items():
        answers = table[policy or BASE]["text"]
        assert answers.correct == scores
        row = answers.row()
        assert row["avg"] == pytest.approx(np.mean(scores))
        assert row["pass"] == pytest.approx(np.mean([max(s) for s in scores]))
        assert 0 < row["avg"] < row["pass"] < 1.01
        assert row["n"] == 6


def _noise_of_evaluations():
    from copd_megatron.parallel.seeding import stable_hash
    return (stable_hash("held_out"),)


def test_intervals_of_one_answer_per_prompt_are_wilsons():
    answers = Answers([[1.0], [0.0], [1.0], [1.0]], [1.0] * 4, [2, 4, 6, 8])
    row = answers.row()
    assert (row["low"], row["high"]) == pytest.approx(wilson(0.75, 4))
    assert (row["avg"], row["pass"], row["n"], row["length"]) == (0.75, 0.75, 4, 5.0)


def test_answers_of_one_prompt_count_as_much_as_they_differ():
    rng = np.random.default_rng(0)
    copies = np.repeat(rng.random((500, 1)) < 0.4, 8, 1).astype(float)
    independent = (rng.random((500, 8)) < 0.4).astype(float)
    assert effective_count(copies) == pytest.approx(500)
    assert effective_count(independent) == pytest.approx(4000, rel=0.15)
    assert effective_count(np.ones((5, 3))) == 5  # nothing is known about the spread


def test_paired_bootstrap():
    rng = np.random.default_rng(1)
    before = (rng.random(2000) < 0.5).astype(float)
    after = np.maximum(before, rng.random(2000) < 0.1)
    mean, low, high = paired_bootstrap(after, before)
    assert mean == pytest.approx((after - before).mean())
    half = 1.96 * (after - before).std() / math.sqrt(2000)
    assert (low, high) == (pytest.approx(mean - half, abs=half / 5), pytest.approx(mean + half, abs=half / 5))
    assert paired_bootstrap(before, before) == (0, 0, 0)


def test_experts_may_not_be_called_like_other_policies_and_metrics():
    assert RESERVED_NAMES == RESERVED | {BASE, MERGED, REFERENCE, BACKBONE}
