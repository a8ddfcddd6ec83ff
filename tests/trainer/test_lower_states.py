"""Scoring and update begin where the rollout left off, at ``adapter.first_layer``: no expert learns otherwise, under
any layout."""
from __future__ import annotations

import pytest
import torch

from copd_megatron.model.hf_config import read_spec
from copd_megatron.model.shared_prefix import PackRules
from support.ranks import run_ranks
from support.replay import assert_same_step, gradients_of, one_step
from support.tiny_models import tiny_model
from support.toy_run import randomise, toy_config, toy_trainer

AMPLE = 1 << 24
STEP = 1
"""Of three OPD steps; this one does not measure agreement."""


def two_steps(config, folder):
    """(gradients of the second step, metrics of an RLVR and an OPD step, tokens, states held after each step) from
    random adapters."""
    with toy_trainer(config, folder) as trainer:
        randomise(trainer)
        metrics, samples, held, update = [], [], [], trainer.learner.update
        trainer.learner.update = lambda own, *rest: (samples.append(own), update(own, *rest))[1]
        states = trainer.runner.lower_states
        for step in range(2):
            metrics.append(trainer.train_step(step, trainer.schedule.phase(step)))
            held += [states.bytes, len(states.owners), len(states._states)]
        return gradients_of(trainer), metrics, samples, held


def kept_rows(samples, rules: PackRules, stored: bool) -> int:
    """Rows of the distinct prompts and completions."""
    answers = {(s.completion.prompt.content_hash, *s.completion.token_ids): s.completion for s in samples}
    prompts = {c.prompt.content_hash: c.prompt for c in answers.values()}
    own = sum(rules.forced(c.prompt) + len(c.token_ids) - 1 for c in answers.values())
    return own + (0 if stored else sum(len(p.token_ids) - rules.forced(p) for p in prompts.values()))


@pytest.mark.parametrize("scope, store, options", [
    ("sequence", 0, {}), ("sequence", AMPLE, {"recompute": "full"}), ("completion", 0, {}), ("completion", AMPLE, {})],
    ids=str)
def test_the_update_is_that_of_an_evaluation_from_the_lowest_layer(scope, store, options, tmp_path):
    """With images and videos, groups split over microbatches, two minibatches; with half the room and with enough."""
    results = {}
    for budget in (0, 12_000, AMPLE):
        config = toy_config(adapter={"rank": 3, "alpha": 6.0, "scope": scope, "first_layer": 2},
                            model={"dtype": "float64", **options}, metrics={"rollouts": False, "overlap_tokens": 20},
                            optimizer={"lr": 1e-2, "warmup_steps": 2, "microbatch_tokens": 80},
                            rlvr={"minibatches_per_rollout": 2},
                            rollout={"prompts_per_step": 2, "group_size": 3, "prefix_store_bytes": store,
                                     "lower_states_bytes": budget})
        results[budget] = two_steps(config, tmp_path / str(budget))
    gradients, metrics, samples, _ = results[0]
    assert not {"tokens/kept_share", "memory/lower_states_bytes"} & metrics[1].keys()
    assert max(float(g.abs().max()) for own in gradients.values() for g in own.values()) > 1e-4
    for budget in (12_000, AMPLE):
        got, numbers, _, held = results[budget]
        assert not any(held), "nothing outlives its step"
        for expert, factors in gradients.items():
            for name, factor in factors.items():
                torch.testing.assert_close(got[expert][name], factor, rtol=0, atol=1e-10, msg=f"{expert} {name}")
        for own, want in zip(numbers, metrics):
            for name, value in want.items():
                if name.split("/")[0] not in ("time", "memory", "tokens", "prefix") and "/idle/" not in name:
                    assert own[name] == pytest.approx(value, rel=1e-8, abs=1e-10), name
            assert own["tokens/update"] == want["tokens/update"], "the upper layers see what they saw"
    rules = PackRules(scope, 2)
    for numbers, own in zip(results[AMPLE][1], samples):
        assert numbers["tokens/kept_share"] == 1
        rows = kept_rows(own, rules, store > 0 and scope == "completion")
        assert numbers["memory/lower_states_bytes"] == rows * read_spec(config.model.path).hidden_size * 8
    for numbers in results[12_000][1]:
        assert 0 < numbers["tokens/kept_share"] < 1 and numbers["memory/lower_states_bytes"] <= 12_000


