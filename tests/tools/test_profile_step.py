"""The profile of a step: phases add up, operations are what torch counts, keys are stable, bad input is refused."""
import importlib.util
import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from copd_megatron.metrics.names import TIMED_PHASES
from copd_megatron.simulate.flops import Flops
from support.toy_run import toy_config, toy_trainer

TOOLS = Path(__file__).resolve().parents[2] / "tools"
RECIPE = """from support.toy_run import toy_config

def recipe():
    return toy_config(adapter={"scope": "completion"})
"""
RATES = {"flops", "flops_per_s", "mfu"}


@pytest.fixture(scope="module")
def tool():
    sys.path.insert(0, str(TOOLS))
    spec = importlib.util.spec_from_file_location("profile_step", TOOLS / "profile_step.py")
    module = sys.modules["profile_step"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    sys.path.remove(str(TOOLS))
    del sys.modules["profile_step"]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    file = tmp_path_factory.mktemp("profile") / "toy.py"
    file.write_text(RECIPE)
    return file


def test_phases_add_up_and_every_number_has_its_key(tool, recipe, capsys):
    out, trace = recipe.with_name("profile.json"), recipe.with_name("trace.json")
    assert tool.main([str(recipe), "--set", "rollout.prompts_per_step=2", "--hardware", "h100", "--top", "6",
                      "--json", str(out), "--trace", str(trace)]) == 0
    result, printed = json.loads(out.read_text()), capsys.readouterr().out
    assert result["peak_flops"] == 67e12 and result["dtype"] == "float64" and result["ranks"] == 1
    assert list(result["steps"]) == ["rlvr", "opd"]
    for kind, step in result["steps"].items():
        phases = step["phases"]
        assert list(phases) == [*TIMED_PHASES, "other"]
        assert step["step_s"] == pytest.approx(sum(row["seconds"] for row in phases.values()))
        assert sum(row["share"] for row in phases.values()) == pytest.approx(1)
        assert step["flops"] == pytest.approx(sum(row["flops"] for row in phases.values()))
        assert step["mfu"] == pytest.approx(step["flops"] / step["step_s"] / 67e12)
        assert all(row.keys() == {"seconds", "share", *RATES} for row in phases.values())
        assert {p for p in phases if phases[p]["flops"]} == {"rollout", "score", "update"}
        assert all(phases[p]["seconds"] > 0 for p in ("rollout", "verify", "score", "update", "optimizer"))
        assert len(step["operators"]) == 6
        for row in step["operators"]:
            assert row.keys() == {"name", "calls", "self_s", "share", "phases"} and row["calls"] > 0
            assert row["self_s"] == pytest.approx(sum(row["phases"].values()))
        assert f"{kind} step: " in printed
    assert result["steps"]["opd"]["flops"] > result["steps"]["rlvr"]["flops"]
    names = {event.get("name") for event in json.loads(trace.read_text())["traceEvents"]}
    assert names >= {"step/rlvr", "step/opd", "phase/rollout", "phase/optimizer", "aten::mm"}
    assert not list(recipe.parent.glob("*.tmp"))


@pytest.mark.parametrize("sections", [
    {"adapter": {"first_layer": 1}},
    {"adapter": {"scope": "completion"}, "rollout": {"prefix_store_bytes": 10**9}},
    {"adapter": {"scope": "completion"}, "rollout": {"prefix_store_bytes": 1}},
    {"adapter": {"first_layer": 2}, "rollout": {"lower_states_bytes": 10**9}},
    {"adapter": {"first_layer": 2}, "rollout": {"lower_states_bytes": 20_000}},
    {"adapter": {"first_layer": 3, "scope": "completion"},
     "rollout": {"lower_states_bytes": 10**9, "prefix_store_bytes": 10**9}},
])
def test_operations_are_those_of_the_matrix_products_that_ran(tool, tmp_path, sections):
    # The step also measures the agreement of experts, with one product of the head for each of them.
    config = toy_config("qwen3", experts=("text", "image"), **sections, schedule={"rl_steps": 3})
    wanted = config.rollout.prompts_per_step * config.rollout.group_size * config.rollout.max_completion_tokens
    with toy_trainer(config, tmp_path) as trainer:
        work = tool.StepWork(trainer)
        with FlopCounterMode(display=False) as counter:
            metrics = trainer.train_step(1, "rlvr")
        counted = work.collect()
        # A lane that ends early would be fed on beside the others, which nobody needs.
        assert metrics["tokens/step"] == 2 * wanted
        assert work.collect() == {}
    assert counted.keys() == {"rollout", "score", "update"}
    total = sum(counted.values(), Flops())
    ran = counter.get_flop_counts()["Global"]
    kinds = (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.bmm)  # attention is an operator of its own
    products = sum(n for op, n in ran.items() if op in kinds)
    assert products == pytest.approx(total.linears + total.adapters + total.head, rel=1e-12)
    if "lower_states_bytes" in sections.get("rollout", {}):
        assert 0.2 < metrics["tokens/kept_share"] <= 1


def test_layers_below_what_was_kept_compute_nothing(tool, tmp_path):
    """With first_layer at half depth scoring and update each lose the forward of two layers of four, by count and by
    what torch dispatched; the rollout loses nothing."""
    counted, products = {}, {}
    for budget in (0, 10**9):
        config = toy_config("qwen3", experts=("text", "image"), adapter={"first_layer": 2},
                            rollout={"lower_states_bytes": budget}, metrics={"overlap_every": 2})
        with toy_trainer(config, tmp_path / str(budget)) as trainer:
            work = tool.StepWork(trainer)
            with FlopCounterMode(display=False) as counter:
                trainer.train_step(1, "rlvr")
            counted[budget], products[budget] = work.collect(), counter.get_flop_counts()["Global"]
            spec = trainer.runner.backbone.spec
    computed, kept = counted.values()
    assert spec.num_layers == 4 and kept["rollout"] == computed["rollout"]
    saved = [computed[phase] + kept[phase] * -1 for phase in ("score", "update")]
    assert all(one.adapters == one.head == 0 < one.linears for one in saved)
    assert saved[0].linears > 0.35 * computed["score"].linears
    mm = [ran[torch.ops.aten.mm] for ran in products.values()]
    assert mm[0] - mm[1] == pytest.approx(saved[0].linears + saved[1].linears, rel=1e-9)


def test_on_a_gpu_kernels_stand_under_the_phase_that_launched_them(tool, monkeypatch):
    """Also those that no operator launches (Triton's), which the profiler hangs on the innermost range."""
    def event(name, start, end, *kernels, device=tool.DeviceType.CPU):
        return SimpleNamespace(name=name, device_type=device, time_range=SimpleNamespace(start=start, end=end),
                               kernels=[SimpleNamespace(name=n, duration=d) for n, d in kernels])

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    found = tool.by_operator([
        event("aten::mm", -5, -4, ("gemm", 1000)), event("step/opd", 0, 100, ("step/opd", 100)),
        event("phase/score", 10, 40, ("grouped_lora", 3), ("phase/score", 30)), event("aten::mm", 12, 13, ("gemm", 5)),
        event("phase/exchange", 20, 30), event("aten::cat", 21, 22, ("copy", 2)),
        event("aten::mm", 33, 34, ("gemm", 4)), event("aten::mm", 50, 51, ("gemm", 7)),
        event("gemm", 60, 99, device=tool.DeviceType.CUDA)], ["rlvr", "opd"])
    assert found["rlvr"] == {}
    assert {name: (own.calls, dict(own.seconds)) for name, own in found["opd"].items()} == {
        "grouped_lora": (1, {"score": pytest.approx(3e-6)}), "copy": (1, {"exchange": pytest.approx(2e-6)}),
        "gemm": (3, {"score": pytest.approx(9e-6), "other": pytest.approx(7e-6)})}


def test_the_innermost_range_counts(tool):
    ranges = tool._Ranges([(0, 10, "a"), (2, 5, "b"), (5, 6, "c"), (20, 30, "a")])
    assert [ranges.at(t) for t in (-1, 0, 2, 4.9, 5, 6, 10, 19, 20, 31)] == [
        None, "a", "b", "b", "c", "a", None, None, "a", None]


@pytest.mark.parametrize("arguments, message", [
    (["--hardware", "h10"], "--hardware: 'h10' is neither built in nor a file; .*did you mean h100"),
    (["--set", "rollout.prompt_per_step=2"], "rollout.prompt_per_step.*prompts_per_step"),
    (["--steps", "0"], "--steps: 0; at least 1"),
    (["--trace", "/"], "--trace: / is a folder; a file to write"),
])
def test_bad_input_is_one_line(tool, recipe, capsys, arguments, message):
    try:
        code = tool.main([str(recipe), *arguments])
    except SystemExit as stop:
        code = stop.code
    assert code == 2
    assert re.search(message, capsys.readouterr().err)


def test_what_is_neither_recipe_nor_run_is_refused(tool, tmp_path, capsys):
    assert tool.main([str(tmp_path)]) == 2 and "holds no run" in capsys.readouterr().err
    assert tool.main([str(tmp_path / "no.py")]) == 2 and "no.py" in capsys.readouterr().err
