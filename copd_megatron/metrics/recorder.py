"""The record of a run: every number of every step, written by one rank, continued on resume.

A step is the number of updates done, counted from 1; step 0 is before training. ``metrics.jsonl`` has one
line {"step", "phase", "time", name: value, ...} per call of ``log``; ``evaluations.jsonl`` has one line per
evaluation.
"""
from __future__ import annotations

import logging
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from copd_megatron.config.metrics import MetricsConfig
from copd_megatron.metrics.names import PHASES, check_name
from copd_megatron.metrics.sinks import JsonLines, Sink, TensorBoardSink, WandbSink, check_wandb

log = logging.getLogger(__name__)


class Recorder:
    """Takes numbers on every rank, writes them on the rank that is told to.

    If a disk refuses ``metrics.jsonl``, lines wait in memory (see ``sinks.JsonLines``) and the run ends with
    a UserError rather than lose them. TensorBoard or W&B that fail are left out with one warning, counted in
    the metric ``record/failures``.
    """

    def __init__(self, run_dir: Path, config: MetricsConfig, resume_step: int | None = None, *,
                 writes: bool = True, run_config: Mapping[str, Any] | None = None,
                 strict: bool = False, extra_sinks: Sequence[Sink] = ()) -> None:
        """Open the record under ``run_dir``.

        ``resume_step``: None for a new run (UserError if the folder already has a record); else the step of
        the checkpoint, and what was recorded after it is dropped. ``writes``: True on one rank only; the
        others ignore every call. ``run_config``: the resolved config for W&B. ``strict``: unknown metric
        names raise ValueError. ``extra_sinks`` get the numbers too.
        """
        check_wandb(config.wandb)
        self._writes = writes
        self._strict = strict
        self._failures = 0
        self._warned: set[str] = set()
        self._sinks: list[Sink] = list(extra_sinks) if writes else []
        if not writes:
            return
        run_dir.mkdir(parents=True, exist_ok=True)
        self._metrics = JsonLines(run_dir / "metrics.jsonl", resume_step)
        self._evaluations = JsonLines(run_dir / "evaluations.jsonl", resume_step)
        if config.tensorboard:
            self._sinks.append(TensorBoardSink(run_dir / "tensorboard", resume_step))
        if config.wandb != "off":
            self._sinks.append(WandbSink(run_dir, config.wandb_project, config.wandb, run_config))

    def log(self, step: int, phase: str, values: Mapping[str, Any]) -> None:
        """Record numbers of one step; several calls for a step add up, the last value of a name counts.

        ``phase`` is ``rlvr``, ``opd`` or ``eval`` (ValueError else). Values are numbers or one-element
        tensors; a value that is not finite becomes null in the file, with one warning per name.
        """
        if phase not in PHASES:
            raise ValueError(f"phase {phase!r}: phases are {', '.join(PHASES)}")
        if not self._writes:
            return
        numbers = {name: float(value) for name, value in values.items()}
        if self._strict:
            for name in numbers:
                check_name(name)
        if self._failures:
            numbers["record/failures"] = float(self._failures)
        self._warn_of_non_finite(step, numbers)
        finite = {name: _strict_number(value) for name, value in numbers.items()}
        self._metrics.append({"step": step, "phase": phase, "time": round(time.time(), 3), **finite})
        self._copy(step, phase, numbers)

    def log_evaluation(self, step: int, policies: Mapping[str, Mapping[str, Mapping[str, float]]],
                       mode: str, samples: int) -> None:
        """Record one evaluation.

        ``policies``: policy -> domain -> {"avg", "pass", "n", "low", "high", "parseable", "length"},
        accuracies as fractions, ``low`` and ``high`` a 95 % interval of ``avg``. ``mode``: ``greedy`` or
        ``sampled``.
        """
        if not self._writes:
            return
        cells = {policy: {domain: {what: _strict_number(value) for what, value in cell.items()}
                          for domain, cell in domains.items()} for policy, domains in policies.items()}
        self._evaluations.append({"step": step, "time": round(time.time(), 3), "mode": mode,
                                  "samples": samples,
                                  "policies": cells})
        self._copy(step, "eval", {f"eval/{policy}/{domain}/{what}": cell[what]
                                  for policy, domains in cells.items() for domain, cell in domains.items()
                                  for what in ("avg", "pass", "parseable", "length")
                                  if cell.get(what) is not None})

    def count_failure(self) -> None:
        """Count a file that could not be written elsewhere (rollouts); shows in ``record/failures``."""
        self._failures += 1

    def close(self) -> None:
        """Flush and close all sinks; UserError if lines of the record would be lost."""
        if not self._writes:
            return
        for sink in self._sinks:
            try:
                sink.close()
            except Exception as error:
                log.warning("%s did not close (%s); metrics.jsonl has all numbers", sink.name, error)
        self._sinks.clear()
        try:
            self._evaluations.close()
        finally:
            self._metrics.close()

    def __enter__(self) -> Recorder:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        try:
            self.close()
        except Exception:
            if error is None:
                raise
            log.exception("closing the record failed, after the error that follows")

    def _warn_of_non_finite(self, step: int, numbers: Mapping[str, float]) -> None:
        fresh = [n for n, v in numbers.items() if not math.isfinite(v) and n not in self._warned]
        for name in fresh:
            self._warned.add(name)
            log.warning("step %d: %s is %s (shown once per name)", step, name, numbers[name])

    def _copy(self, step: int, phase: str, values: Mapping[str, float]) -> None:
        """Hand values to the sinks that are copies; one that fails is closed and left out."""
        for sink in list(self._sinks):
            try:
                sink.write(step, phase, values)
            except Exception as error:  # a viewer's copy must not end a training run, whatever it raises
                self._sinks.remove(sink)
                self._failures += 1
                log.warning("%s failed at step %d and is left out from now on (%s); metrics.jsonl goes on",
                            sink.name, step, error)


def _strict_number(value: Any) -> int | float | None:
    """A number that strict JSON knows: whole numbers stay whole, what is not finite is None."""
    if isinstance(value, int):
        return value
    number = float(value)
    return number if math.isfinite(number) else None
