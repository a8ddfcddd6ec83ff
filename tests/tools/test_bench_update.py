"""The update benchmark: what it writes, that its three ways agree, and that it says so when they do not."""
import importlib.util
import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from copd_megatron.config.model import AdapterConfig, ModelConfig
from copd_megatron.model.spec import BackboneSpec, RopeSpec
from copd_megatron.simulate import flops as count

TOOL = Path(__file__).resolve().parents[2] / "tools/bench_update.py"
SMALL = ["--layers", "2", "--hidden", "32", "--heads", "2", "--kv-heads", "1", "--ffn", "48", "--vocab", "61",
         "--rank", "3", "--threads", "1", "--repeats", "1"]
SPEC = BackboneSpec(family="qwen3", num_layers=2, hidden_size=32, ffn_hidden_size=48, num_heads=2, num_kv_heads=1,
                    head_dim=16, vocab_size=61, norm_eps=1e-6, rope=RopeSpec(1e6), qk_norm=True, qkv_bias=False,
                    o_bias=False, mlp_bias=False, tied_head=False, deepstack_layers=0)
SHAPE = count.UpdateShape(12, 4, group=3, experts=2)


@pytest.fixture(scope="module")
def bench():
    spec = importlib.util.spec_from_file_location("bench_update", TOOL)
    module = sys.modules["bench_update"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    del sys.modules["bench_update"]


@pytest.mark.parametrize("scope, first_layer", [("sequence", 0), ("completion", 1)])
def test_writes_times_ratios_and_differences(bench, tmp_path, capsys, scope, first_layer):
    file = tmp_path / "result.json"
    assert bench.main([*SMALL, "--prefix", "12", "--completion", "4", "--group", "3", "--experts", "2", "--scope",
                       scope, "--first-layer", str(first_layer), "--json", str(file)]) == 0
    result = json.loads(file.read_text())
    adapter = AdapterConfig(rank=3, scope=scope, first_layer=first_layer)
    flops = {way: count.update_flops(way, SHAPE, SPEC, adapter).total for way in count.WAYS}
    assert ("kept_s" in result) == (first_layer > 0)
    if first_layer:
        below = count.PassStreams(count.pass_streams(SHAPE, adapter, 2, True).below, count.Stream(), count.Stream(), 0)
        saved = 2 * count.pass_flops(SPEC, adapter, below, backward=False).total  # of scoring and update
        assert result["kept_flops"] == pytest.approx(flops["shared"] - saved) and saved > 0.1 * flops["shared"]
        assert result["kept_ratio"] == result["naive_s"] / result["kept_s"] > 0
        assert result["kept_predicted_ratio"] > result["predicted_ratio"]
    assert result["predicted_ratio"] == pytest.approx(flops["naive"] / flops["shared"])
    assert result["ratio"] == result["naive_s"] / result["shared_s"] > 0
    assert result["per_expert_s"] > 0
    assert 0 <= result["max_logit_diff"] < 1e-4 < result["max_logit"]
    assert 0 <= result["max_grad_diff"] < 1e-4 < result["max_grad"]
    assert result["machine"]["torch"] == torch.__version__ and result["arguments"]["scope"] == scope
    printed = capsys.readouterr().out
    assert f"scope {scope}, first layer {first_layer}" in printed and "predicted" in printed


def test_what_the_backward_computes_again_is_counted(bench, tmp_path):
    file = tmp_path / "result.json"
    assert bench.main([*SMALL, "--prefix", "12", "--completion", "4", "--group", "3", "--experts", "2", "--recompute",
                       "full", "--json", str(file)]) == 0
    result, adapter = json.loads(file.read_text()), AdapterConfig(rank=3)
    lanes = count.pass_streams(SHAPE, adapter, 1, sharing=True)
    again = count.recomputed_flops(SPEC, adapter, lanes, "full").total
    assert result["shared_flops"] == count.update_flops("shared", SHAPE, SPEC, adapter).total + again
    assert again == count.pass_flops(SPEC, adapter, lanes, backward=False).total - 2 * 32 * 61 * 3 * 4  # no head


def test_sweep_covers_the_map(bench, tmp_path, capsys):
    file = tmp_path / "sweep.json"
    assert bench.main([*SMALL, "--sweep", "--scale", "256", "--group", "2", "--experts", "2",
                       "--json", str(file)]) == 0
    rows = json.loads(file.read_text())["rows"]
    assert {(r["scope"], r["first_layer"]) for r in rows} == {(s, f) for s in ("completion", "sequence")
                                                              for f in (0, 1)}
    assert {(r["prefix"], r["completion"]) for r in rows} >= {(64, 4), (16, 4), (4, 32)}
    assert "divided by 256" in capsys.readouterr().out


def test_splitting_naive_passes_changes_nothing(bench, one_rank):
    groups = one_rank()
    whole, split = (bench.Update(SPEC, SHAPE, AdapterConfig(rank=3), groups, ModelConfig(path="-", dtype="float64"),
                                   tokens).outcome("naive")
                    for tokens in (10_000, 1))
    torch.testing.assert_close(split.hidden, whole.hidden, rtol=0, atol=1e-12)
    for name, gradient in whole.gradients.items():
        torch.testing.assert_close(split.gradients[name], gradient, rtol=0, atol=1e-10)


@pytest.mark.parametrize("header", [3, 12])
@pytest.mark.parametrize("scope", ["sequence", "completion"])
def test_kept_states_are_those_of_the_layers_below(bench, one_rank, scope, header):
    """Also where the header is the whole prompt; with completions that are equal."""
    shape = replace(SHAPE, header=header, completion=2, group=40)
    update = bench.Update(replace(SPEC, vocab_size=5), shape, AdapterConfig(rank=3, scope=scope, first_layer=1),
                          one_rank(), ModelConfig(path="-", dtype="float64"), 10_000)
    computed, kept = update.outcome("shared"), update.outcome("kept")
    torch.testing.assert_close(kept.hidden, computed.hidden, rtol=0, atol=1e-12)
    for name, gradient in computed.gradients.items():
        torch.testing.assert_close(kept.gradients[name], gradient, rtol=0, atol=1e-10)
    below = []
    with update.backbone.layers[0].register_forward_hook(lambda *given: below.append(given)):
        update.run("kept")
    assert not below


@pytest.mark.parametrize("part", ["logits", "gradients"])
def test_a_way_that_computes_something_else_is_an_error(bench, one_rank, part):
    class Wrong(bench.Update):
        def outcome(self, way):
            right = super().outcome(way)
            if way != "shared":
                return right
            off = {name: g * 1.01 for name, g in right.gradients.items()}
            return replace(right, hidden=right.hidden * 1.01) if part == "logits" else replace(right, gradients=off)

    update = Wrong(SPEC, SHAPE, AdapterConfig(rank=3), one_rank(),
                   ModelConfig(path="-", dtype="float32"), 100)
    with pytest.raises(ArithmeticError, match=f"{part[:4]}.*differ by"):
        bench.compare(update, bench.TOLERANCE["float32"])


@pytest.mark.parametrize("arguments, message", [
    (["--prefix", "2"], "--header: 3; at most the prefix's 2"), (["--group", "0"], "--group: 0; at least 1"),
    (["--kv-heads", "3"], "--kv-heads: 3; a divisor of the 2 heads"),
    (["--first-layer", "2"], "--first-layer: 2; below the 2 --layers")])
def test_impossible_shapes_are_refused(bench, capsys, arguments, message):
    with pytest.raises(SystemExit) as stop:
        bench.main([*SMALL, *arguments])
    assert stop.value.code == 2 and message in capsys.readouterr().err
