"""The embedded rollout engine: decodes on the training shards, many experts and prompts in one batch.

A wave of at most ``rollout.decode_lanes`` lanes: its distinct prefixes are evaluated once (per expert above
``adapter.first_layer`` in scope ``sequence``, else for all) or found in the prefix store (``prefill``), then all
its lanes step in lockstep. A lane starts with the forced tokens that training's packs start a leaf with, so
log-probs are the trainer's up to rounding.

Pipeline stages relay hidden states; the last one samples and broadcasts, so every rank of the replica knows
every token and takes the same turns. Context ranks have whole prompts of their own and tell each other what was
answered; nothing is split while decoding, so sequence parallelism rests too. MoE experts that are spread over context
ranks keep these in step (``lockstep``).
"""
from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from copd_megatron.config.rollout import RolloutConfig
from copd_megatron.model.backbone import Backbone
from copd_megatron.model.shared_prefix import StateKey
from copd_megatron.parallel.collectives import all_gather_objects
from copd_megatron.parallel.groups import Groups
from copd_megatron.platform import device, on_device
from copd_megatron.rollout.decode_state import Answers, DecodeState
from copd_megatron.rollout.engine import EngineCounters, Request, VisualSource
from copd_megatron.rollout.kv_cache import DecodeAttention, PrefixBlock
from copd_megatron.rollout.lanes import Wave, deal_requests, plan_waves
from copd_megatron.rollout.lower_states import BorderRows, LowerStates
from copd_megatron.rollout.prefill import Prefill
from copd_megatron.rollout.relay import StageRelay
from copd_megatron.rollout.sampling import Sampled, sample
from copd_megatron.types import Completion, Prompt, Segment, UserError

COMPACT_AT = 0.75
"""Ended lanes leave the batch once at most this share of it still runs: copying the caches then pays."""


NOBODY = np.zeros(0, np.int64)


class _Answer(NamedTuple):
    """One new segment, as context ranks tell each other."""

    request: int
    """Index among the requests of the call."""
    sample: int
    token_ids: list[int]
    logprobs: list[float]
    sampled_logprobs: list[float]
    finish: str


