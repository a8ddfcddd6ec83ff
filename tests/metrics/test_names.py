"""The catalogue of metrics is unambiguous, covers what is logged, and is what the documentation shows."""
from pathlib import Path

import pytest

from copd_megatron.metrics.names import (
    GROUPS,
    METRICS,
    PHASES,
    RESERVED,
    TIMED_PHASES,
    check_name,
    edge_name,
    find,
    markdown_table,
    pair_name,
)

DOCUMENT = Path(__file__).parents[2] / "docs" / "metrics.md"

EXAMPLES = {
    "text/reward": "{expert}/reward",
    "text/reward/accuracy": "{expert}/reward/{part}",
    "image_2/zero_std_groups": "{expert}/zero_std_groups",
    "edge/text->image/delta_p50": "edge/{teacher}->{student}/delta_p50",
    "pair/text~video/overlap": "pair/{a}~{b}/overlap",
    "time/rollout_s": "time/{phase}_s",
    "time/step_s": "time/step_s",
    "tokens/update_per_s": "tokens/{phase}_per_s",
    "tokens/step": "tokens/step",
    "eval/merged/video/avg": "eval/{policy}/{domain}/avg",
}


@pytest.mark.parametrize("name, pattern", EXAMPLES.items())
def test_names_find_their_pattern(name, pattern):
    assert check_name(name).pattern == pattern


@pytest.mark.parametrize("name", ["text/rewards", "reward", "edge/text/delta_p50", "edge/text->image/delta",
                                  "pair/text-video/overlap", "time/reward", "tokens/entropy", "", "a/b/c/d"])
def test_unknown_names_are_refused_with_the_nearest(name):
    assert find(name) is None
    with pytest.raises(ValueError, match="the nearest is"):
        check_name(name)


def test_nearest_pattern_is_near():
    with pytest.raises(ValueError, match=r"nearest is '\{expert\}/kl_backbone'"):
        check_name("text/kl_bakbone")


def test_placeholders_are_read_back():
    assert find(edge_name("text", "image", "teacher_kl"))[1] == {"teacher": "text", "student": "image"}
    assert find(pair_name("text", "image", "overlap"))[1] == {"a": "image", "b": "text"}
    assert pair_name("a", "b", "overlap") == pair_name("b", "a", "overlap")


def test_catalogue_has_no_duplicates_or_blanks():
    assert len({m.pattern for m in METRICS}) == len(METRICS) == sum(map(len, GROUPS.values()))
    for metric in METRICS:
        assert all((metric.meaning, metric.unit, metric.healthy, metric.action)), metric.pattern


def test_first_words_that_are_no_experts_are_reserved():
    firsts = {m.pattern.split("/")[0] for m in METRICS} - {"{expert}"}
    assert firsts == RESERVED


def test_timed_phases_and_step_phases_are_apart():
    assert not set(TIMED_PHASES) & set(PHASES)
    for phase in (*TIMED_PHASES, "other"):
        assert check_name(f"time/{phase}_s").pattern == "time/{phase}_s"


def test_documentation_shows_the_catalogue():
    text = DOCUMENT.read_text()
    begin, end = "<!-- table of copd_megatron/metrics/names.py: begin -->\n", "<!-- end -->"
    shown = text[text.index(begin) + len(begin):text.index(end)]
    assert shown == markdown_table(), "paste names.markdown_table() between the two marks of docs/metrics.md"
