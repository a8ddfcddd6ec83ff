"""The recorder: one writer, every number once, copies that may fail, TensorBoard that can be read."""
import json
import logging
import math

import numpy as np
import pytest
import torch

from copd_megatron.config.metrics import MetricsConfig
from copd_megatron.metrics.recorder import Recorder
from copd_megatron.types import UserError

QUIET = MetricsConfig(tensorboard=False)
CELL = {"avg": 0.5, "pass": 0.75, "n": 4, "low": 0.2, "high": 0.8, "parseable": 1.0, "length": 3.0}


class ListSink:
    """A viewer that keeps what it gets, and breaks from a step on."""

    name = "list"

    def __init__(self, breaks_at: int | None = None):
        self.rows, self.closed, self.breaks_at = [], False, breaks_at

    def write(self, step, phase, values):
        if self.breaks_at is not None and step >= self.breaks_at:
            raise RuntimeError("connection lost")
        self.rows.append((step, phase, dict(values)))

    def close(self):
        self.closed = True


def lines(run_dir, name="metrics.jsonl"):
    text = (run_dir / name).read_text()
    return [json.loads(line, parse_constant=pytest.fail) for line in text.splitlines()]


def test_log_writes_one_line_with_plain_numbers(tmp_path):
    with Recorder(tmp_path, QUIET) as recorder:
        recorder.log(1, "rlvr", {"text/reward": torch.tensor(0.25), "text/length": np.float32(3),
                                 "tokens/step": 7})
    (line,) = lines(tmp_path)
    assert line.pop("time") > 1e9
    assert line == {"step": 1, "phase": "rlvr", "text/reward": 0.25, "text/length": 3.0, "tokens/step": 7.0}


def test_only_the_writer_writes(tmp_path):
    sink = ListSink()
    with Recorder(tmp_path / "run", MetricsConfig(), writes=False, extra_sinks=[sink]) as recorder:
        recorder.log(1, "rlvr", {"text/reward": 1.0})
        recorder.log_evaluation(1, {"base": {"text": CELL}}, "greedy", 1)
    assert not (tmp_path / "run").exists()
    assert not sink.rows


def test_resume_continues_metrics_and_evaluations(tmp_path):
    for resume, steps in ((None, range(1, 6)), (3, range(4, 7))):
        with Recorder(tmp_path, QUIET, resume) as recorder:
            for step in steps:
                recorder.log(step, "rlvr", {"text/reward": step})
                recorder.log_evaluation(step, {"base": {"text": CELL}}, "greedy", 1)
    assert [line["step"] for line in lines(tmp_path)] == [1, 2, 3, 4, 5, 6]
    assert [line["step"] for line in lines(tmp_path, "evaluations.jsonl")] == [1, 2, 3, 4, 5, 6]


def test_a_folder_with_a_record_needs_resume(tmp_path):
    with Recorder(tmp_path, QUIET) as recorder:
        recorder.log(1, "rlvr", {})
    with pytest.raises(UserError, match="--resume"):
        Recorder(tmp_path, QUIET)


def test_values_that_are_not_finite_become_null_and_warn_once(tmp_path, caplog):
    sink = ListSink()
    with caplog.at_level(logging.WARNING), Recorder(tmp_path, QUIET, extra_sinks=[sink]) as recorder:
        recorder.log(1, "rlvr", {"text/loss": math.nan})
        recorder.log(2, "rlvr", {"text/loss": math.inf, "text/reward": 1.0})
        recorder.log_evaluation(2, {"base": {"text": {**CELL, "low": math.nan}}}, "greedy", 1)
    assert [line["text/loss"] for line in lines(tmp_path)] == [None, None]
    assert lines(tmp_path, "evaluations.jsonl")[0]["policies"]["base"]["text"]["low"] is None
    assert caplog.text.count("text/loss is nan") == 1
    assert math.isinf(sink.rows[1][2]["text/loss"])


def test_evaluation_line_and_its_copy(tmp_path):
    with Recorder(tmp_path, QUIET, strict=True, extra_sinks=[sink := ListSink()]) as recorder:
        recorder.log_evaluation(5, {"merged": {"text": CELL}}, "sampled", 4)
    (line,) = lines(tmp_path, "evaluations.jsonl")
    assert (line["step"], line["mode"], line["samples"]) == (5, "sampled", 4)
    assert line["policies"] == {"merged": {"text": CELL}}
    copied = {f"eval/merged/text/{k}": CELL[k] for k in ("avg", "pass", "parseable", "length")}
    assert sink.rows == [(5, "eval", copied)]
    assert sink.closed


def test_a_failing_copy_is_left_out_and_counted(tmp_path, caplog):
    good, bad = ListSink(), ListSink(breaks_at=2)
    with caplog.at_level(logging.WARNING), Recorder(tmp_path, QUIET, extra_sinks=[bad, good]) as recorder:
        for step in (1, 2, 3, 4):
            recorder.log(step, "rlvr", {"text/reward": 0.0})
        recorder.count_failure()
        recorder.log(5, "rlvr", {"text/reward": 0.0})
    assert [row[0] for row in bad.rows] == [1]
    assert [row[0] for row in good.rows] == [1, 2, 3, 4, 5]
    assert [line.get("record/failures") for line in lines(tmp_path)] == [None, None, 1.0, 1.0, 2.0]
    assert caplog.text.count("connection lost") == 1


def test_unknown_phase_and_strict_names_are_refused(tmp_path):
    with Recorder(tmp_path, QUIET, strict=True) as recorder:
        with pytest.raises(ValueError, match="phases are rlvr, opd, eval"):
            recorder.log(1, "train", {})
        with pytest.raises(ValueError, match="nearest"):
            recorder.log(1, "rlvr", {"text/rewards": 1.0})
    assert lines(tmp_path) == []


def test_an_error_inside_is_not_hidden_by_closing(tmp_path):
    with pytest.raises(KeyError):
        with Recorder(tmp_path, QUIET):
            raise KeyError("the first error")


def test_tensorboard_has_the_numbers_once_after_resume(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    name = "edge/text->image/delta_p50"
    for resume, steps in ((None, range(1, 5)), (2, range(3, 6))):
        with Recorder(tmp_path, MetricsConfig(), resume) as recorder:
            for step in steps:
                recorder.log(step, "opd", {name: 10.0 * step + (resume or 0)})
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    scalars = events.Scalars("edge/text-to-image/delta_p50")
    assert [(e.step, e.value) for e in scalars] == [(1, 10.0), (2, 20.0), (3, 32.0), (4, 42.0), (5, 52.0)]