class MegatronEngine:
    """A ``RolloutEngine`` over a backbone and its adapters; all ranks of the replica make the same calls."""

    def __init__(self, backbone: Backbone, groups: Groups, config: RolloutConfig, seed: int):
        self.backbone, self.groups, self.config, self.seed = backbone, groups, config, seed
        self.counters = EngineCounters()
        self.device, self.rules = device(), backbone.rules
        self.lower_states = LowerStates(backbone, groups, config.lower_states_bytes)
        self.prefill = Prefill(backbone, groups, config, self.lower_states)
        self.relay = StageRelay(backbone, groups)

    @torch.no_grad()
    def generate(self, requests: Sequence[Request],
                 visual: VisualSource | None = None) -> list[list[Completion]]:
        """See ``RolloutEngine.generate``."""
        for request in requests:
            self._check(request, visual)
        # A longer answer takes the place of what it goes on from.
        self.lower_states.forget([_state_key(r.prompt, r.prior[:-1]) for r in requests if r.prior])
        rank_of = deal_requests(requests, self.groups.layout.cp)
        mine = [index for index, rank in enumerate(rank_of) if rank == self.groups.coords.cp]
        computed, answers = self._answer([requests[index] for index in mine], visual)
        self.relay.lockstep.finish()
        own = computed, [answer._replace(request=mine[answer.request]) for answer in answers], self.lower_states.news()
        completions: list[list[Completion]] = [[] for _ in requests]
        everybody = all_gather_objects(own, self.groups.cp)
        self.lower_states.heard([kept for _, _, kept in everybody])
        for computed, answers, _ in everybody:
            self.counters.prompt_tokens_computed += computed
            for answer in answers:
                completions[answer.request].append(_completion(requests[answer.request], answer))
                self.counters.decoded_tokens += len(answer.token_ids)
        for request, group in zip(requests, completions):
            group.sort(key=lambda completion: completion.sample)
            self.counters.prompt_tokens_asked += len(group) * len(request.prompt.token_ids)
            self.counters.prompt_tokens_computed += len(group) * self.rules.forced(request.prompt)
        return completions

    def _answer(self, requests: Sequence[Request], visual: VisualSource | None) -> tuple[float, list[_Answer]]:
        """Prompt tokens evaluated, averaged over the layers, and the answers of all samples."""
        found: list[_Answer] = []
        prefixes, blocks, before = None, [], self.prefill.computed_tokens
        self.prefill.forget_old()
        for wave in plan_waves(requests, self.rules, self.config.decode_lanes):
            if wave.prefixes is not prefixes:
                prefixes, blocks = wave.prefixes, []  # Free the last wave's before the next is computed.
                blocks = self.prefill.blocks(prefixes, visual)
            border = BorderRows(len(wave)) if self.lower_states.recording else None
            answers = self._decode(wave, requests, blocks, border)
            own = list(_answers(wave, answers))
            if border is not None:
                self._keep(own, requests, answers.fed, border)
            found += own
        return self.prefill.computed_tokens - before, found

    def _keep(self, found: Sequence[_Answer], requests: Sequence[Request], fed: np.ndarray, border: BorderRows) -> None:
        """Keep the states of a wave's lanes, in lane order."""
        for lane, answer in enumerate(found):
            request = requests[answer.request]
            key = _state_key(request.prompt, (*request.prior, Segment(answer.token_ids)))
            self.lower_states.keep(key, int(fed[lane]), border.ended.pop(lane, None))

    def _check(self, request: Request, visual: VisualSource | None) -> None:
        """Refuse a request before any work is done."""
        prompt, vocabulary = request.prompt, self.backbone.spec.vocab_size
        policies = self.backbone.bank.slots
        if request.expert is not None and request.expert not in policies:
            raise UserError(f"rollout: the policy {request.expert!r} was asked for; this replica holds "
                            f"{', '.join(map(repr, policies))} and the backbone; ask one that hosts it")
        length, limit = len(prompt.token_ids), self.config.max_prompt_tokens
        if length > limit:
            raise UserError(f"rollout.max_prompt_tokens: prompt {prompt.key!r} has {length} tokens; allowed "
                            f"are {limit}; raise the limit or leave the prompt out")
        if not 1 <= self.rules.forced(prompt) <= length:
            raise UserError(f"adapter.scope: completion, but prompt {prompt.key!r} of {length} tokens has a "
                            f"generation header of {prompt.header_tokens}; at least 1, adapted from there "
                            "on; use a chat template with a generation header, or adapter.scope=sequence")
        prior = sum(len(segment.token_ids) for segment in request.prior)
        self.rules.check_length(prompt, prior + request.params.max_tokens - 1)
        outside = [token for token in request.params.stop_token_ids if not 0 <= token < vocabulary]
        if outside:
            raise ValueError(f"stop_token_ids: {outside}; ids of this vocabulary are 0 to {vocabulary - 1}")
        if len(prompt.visual_index) and visual is None:
            raise ValueError(f"visual: not given, but prompt {prompt.key!r} has media")

    def _decode(self, wave: Wave, requests: Sequence[Request], blocks: Sequence[PrefixBlock],
                border: BorderRows | None) -> Answers:
        """Step all lanes of a wave until each has ended; ``border`` takes their states where adapters begin."""
        state = DecodeState(wave, requests, self.rules, self.seed, self.device)
        attention = DecodeAttention(blocks, wave.trunk, self.device, self.backbone.backend)
        experts, rows = wave.experts, state.first_rows
        while True:
            token_ids, position_ids = state.inputs(attention.own.length)
            attention.own.advance(rows)
            hidden = self._forward(token_ids, position_ids, attention, _routing(experts, rows), border)
            fed = attention.own.length
            sampled = self._sample(hidden, state, fed, rows)
            running = state.record(fed, sampled)
            if running == 0:
                answers = state.answers()
                if border is not None:
                    border.keep(NOBODY, answers.fed)
                return answers
            if running <= COMPACT_AT * len(state.lanes):
                kept = state.keep_running()
                attention.keep(kept)
                if border is not None:
                    border.keep(kept, state.fed)
                experts = _kept_experts(wave.experts, state.lanes)
            rows = 1

    def _forward(self, token_ids: Tensor, position_ids: Tensor, attention: DecodeAttention,
                 routing: Sequence[tuple[str, slice]], border: BorderRows | None) -> Tensor:
        """[L c, 1, H] of this stage."""
        at_border = None if border is None else border.append
        return self.relay.run([len(token_ids)] * len(self.backbone.chunks), lambda layers: self.backbone.forward_step(
            token_ids, position_ids, attention, routing, layers, at_border))

    def _sample(self, hidden: Tensor, state: DecodeState, fed: int, rows: int) -> Tensor:
        """[3, L] float64 for ``DecodeState.record``, the same on every rank of the replica."""
        lanes = len(state.lanes)
        sampled = torch.zeros(3, lanes, dtype=torch.float64, device=self.device)
        if self.groups.is_last_stage:
            last = hidden[:, 0].unflatten(0, (lanes, rows))[:, -1]
            uniform, ready, how = state.uniforms(fed), state.ready(fed), state.how
            if ready is None:
                sampled = _stack(sample(last, self.backbone.own_head, how, uniform, self.config.temperature))
            elif len(ready):
                where = on_device(ready, self.device)
                drawn = sample(last.index_select(0, where), self.backbone.own_head, how.select(ready),
                               uniform.index_select(0, where), self.config.temperature)
                sampled.index_copy_(1, where, _stack(drawn))
        if self.groups.layout.pp > 1:
            dist.broadcast(sampled, src=self.groups.last_stage_rank, group=self.groups.pp)
        return sampled


