"""Displays: plain lines without control characters, a live display that fits its window, or nothing."""
import io
import re

import numpy as np
import pytest
from rich.console import Console

from copd_megatron.metrics.progress import LiveProgress, PlainProgress, Progress, duration, make_progress
from support.fake_run import fake_evaluation, fake_values

EXPERTS = ["text", "image", "video"]


def evaluation(experts=EXPERTS, step=6):
    return {"step": step, "mode": "greedy", "samples": 1,
            "policies": fake_evaluation(np.random.default_rng(0), list(experts), 0.5, 256)}


def values(experts=EXPERTS):
    return fake_values(np.random.default_rng(0), list(experts), 0.5, "rlvr", 0.1, 1e-3)


def run(progress: Progress, experts=EXPERTS) -> None:
    with progress:
        for step in (1, 2):
            progress.phase("rollout")
            progress.step(step, "rlvr", values(experts))
        progress.note("saved step 2")
        progress.evaluation(evaluation(experts))


def test_plain_prints_one_clean_line_per_step():
    stream = io.StringIO()
    run(make_progress("auto", experts=EXPERTS, total_steps=10, stream=stream))
    text = stream.getvalue()
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f]", text)
    lines = text.splitlines()
    assert all(line.startswith(f"step {i}/10 rlvr | text: reward 0.") for i, line in enumerate(lines[:2], 1))
    assert lines[0].endswith("s/step, 0s left")
    assert lines[2:4] == ["saved step 2", "evaluation at step 6"]
    assert lines[4].startswith("| policy")


def test_plain_sums_up_many_experts():
    stream = io.StringIO()
    experts = [f"e{i}" for i in range(30)]
    run(PlainProgress(experts, 10, 0, stream), experts)
    first = stream.getvalue().splitlines()[0]
    assert re.match(r"step 1/10 rlvr \| 30 experts: reward 0\.\d+ \(0\.\d+ to \d\.\d+\), length", first)
    assert len(first) < 200


def test_values_that_are_missing_are_left_out():
    stream = io.StringIO()
    PlainProgress(EXPERTS, 4, 2, stream).step(3, "opd", {"text/reward": 0.5})
    assert stream.getvalue().startswith("step 3/4 opd | text: reward 0.500 | ")


def test_off_prints_nothing(capsys):
    run(make_progress("off", experts=EXPERTS, total_steps=10))
    assert capsys.readouterr() == ("", "")


def test_live_is_taken_only_where_asked_or_on_a_terminal():
    stream = io.StringIO()
    assert type(make_progress("auto", experts=EXPERTS, total_steps=1, stream=stream)) is PlainProgress
    assert type(make_progress("plain", experts=EXPERTS, total_steps=1, stream=stream)) is PlainProgress
    with make_progress("live", experts=EXPERTS, total_steps=1, stream=stream) as progress:
        assert type(progress) is LiveProgress


@pytest.mark.parametrize("width, height", [(40, 8), (60, 12), (80, 24), (120, 40)])
@pytest.mark.parametrize("count", [1, 3, 30])
def test_live_fits_the_window(width, height, count):
    experts = [f"expert{i}" for i in range(count)]
    progress = LiveProgress(experts, 10, 0, io.StringIO())
    with progress:
        progress.step(1, "rlvr", values(experts))
        progress.evaluation(evaluation(experts))
        console = Console(width=width, height=height, file=io.StringIO(), force_terminal=True)
        lines = ["".join(s.text for s in line) for line in console.render_lines(progress, pad=False)]
    assert len(lines) <= height
    assert max(map(len, lines)) <= width
    assert lines[0].startswith("step 1/10  rlvr  starting")
    assert any(line.startswith("expert ") and "reward" in line for line in lines)
    assert (height < 24) or (count == 30) or any("merged" in line for line in lines)


def test_live_ends_with_the_cursor_shown():
    stream = io.StringIO()
    run(make_progress("live", experts=EXPERTS, total_steps=2, stream=stream))
    text = stream.getvalue()
    assert "saved step 2" in text
    assert text.rindex("\x1b[?25h") > text.rindex("\x1b[?25l")


def test_durations_read_well():
    assert [duration(s) for s in (0.2, 7.2, 63, 3723, 90000)] == ["0s", "7s", "1m03s", "1h02m", "25h00m"]
