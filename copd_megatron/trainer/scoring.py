"""Everything that is known about samples before the update: one pass without gradient, then the exchange.

Lanes of one pass: the backbone (KL is always logged), a frozen KL reference, the policy itself where several
updates follow, and every teacher that this replica hosts, for its own students and for those elsewhere; or,
where adapters travel instead, every teacher of its own students. Signal ``student_topk`` takes a pass of the
students before it. Teachers are scored with the weights they have at the start of the step. A lane's states pass the
head once, for what is asked of that lane, and those of signal ``full`` not at all: their student multiplies them.
"""
from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor

from copd_megatron.config.losses import OpdConfig, RlvrConfig
from copd_megatron.config.rollout import RolloutConfig
from copd_megatron.exchange.gather import gathered_teachers
from copd_megatron.exchange.payload import Codec, Kind, Signal
from copd_megatron.exchange.request import KINDS, ScoreRequest
from copd_megatron.exchange.scatter import Exchange
from copd_megatron.exchange.transport import StepBytes, adapter_bytes
from copd_megatron.exchange.wire import Wire
from copd_megatron.metrics.timers import Timers
from copd_megatron.model.shared_prefix import Pack
from copd_megatron.model.vocab_parallel import score
from copd_megatron.parallel.groups import Groups
from copd_megatron.trainer.batching import Lane, Microbatch, Sample, make_microbatches
from copd_megatron.trainer.forward import Runner
from copd_megatron.trainer.opd_phase import CrossBatch
from copd_megatron.trainer.step_metrics import Sums
from copd_megatron.types import BACKBONE, Completion, Edge, Segment

log = logging.getLogger(__name__)

REFERENCE = "kl_reference"
"""Slot of the frozen adapter that ``rlvr.kl_reference`` names."""
Key = tuple[Sample, str | None]
"""Of a lane: the sample and the policy."""


@dataclass(frozen=True, eq=False)
class _Scored:
    """A lane's scores, [R] each."""

    logprobs: Tensor | None = None
    topk_ids: Tensor | None = None
    topk_logprobs: Tensor | None = None
    """At the lane's own ids or, ``student_topk``, at the student's."""
    hidden: Tensor | None = None


