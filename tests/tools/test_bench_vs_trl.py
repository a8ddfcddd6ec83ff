"""The benchmark against TRL: both sides compute the same gradients; what is missing is one line."""
import importlib.util
import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from copd_megatron.model.translate import check_backbone
from support.tiny_models import tiny_model

TOOL = Path(__file__).resolve().parents[2] / "tools/bench_vs_trl.py"
SMALL = ["--prompt-tokens", "24", "--completion-tokens", "6", "--group", "4", "--rank", "4", "--threads", "1",
         "--repeats", "1"]


@pytest.fixture(scope="module")
def bench():
    spec = importlib.util.spec_from_file_location("bench_vs_trl", TOOL)
    module = sys.modules["bench_vs_trl"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    del sys.modules["bench_vs_trl"]


@pytest.fixture(scope="module")
def model():
    return str(tiny_model("llama", tie_word_embeddings=True))


@pytest.fixture
def here(bench, monkeypatch):
    """Sides run in this process."""
    monkeypatch.setattr(bench, "in_a_process", lambda work, *given, limit_s: work(*given))
    return bench


def test_our_side_runs_alone_and_groups_pass_one_by_one(here, model, tmp_path, capsys):
    file = tmp_path / "result.json"
    assert here.main([model, *SMALL, "--ours-only", "--json", str(file)]) == 0
    result = json.loads(file.read_text())
    assert [row["row"] for row in result["rows"]] == list(here.ROWS)
    assert result["ours_s"] > 0 and "trl_s" not in result
    assert all(result[f"{row}_predicted"] > 1 for row in here.ROWS)
    out = capsys.readouterr().out
    assert "sequence ours: update 3 of 3" in out and "2048: 1.0" in out


def test_predictions_by_hand(bench, model):
    """Where the feed-forward, or the head, is all that counts, the ratio is one of tokens."""
    spec = replace(check_backbone(model), vocab_size=1, ffn_hidden_size=10**6)
    options = bench.parse(["-", "--prompt-tokens", "1200", "--completion-tokens", "300", "--group", "4", "--rank", "1"])
    naive = 4 * 1499
    shared, leaves, trunk = 1199 + 4 * 300, 4 * 302, 1197
    found = {row: bench.predicted_ratio(spec, options, row, 3) for row in bench.ROWS}
    assert found["sequence"] == pytest.approx(naive / shared, rel=0.01)
    assert found["opd"] == pytest.approx(found["sequence"], rel=0.02)
    assert found["completion"] == pytest.approx(2 * naive / (2 * leaves + trunk), rel=0.05)
    wide = replace(spec, vocab_size=10**9)
    assert (bench.predicted_ratio(wide, options, "sequence", 3, whole_head=True)
            == pytest.approx(1499 / 300, rel=0.02))
    assert bench.predicted_ratio(wide, options, "sequence", 3) == pytest.approx(1, rel=0.1)


@pytest.mark.skipif(importlib.util.find_spec("trl") is None, reason="trl is not installed (extra [bench])")
def test_both_sides_have_the_same_gradients(here, model, tmp_path):
    file = tmp_path / "result.json"
    assert here.main([model, *SMALL, "--json", str(file)]) == 0
    result = json.loads(file.read_text())
    assert all(row["gradient_difference"] < 1e-4 for row in result["rows"])
    assert {"sequence_ratio", "sequence_predicted", "completion_ratio", "memory_ratio", "opd_ratio",
            "opd_memory_ratio", "ours_s", "trl_s"} <= result.keys()


def test_other_gradients_are_an_error(bench):
    mine, theirs = (bench.Outcome({"a": np.full(3, value, np.float32)}, 1.0, 1) for value in (1.0, 1.01))
    assert bench.compare(mine, mine, 1e-3) == 0
    with pytest.raises(ArithmeticError, match="gradients differ by 9.9e-03 of the largest"):
        bench.compare(mine, theirs, 1e-3)
    with pytest.raises(ArithmeticError, match="one side only"):
        bench.compare(mine, bench.Outcome({"b": mine.gradients["a"]}, 1.0, 1), 1e-3)


@pytest.mark.parametrize("arguments, message", [
    (["--group", "1"], "--group: 1; at least 2"), (["--rank", "0"], "--rank: 0; at least 1")])
def test_impossible_shapes_are_refused(bench, model, capsys, arguments, message):
    with pytest.raises(SystemExit) as stop:
        bench.main([model, *arguments])
    assert stop.value.code == 2 and message in capsys.readouterr().err


def test_a_backbone_that_is_not_there_is_one_line(bench, tmp_path, capsys):
    assert bench.main([str(tmp_path / "none"), "--ours-only"]) == 2
    assert capsys.readouterr().err.startswith(f"error: model: {tmp_path}/none/config.json does not exist")


def test_a_prompt_shorter_than_its_header_is_one_line(bench, model, capsys):
    assert bench.main([model, "--ours-only", "--prompt-tokens", "1"]) == 2
    assert "--prompt-tokens: 1; more than the header's" in capsys.readouterr().err
