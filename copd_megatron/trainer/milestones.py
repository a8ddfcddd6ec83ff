"""What happens around the steps: records, evaluations, saves, exports, the report, the summary."""
from __future__ import annotations

import json
import logging
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from types import TracebackType

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
from copd_megatron.trainer.evaluator import BASE, Answers, Evaluator, evaluation_rows, mode_of
from copd_megatron.trainer.merge import MERGED, all_policies

log = logging.getLogger(__name__)

Rows = dict[str, dict[str, dict[str, float]]]
"""policy -> domain -> row of an evaluation."""
COUNTED = ("score", "update")
"""Phases whose tokens the loop counts as metrics ``tokens/{phase}``, to become tokens per second."""


class Milestones:
    """Everything the loop does besides training; only the main rank writes. A context manager: closes its files."""

    def __init__(self, config: RunConfig, run_dir: Path, groups: Groups, state: RunState, evaluator: Evaluator,
                 checkpoints: CheckpointManager, recorder: Recorder, rollouts: RolloutWriter | None,
                 progress: Progress, timers: Timers, total_steps: int, resumed: Path | None):
        self.config, self.run_dir, self.groups, self.state = config, run_dir, groups, state
        self.evaluator, self.checkpoints = evaluator, checkpoints
        self.recorder, self.rollouts, self.progress, self.timers = recorder, rollouts, progress, timers
        self.total_steps = total_steps
        self._base: dict[int, dict[str, Answers]] = {}
        self._saved_at = state.step if resumed else None
        self._resumed = resumed  # the save it went on from

    def __enter__(self) -> Milestones:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        try:
            self.checkpoints.close()
        finally:
            self.progress.close()
            self.recorder.__exit__(kind, error, trace)

    def before(self) -> None:
        """The evaluation before the first step, if evaluations are on."""
        self.timers.collect()
        if self._resumed:
            self.progress.note(f"resumed from {self._resumed} (step {self.state.step})")
        if self.config.evaluation.every and self.state.step == 0 and not self._resumed:
            self._evaluate(self.config.evaluation.prompts)

    def after_step(self, step: int, phase: str, metrics: dict[str, float]) -> None:
        """Record the ``step``-th step (counted from 1); evaluate and save when it is time."""
        self.state.step = step
        self.timers.add_tokens("rollout", int(metrics["tokens/step"] - metrics.get("tokens/reused", 0.0)))
        for part in COUNTED:
            self.timers.add_tokens(part, int(metrics.pop(f"tokens/{part}")))
        values = {**metrics, **self.timers.collect()}
        self.recorder.log(step, phase, values)
        self.progress.step(step, phase, values)
        self._note_saved(self.checkpoints.poll())
        if step == self.total_steps:
            return
        if _due(step, self.config.evaluation.every):
            self._evaluate(self.config.evaluation.prompts)
        if _due(step, self.config.checkpoint.every):
            self._save()

    def record_rollouts(self, step: int, phase: str, samples: Sequence[Sample]) -> None:
        """Write this replica's completions, where this rank is the one that has them."""
        if self.rollouts is None:
            return
        records = [RolloutRecord(s.completion, phase, s.advantage if s.is_native else None,
                                 {} if s.delta is None else {s.edge.teacher: s.delta.tolist()}) for s in samples]
        self.rollouts.write(step + 1, records)

    def interrupted(self) -> None:
        """Save what was trained and say how to go on."""
        self._save()
        self._note_saved(self.checkpoints.wait())
        self._report("interrupted")
        self.progress.note(f"stopped after step {self.state.step} of {self.total_steps}; saved; "
                           f"go on with --resume --run-dir {self.run_dir}")

    def finished(self) -> None:
        """Save, final evaluation, merged export, summary, report."""
        self._save()
        rows, answers = self._evaluate(self.config.evaluation.final_prompts, final=True)
        if self.config.checkpoint.export_merged and self.config.adapter.scope == "sequence":
            with self.timers("save"), self._all_policies():
                self.checkpoints.export_merged(self.state, MERGED, self.run_dir / "merged")
        self._note_saved(self.checkpoints.wait())
        self._summarise(rows, answers)
        self._report("finished")

    def _all_policies(self) -> AbstractContextManager[list[str]]:
        return all_policies(self.state.bank, self.groups, list(self.config.experts), self.config.merge)

    def _evaluate(self, prompts: int, final: bool = False) -> tuple[Rows, dict[str, dict[str, Answers]]]:
        """Evaluate all policies and record the table; the backbone's answers never change, so they are kept."""
        experts, step = list(self.config.experts), self.state.step
        with self.timers("evaluation"):
            if prompts not in self._base:
                self._base[prompts] = self.evaluator.evaluate([None], experts, prompts)[BASE]
            base = self._base[prompts]
            with self._all_policies() as policies:
                answers = {BASE: base, **self.evaluator.evaluate(policies, experts, prompts)}
        rows = evaluation_rows(answers)
        mode, samples = mode_of(self.config.evaluation), self.config.evaluation.samples
        self.recorder.log_evaluation(step, rows, mode, samples)
        if not final:  # the last table is printed below the display, where it stays
            self.progress.evaluation({"step": step, "policies": rows, "mode": mode, "samples": samples})
        self._keep_best(rows[MERGED])
        self._report("running")
        return rows, answers

    def _keep_best(self, merged: Mapping[str, Mapping[str, float]]) -> None:
        """Export the merged policy if its mean accuracy is the best so far."""
        accuracy = sum(row["avg"] for row in merged.values()) / len(merged)
        step, state = self.state.step, self.state
        if not self.config.evaluation.keep_best or step == 0 or accuracy <= state.best_accuracy:
            return
        state.best_accuracy, state.best_step = accuracy, step
        with self.timers("save"), self._all_policies():
            self.checkpoints.export_peft(state, MERGED, self.run_dir / "best")

    def _save(self) -> None:
        """Begin to save unless this very step is saved."""
        if self._saved_at == self.state.step:
            return
        with self.timers("save"), self._all_policies() as policies:
            self._note_saved(self.checkpoints.wait())
            self.checkpoints.save(self.state, policies)
            if not self.config.checkpoint.asynchronous:
                self._note_saved(self.checkpoints.wait())
        self._saved_at = self.state.step

    def _note_saved(self, path: Path | None) -> None:
        """Tell of a save that has become complete."""
        if path is not None:
            self.progress.note(f"saved {path}")

    def _summarise(self, rows: Rows, answers: Mapping[str, Mapping[str, Answers]]) -> None:
        """summary.json, the final table, and held_out.json: accuracies prompt by prompt, to compare policies and
        runs on the same questions."""
        if not self.groups.is_main:
            return
        trained_s = self.state.train_s + time.monotonic() - self.state.started
        summary = {"policies": {policy: {domain: row["avg"] for domain, row in by_domain.items()}
                                for policy, by_domain in rows.items()},
                   "held_out": {domain: int(row["n"]) for domain, row in rows[BASE].items()},
                   "train_s": round(trained_s, 3), "seed": self.config.seed}
        replace_file(self.run_dir / "summary.json", (json.dumps(summary, indent=2) + "\n").encode())
        by_prompt = {policy: {domain: own.per_prompt() for domain, own in by_domain.items()}
                     for policy, by_domain in answers.items()}
        replace_file(self.run_dir / "held_out.json", (json.dumps(by_prompt) + "\n").encode())
        self.progress.close()
        print(policy_table_text({"policies": rows, "mode": mode_of(self.config.evaluation)}), flush=True)
        print(f"report: {self.run_dir / 'report.html'}", flush=True)

    def _report(self, state: str) -> None:
        """Rebuild the page; a page that cannot be written costs the page, not the run."""
        if not self.groups.is_main:
            return
        try:
            with self.timers("save"):
                build_report(self.run_dir, state)
        except OSError as error:
            log.warning("report.html was not written (%s); training goes on", error)


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
