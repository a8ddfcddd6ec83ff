"""The FP8 benchmark: what it writes, that all forms hold the same weights, and what it says where a form cannot run."""
import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch

from copd_kernels.rowwise_fp8.reference import quantise_rows
from copd_megatron.config.model import AdapterConfig, ModelConfig
from copd_megatron.model.fp8 import is_fp8
from copd_megatron.parallel.layout import Layout
from copd_megatron.simulate.flops import UpdateShape
from copd_megatron.simulate.memory import backbone_bytes

TOOL = Path(__file__).resolve().parents[2] / "tools/bench_fp8.py"
SMALL = ["--layers", "2", "--hidden", "32", "--heads", "2", "--kv-heads", "1", "--head-dim", "32", "--ffn", "48",
         "--vocab", "61", "--rank", "3", "--threads", "1", "--repeats", "1", "--prefix", "12", "--completion", "4",
         "--group", "3"]


@pytest.fixture(scope="module")
def bench():
    spec = importlib.util.spec_from_file_location("bench_fp8", TOOL)
    module = sys.modules["bench_fp8"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    del sys.modules["bench_fp8"]


def group_of(bench, groups, form, dtype="float32"):
    spec = bench.spec_of(bench.parse(SMALL))
    return bench.Group(spec, UpdateShape(12, 4, group=3, experts=2), AdapterConfig(rank=3, scope="completion"), groups,
                       ModelConfig(path="-", dtype=dtype, fp8=form))


@pytest.mark.skipif(torch.cuda.is_available(), reason="the bytes are those of tensors, not of the allocator")
def test_rows_say_time_memory_and_error(bench, tmp_path, capsys):
    file = tmp_path / "fp8.json"
    assert bench.main([*SMALL, "--json", str(file)]) == 0
    plain, rows, *others = json.loads(file.read_text())["rows"]
    assert (plain["form"], rows["form"]) == ("none", "frozen_rowwise")
    spec = bench.spec_of(bench.parse(SMALL))
    for row in (plain, rows):
        planned = backbone_bytes(spec, Layout(), 0, "float32", row["form"])
        assert row["weights_bytes"] == sum(planned.values())
        assert min(row["score_s"], row["update_s"]) > 0
        assert min(row["score_peak_bytes"], row["update_peak_bytes"]) >= 0
        assert row["score_s_ratio"] == row["score_s"] / plain["score_s"]
    assert plain["logprob_error"] == plain["kl"] == 0 and plain["gradient_cosine"] == pytest.approx(1)
    assert 0 < rows["logprob_error"] < 0.2 and 0 < rows["kl"] < 0.05 and 0.9 < rows["gradient_cosine"] < 0.99999
    assert [row["form"] for row in others] == ["te_current", "te_blockwise"]
    assert all("without a CUDA device" in row["unavailable"] for row in others)
    assert "not available: model.fp8: te_current" in capsys.readouterr().out


def test_all_forms_hold_the_same_weights(bench, one_rank):
    groups = one_rank()
    plain, rows = (dict(group_of(bench, groups, form).backbone.named_parameters())
                   for form in ("none", "frozen_rowwise"))
    assert plain.keys() == rows.keys() and sum(map(is_fp8, rows.values())) == 2 * 4
    for name, weight in rows.items():
        expected = quantise_rows(plain[name])[0].float() if is_fp8(weight) else plain[name]
        assert torch.equal(weight.float(), expected), name


def test_errors_are_those_of_the_definitions(bench, one_rank):
    group = group_of(bench, one_rank(), "none")
    plain = bench.Outcome.of(group)
    own = bench.Outcome(plain.hidden * 1.1, plain.logprobs + 0.5, {n: g + 1 for n, g in plain.gradients.items()})
    found = bench.errors(group, plain, own)
    head = group.backbone.own_head.real_weight
    log_q, log_p = ((hidden @ head.T).log_softmax(1) for hidden in (plain.hidden, own.hidden))
    assert found["kl"] == pytest.approx(torch.nn.functional.kl_div(
        log_p, log_q, log_target=True, reduction="batchmean").item(), rel=1e-4)
    flat = torch.cat([g.flatten() for g in plain.gradients.values()]).double()
    assert found["gradient_cosine"] == pytest.approx(torch.cosine_similarity(flat, flat + 1, 0).item())
    assert found["logprob_error"] == pytest.approx(0.5)


def test_a_form_that_computes_something_else_is_an_error(bench, monkeypatch, capsys):
    right = bench.errors
    monkeypatch.setattr(bench, "errors", lambda group, plain, own: right(group, plain, bench.Outcome(
        own.hidden, own.logprobs, own.gradients if own is plain else {n: -g for n, g in own.gradients.items()})))
    assert bench.main([*SMALL, "--forms", "frozen_rowwise"]) == 1
    assert "frozen_rowwise: gradients have a cosine of -" in capsys.readouterr().err


def test_what_cannot_be_in_float64_is_a_row_that_says_so(bench, tmp_path):
    file = tmp_path / "fp8.json"
    assert bench.main([*SMALL, "--dtype", "float64", "--forms", "frozen_rowwise", "--json", str(file)]) == 0
    plain, rows = json.loads(file.read_text())["rows"]
    assert plain["form"] == "none" and plain["score_s"] > 0
    assert rows["form"] == "frozen_rowwise" and "model.dtype=float64" in rows["unavailable"]


def test_sizes_that_fp8_cannot_take_end_the_program(bench, capsys):
    assert bench.main([*SMALL, "--ffn", "40", "--forms", "frozen_rowwise"]) == 2
    assert "FP8 products need multiples of 16" in capsys.readouterr().err


@pytest.mark.parametrize("arguments, message", [
    (["--forms", "int4"], "invalid choice: 'int4'"), (["--recompute", "some"], "invalid choice: 'some'"),
    (["--experts", "0"], "--experts: 0; at least 1")])
def test_impossible_arguments_are_refused(bench, capsys, arguments, message):
    with pytest.raises(SystemExit) as stop:
        bench.main([*SMALL, *arguments])
    assert stop.value.code == 2 and message in capsys.readouterr().err
