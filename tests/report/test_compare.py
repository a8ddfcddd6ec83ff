"""Runs side by side: differences with intervals, config differences, labels, the page."""
import re
from pathlib import Path

import pytest

from copd_megatron.metrics.accuracy import Cell
from copd_megatron.report.compare import accuracy_rows, compare_runs, run_labels
from copd_megatron.types import UserError
from support.fake_run import fake_run


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    top = tmp_path_factory.mktemp("runs")
    fake_run(top / "with_opd", cycles=2, rl_steps=3, opd_steps=2, evaluate_every=5)
    fake_run(top / "without", cycles=2, rl_steps=5, opd_steps=0, evaluate_every=5, seed=1, lr=1e-3)
    return [top / "with_opd", top / "without"]


def test_text_has_runs_accuracies_and_config_differences(runs):
    text = compare_runs(runs)
    assert re.search(r"with_opd\s+finished\s+10\s+7m12s\s+0", text)
    assert re.search(r"merged\s+text\s+\d\d\.\d\s+\d\d\.\d \([+-]\d+\.\d ± \d\.\d\)", text)
    assert re.search(r"optimizer\.lr\s+0\.002\s+0\.001", text)
    assert re.search(r"schedule\.opd_steps\s+2\s+0", text)
    assert "rollout.group_size" not in text
    assert max(map(len, text.splitlines())) <= 110


def test_page_is_written_and_self_contained(runs, tmp_path):
    compare_runs(runs, tmp_path / "compare.html")
    page = (tmp_path / "compare.html").read_text()
    assert not re.search(r"https?:|@import", page)
    assert page.count("<svg") == 5 and "Median pairwise overlap" in page and "optimizer.lr" in page
    assert [p.name for p in tmp_path.iterdir()] == ["compare.html"]


def test_equal_configs_are_said(runs):
    assert "The configs are equal." in compare_runs([runs[0], runs[0]])


def test_differences_and_their_intervals():
    a = {"base": {"text": Cell(0.5, 0.47, 0.53), "image": Cell(0.4)}}
    b = {"base": {"text": Cell(0.6, 0.56, 0.64), "image": Cell(0.3)}, "merged": {"text": Cell(0.9)}}
    rows = {(r.policy, r.domain): r for r in accuracy_rows([a, b])}
    gain, half = rows["base", "text"].differences[1]
    assert gain == pytest.approx(0.1) and half == pytest.approx(0.05)        # hypot(0.03, 0.04)
    assert rows["base", "image"].differences[1] == (pytest.approx(-0.1), None)
    assert rows["base", "mean"].values == (pytest.approx(0.45), pytest.approx(0.45))
    assert rows["merged", "text"].values == (None, 0.9) and rows["merged", "text"].differences == (None, None)
    assert ("merged", "mean") not in rows


def test_labels_are_as_short_as_they_can_be():
    assert run_labels([Path("/x/a"), Path("/x/b")]) == ["a", "b"]
    assert run_labels([Path("/x/1/run"), Path("/x/2/run")]) == ["1/run", "2/run"]
    assert run_labels([Path("/x/run"), Path("/x/run")]) == ["1: run", "2: run"]


def test_narrow_terminals_drop_the_intervals(runs):
    text = compare_runs([*runs, *runs], width=84)
    assert "±" not in text.replace("± 95 %", "")
    assert max(map(len, text.splitlines())) <= 90


def test_a_run_without_evaluation_still_compares(runs, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    assert re.search(r"base\s+text\s+\d\d\.\d\s+-", compare_runs([runs[0], tmp_path]))
    assert "no evaluation yet" in compare_runs([tmp_path, tmp_path])


def test_wrong_arguments(runs, tmp_path):
    with pytest.raises(UserError, match="at least two"):
        compare_runs(runs[:1])
    with pytest.raises(UserError, match="holds none of"):
        compare_runs([runs[0], tmp_path])