COMPLETION = {"scope": "completion"}
LAYOUTS = {  # ranks -> (parallel section, sections, share of what is kept, or None: some of it)
    2: [({"tensor": 2}, {}, 1), ({"tensor": 2, "sequence_parallel": True}, {"adapter": COMPLETION}, 1),
        ({"pipeline": 2}, {}, 1), ({"pipeline": 2}, {"adapter": {"first_layer": 3}, "rlvr": {"epochs": 2}}, 1),
        ({"pipeline": 2}, {"adapter": COMPLETION, "rollout": {"prefix_store_bytes": AMPLE}}, 1),
        ({"context": 2}, {}, 1),
        ({"context": 2}, {"adapter": COMPLETION, "rollout": {"lower_states_bytes": 6_000}}, None),
        ({"context": 2, "moe_expert": 2}, {"family": "qwen3_moe"}, 1),
        ({}, {}, None), ({}, {"opd": {"rollouts": "native"}, "exchange": {"transport": "scatter"}}, None)],
    3: [({"pipeline": 3, "virtual_pipeline": 2}, {"adapter": {"first_layer": 3}}, 1)],
    4: [({"tensor": 2, "context": 2, "sequence_parallel": True}, {"rollout": {"lower_states_bytes": 6_000}}, None),
        ({"pipeline": 2, "context": 2}, {"adapter": COMPLETION}, 1)],
}
CASES = [(world, number) for world, layouts in LAYOUTS.items() for number in range(len(layouts))]


def layout_config(parallel, sections, kept=True):
    """An OPD step of three experts; seven layers, so that of two or more stages the first holds none above."""
    sections = dict(sections)
    family = sections.pop("family", "qwen3")
    merged = {"model": {"path": str(tiny_model(family, num_hidden_layers=7)), "dtype": "float64"},
              "adapter": {"rank": 3, "alpha": 6.0, "first_layer": 4, "targets": ("q_proj", "o_proj")},
              "optimizer": {"lr": 1e-2, "warmup_steps": 2, "microbatch_tokens": 60},
              "rollout": {"prompts_per_step": 2, "group_size": 2, "max_completion_tokens": 3,
                          "lower_states_bytes": AMPLE},
              "schedule": {"cycles": 1, "rl_steps": 0, "opd_steps": 3}, "metrics": {"rollouts": False},
              "exchange": {"topology": "ring"}}
    for name, section in sections.items():
        merged[name] = {**merged.get(name, {}), **section}
    if not kept:
        merged["rollout"]["lower_states_bytes"] = 0
    return toy_config("qwen3", **merged, parallel=parallel)


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """World size -> per layout what each rank found, and what one rank finds that keeps nothing."""
    folder, found = tmp_path_factory.mktemp("layouts"), {}

    def walk(configs):
        return [one_step(config, folder, STEP) | {"recording": None} for config in configs]

    def of_world(world):
        if world not in found:
            layouts = LAYOUTS[world]
            want = run_ranks(1, walk, [layout_config({}, sections, kept=False) for _, sections, _ in layouts],
                             timeout_s=240)[0]
            ranks = run_ranks(world, walk, [layout_config(*layout[:2]) for layout in layouts], timeout_s=280)
            found[world] = want, list(zip(*ranks))
        return found[world]

    return of_world


@pytest.mark.parametrize(("world", "number"), CASES, ids=str)
def test_every_layout_trains_what_one_rank_trains_that_keeps_nothing(world, number, outcomes):
    """Tokens are sampled freely, and are the same."""
    want, ranks = outcomes(world)
    assert_same_step(ranks[number], want[number])
    share, wanted = ranks[number][0]["metrics"]["tokens/kept_share"], LAYOUTS[world][number][2]
    assert "tokens/kept_share" not in want[number]["metrics"]
    assert share == wanted if wanted else 0 < share < 1


def test_evaluations_keep_nothing(tmp_path):
    config = toy_config("qwen3", ("text",), adapter={"rank": 3, "first_layer": 1},
                        rollout={"prompts_per_step": 1, "group_size": 2, "lower_states_bytes": AMPLE})
    with toy_trainer(config, tmp_path) as trainer:
        states, seen = trainer.runner.lower_states, []
        keep = states.keep
        states.keep = lambda key, *rest: (keep(key, *rest), seen.append(states.bytes))
        trainer.milestones.evaluator.evaluate(["text"], ["text"], 2)
        assert not any(seen) and not states.owners
        trainer.train_step(0, "rlvr")
        assert max(seen) > 0