def _routing(experts: Sequence[tuple[str | None, slice]], rows: int) -> list[tuple[str, slice]]:
    """(expert, rows of the step) from lanes, ``rows`` rows each."""
    return [(expert, slice(lanes.start * rows, lanes.stop * rows))
            for expert, lanes in experts if expert is not None]


def _kept_experts(experts: Sequence[tuple[str | None, slice]],
                  lanes: np.ndarray) -> list[tuple[str | None, slice]]:
    """Each policy's place in the batch when only ``lanes`` (ascending) of the wave are left."""
    ends = [(expert, lanes.searchsorted([part.start, part.stop]).tolist()) for expert, part in experts]
    return [(expert, slice(start, stop)) for expert, (start, stop) in ends if start < stop]


def _stack(drawn: Sampled) -> Tensor:
    """[3, L] float64; ids stay exact."""
    return torch.stack([column.double() for column in drawn])


def _answers(wave: Wave, answers: Answers) -> Iterator[_Answer]:
    """What every lane of a wave answered."""
    columns = answers.token_ids, answers.logprobs, answers.sampled_logprobs
    for lane, (index, number) in enumerate(zip(wave.request.tolist(), wave.sample.tolist())):
        segment = (column[lane, :answers.lengths[lane]].tolist() for column in columns)
        yield _Answer(index, number, *segment, "stop" if answers.stopped[lane] else "length")


def _state_key(prompt: Prompt, segments: Sequence[Segment]) -> StateKey:
    """Name of the states of a completion of these segments."""
    return prompt.content_hash, tuple(token for segment in segments for token in segment.token_ids)


def _completion(request: Request, answer: _Answer) -> Completion:
    """The request's earlier segments and the new one."""
    new = Segment(answer.token_ids, "policy", answer.logprobs, answer.sampled_logprobs)
    prior = [Segment(list(s.token_ids), s.origin, list(s.logprobs), list(s.sampled_logprobs))
             for s in request.prior]
    return Completion(request.prompt, request.expert, answer.sample, [*prior, new], answer.finish)
