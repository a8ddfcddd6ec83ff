"""The cost in the number of experts: exponents that the closed forms must have, and the files that are written."""
from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import pytest

from copd_megatron.exchange.answers import ROUND_BYTES
from copd_megatron.exchange.wire import LENGTH_BYTES
from support.ranks import run_ranks

TOOL = Path(__file__).resolve().parents[2] / "tools/expert_scaling.py"


@pytest.fixture(scope="module")
def tool():
    sys.path.insert(0, str(TOOL.parent))
    try:
        yield importlib.import_module(TOOL.stem)
    finally:
        sys.path.remove(str(TOOL.parent))
        for name in (TOOL.stem, "expert_step", "forked_ranks", "bench_backbone", "bench_record"):
            sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def result(tool, tmp_path_factory):
    out = tmp_path_factory.mktemp("scaling")
    assert tool.main(["--out", str(out), "--json", str(out / "scaling.json"), "--topologies", "full", "hub", "ring",
                      "no_such_graph"]) == 0
    assert {file.name for file in out.iterdir()} == {"scaling.json", "scaling.png", "scaling.svg"}
    return json.loads((out / "scaling.json").read_text())


def slope(result, topology, rule, cost, replicas="experts"):
    return next(f for f in result["exponents"]
                if (f["topology"], f["rule"], f["replicas"]) == (topology, rule, replicas))[cost]


def test_at_fixed_tokens_per_edge_full_grows_with_the_square_and_sparse_graphs_linearly(result):
    assert slope(result, "full", "per_edge", "scatter_bytes") == pytest.approx(2, abs=0.1)
    assert slope(result, "hub", "per_edge", "scatter_bytes") == pytest.approx(1, abs=0.1)
    assert slope(result, "ring", "per_edge", "scatter_bytes") == pytest.approx(1, abs=0.01)
    assert slope(result, "full", "per_edge", "step_flops") == pytest.approx(2, abs=0.25)


@pytest.mark.parametrize("topology", ["full", "ring"])
def test_at_fixed_tokens_per_student_all_grow_linearly(result, topology):
    assert slope(result, topology, "per_student", "scatter_bytes") == pytest.approx(1, abs=0.05)
    assert slope(result, topology, "per_student", "step_flops") == pytest.approx(1, abs=0.05)


def test_gathered_adapters_grow_linearly_for_every_rank_and_on_a_fixed_number_of_replicas(result):
    for rule in ("per_edge", "per_student"):
        assert slope(result, "full", rule, "gather_rank_bytes") == pytest.approx(1, abs=0.1)
        assert slope(result, "full", rule, "gather_bytes", "fixed") == pytest.approx(1, abs=0.01)
    rows = {(r["topology"], r["rule"]): r["gather_bytes"] for r in result["rows"]
            if r["replicas"] == "experts" and r["experts"] == 8}
    # A teacher goes to the replicas of its own students and to no other.
    assert rows["full", "per_edge"] == 7 * rows["ring", "per_student"]


def test_what_is_not_known_is_left_out_and_said(result):
    assert {row["topology"] for row in result["rows"]} == {"full", "hub", "ring"}
    assert len(result["left_out"]) == 5 and "no_such_graph" in result["left_out"][0]


def test_a_step_that_runs_moves_and_computes_what_is_counted(tool):
    """On ranks: bytes to the last one but for sizes and numbers of rounds, operations within a few percent."""
    options = tool.parse(["--topologies", "full", "ring", "--measure", "3", "--replicas", "2"])
    points = [(m.replicas, m) for m in tool.measurements(options, lambda *args: run_ranks(*args)[0])]
    assert len(points) == 2 * 2 * 2
    for replicas, m in points:
        ranks = 3 if replicas == "experts" else 2
        assert m.scatter_bytes - m.counted_scatter_bytes == ranks * (ranks - 1) * (LENGTH_BYTES + ROUND_BYTES)
        assert m.gather_bytes == m.counted_gather_bytes > 0
        assert m.score_flops == pytest.approx(m.counted_score_flops, rel=0.05)
        assert m.update_flops == pytest.approx(m.counted_update_flops, rel=0.05)
    spread = {(m.topology, m.rule): m for replicas, m in points if replicas == "experts"}
    assert spread["full", "per_edge"].gather_bytes == 2 * spread["ring", "per_edge"].gather_bytes
    assert spread["full", "per_edge"].update_flops > 1.4 * spread["ring", "per_edge"].update_flops
