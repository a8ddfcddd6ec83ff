"""The cost in the number of experts: exponents that the closed forms must have, and the files that are written."""
from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest

TOOL = Path(__file__).resolve().parents[2] / "tools/expert_scaling.py"


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    spec = importlib.util.spec_from_file_location("expert_scaling", TOOL)
    module = sys.modules["expert_scaling"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    out = tmp_path_factory.mktemp("scaling")
    assert module.main(["--out", str(out), "--json", str(out / "scaling.json"), "--topologies", "full", "hub", "ring",
                        "no_such_graph"]) == 0
    del sys.modules["expert_scaling"]
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
