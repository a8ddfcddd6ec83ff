"""The loop, on one screen: rollout, grade, score, exchange, update; evaluate, save, report.

Every rank of every replica runs it; there is no controller (Gu et al. 2026, arXiv:2604.27083).
"""
from __future__ import annotations

import logging
from collections.abc import Sequence

from copd_megatron.config.run import RunConfig
from copd_megatron.exchange.gather import gathered_adapters
from copd_megatron.exchange.schedule import Schedule
from copd_megatron.metrics.timers import Timers
from copd_megatron.parallel.groups import Groups
from copd_megatron.rollout.collector import Collector
from copd_megatron.trainer.agreement import measure_agreement
from copd_megatron.trainer.batching import Sample
from copd_megatron.trainer.forward import Runner
from copd_megatron.trainer.learner import Learner
from copd_megatron.trainer.milestones import Milestones
from copd_megatron.trainer.opd_phase import CrossBatch, cross_metrics
from copd_megatron.trainer.rlvr_phase import NativeBatch, group_tokens, native_metrics
from copd_megatron.trainer.scoring import Scoring
from copd_megatron.trainer.step_metrics import BUSY_PHASES, StepMetrics, Sums, bring_deltas, measured
from copd_megatron.trainer.stop import StopRequest
from copd_megatron.types import Edge

log = logging.getLogger(__name__)


class Trainer:
    """Runs the schedule from ``step`` on. Built by ``trainer.build``."""

    def __init__(self, config: RunConfig, groups: Groups, runner: Runner, collector: Collector,
                 native: NativeBatch, cross: CrossBatch, scoring: Scoring, learner: Learner,
                 schedule: Schedule, milestones: Milestones, timers: Timers, step: int = 0):
        self.config, self.groups, self.runner, self.collector = config, groups, runner, collector
        self.native, self.cross, self.scoring, self.learner = native, cross, scoring, learner
        self.schedule, self.milestones, self.timers, self.step = schedule, milestones, timers, step
        self.experts = list(config.experts)

    def run(self) -> None:
        """Train to the end of the schedule, or to a stop request; what was trained is saved either way."""
        self._announce()
        with StopRequest(self.groups) as stop, self.milestones:
            self.milestones.before()
            stopped = stop.requested()
            while self.step < self.schedule.total_steps and not stopped:
                phase = self.schedule.phase(self.step)
                metrics = self.train_step(self.step, phase)
                self.step += 1
                self.milestones.after_step(self.step, phase, metrics)
                stopped = stop.requested()
            if stopped:
                self.milestones.interrupted()
            else:
                self.milestones.finished()

    def train_step(self, step: int, phase: str) -> dict[str, float]:
        """One update of every hosted expert; the step's metrics, the same on every rank."""
        with self.runner.prefill.lower_states.step():
            return self._train_step(step, phase)

    def _train_step(self, step: int, phase: str) -> dict[str, float]:
        numbers, timers = StepMetrics(self.groups), self.timers
        edges = self.schedule.edges(step)
        samples = self.collect(step, edges, numbers)
        with timers("score"):
            numbers.add(self.scoring.score(samples, step, edges, timers))
        numbers.add(self.runner.work("score"))
        with timers("update"):
            numbers.add(self.learner.update(samples, self.schedule.training(step), timers))
        numbers.add(self.runner.work("update"))
        numbers.add_busy({part: timers.seconds(part) for part in BUSY_PHASES})
        bring_deltas(samples)
        numbers.add_deltas(samples)
        with timers("score"):
            numbers.add(self.agreement(step, samples))
        numbers.add(self.runner.prefill.work())
        self.milestones.record_rollouts(step, phase, samples)
        metrics = numbers.reduce()
        self.schedule.observe(step, measured(metrics, self.experts))
        return metrics

    def collect(self, step: int, edges: Sequence[Edge], numbers: StepMetrics) -> list[Sample]:
        """Native and, in OPD steps, cross samples of the hosted experts: one batch for the engine."""
        native, cross = self.native.requests(step), self.cross.requests(step, edges)
        reusing = bool(edges) and self.config.opd.rollouts == "native"
        with self.timers("rollout"):
            sampled = native if reusing else native + cross
            groups = self.collector.collect([a.request for a in sampled], graded=len(native))
            native_groups, cross_groups = groups[:len(native)], groups[len(native):]
            if reusing:
                with self.timers("exchange"):
                    cross_groups = self.cross.reused(cross, native, native_groups)
            replaced = self.native.resample(step, native, native_groups, self.collector)
        samples = self.native.samples(native, native_groups)
        crossing = self.cross.samples(cross, cross_groups)
        numbers.add(native_metrics(samples, native_groups))
        numbers.add(cross_metrics(crossing))
        numbers.add(group_tokens(native + cross, native_groups + cross_groups))
        numbers.add({f"{e}/resampled_groups": (float(n), 0.0) for e, n in replaced.items()})
        numbers.add(self.runner.prefill.lower_states.work())
        numbers.add({"tokens/step": (float(sum(s.length for s in samples + crossing)), 0.0)})
        if reusing:
            numbers.add({"tokens/reused": (float(sum(s.length for s in crossing)), 0.0)})
        return samples + crossing

    def agreement(self, step: int, samples: Sequence[Sample]) -> Sums:
        """Overlap and symmetric KL of all pairs after the update, every few steps and where a phase ends."""
        config = self.config.metrics
        if len(self.experts) < 2 or not (self.schedule.ends_phase(step) or step % config.overlap_every == 0):
            return {}
        with gathered_adapters(self.runner.backbone.bank, self.groups, self.experts):
            sums = measure_agreement(self.runner, samples, self.experts, config.overlap_k, config.overlap_tokens,
                                     self.config.rollout.temperature, self.config.optimizer.microbatch_tokens)
        self.runner.work("score")  # measuring is no part of the method's work
        return sums

    def _announce(self) -> None:
        if self.groups.is_main and self.learner.one_update:
            log.info("rlvr.minibatches_per_rollout x rlvr.epochs = 1: every ratio is exactly 1, so clipping "
                     "is inert")
