"""The scoring benchmark: what it writes and predicts, that one pass is every expert's own, and what it refuses."""
import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch

from copd_megatron.config.model import AdapterConfig, ModelConfig
from copd_megatron.model.spec import BackboneSpec, RopeSpec
from copd_megatron.simulate.flops import UpdateShape, pass_flops, pass_streams
from copd_megatron.simulate.hardware import BUILT_IN

TOOL = Path(__file__).resolve().parents[2] / "tools/bench_scoring.py"
SMALL = ["--layers", "2", "--hidden", "32", "--heads", "2", "--kv-heads", "1", "--head-dim", "32", "--ffn", "48",
         "--vocab", "61", "--rank", "3", "--threads", "1", "--repeats", "1", "--prefix", "12", "--completion", "4",
         "--group", "3", "--hardware", "cpu"]
SPEC = BackboneSpec(family="qwen3", num_layers=2, hidden_size=32, ffn_hidden_size=48, num_heads=2, num_kv_heads=1,
                    head_dim=32, vocab_size=61, norm_eps=1e-6, rope=RopeSpec(1e6), qk_norm=True, qkv_bias=False,
                    o_bias=False, mlp_bias=False, tied_head=False, deepstack_layers=0)
SHAPE = UpdateShape(12, 4, group=3, experts=3)


@pytest.fixture(scope="module")
def bench():
    spec = importlib.util.spec_from_file_location("bench_scoring", TOOL)
    module = sys.modules["bench_scoring"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    del sys.modules["bench_scoring"]


def test_a_row_for_each_first_layer_with_the_predicted_ratio(bench, tmp_path, capsys):
    file = tmp_path / "scoring.json"
    assert bench.main([*SMALL, "--json", str(file)]) == 0
    result = json.loads(file.read_text())
    assert [row["first_layer"] for row in result["rows"]] == [0, 1]
    rate = result["machine"]["matrix_flops"]
    assert rate == BUILT_IN["cpu"].flops("float32")
    for row in result["rows"]:
        adapter = AdapterConfig(rank=3, scope="completion", first_layer=row["first_layer"])
        flops = [pass_flops(SPEC, adapter, pass_streams(SHAPE, adapter, experts, sharing=True), backward=False).total
                 for experts in (1, 3)]
        assert [row["one_flops"], row["all_flops"]] == flops
        assert row["predicted_ratio"] == pytest.approx(flops[1] / flops[0])
        assert row["ratio"] == row["all_s"] / row["one_s"] > 0
        assert row["over_prediction"] == pytest.approx(row["ratio"] / row["predicted_ratio"])
        assert row["all_share"] == pytest.approx(flops[1] / row["all_s"] / rate)
        assert row["one_peak_bytes"] >= 0 and row["all_peak_bytes"] >= 0
        assert 0 <= row["mean_logprob_diff"] <= row["max_logprob_diff"] < 1e-4 < row["mean_expert_diff"]
    assert "measured / predicted" in capsys.readouterr().out


def test_shared_passes_say_what_naive_ones_do(bench, one_rank):
    group = bench.Group(SPEC, SHAPE, AdapterConfig(rank=3, scope="completion", first_layer=1), one_rank(),
                        ModelConfig(path="-", dtype="float64"))
    hidden, scores = group.score(group.experts, bench.TOPK)
    with torch.no_grad():
        naive = torch.cat([group.evaluate([lane], sharing=False)[0] for lane in group.lanes(group.experts)])
    torch.testing.assert_close(hidden, naive, rtol=0, atol=1e-12)
    assert scores.topk_ids_TK.shape == (3 * 3 * 4, 61)  # 64 of a vocabulary of 61
    logprobs = (naive @ group.backbone.own_head.real_weight.T).log_softmax(1)
    targets = torch.tensor([token for lane in group.lanes(group.experts) for token in lane.token_ids])
    torch.testing.assert_close(scores.logprobs_T, logprobs.gather(1, targets[:, None])[:, 0], rtol=0, atol=1e-12)


def test_experts_that_are_mixed_up_are_an_error(bench, one_rank):
    class Mixed(bench.Group):
        def score(self, experts, topk):
            return super().score([*experts[1:], *experts[:1]], topk)

    groups, adapter = one_rank(), AdapterConfig(rank=3, scope="completion")
    group = Mixed(SPEC, SHAPE, adapter, groups, ModelConfig(path="-", dtype="float32"))
    with pytest.raises(ArithmeticError, match="log-probs of one pass differ from an expert's own by"):
        bench.compare(group)


@pytest.mark.parametrize("arguments, message", [
    (["--experts", "1"], "--experts: 1; at least 2"), (["--header", "13"], "--header: 13; at most the prefix's 12"),
    (["--first-layer", "0", "2"], "--first-layer: 2; below the 2 --layers"),
    (["--head-dim", "3"], "--head-dim: 3; even, at least 2"), (["--attention", "fast"], "invalid choice: 'fast'")])
def test_impossible_arguments_are_refused(bench, capsys, arguments, message):
    with pytest.raises(SystemExit) as stop:
        bench.main([*SMALL, *arguments])
    assert stop.value.code == 2 and message in capsys.readouterr().err
