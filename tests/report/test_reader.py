"""Run folders are read as they are: whole, half-written, damaged, or not at all."""
import json

import numpy as np
import pytest

from copd_megatron.report.reader import QUIET_S, read_run
from copd_megatron.types import UserError
from support.fake_run import fake_run


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return fake_run(tmp_path_factory.mktemp("run"), cycles=2, rl_steps=3, opd_steps=2, evaluate_every=5)


def write_lines(folder, name, *records):
    (folder / name).write_text("".join(json.dumps(r) + "\n" for r in records))


def test_a_whole_run(folder):
    run = read_run(folder)
    assert run.experts == ["text", "image", "video"]
    assert run.edges == [("text", "image"), ("image", "text"), ("text", "video"), ("video", "text")]
    assert len(run.pairs) == 3
    assert (run.step, run.total_steps, run.state()) == (10, 10, "finished")
    assert run.opd_spans() == [(3.5, 5.5), (8.5, 10.5)]
    assert run.series["text/reward"].steps.tolist() == list(range(1, 11))
    assert run.series["edge/text->image/delta_p50"].steps.tolist() == [4, 5, 9, 10]
    assert [e["step"] for e in run.evaluations] == [0, 5, 10]
    assert run.latest_accuracies() is run.evaluations[-1]
    assert len(run.rollout_files) == 4
    assert run.notes == []


def test_a_folder_that_is_no_run(tmp_path):
    with pytest.raises(UserError, match="run_dir: .* holds none of config.json"):
        read_run(tmp_path)


def test_lines_of_a_step_add_up_and_the_last_value_counts(tmp_path):
    write_lines(tmp_path, "metrics.jsonl", {"step": 2, "phase": "rlvr", "time": 5.0, "text/reward": 0.1},
                {"step": 1, "phase": "rlvr", "time": 6.0, "text/reward": 0.2, "text/length": 4},
                {"step": 2, "phase": "rlvr", "time": 7.0, "text/reward": 0.3, "text/loss": None})
    run = read_run(tmp_path)
    assert run.series["text/reward"].steps.tolist() == [1, 2]
    assert run.series["text/reward"].values.tolist() == [0.2, 0.3]
    assert np.isnan(run.series["text/loss"].values).all()
    assert run.notes == ["text/loss was not finite in 1 steps, first in step 2."]
    assert run.experts == ["text"] and run.total_steps is None


def test_a_line_that_is_being_written_is_passed_over(tmp_path):
    write_lines(tmp_path, "metrics.jsonl", {"step": 1, "phase": "rlvr", "time": 1.0, "text/reward": 1.0})
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 2, "phase": "rl')
    run = read_run(tmp_path)
    assert run.step == 1 and run.notes == []


def test_damage_is_noted(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "phase": "rlvr"}\nnonsense\n[1]\n{"step": 2}\n')
    (tmp_path / "summary.json").write_text("{")
    (tmp_path / "config.json").write_text("[]")
    run = read_run(tmp_path)
    assert run.notes == ["summary.json is not valid JSON and was left out.",
                         "metrics.jsonl: 2 unreadable lines were left out."]
    assert run.config == {} and run.summary == {}


@pytest.mark.parametrize("quiet_s, gap_s, state", [(1, 1, "running"), (QUIET_S - 1, 1, "running"),
                                                   (QUIET_S + 1, 1, "interrupted"), (5000, 400, "running"),
                                                   (9000, 400, "interrupted")])
def test_a_quiet_run_without_summary_counts_as_interrupted(quiet_s, gap_s, state, tmp_path):
    lines = [{"step": s, "phase": "rlvr", "time": s * gap_s} for s in range(1, 6)]
    write_lines(tmp_path, "metrics.jsonl", *lines)
    assert read_run(tmp_path).state(now=5 * gap_s + quiet_s) == state


def test_a_summary_that_differs_from_the_last_evaluation_wins(tmp_path):
    row = {"text": {"avg": 0.4, "n": 10}}
    write_lines(tmp_path, "evaluations.jsonl", {"step": 5, "policies": {"base": row}})
    run = read_run(tmp_path)
    assert run.latest_accuracies()["step"] == 5
    summary = {"policies": {"base": {"text": 0.5}}, "held_out": {"text": 9}}
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    run = read_run(tmp_path)
    assert run.latest_accuracies()["policies"]["base"]["text"] == 0.5
    assert run.state() == "finished"
