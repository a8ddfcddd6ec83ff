"""The update: from samples to one optimizer step per hosted expert, or several with minibatches and epochs."""
from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence

import numpy as np
import torch

from copd_megatron.config.losses import OpdConfig, RlvrConfig
from copd_megatron.config.rollout import RolloutConfig
from copd_megatron.losses.reduction import token_weights
from copd_megatron.metrics.timers import Timers
from copd_megatron.parallel.collectives import reduce_scalars
from copd_megatron.parallel.groups import Groups
from copd_megatron.trainer.batching import Lane, Sample, make_microbatches
from copd_megatron.trainer.forward import Runner
from copd_megatron.trainer.objective import LossFunction, Objective
from copd_megatron.trainer.optimizer import ExpertOptimizer
from copd_megatron.trainer.step_metrics import Sums, add_sums


class Learner:
    """Updates every hosted expert. All ranks of all replicas that host an expert update it together."""

    def __init__(self, runner: Runner, groups: Groups, optimizers: Mapping[str, ExpertOptimizer],
                 rlvr: RlvrConfig, opd: OpdConfig, rollout: RolloutConfig, microbatch_tokens: int,
                 loss_function: LossFunction | None = None):
        self.runner, self.groups, self.optimizers = runner, groups, optimizers
        self.rlvr, self.rollout, self.microbatch_tokens = rlvr, rollout, microbatch_tokens
        self.objective = Objective(runner.backbone, rlvr, opd, rollout.temperature, loss_function)

    @property
    def one_update(self) -> bool:
        """Whether the old policy is the one being differentiated, so that every ratio is exactly 1."""
        return self.rlvr.minibatches_per_rollout * self.rlvr.epochs == 1

    def update(self, samples: Sequence[Sample], training: Collection[str] | None = None,
               timers: Timers | None = None) -> Sums:
        """All updates of one step; native and cross samples of a minibatch make one update.

        Args:
            training: experts that are updated; None: all. The others stay as they are, moments included.
            timers: the run's, for phase "optimizer".
        """
        sums: Sums = {}
        timers = timers or Timers()
        count = self.rlvr.minibatches_per_rollout
        experts = [e for e in self.optimizers if training is None or e in training]
        for _ in range(self.rlvr.epochs):
            for number in range(count):
                own = [s for s in samples if s.slot * count // s.slots == number]
                add_sums(sums, self._one_update(own, experts, timers))
        return sums

    def _one_update(self, samples: Sequence[Sample], experts: Sequence[str], timers: Timers) -> Sums:
        for expert in experts:
            self.optimizers[expert].zero_grad()
        self._weigh(samples, experts)
        batches = make_microbatches([Lane(s, s.expert) for s in samples], self.runner.backbone.rules,
                                    self.microbatch_tokens)
        sums: Sums = {}
        for result in self.runner.train(batches, self.objective):
            add_sums(sums, result)
        with timers("optimizer"):
            for expert in experts:
                numbers = self.optimizers[expert].step()
                add_sums(sums, {f"{expert}/{name}": (value, 1.0) for name, value in numbers.items()})
        return sums

    def _weigh(self, samples: Sequence[Sample], experts: Sequence[str]) -> None:
        """Token weights from the totals over all of an expert's replicas."""
        by_expert = defaultdict(list)
        for sample in samples:
            by_expert[sample.expert].append(sample)
        for expert in experts:
            own = by_expert[expert]
            totals = reduce_scalars({"sequences": len(own), "tokens": sum(int(s.loss_mask.sum()) for s in own)},
                                    self.groups.adapter[expert])
            if not own:
                continue
            lengths = [s.length for s in own]
            mask = torch.from_numpy(np.concatenate([s.loss_mask for s in own]))
            weights = token_weights(torch.tensor(lengths), self.rlvr.reduction, int(totals["sequences"]),
                                    int(totals["tokens"]), self.rollout.max_completion_tokens, loss_mask_T=mask,
                                    dtype=torch.float64)
            for sample, part in zip(own, weights.split(lengths)):
                sample.weights = part.numpy()