class Scoring:
    """Fills ``old_logprobs``, ``backbone_logprobs``, ``reference_logprobs`` and ``signal`` of samples."""

    def __init__(self, runner: Runner, groups: Groups, cross: CrossBatch, rlvr: RlvrConfig, opd: OpdConfig,
                 rollout: RolloutConfig, microbatch_tokens: int, transport: str = "auto", checked: bool = False):
        """``transport``: ``exchange.transport``; ``checked``: ``parallel.debug_checks``."""
        self.runner, self.groups, self.cross = runner, groups, cross
        self.rlvr, self.opd, self.rollout = rlvr, opd, rollout
        self.microbatch_tokens, self.transport, self.checked = microbatch_tokens, transport, checked
        self._announced: str | None = None

    def score(self, samples: Sequence[Sample], step: int, edges: Sequence[Edge], timers: Timers) -> Sums:
        """Score all samples in place. All replicas call it together: signals cross between them.

        Returns:
            Metrics of the exchange; none where all experts live together.
        """
        crossing = [s for s in samples if not s.is_native]
        asked = [ScoreRequest(s.edge.teacher, s.edge.student, s.slot, tuple(s.completion.token_ids), s.edge.signal)
                 for s in crossing]
        codecs = {kind: self._codec(kind) for kind in KINDS if any(e.signal == kind for e in edges)}
        taken, sums = self._choose(asked, edges, codecs)
        scored = self._score_students(crossing) if "student_topk" in codecs else {}
        own = [lane for lane in self._own_lanes(samples) if _key(lane) not in scored]
        with ExitStack() as gathered, timers("exchange"):
            if taken == "gather_adapters":
                wire = Wire(self.groups.exchange, self.checked)
                gathered.enter_context(gathered_teachers(self.runner.backbone.bank, self.groups, edges, wire))
            at_home = not edges or taken == "gather_adapters"
            exchange = Exchange.open(asked, self.groups, at_home, self.checked)
            ids: list[Tensor | None] = [None] * len(exchange.to_score)
            if "student_topk" in codecs and self.groups.is_last_stage:
                exchange, ids = exchange.tell_ids([scored[s, s.expert].topk_ids if s.edge.signal == "student_topk"
                                                   else None for s in crossing], self._topk())
            guests = self._guests(exchange.to_score, step, edges)
            with timers("score"):
                own_scores, returned = self._pass(own, guests, exchange, ids, codecs, timers)
        scored |= own_scores
        self._fill(samples, crossing, scored, returned)
        return sums

    def _fill(self, samples: Sequence[Sample], crossing: Sequence[Sample],
              scored: Mapping[Key, _Scored], returned: Sequence[Signal]) -> None:
        """Hand every sample what is known about it; on the last stage, elsewhere nothing is."""
        if not self.groups.is_last_stage:
            return
        for sample, signal in zip(crossing, returned, strict=True):
            sample.signal = signal
        several = self.rlvr.minibatches_per_rollout * self.rlvr.epochs > 1
        for sample in samples:
            own, backbone, reference = (scored.get((sample, p)) for p in (sample.expert, None, REFERENCE))
            sample.old_logprobs = own.logprobs if own and several else None
            sample.backbone_logprobs = backbone.logprobs if backbone else None
            sample.reference_logprobs = reference.logprobs if reference else None

    def _choose(self, asked: Sequence[ScoreRequest], edges: Sequence[Edge],
                codecs: Mapping[Kind, Codec]) -> tuple[str, Sums]:
        """The step's transport, a function of the step's requests alone, and the bytes that decided."""
        if not edges:
            self._announced = None
        if not edges or self.groups.layout.replicas == 1:
            return "scatter", {}
        count = StepBytes.count(asked, edges, self.groups, codecs, adapter_bytes(self.runner.backbone.bank))
        taken = count.cheaper if self.transport == "auto" else self.transport
        if self.groups.is_main and taken != self._announced:
            log.info("exchange.transport=%s: %s; this step scatter moves %d bytes, gather_adapters %d",
                     self.transport, taken, count.scatter, count.gather_adapters)
        self._announced = taken
        return taken, {"exchange/scatter_bytes": (float(count.scatter), 1.0),
                       "exchange/gather_adapters_bytes": (float(count.gather_adapters), 1.0),
                       "exchange/moved_bytes": (float(getattr(count, taken)), 1.0)}

    def _score_students(self, crossing: Sequence[Sample]) -> dict[Key, _Scored]:
        """The students themselves, before the exchange, where their own top-k ids are what is asked about."""
        lanes = [Lane(s, s.expert) for s in crossing if s.edge.signal == "student_topk"]
        batches = make_microbatches(lanes, self.runner.backbone.rules, self.microbatch_tokens)
        return self._run(batches, dict.fromkeys(map(_key, lanes), "topk"))

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

    def _guests(self, requests: Sequence[ScoreRequest], step: int, edges: Sequence[Edge]) -> list[Lane]:
        """The completions to score, on prompts that any rank can make."""
        lanes = []
        for request in requests:
            prompt = self.cross.prompt(edges, request.teacher, request.student, step, request.prompt)
            completion = Completion(prompt, request.student, 0, [Segment(list(request.token_ids))])
            teacher = None if request.teacher == BACKBONE else request.teacher
            lanes.append(Lane(Sample(completion, request.student), teacher))
        return lanes

    def _pass(self, own: Sequence[Lane], guests: Sequence[Lane], exchange: Exchange, ids: Sequence[Tensor | None],
              codecs: Mapping[Kind, Codec], timers: Timers) -> tuple[dict[Key, _Scored], list[Signal]]:
        """Score own lanes and the requests; answers leave while later microbatches are scored.

        Returns:
            Scores of all lanes and the signals that came back; nothing on other stages than the last.
        """
        requests = exchange.to_score
        # Guests first: all replicas then have something to send from their first microbatch on.
        batches = make_microbatches([*guests, *own], self.runner.backbone.rules, self.microbatch_tokens)
        number = {lane: index for index, lane in enumerate(guests)}
        rounds = [held for batch in batches if (held := [number[lane] for lane in batch.lanes if lane in number])]
        if not self.groups.is_last_stage:
            return self._run(batches), []
        round_of = {index: round_ for round_, held in enumerate(rounds) for index in held}
        with timers("exchange"):
            answers = exchange.answers(codecs, [round_of[index] for index in range(len(requests))])

        def answer(batch: Microbatch, scores: Mapping[Key, _Scored]) -> None:
            held = [number[lane] for lane in batch.lanes if lane in number]
            if held:
                with timers("exchange"):
                    answers.send({i: self._signal(scores[_key(guests[i])], requests[i], ids[i]) for i in held})

        kinds = {_key(guest): request.kind for guest, request in zip(guests, requests)}
        scored = self._run(batches, kinds, dict(zip(kinds, ids)), answer)
        with timers("exchange"):
            return scored, answers.finish()

    def _run(self, batches: Sequence[Microbatch], kinds: Mapping[Key, Kind] | None = None,
             ids: Mapping[Key, Tensor | None] | None = None,
             then: Callable[[Microbatch, dict[Key, _Scored]], None] | None = None) -> dict[Key, _Scored]:
        """Score microbatches; results on the last stage only.

        Args:
            kinds: lane -> the kind of signal that its scores are for; ``sampled`` where nothing is said.
            ids: lane -> [R, K] ids to score, of kind ``student_topk``.
            then: called after each microbatch with its scores.
        """
        def at_end(hidden: Tensor, pack: Pack, batch: Microbatch):
            keys = [_key(lane) for lane in batch.lanes]
            asked = [(kinds or {}).get(key, "sampled") for key in keys]
            rows = list(zip(keys, hidden.split(pack.leaf_lengths), pack.target_ids.split(pack.leaf_lengths)))
            found: dict[Key, _Scored] = {}
            for kind in dict.fromkeys(asked):
                own, states, targets = zip(*(row for row, its in zip(rows, asked) if its == kind))
                found |= zip(own, self._of_kind(kind, states, targets, [(ids or {}).get(key) for key in own]))
            if then is not None:
                then(batch, found)
            return None, found

        return {key: value for part in self.runner.score(batches, at_end) for key, value in part.items()}

    def _of_kind(self, kind: Kind, states: Sequence[Tensor], targets: Sequence[Tensor],
                 ids: Sequence[Tensor | None]) -> list[_Scored]:
        """Scores of lanes, one each, from their hidden states [R, H]."""
        if kind == "full":
            return [_Scored(hidden=own) for own in states]
        scores = score(torch.cat(states), self.runner.backbone.head, torch.cat(targets),
                       topk=self._topk() if kind == "topk" else 0,
                       at_ids_TK=torch.cat(ids) if kind == "student_topk" else None,
                       temperature=self.rollout.temperature)
        columns = (scores.logprobs_T, scores.topk_ids_TK,
                   scores.at_logprobs_TK if kind == "student_topk" else scores.topk_logprobs_TK)
        lengths = [len(own) for own in states]
        return [_Scored(*row) for row in zip(*([None] * len(lengths) if column is None else column.split(lengths)
                                               for column in columns))]

    def _topk(self) -> int:
        return min(self.opd.topk, self.runner.backbone.spec.vocab_size)

    def _codec(self, kind: str) -> Codec:
        backbone = self.runner.backbone
        return Codec(kind, self.opd.wire_dtype, self._topk(), backbone.spec.hidden_size,
                     exact=backbone.dtype == torch.float64)

    @staticmethod
    def _signal(scored: _Scored, request: ScoreRequest, ids: Tensor | None) -> Signal:
        """What the teacher says about one completion, before the codec rounds it; ``ids``: the student's."""
        return Signal(request.kind, scored.logprobs, scored.topk_ids if ids is None else ids, scored.topk_logprobs,
                      hidden_TH=scored.hidden)


def _key(lane: Lane) -> Key:
    return lane.sample, lane.policy
