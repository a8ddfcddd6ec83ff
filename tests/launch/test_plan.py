"""``copd plan`` and ``copd calibrate`` as a user meets them."""
from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

import pytest

from copd_megatron.launch import cli
from copd_megatron.launch.calibrate import measure, summary
from copd_megatron.launch.plan import size_text
from copd_megatron.parallel.layout import Layout
from copd_megatron.parallel.placement import Placement
from copd_megatron.simulate.hardware import BUILT_IN, load_hardware
from copd_megatron.simulate.ranks import members_text, rank_table
from support.ranks import run_ranks

ROOT = Path(__file__).resolve().parents[2]
QUICKSTART = str(ROOT / "examples/quickstart.py")
BACKBONE = {
    "architectures": ["Qwen3VLForConditionalGeneration"], "model_type": "qwen3_vl", "image_token_id": 151655,
    "video_token_id": 151656, "vision_start_token_id": 151652, "vision_end_token_id": 151653,
    "tie_word_embeddings": True,
    "text_config": {"model_type": "qwen3_vl_text", "hidden_size": 2560, "intermediate_size": 9728,
                    "num_hidden_layers": 36, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
                    "vocab_size": 151936, "hidden_act": "silu", "rms_norm_eps": 1e-6, "attention_bias": False,
                    "tie_word_embeddings": True,
                    "rope_parameters": {"rope_type": "default", "rope_theta": 5e6, "mrope_interleaved": True,
                                        "mrope_section": [24, 20, 20]}},
    "vision_config": {"model_type": "qwen3_vl_vision", "depth": 24, "hidden_size": 1024, "intermediate_size": 4096,
                      "num_heads": 16, "patch_size": 16, "spatial_merge_size": 2, "temporal_patch_size": 2,
                      "out_hidden_size": 2560, "num_position_embeddings": 2304,
                      "deepstack_visual_indexes": [5, 11, 17]},
}
RECIPE = """
from copd_megatron.config.run import RunConfig

def recipe():
    return RunConfig(model={"path": "backbone"}, opd={"signal": "topk"}, parallel={"tensor": 4, "pipeline": 2},
                     experts={name: {"task": "no_such_module:Task"} for name in ("text", "image", "video")})
"""


@pytest.fixture
def big_recipe(tmp_path, monkeypatch) -> str:
    """A recipe on a config.json of Qwen3-VL-4B's shape: no weights, no tokenizer, tasks that do not exist."""
    (tmp_path / "backbone").mkdir()
    (tmp_path / "backbone/config.json").write_text(json.dumps(BACKBONE))
    file = tmp_path / "plan_recipe.py"
    file.write_text(RECIPE)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield str(file)
    sys.modules.pop("plan_recipe", None)


@pytest.fixture(autouse=True)
def own_environment(monkeypatch):
    monkeypatch.setattr(os, "environ", dict(os.environ))


def test_4096_ranks_are_planned_from_a_config_alone(big_recipe, tmp_path, capsys):
    file, start = tmp_path / "plan.json", time.perf_counter()
    code = cli.main(["plan", big_recipe, "--world-size", "4096", "--hardware", "h100", "--prompt-tokens", "1000",
                     "--layout", "--json", str(file)])
    assert time.perf_counter() - start < 5
    assert code == 0
    out = capsys.readouterr().out
    assert "4096 ranks of h100: TP 4 x PP 2 x CP 1 x 512 replicas; 3 experts, 4 edges" in out
    assert "layers by stage: 0-17; 18-35" in out
    assert "fits: the fullest rank needs" in out
    plan = json.loads(file.read_text())
    assert len(plan["ranks"]) == 4096
    assert plan["fits"] and plan["transport"]
    always = [{k["stage"]: k["always"] for k in plan["memory"]}[stage] for stage in (0, 1)]
    weights = sum(always[0][part] + always[1][part] for part in ("layers", "head")) * 4
    assert weights == pytest.approx(2 * 4.02e9, rel=0.02)  # parameters in bfloat16, the tied table counted once


def test_quickstart_is_planned_with_its_own_prompts(capsys):
    assert cli.main(["plan", QUICKSTART, "--world-size", "3", "--hardware", "cpu", "--layout"]) == 0
    out = capsys.readouterr().out
    for line in ("memory per rank", "vision tower", "scatter/topk", "gather_adapters", "seconds (estimate)",
                 "assumptions", "adapter groups"):
        assert line in out


