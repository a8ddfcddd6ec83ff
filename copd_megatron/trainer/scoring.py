"""Everything that is known about samples before the update: one pass without gradient, then the exchange.

Lanes of one pass: the backbone (KL is always logged), a frozen KL reference, the policy itself where several
updates follow, and every teacher that this replica hosts, for its own students and for those elsewhere.
Teachers are scored with the weights they have at the start of the step.
"""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from copd_megatron.config.losses import OpdConfig, RlvrConfig
from copd_megatron.config.rollout import RolloutConfig
from copd_megatron.exchange.payload import Codec, Signal
from copd_megatron.exchange.scatter import Exchange, ScoreRequest
from copd_megatron.metrics.timers import Timers
from copd_megatron.model.shared_prefix import Pack
from copd_megatron.model.vocab_parallel import score
from copd_megatron.parallel.groups import Groups
from copd_megatron.trainer.batching import Lane, Microbatch, Sample, make_microbatches
from copd_megatron.trainer.forward import Runner
from copd_megatron.trainer.opd_phase import CrossBatch
from copd_megatron.types import BACKBONE, Completion, Edge, Segment

REFERENCE = "kl_reference"
"""Slot of the frozen adapter that ``rlvr.kl_reference`` names."""


@dataclass(frozen=True, eq=False)
class _Scored:
    """A lane's scores, [R] each."""

    logprobs: Tensor
    topk_ids: Tensor | None
    topk_logprobs: Tensor | None
    hidden: Tensor | None


class Scoring:
    """Fills ``old_logprobs``, ``backbone_logprobs``, ``reference_logprobs`` and ``signal`` of samples."""

    def __init__(self, runner: Runner, groups: Groups, cross: CrossBatch, rlvr: RlvrConfig, opd: OpdConfig,
                 rollout: RolloutConfig, microbatch_tokens: int):
        self.runner, self.groups, self.cross = runner, groups, cross
        self.rlvr, self.opd, self.rollout = rlvr, opd, rollout
        self.microbatch_tokens = microbatch_tokens

    def score(self, samples: Sequence[Sample], step: int, edges: Sequence[Edge], timers: Timers) -> None:
        """Score all samples in place. All replicas call it together: signals cross between them."""
        crossing = [s for s in samples if not s.is_native]
        with timers("exchange"):
            exchange = Exchange.open([
                ScoreRequest(s.edge.teacher, s.edge.student, s.slot, tuple(s.completion.token_ids),
                             s.edge.signal) for s in crossing], self.groups)
        requests = exchange.to_score
        guests = [Lane(self._guest(request, step, edges), None if request.teacher == BACKBONE else request.teacher)
                  for request in requests]
        kinds = {kind for kind in ("sampled", "topk", "full") if any(e.signal == kind for e in edges)}
        scored = self._pass([*self._own_lanes(samples), *guests], kinds)
        if not self.groups.is_last_stage:
            return
        signals = [self._signal(scored[_key(lane)], request) for lane, request in zip(guests, requests)]
        with timers("exchange"):
            returned = exchange.close(signals, {kind: self._codec(kind) for kind in sorted(kinds)})
        for sample, signal in zip(crossing, returned):
            sample.signal = signal
        for sample in samples:
            own, backbone, reference = (scored.get((sample, p)) for p in (sample.expert, None, REFERENCE))
            sample.old_logprobs = own.logprobs if own else None
            sample.backbone_logprobs = backbone.logprobs if backbone else None
            sample.reference_logprobs = reference.logprobs if reference else None

    def _own_lanes(self, samples: Sequence[Sample]) -> list[Lane]:
        lanes = []
        several = self.rlvr.minibatches_per_rollout * self.rlvr.epochs > 1
        reference = self.rlvr.kl_coef and self.rlvr.kl_reference != "backbone"
        for sample in samples:
            if sample.is_native:
                lanes.append(Lane(sample, None))
                if reference:
                    lanes.append(Lane(sample, REFERENCE))
            if several:
                lanes.append(Lane(sample, sample.expert))
        return lanes

    def _guest(self, request: ScoreRequest, step: int, edges: Sequence[Edge]) -> Sample:
        """The completion to score, on the prompt that any rank can make."""
        prompt = self.cross.prompt(edges, request.teacher, request.student, step, request.prompt)
        completion = Completion(prompt, request.student, 0, [Segment(list(request.token_ids))])
        return Sample(completion, request.student)

    def _pass(self, lanes: Sequence[Lane], kinds: set[str]) -> dict[tuple[Sample, str | None], _Scored]:
        """Score all lanes; results on the last stage only."""
        k = self._topk() if "topk" in kinds else 0

        def at_end(hidden: Tensor, pack: Pack, batch: Microbatch):
            scores = score(hidden, self.runner.backbone.head, pack.target_ids,
                           temperature=self.rollout.temperature, topk=k)
            columns = (scores.logprobs_T, scores.topk_ids_TK, scores.topk_logprobs_TK,
                       hidden if "full" in kinds else None)
            lengths = list(pack.leaf_lengths)
            parts = [[None] * len(lengths) if c is None else c.split(lengths) for c in columns]
            return None, {_key(lane): _Scored(*row) for lane, row in zip(batch.lanes, zip(*parts))}

        batches = make_microbatches(lanes, self.runner.backbone.rules, self.microbatch_tokens)
        return {key: value for part in self.runner.score(batches, at_end) for key, value in part.items()}

    def _topk(self) -> int:
        return min(self.opd.topk, self.runner.backbone.spec.vocab_size)

    def _codec(self, kind: str) -> Codec:
        backbone = self.runner.backbone
        return Codec(kind, self.opd.wire_dtype, self._topk(), backbone.spec.hidden_size,
                     exact=backbone.dtype == torch.float64)

    @staticmethod
    def _signal(scored: _Scored, request: ScoreRequest) -> Signal:
        """What the teacher says about one completion, before the codec rounds it."""
        if request.kind == "topk":
            return Signal("topk", scored.logprobs, scored.topk_ids, scored.topk_logprobs)
        if request.kind == "full":
            return Signal("full", scored.logprobs, hidden_TH=scored.hidden)
        return Signal("sampled", scored.logprobs)


def _key(lane: Lane) -> tuple[Sample, str | None]:
    return lane.sample, lane.policy
