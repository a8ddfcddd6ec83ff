"""Ranks killed with SIGKILL at random moments, during saves too: the resumed run ends where the undisturbed did."""
import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch

TOOL = Path(__file__).resolve().parents[2] / "tools/kill_study.py"
RESULT = TOOL.parents[1] / "docs/results/kill.json"


@pytest.fixture(scope="module")
def study():
    spec = importlib.util.spec_from_file_location("kill_study", TOOL)
    module = sys.modules["kill_study"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    del sys.modules["kill_study"]


def test_three_kills_change_nothing(study):
    result = study.study(3, seed=1, layouts=["replicas"], steps=4)
    assert result["equal"] == result["killed"] == 3, result["trials"]


def test_one_bit_counts_as_a_difference(study):
    one = {"text": {"a": torch.tensor([1.0, -2.0])}}
    assert study.same_bits(one, {"text": {"a": torch.tensor([1.0, -2.0])}})
    for other in ({"text": {"a": torch.tensor([1.0, -2.0 * (1 + 2**-23)])}}, {"text": {}}, {}):
        assert not study.same_bits(one, other)


def test_the_full_count_was_run(study):
    result = json.loads(RESULT.read_text())
    assert result["equal"] == result["killed"] == len(result["trials"]) == 20
    assert {trial["layout"] for trial in result["trials"]} == set(study.LAYOUTS)
    assert {trial["rank"] for trial in result["trials"]} == {0, 1} and result["during_a_save"] >= 5