def test_what_does_not_fit_is_said_and_searched(big_recipe, capsys):
    common = ["plan", big_recipe, "--prompt-tokens", "100", "--set", "parallel.tensor=1", "parallel.pipeline=1"]
    assert cli.main([*common, "--world-size", "1", "--hardware", "cpu"]) == 1
    assert "does NOT fit: the fullest rank needs" in capsys.readouterr().out
    assert cli.main([*common, "--world-size", "4", "--hardware", "h100", "--search"]) == 0
    out = capsys.readouterr().out
    assert "fit h100; the fastest by estimated seconds of a step" in out


@pytest.mark.parametrize(("arguments", "message"), [
    (["--world-size", "12"], "parallel.tensor, parallel.pipeline"),
    (["--world-size", "8", "--hardware", "h10"], "--hardware: 'h10' is neither built in nor a file"),
    (["--world-size", "8", "--set", "parallel.tensor=3", "parallel.pipeline=1"], "parallel.tensor"),
    (["--world-size", "8", "--completion-tokens", "5000", "--prompt-tokens", "9"], "--completion-tokens: 5000"),
    (["--world-size", "8", "--prompt-tokens", "9", "--set", "exchange.topology=rong"], "exchange.topology: 'rong'"),
])
def test_mistakes_are_one_line(big_recipe, arguments, message, capsys):
    assert cli.main(["plan", big_recipe, *arguments]) == 2
    out, err = capsys.readouterr()
    assert err.startswith(f"copd: {message}") and err.count("\n") == 1


def test_few_ranks_have_a_row_each_and_many_are_folded():
    layout = Layout(tp=2, pp=2, replicas=3)
    placement = Placement.build(("text", "image"), 3)
    header, rows = rank_table(layout, placement, full=True)
    assert len(rows) == 12 and all(len(row) == len(header) for row in rows)
    assert rows[9] == ["9", "1", "1", "0", "1", "text", "8,9", "3,9", "7,9,11", "7,9"]
    _, folded = rank_table(layout, placement, full=False)
    assert [row[:6] for row in folded] == [
        ["0-3", "0-1", "0", "0", "0-1", "text"], ["4-5", "2", "0", "0", "0-1", "image"],
        ["6-9", "0-1", "1", "0", "0-1", "text"], ["10-11", "2", "1", "0", "0-1", "image"]]


@pytest.mark.parametrize(("ranks", "text"), [([3], "3"), ([3, 4], "3,4"), ([0, 1, 2], "0-2"), ([0, 8, 16], "0,8,16"),
                                             ([0, 8, 16, 24], "0,8,..,24"), ([0, 8, 9, 10], "0,8,9,10")])
def test_members_take_few_characters(ranks, text):
    assert members_text(ranks) == text


@pytest.mark.parametrize(("size", "text"), [(0, "0"), (512, "512 B"), (1234567, "1.23 MB"), (81.2e9, "81.2 GB")])
def test_sizes_are_readable(size, text):
    assert size_text(size) == text


def test_calibrate_writes_what_plan_reads(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("copd_megatron.launch.calibrate.SECONDS", 0.01)
    file = tmp_path / "hardware.json"
    assert cli.main(["calibrate", "--out", str(file)]) == 0
    assert f"written: {file}" in capsys.readouterr().out
    assert [p.name for p in tmp_path.iterdir()] == ["hardware.json"]
    hardware = load_hardware(str(file))
    assert all(1e8 < hardware.flops(dtype) < 1e16 for dtype in ("float32", "float64"))
    assert 1e7 < hardware.memory_bandwidth < 1e14
    assert "not measured" in hardware.notes["intra_node collectives"]
    assert hardware.intra_node_bandwidth == BUILT_IN["cpu"].intra_node_bandwidth


def test_calibrate_measures_collectives_where_there_are_ranks():
    first, second = run_ranks(2, lambda: measure(0.01))
    assert first == second
    assert first.ranks_per_node == 2
    assert "measured over 2 ranks, gloo" in first.notes["intra_node collectives"]
    assert 0 < first.intra_node_latency_s < 1
    assert 1e5 < first.intra_node_bandwidth < 1e13
    assert "2 ranks per node" in summary(first)
