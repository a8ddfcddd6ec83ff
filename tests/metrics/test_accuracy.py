"""The table policy x domain: cells, intervals, order, and fitting a width."""
import pytest
from rich.console import Console

from copd_megatron.metrics.accuracy import (
    Cell,
    accuracies,
    mean_accuracy,
    policy_table,
    policy_table_text,
    wilson,
)

SUMMARY = {"policies": {"merged": {"text": 0.8, "image": 0.7}, "base": {"text": 0.45, "image": 0.5},
                        "text": {"text": 0.88, "image": 0.4}}, "held_out": {"text": 1000, "image": 400}}


def test_wilson_is_the_score_interval():
    low, high = wilson(0.5, 100)                     # Wilson 1927; values of any statistics table
    assert (low, high) == pytest.approx((0.40383, 0.59617), abs=1e-5)
    assert wilson(0.0, 10) == pytest.approx((0.0, 0.27754), abs=1e-5)
    assert wilson(1.0, 10)[1] == pytest.approx(1.0)


def test_cells_of_a_summary_and_of_an_evaluation():
    cells = accuracies(SUMMARY)
    assert list(cells) == ["base", "text", "merged"]
    assert cells["base"]["text"] == Cell(0.45, *wilson(0.45, 1000), 1000)
    row = {"text": {"avg": 0.5, "low": 0.3, "high": 0.6, "n": 9}, "image": {"avg": None}}
    assert accuracies({"policies": {"base": row}}) == {"base": {"text": Cell(0.5, 0.3, 0.6, 9)}}


def test_mean_needs_every_domain():
    cells = accuracies(SUMMARY)["base"]
    assert mean_accuracy(cells, ["text", "image"]) == pytest.approx(0.475)
    assert mean_accuracy(cells, ["text", "video"]) is None


def test_text_table_shows_values_intervals_and_gains():
    text = policy_table_text(SUMMARY)
    assert text.isascii()
    rows = {line.split("|")[1].strip(): line for line in text.splitlines() if line.startswith("|")}
    assert "88.0 +-2.2 (+43.0)" in rows["text"]
    assert "40.0 +-4.9 (-10.0)" in rows["text"]
    assert "75.0 (+27.5)" in rows["merged"]
    assert "(" not in rows["base"]
    assert "400 to 1,000 held-out prompts" in text


@pytest.mark.parametrize("width", [120, 70, 50, 34, 30])
def test_tables_fit_the_width(width):
    for line in policy_table_text(SUMMARY, width).splitlines():
        assert len(line) <= width
    console = Console(width=width, record=True, force_terminal=True, file=open("/dev/null", "w"))
    console.print(policy_table(SUMMARY, width=width))
    assert "…" not in console.export_text()


def test_many_domains_fall_back_to_own_domain_and_mean():
    experts = [f"expert{i:02d}" for i in range(20)]
    source = {"policies": {p: dict.fromkeys(experts, 0.5) for p in ["base", *experts, "merged"]}}
    text = policy_table_text(source, 80)
    assert "own domain" in text and "mean" in text
    assert len(text.splitlines()) >= 24


def test_a_policy_without_some_domain_shows_a_dash():
    text = policy_table_text({"policies": {"base": {"text": 0.5, "image": 0.5}, "text": {"text": 0.6}}})
    cells = [cell.strip() for cell in text.splitlines()[3].split("|")[1:-1]]
    assert cells == ["text", "60.0 (+10.0)", "-", "-"]
