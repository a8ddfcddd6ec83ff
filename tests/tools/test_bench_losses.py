"""The benchmark of the losses over the vocabulary: its sides agree, and it says why one did not run."""
import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch

from copd_megatron.simulate.hardware import BUILT_IN

TOOL = Path(__file__).resolve().parents[2] / "tools/bench_losses.py"
ONCE = ["--threads", "1", "--repeats", "1", "--hardware", "cpu"]
SMALL = ["--tokens", "96", "--hidden", "16", "--vocab", "4096", "--chunk-tokens", "8", *ONCE]


@pytest.fixture(scope="module")
def bench():
    spec = importlib.util.spec_from_file_location("bench_losses", TOOL)
    module = sys.modules["bench_losses"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    del sys.modules["bench_losses"]


@pytest.fixture
def here(bench, monkeypatch):
    """Sides run in this process."""
    monkeypatch.setattr(bench, "in_a_process", lambda work, *given: work(*given))
    return bench


def test_sides_agree_on_every_loss(here, tmp_path, capsys):
    file = tmp_path / "losses.json"
    assert here.main([*SMALL, "--loss", *here.LOSSES, "--json", str(file)]) == 0
    result = json.loads(file.read_text())
    assert [row["loss"] for row in result["rows"]] == list(here.LOSSES)
    for row in result["rows"]:
        assert row["materialised_value_difference"] < 1e-4 and row["materialised_gradient_difference"] < 1e-4
        assert row["chunked_s"] > 0 and row["materialised_s"] > 0
        products = 2 if row["loss"] == "logprob" else 3
        assert row["ideal_s"] == products * 2 * 96 * 16 * 4096 / BUILT_IN["cpu"].flops("float32")
    assert result["chunked_peak_bytes"] == result["rows"][0]["chunked_peak_bytes"]
    assert result["liger_s"] is None and result["liger_skipped"]
    printed = capsys.readouterr().out
    assert "skipped: " in printed and "of 3 products; chunked reaches" in printed
    assert "chunked and materialised: values and gradients differ by" in printed


def test_chunks_take_less_memory_than_kept_logits(bench, tmp_path):
    file = tmp_path / "losses.json"
    assert bench.main(["--tokens", "512", "--hidden", "16", "--vocab", "30000", "--chunk-tokens", "16", *ONCE,
                       "--loss", "jsd", "--json", str(file)]) == 0
    result = json.loads(file.read_text())
    logits = 4 * 512 * 30000
    if not torch.cuda.is_available():
        assert result["materialised_peak_bytes"] > 3 * logits
    assert result["chunked_peak_bytes"] < logits < result["materialised_peak_bytes"]


def test_too_little_memory_leaves_kept_logits_out(here, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(here, "free_bytes", lambda: 10**6)
    file = tmp_path / "losses.json"
    assert here.main([*SMALL, "--loss", "jsd", "--json", str(file)]) == 0
    assert json.loads(file.read_text())["materialised_s"] is None
    assert "skipped: needs up to 0.0 GB, 0.0 GB are free; fewer --tokens" in capsys.readouterr().out


def test_sides_that_differ_are_an_error(here, monkeypatch, capsys):
    right = here.SIDES["materialised"]
    monkeypatch.setitem(here.SIDES, "materialised", lambda *given: 1.01 * right(*given))
    assert here.main([*SMALL, "--loss", "jsd"]) == 1
    assert "values differ by 9.9e-03 of the largest; at most 1e-03" in capsys.readouterr().err


@pytest.mark.parametrize("arguments, message", [
    (["--tokens", "0"], "--tokens: 0; at least 1"), (["--vocab", "64"], "--vocab: 64; at least 65")])
def test_impossible_shapes_are_refused(bench, capsys, arguments, message):
    with pytest.raises(SystemExit) as stop:
        bench.main(arguments)
    assert stop.value.code == 2 and message in capsys.readouterr().err
