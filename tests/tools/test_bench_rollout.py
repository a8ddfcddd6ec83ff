"""The sampling benchmark: what it writes, that reuse saves prompt tokens and changes no answer, what it refuses."""
import importlib.util
import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from copd_megatron.simulate.hardware import BUILT_IN

TOOL = Path(__file__).resolve().parents[2] / "tools/bench_rollout.py"
SMALL = ["--layers", "2", "--hidden", "32", "--heads", "2", "--kv-heads", "1", "--ffn", "48", "--vocab", "61",
         "--rank", "3", "--threads", "1", "--repeats", "1", "--prefix", "12", "--completion", "5", "--group", "2"]
ASKED = {"engine", "scope", "experts", "batch", "tokens_per_s", "prompt_tokens_computed", "sync_s"}
TRUNK, HEADER, LAST = 12 - 3, 3, 1
"""Prompt tokens outside the header, those of it, and the one that scope sequence feeds to every lane."""


@pytest.fixture(scope="module")
def bench():
    spec = importlib.util.spec_from_file_location("bench_rollout", TOOL)
    module = sys.modules["bench_rollout"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    del sys.modules["bench_rollout"]


@pytest.fixture(scope="module")
def result(bench, tmp_path_factory):
    file = tmp_path_factory.mktemp("new") / "folder/rollout.json"
    cases = ["--experts", "1", "3", "--batch", "2", "4"]
    assert bench.main([*SMALL, *cases, "--hardware", "cpu", "--json", str(file)]) == 0
    assert [path.name for path in file.parent.iterdir()] == [file.name]
    return json.loads(file.read_text())


def test_every_way_has_a_row_with_the_same_tokens(bench, result):
    rows = result["rows"]
    assert [(r["scope"], r["experts"], r["batch"], r["way"]) for r in rows] == [
        (scope, experts, batch, way) for scope in bench.SCOPES for experts in (1, 3) for batch in (2, 4)
        for way in bench.WAYS[scope]]
    for row in rows:
        assert set(row) >= ASKED and row["engine"] == "embedded"
        assert row["same_tokens"] == 1.0
        assert row["tokens_per_s"] == pytest.approx(row["experts"] * row["batch"] * 5 / row["seconds"])
        assert row["reached"] == pytest.approx(row["tokens_per_s"] / row["ideal_tokens_per_s"])
        assert min(row["sync_s"], row["cpu_s"]) > 0 and row["decode_bound"] in ("memory", "compute")
    assert result["machine"]["peaks"]["flops"] == BUILT_IN["cpu"].peak_flops["float32"]
    assert result["arguments"]["batch"] == [2, 4]


def test_prompt_tokens_are_computed_once_for_all_experts_or_found(result):
    for row in result["rows"]:
        prompts, lanes, completion = row["batch"] // 2, row["experts"] * row["batch"], row["scope"] == "completion"
        once = prompts * (TRUNK if completion else 12 - LAST)
        share = {"per_expert": row["experts"], "store_seen": 0}.get(row["way"], 1 if completion else row["experts"])
        assert row["prefix_tokens_computed"] == share * once
        assert row["prompt_tokens_computed"] == share * once + lanes * (HEADER if completion else LAST)
        kv = prompts * TRUNK * 2 * 2 * 16 * 4  # layers, K and V, head dim, bytes
        assert row["store_bytes"] == (kv if row["way"].startswith("store") else 0)


def test_the_ideal_counts_weights_once_per_step_and_call(bench, one_rank):
    """So one call for three experts is nearly three times as fast where memory bounds it and weights are most of it."""
    options = bench.parse([*SMALL, "--hidden", "256", "--prefix", "4", "--batch", "2"])
    starved = replace(BUILT_IN["cpu"], memory_bandwidth=1.0)
    rollout = bench.Rollout(bench.AdapterConfig(rank=3, scope="completion"), one_rank(), starved, options)
    alone, together = (rollout._ideal(bench.Case(3, 2), rollout.experts[:n], found=True) for n in (1, 3))
    assert alone[1] == together[1] == "memory"
    weights = sum(p.numel() * 4 for name, p in rollout.backbone.named_parameters()
                  if "embedding" not in name and "bank" not in name)
    assert 5 * weights < alone[0] < 1.2 * 5 * weights  # seconds at a byte per second, five steps
    assert alone[0] < together[0] < 1.5 * alone[0]
    rollout.hardware = replace(starved, memory_bandwidth=1e30)
    assert rollout._ideal(bench.Case(3, 2), rollout.experts[:1], found=True)[1] == "compute"


def test_answers_may_part_between_equal_tokens_only(bench, one_rank):
    options = bench.parse([*SMALL, "--batch", "2", "--scope", "completion"])
    rollout = bench.Rollout(bench.AdapterConfig(rank=3, scope="completion"), one_rank(), BUILT_IN["cpu"], options)
    case = bench.Case(3, 2)
    engine = bench.Embedded(rollout.backbone, rollout.groups, 6, 12)
    right = rollout._run(case, engine, "shared").completions
    assert len({tuple(c.token_ids) for c in right}) == 3  # the samples of an expert are alike, experts are not

    def changed(position: int, logprob: float):
        segment = right[0].segments[0]
        ids, logprobs = list(segment.token_ids), list(segment.logprobs)
        ids[position], logprobs[position] = (ids[position] + 1) % 61, logprobs[position] + logprob
        return [replace(right[0], segments=[replace(segment, token_ids=ids, logprobs=logprobs)]), *right[1:]]

    assert bench.compare(right, right, 1e-9) == 1.0
    assert bench.compare(right, changed(2, 0.0), 1e-9) == 5 / 6
    with pytest.raises(ArithmeticError, match="expert0 on prompt0, sample 0, differ by 1.00e-02"):
        bench.compare(right, changed(2, 0.01), 1e-3)


def test_a_machine_is_measured_and_wrong_answers_end_the_program(bench, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(sys.modules["bench_backbone"], "CALIBRATE_S", 0.01)
    monkeypatch.setattr(bench, "TOLERANCE", {"float32": -1.0})
    file = tmp_path / "rollout.json"
    assert bench.main([*SMALL, "--batch", "2", "--json", str(file)]) == 1
    printed = capsys.readouterr()
    assert "differ by" in printed.err and "1/2: scope completion" in printed.err and "cpu-measured" in printed.out
    assert not file.exists()


@pytest.mark.parametrize("arguments, message", [
    (["--batch", "2", "3"], "--batch: 3; a multiple of the 2 completions"),
    (["--batch", "0"], "--batch: 0; at least 1"),
    (["--header", "12"], "--header: 12; less than the prefix's 12"),
    (["--kv-heads", "3"], "--kv-heads: 3; a divisor of the 2 heads"),
    (["--hidden", "30"], "--hidden: 30; a multiple of 2 x the 2 heads"),
    (["--first-layer", "2"], "--first-layer: 2; below the 2 --layers"),
    (["--json", "/"], "--json: / is a folder")])
def test_impossible_arguments_are_refused(bench, capsys, arguments, message):
    with pytest.raises(SystemExit) as stop:
        bench.main([*SMALL, *arguments])
    assert stop.value.code == 2 and message in capsys.readouterr().err


def test_what_the_package_refuses_is_one_line(bench, capsys):
    assert bench.main([*SMALL, "--batch", "2", "--hardware", "h10"]) == 2
    assert "--hardware: 'h10' is neither built in nor a file" in capsys.readouterr().err
