"""What the frozen head says about a microbatch under the policies being updated; each token's logits are made once.

samples                              what                                              products with the head
native, or signal ``sampled``        log-probs                                         2; 3 with the entropy's gradient
signal ``topk``, ``student_topk``    also those at the teacher's ids: a divergence     2
signal ``full``                      a divergence, and both log-probs from its logits  3, the teacher's among them

Products are those of forward and backward. Samples of one line pass the head together.

Shape suffixes: N completion tokens of the microbatch, T of the samples of one line, H hidden.
"""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from copd_megatron.config.losses import OpdConfig
from copd_megatron.exchange.payload import Signal
from copd_megatron.losses.topk_kl import topk_divergence
from copd_megatron.model.backbone import Backbone
from copd_megatron.model.full_divergence import full_divergence
from copd_megatron.model.vocab_parallel import score
from copd_megatron.trainer.batching import Sample
from copd_megatron.trainer.rows import Rows

Columns = tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]
"""Log-probs, entropy, divergence and the teacher's log-probs, [T] each; None for what is not made."""


@dataclass(frozen=True, eq=False)
class PolicyScores:
    """Of every token under the policy that its sample updates, [N] each."""

    logprobs_N: Tensor
    """Log-probs of the completions' tokens; differentiable but for signal ``full``."""
    entropy_N: Tensor
    """Nats; differentiable on native tokens if that was asked for; 0 on tokens of top-k and full signals."""
    divergence_N: Tensor
    """Nats from the teacher, for top-k and full signals, where it is differentiable; 0 on other tokens."""
    teacher_logprobs_N: Tensor
    """The teacher's, without a graph; 0 on native tokens."""


class PolicyScorer:
    """Callable for the loss: (rows, hidden states [N, H], tokens [N]) -> scores."""

    def __init__(self, backbone: Backbone, opd: OpdConfig, temperature: float, entropy_gradient: bool):
        self.backbone, self.opd, self.temperature = backbone, opd, temperature
        self.entropy_gradient = entropy_gradient

    def __call__(self, rows: Rows, hidden_NH: Tensor, target_ids_N: Tensor) -> PolicyScores:
        evaluate = {"plain": self._plain, "entropy": self._entropy, "topk": self._topk, "full": self._full}
        kinds = [self._kind(sample) for sample in rows.samples]
        columns: list[list[Tensor | None]] = [[None] * len(kinds) for _ in range(3)]
        columns.append([s.signal and s.signal.logprobs_T for s in rows.samples])
        for kind in dict.fromkeys(kinds):
            chosen = [i for i, own in enumerate(kinds) if own == kind]
            found = evaluate[kind](rows.of_samples(chosen, hidden_NH), rows.of_samples(chosen, target_ids_N),
                                   [rows.samples[i].signal for i in chosen])
            for column, part in zip(columns, found):
                if part is not None:
                    for i, own in zip(chosen, part.split([rows.lengths[i] for i in chosen])):
                        column[i] = own
        zeros_N = torch.zeros_like(rows.weights_N)
        return PolicyScores(*(rows.joined(column, zeros_N) for column in columns))

    def _kind(self, sample: Sample) -> str:
        if sample.signal is None or sample.signal.kind == "sampled":
            return "entropy" if sample.is_native and self.entropy_gradient else "plain"
        return "full" if sample.signal.kind == "full" else "topk"

    def _plain(self, hidden_TH: Tensor, ids_T: Tensor, signals: Sequence[Signal | None],
               entropy_gradient: bool = False) -> Columns:
        found = score(hidden_TH, self.backbone.head, ids_T, temperature=self.temperature, entropy=True,
                      entropy_gradient=entropy_gradient)
        return found.logprobs_T, found.entropy_T, None, None

    def _entropy(self, hidden_TH: Tensor, ids_T: Tensor, signals: Sequence[Signal | None]) -> Columns:
        return self._plain(hidden_TH, ids_T, signals, entropy_gradient=True)

    def _topk(self, hidden_TH: Tensor, ids_T: Tensor, signals: Sequence[Signal]) -> Columns:
        found = score(hidden_TH, self.backbone.head, ids_T, temperature=self.temperature,
                      at_ids_TK=torch.cat([s.topk_ids_TK for s in signals]))
        return found.logprobs_T, None, topk_divergence(
            found.at_logprobs_TK, torch.cat([s.topk_logprobs_TK for s in signals]),
            torch.cat([s.log_tail_T for s in signals]), self.opd.divergence, self.opd.jsd_weight,
            self.backbone.kernels), None

    def _full(self, hidden_TH: Tensor, ids_T: Tensor, signals: Sequence[Signal]) -> Columns:
        found = full_divergence(hidden_TH, torch.cat([s.hidden_TH for s in signals]), self.backbone.head,
                                self.opd.divergence, temperature=self.temperature, jsd_weight=self.opd.jsd_weight,
                                target_ids_T=ids_T)
        return found.logprobs_T, None, found.value_T, found.teacher_logprobs_T
