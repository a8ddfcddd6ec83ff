"""Training steps of families and head counts that other tests leave out, on several ranks as on one (float64).

On replayed rollouts from images, videos and text an OPD step has the same gradients within 1e-9 and the same adapters
within 1e-8, with key/value heads that several tensor-parallel ranks have copies of, biases, and rotary positions that
count time.
"""
from __future__ import annotations

import functools

import pytest

from support.ranks import run_ranks
from support.replay import assert_same_step, one_step
from support.tiny_models import tiny_model
from support.toy_run import toy_config

STEP = 1
"""The OPD step; step 0 is RLVR."""

BIASED = {"attention_bias": True, "mlp_bias": True}
BACKBONES = {
    "qwen2_5_vl, one key/value head": ("qwen2_5_vl", {"num_key_value_heads": 1}),
    "llama, biases, one key/value head": ("llama", {"num_key_value_heads": 1, **BIASED}),
    "qwen2": ("qwen2", {}),
    "qwen3_moe, one key/value head": ("qwen3_moe", {"num_key_value_heads": 1, "mlp_only_layers": [1]}),
}
VISION, BIASES, QWEN2, MOE = BACKBONES

LAYOUTS = {  # world size -> (parallel section, backbone); Qwen2's two key/value heads are on two of four ranks each
    2: [({"tensor": 2}, VISION), ({"tensor": 2, "sequence_parallel": True}, VISION), ({"tensor": 2}, BIASES),
        ({"tensor": 2, "sequence_parallel": True, "moe_expert": 2}, MOE)],
    4: [({"tensor": 4, "sequence_parallel": True}, QWEN2), ({"tensor": 2, "context": 2}, VISION),
        ({"tensor": 2, "pipeline": 2, "sequence_parallel": True}, BIASES)],
}
CASES = [(world, number) for world, layouts in LAYOUTS.items() for number in range(len(layouts))]


def _config(backbone: str, parallel: dict):
    family, options = BACKBONES[backbone]
    path = tiny_model(family, num_hidden_layers=2, **options)
    return toy_config(family, model={"path": str(path), "dtype": "float64"},
                      rollout={"prompts_per_step": 2, "group_size": 2, "max_completion_tokens": 3},
                      evaluation={"prompts": 1, "final_prompts": 1}, metrics={"rollouts": False}, parallel=parallel)


@pytest.fixture(scope="module")
def truth(tmp_path_factory):
    """Backbone -> what one rank makes of it, with the rollouts it sampled."""
    folder = tmp_path_factory.mktemp("one_rank")
    configs = {backbone: _config(backbone, {}) for backbone in BACKBONES}
    return run_ranks(1, lambda: {b: one_step(c, folder, STEP) for b, c in configs.items()}, timeout_s=240)[0]


@pytest.fixture(scope="module")
def outcomes(truth, tmp_path_factory):
    """World size -> number of the layout -> what each rank found."""
    folder = tmp_path_factory.mktemp("many_ranks")

    def walk(runs):
        return [one_step(config, folder, STEP, recording) | {"recording": None} for config, recording in runs]

    @functools.cache
    def of_world(world):
        runs = [(_config(backbone, parallel), truth[backbone]["recording"]) for parallel, backbone in LAYOUTS[world]]
        return list(zip(*run_ranks(world, walk, runs, timeout_s=240)))

    return of_world


@pytest.mark.parametrize(("world", "number"), CASES, ids=lambda v: str(v))
def test_a_step_equals_one_rank(world, number, truth, outcomes):
    assert_same_step(outcomes(world)[number], truth[LAYOUTS[world][number][1]])


def test_the_step_moves_every_factor(truth):
    """Those of k and v too."""
    for backbone, result in truth.items():
        for expert, own in result["gradients"].items():
            assert all(float(g.abs().max()) > 1e-6 for g in own.values()), (backbone, expert)
            assert any(".k_proj." in name for name in own) and any(".v_proj." in name for name in own)
