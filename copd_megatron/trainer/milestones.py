"""What happens around the steps: records, evaluations, saves, exports, the report, the summary."""
from __future__ import annotations

import json
import logging
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from copd_megatron.checkpoint.manager import CheckpointManager, RunState
from copd_megatron.config.run import RunConfig
from copd_megatron.metrics.accuracy import policy_table_text
from copd_megatron.metrics.progress import Progress
from copd_megatron.metrics.recorder import Recorder
from copd_megatron.metrics.rollout_writer import RolloutRecord, RolloutWriter
from copd_megatron.metrics.sinks import replace_file
from copd_megatron.metrics.timers import Timers
from copd_megatron.parallel.groups import Groups
from copd_megatron.report.build import build_report
from copd_megatron.trainer.batching import Sample
from copd_megatron.trainer.evaluate import BASE, Answers, Evaluator, evaluation_rows
from copd_megatron.trainer.merge import MERGED, all_policies

if TYPE_CHECKING:
    from copd_megatron.trainer.trainer import Trainer

log = logging.getLogger(__name__)


class Milestones:
    """Everything the loop does besides training; only the main rank writes."""

    def __init__(self, config: RunConfig, run_dir: Path, groups: Groups, state: RunState, evaluator: Evaluator,
                 checkpoints: CheckpointManager, recorder: Recorder, rollouts: RolloutWriter | None,
                 progress: Progress, timers: Timers):
        self.config, self.run_dir, self.groups, self.state = config, run_dir, groups, state
        self.evaluator, self.checkpoints = evaluator, checkpoints
        self.recorder, self.rollouts, self.progress, self.timers = recorder, rollouts, progress, timers
        self._base: dict[int, dict[str, Answers]] = {}
        self._answers: dict[str, dict[str, Answers]] = {}
        self._started = time.time()
        self._saved_at = state.step

    def before(self, trainer: Trainer) -> None:
        """The evaluation before the first step, if evaluations are on."""
        self.timers.collect()
        if self.config.evaluation.every and trainer.step == 0:
            self._evaluate(trainer, self.config.evaluation.prompts)

    def after_step(self, trainer: Trainer, phase: str, metrics: Mapping[str, float]) -> None:
        """Record the step; evaluate and save when it is time."""
        self.state.step = trainer.step
        self.timers.add_tokens("rollout", int(metrics.get("tokens/step", 0)))
        values = {**metrics, **self.timers.collect()}
        self.recorder.log(trainer.step, phase, values)
        self.progress.step(trainer.step, phase, values)
        last = trainer.step == trainer.schedule.total_steps
        if _due(trainer.step, self.config.evaluation.every) and not last:
            self._evaluate(trainer, self.config.evaluation.prompts)
        if _due(trainer.step, self.config.checkpoint.every) and not last:
            self._save()

    def record_rollouts(self, step: int, phase: str, samples: Sequence[Sample]) -> None:
        """Write this replica's completions, where this rank is the one that has them."""
        if self.rollouts is None:
            return
        records = [RolloutRecord(s.completion, phase, s.advantage if s.is_native else None,
                                 {} if s.delta is None else {s.edge.teacher: s.delta.tolist()}) for s in samples]
        self.rollouts.write(step + 1, records)

    def interrupted(self, trainer: Trainer) -> None:
        """Save what was trained and say how to go on."""
        self._save()
        self._report("interrupted")
        self.progress.note(f"stopped after step {trainer.step} of {trainer.schedule.total_steps}; saved; "
                           f"go on with --resume --run-dir {self.run_dir}")
        self._close()

    def finished(self, trainer: Trainer) -> None:
        """Save, final evaluation, merged export, summary, report."""
        if self._saved_at != trainer.step:
            self._save()
        rows = self._evaluate(trainer, self.config.evaluation.final_prompts)
        if self.config.checkpoint.export_merged and self.config.adapter.scope == "sequence":
            with self.timers("save"), self._all_policies():
                self.checkpoints.export_merged(self.state, MERGED, self.run_dir / "merged")
        self._summarise(rows)
        self._report("finished")
        self._close()

    def _all_policies(self):
        return all_policies(self.state.bank, self.groups, list(self.config.experts), self.config.merge)

    def _evaluate(self, trainer: Trainer, prompts: int) -> dict:
        """Evaluate all policies and record the table; the backbone's answers never change, so they are kept."""
        settings, experts = self.config.evaluation, list(self.config.experts)
        with self.timers("evaluation"):
            if prompts not in self._base:
                self._base[prompts] = self.evaluator.evaluate([None], experts, prompts)[BASE]
            with self._all_policies() as policies:
                self._answers = {BASE: self._base[prompts], **self.evaluator.evaluate(policies, experts, prompts)}
        rows = evaluation_rows(self._answers)
        mode = "greedy" if settings.greedy else "sampled"
        self.recorder.log_evaluation(trainer.step, rows, mode, settings.samples)
        self.progress.evaluation({"step": trainer.step, "policies": rows, "mode": mode, "samples": settings.samples})
        self._keep_best(trainer.step, rows[MERGED])
        self._report("running")
        return rows

    def _keep_best(self, step: int, merged: Mapping[str, Mapping[str, float]]) -> None:
        """Export the merged policy if its mean accuracy is the best so far."""
        accuracy = sum(row["avg"] for row in merged.values()) / len(merged)
        if not self.config.evaluation.keep_best or step == 0 or accuracy <= self.state.best_accuracy:
            return
        self.state.best_accuracy, self.state.best_step = accuracy, step
        with self.timers("save"), self._all_policies():
            self.checkpoints.export_peft(self.state, MERGED, self.run_dir / "best")

    def _save(self) -> None:
        with self.timers("save"), self._all_policies() as policies:
            path = self.checkpoints.save(self.state, policies)
        self._saved_at = self.state.step
        self.progress.note(f"saved {path}")

    def _summarise(self, rows: Mapping[str, Mapping[str, Mapping[str, float]]]) -> None:
        if not self.groups.is_main:
            return
        settings = self.config.evaluation
        summary = {"policies": {p: {d: row["avg"] for d, row in by_domain.items()} for p, by_domain in rows.items()},
                   "held_out": {d: int(row["n"]) for d, row in rows[BASE].items()},
                   "train_s": round(self.state.train_s + time.time() - self._started, 3), "seed": self.config.seed,
                   "mode": "greedy" if settings.greedy else f"sampled, {settings.samples} per prompt",
                   "steps": self.state.step}
        # Per prompt, so that runs and policies can be compared pairwise.
        correct = {p: {d: [round(sum(c) / len(c), 6) for c in a.correct] for d, a in by_domain.items()}
                   for p, by_domain in self._answers.items()}
        replace_file(self.run_dir / "held_out.json", json.dumps(correct).encode())
        replace_file(self.run_dir / "summary.json", (json.dumps(summary, indent=2) + "\n").encode())
        self.progress.close()
        print(policy_table_text(summary), flush=True)
        print(f"report: {self.run_dir / 'report.html'}", flush=True)

    def _report(self, state: str) -> None:
        if self.groups.is_main:
            with self.timers("save"):
                build_report(self.run_dir, state)

    def _close(self) -> None:
        self.progress.close()
        self.recorder.close()


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
