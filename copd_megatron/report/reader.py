"""A run folder in memory, read while the run may still write it.

Missing files, a truncated last line and damaged rollout files are tolerated; ``notes`` says what was skipped.
"""
from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from copd_megatron.metrics.names import find
from copd_megatron.types import UserError

State = Literal["running", "finished", "interrupted"]

QUIET_S = 600.0
"""A run without a summary that wrote nothing for this long (or 20 steps' time) counts as interrupted."""


@dataclass(frozen=True, eq=False)
class Series:
    """One metric over steps."""

    steps: np.ndarray
    """[n] int64, ascending."""
    values: np.ndarray
    """[n] float64; NaN where the value was not finite."""


@dataclass
class RunData:
    """What a run folder holds; every part may be empty."""

    folder: Path
    config: dict[str, Any] = field(default_factory=dict)
    info: dict[str, Any] = field(default_factory=dict)
    """``run.json``: recipe, versions, starts."""
    summary: dict[str, Any] = field(default_factory=dict)
    """``summary.json``; empty until the run ended."""
    series: dict[str, Series] = field(default_factory=dict)
    phases: dict[int, str] = field(default_factory=dict)
    """Training step -> rlvr or opd, ascending."""
    times: list[float] = field(default_factory=list)
    """Unix time of every line of metrics.jsonl."""
    evaluations: list[dict[str, Any]] = field(default_factory=list)
    """Lines of evaluations.jsonl by step, the last one of each step."""
    rollout_files: list[Path] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def experts(self) -> list[str]:
        """Expert names in config order; from the metrics where there is no config."""
        if isinstance(self.config.get("experts"), Mapping):
            return list(self.config["experts"])
        return self.found("expert")

    @property
    def edges(self) -> list[tuple[str, str]]:
        """(teacher, student) of all edges that were measured, in order of appearance."""
        return self._pairs_of("teacher", "student")

    @property
    def pairs(self) -> list[tuple[str, str]]:
        """Pairs of experts as named in ``pair/{a}~{b}/...``."""
        return self._pairs_of("a", "b")

    @property
    def step(self) -> int:
        """Updates done."""
        return max(self.phases, default=0)

    @property
    def total_steps(self) -> int | None:
        """Updates planned; None without a config."""
        schedule = self.config.get("schedule")
        if not isinstance(schedule, Mapping):
            return None
        per_cycle = schedule.get("rl_steps", 0) + schedule.get("opd_steps", 0)
        return schedule.get("cycles", 0) * per_cycle or None

    def opd_spans(self) -> list[tuple[float, float]]:
        """Runs of consecutive OPD steps as (first - 0.5, last + 0.5), to shade."""
        spans: list[list[float]] = []
        for step, phase in self.phases.items():
            if phase != "opd":
                continue
            if spans and spans[-1][1] == step - 0.5:
                spans[-1][1] = step + 0.5
            else:
                spans.append([step - 0.5, step + 0.5])
        return [(a, b) for a, b in spans]

    def state(self, now: float | None = None) -> State:
        """finished: there is a summary (or it says another state); else running while lines keep coming."""
        if self.summary:
            return self.summary.get("state", "finished")
        if not self.times:
            return "running"
        gap_s = float(np.median(np.diff(self.times))) if len(self.times) > 1 else 0.0
        quiet_s = (now if now is not None else time.time()) - self.times[-1]
        return "interrupted" if quiet_s > max(QUIET_S, 20 * gap_s) else "running"

    def latest_accuracies(self) -> dict[str, Any] | None:
        """The newest evaluation line, or the summary if it is all there is (its accuracies have no intervals
        of their own); None before the first evaluation."""
        if self.evaluations and (not self.summary or self._summary_agrees(self.evaluations[-1])):
            return self.evaluations[-1]
        if self.summary.get("policies"):
            return self.summary
        return self.evaluations[-1] if self.evaluations else None

    def found(self, placeholder: str) -> list[str]:
        """Distinct values of a placeholder over all metric names, in order of appearance."""
        values = (find(name) for name in self.series)
        return list(dict.fromkeys(v[1][placeholder] for v in values if v and placeholder in v[1]))

    def _pairs_of(self, first: str, second: str) -> list[tuple[str, str]]:
        values = (find(name) for name in self.series)
        return list(dict.fromkeys((v[1][first], v[1][second]) for v in values if v and first in v[1]))

    def _summary_agrees(self, evaluation: Mapping[str, Any]) -> bool:
        policies = evaluation["policies"]
        return all(abs(policies.get(p, {}).get(d, {}).get("avg", -1) - value) < 1e-9
                   for p, row in self.summary.get("policies", {}).items() for d, value in row.items())


def read_run(run_dir: Path) -> RunData:
    """Read a run folder; UserError if it is none."""
    run = RunData(run_dir)
    known = ("config.json", "metrics.jsonl", "evaluations.jsonl", "summary.json")
    if not any((run_dir / name).exists() for name in known):
        raise UserError(f"run_dir: {run_dir} holds none of {', '.join(known)}; give the --run-dir of a run")
    run.config = _read_json(run_dir / "config.json", run.notes)
    run.info = _read_json(run_dir / "run.json", run.notes)
    run.summary = _read_json(run_dir / "summary.json", run.notes)
    _read_metrics(run)
    evaluations = {line["step"]: line for line in _read_lines(run_dir / "evaluations.jsonl", run.notes)}
    run.evaluations = [evaluations[step] for step in sorted(evaluations)]
    run.rollout_files = sorted((run_dir / "rollouts").glob("step_*.parquet"))
    return run


def _read_metrics(run: RunData) -> None:
    values: dict[str, dict[int, float]] = {}
    for line in _read_lines(run.folder / "metrics.jsonl", run.notes):
        step, phase = line.pop("step"), line.pop("phase", "")
        run.times.append(line.pop("time", 0.0))
        if phase in ("rlvr", "opd"):
            run.phases[step] = phase
        for name, value in line.items():
            values.setdefault(name, {})[step] = float("nan") if value is None else float(value)
    run.phases = dict(sorted(run.phases.items()))
    for name, by_step in values.items():
        steps = np.array(sorted(by_step), np.int64)
        run.series[name] = Series(steps, np.array([by_step[s] for s in steps.tolist()], np.float64))
        bad = steps[np.isnan(run.series[name].values)]
        if len(bad):
            run.notes.append(f"{name} was not finite in {len(bad)} steps, first in step {bad[0]}.")


def _read_lines(path: Path, notes: list[str]) -> list[dict[str, Any]]:
    """Records of a JSON Lines file; a last line that is still being written is passed over in silence."""
    if not path.exists():
        return []
    records, broken = [], 0
    lines = path.read_bytes().split(b"\n")
    for i, line in enumerate(lines):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError:
            broken += i < len(lines) - 1
            continue
        if isinstance(record, dict) and isinstance(record.get("step"), int):
            records.append(record)
        else:
            broken += 1
    if broken:
        notes.append(f"{path.name}: {broken} unreadable lines were left out.")
    return records


def _read_json(path: Path, notes: list[str]) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        content = json.loads(path.read_bytes())
    except ValueError:
        notes.append(f"{path.name} is not valid JSON and was left out.")
        return {}
    return content if isinstance(content, dict) else {}
