"""``copd train --dry-run``: every kind of rank of a world that is not there, and what is missing before a run."""
from __future__ import annotations

from pathlib import Path

import pytest
from transformers import Qwen3MoeConfig

from copd_megatron.config.loading import apply_overrides, load_recipe
from copd_megatron.launch import cli
from copd_megatron.launch.dry_run import built_ranks, missing_inputs
from copd_megatron.launch.plan import job_of, layout_of, make_plan
from copd_megatron.model.hf_config import read_spec
from copd_megatron.simulate.hardware import load_hardware
from copd_megatron.simulate.memory import MOE_EXPERTS
from copd_megatron.types import UserError

pytestmark = pytest.mark.usefixtures("no_world")

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
LADDER = [("qwen3_text_experts.py", "qwen3-0.6b", 1, 256), ("qwen3_text_experts.py", "qwen3-1.7b", 1, 256),
          ("qwen3_vl_4b_one_node.py", "qwen3-vl-4b-instruct", 8, 2048),
          ("qwen3_vl_4b_copd.py", "qwen3-vl-4b-instruct", 32, 16384)]
"""Recipe, backbone, ranks, prompt tokens."""


def configured(recipe: str, backbone: str, *overrides: str):
    path = [f"model.path={EXAMPLES / 'configs' / backbone}"] if backbone else []
    return apply_overrides(load_recipe(EXAMPLES / recipe), [*path, *overrides])


@pytest.mark.parametrize("recipe, backbone, ranks, prompt", LADDER)
def test_the_ladders_recipes_fit_and_every_rank_holds_what_is_planned(recipe, backbone, ranks, prompt):
    config = configured(recipe, backbone)
    layout, placement = layout_of(config, ranks)
    plan = make_plan(job_of(config, prompt), layout, placement, load_hardware("h100"), "auto")
    assert plan.fits
    built = list(built_ranks(config, read_spec(config.model.path), layout, placement))
    assert sum(rank.ranks for rank in built) == ranks
    assert {e for rank in built for e in rank.experts} == set(config.experts)
    for rank in built:
        [planned] = {tuple(sorted(k.memory.always.items())) for k in plan.kinds if k.stage == rank.stage
                     and set(placement.experts_of(k.replica)) == set(rank.experts)}
        planned = dict(planned)
        assert rank.backbone_bytes == sum(planned.get(part, 0) for part in ("embedding", "layers", "head"))
        assert rank.adapter_bytes == planned["adapters"]


def test_stages_and_shards_of_a_layout(tmp_path):
    config = configured("qwen3_text_experts.py", "qwen3-0.6b", "parallel.tensor=2", "parallel.pipeline=2")
    layout, placement = layout_of(config, 8)
    built = list(built_ranks(config, read_spec(config.model.path), layout, placement))
    lower, upper = [range(14)], [range(14, 28)]
    assert [(b.stage, b.chunks, b.ranks, b.experts) for b in built] == [
        (0, lower, 2, ("maths", "science")), (1, upper, 2, ("maths", "science")), (0, lower, 2, ("facts",)),
        (1, upper, 2, ("facts",))]
    first, last = built[0].shapes, built[1].shapes
    assert first["embedding.weight"] == (75968, 1024) and "final_norm.weight" not in first
    assert first["layers.0.mlp.linear_fc1.weight"] == (3072, 1024), "gate and up, half of each"
    assert last["output_weight"] == (75968, 1024), "a tied head is a copy of its own on another stage"


def test_moe_experts_are_shared_out(tmp_path):
    """Sizes of Qwen3-30B-A3B, 4 of its 48 layers."""
    Qwen3MoeConfig(num_hidden_layers=4, head_dim=128).save_pretrained(tmp_path)
    config = configured("qwen3_text_experts.py", "", f"model.path={tmp_path}", "parallel.context=4",
                        "parallel.moe_expert=4", 'adapter.targets=["q_proj", "k_proj", "v_proj", "o_proj"]')
    layout, placement = layout_of(config, 4)
    [built] = built_ranks(config, read_spec(tmp_path), layout, placement)
    assert "layers.3.mlp.experts.local_experts.31.linear_fc2.weight" in built.shapes
    plan = make_plan(job_of(config, 256), layout, placement, load_hardware("h100"), "auto")
    assert plan.kinds[0].memory.always[MOE_EXPERTS] == 2 * 4 * 32 * 3 * 2048 * 768
    parts = ("embedding", "layers", MOE_EXPERTS, "head")
    assert built.backbone_bytes == sum(plan.kinds[0].memory.always[part] for part in parts)
    with pytest.raises(UserError, match="^adapter.targets: gate_proj, up_proj, down_proj; .*Mixtures of Experts"):
        job_of(configured("qwen3_text_experts.py", "", f"model.path={tmp_path}"), 256)


def test_what_is_missing_is_listed(capsys):
    assert cli.main(["train", str(EXAMPLES / "qwen3_text_experts.py"), "--dry-run", "--world-size", "2", "--set",
                     f"model.path={EXAMPLES / 'configs/qwen3-0.6b'}"]) == 0
    shown = capsys.readouterr().out
    assert "replicas2: every kind of rank was built" in shown
    missing = shown.split("not ready to train:\n")[1].splitlines()
    assert len(missing) == 5, "weights, tokenizer, three data files"
    assert "neither model.safetensors" in missing[0] and "science.jsonl was given; there is no such file" in shown


@pytest.mark.parametrize("ranks, tensor", [(1, 1), (4, 1), (4, 2)])
def test_a_run_that_could_start(ranks, tensor, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["train", str(EXAMPLES / "quickstart.py"), "--dry-run", "--world-size", str(ranks), "--set",
                     f"parallel.tensor={tensor}"]) == 0
    shown = capsys.readouterr().out
    assert f"replicas{ranks // tensor}: every kind of rank was built" in shown
    assert shown.rstrip().endswith("\nready to train")
    assert missing_inputs(configured("quickstart.py", "", 'exchange.frozen_teachers={"old": "nowhere"}')) != []
    assert list(tmp_path.iterdir()) == [], "nothing is written"


@pytest.mark.parametrize("arguments, message", [
    (["--dry-run", "--world-size", "6", "--set", "parallel.tensor=4"], "6"),
    (["--world-size", "6"], "--world-size: 6 without --dry-run"),
    (["--dry-run", "--set", "exchange.topology=star"], "exchange.topology"),
])
def test_mistakes_are_one_line(capsys, arguments, message):
    assert cli.main(["train", str(EXAMPLES / "quickstart.py"), *arguments]) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("copd: ") and message in error and "\n" not in error
