"""Packs through the backbone with Megatron's schedules: one stage or many, with or without backward.

Where no gradient flows into prefixes (scope ``completion``) and there is a store for them, they are taken from it, and
packs hold completions only. What a run of the schedule needs is brought together before it, as its stages must not
wait for each other within; microbatches are dealt out to as many runs as the store's budget makes necessary. What
enters ``adapter.first_layer`` and was kept by the step's rollout is not evaluated again.
"""
from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import torch
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from megatron.core.pipeline_parallel.schedules import (
    forward_backward_no_pipelining,
    forward_backward_pipelining_with_interleaving,
    forward_backward_pipelining_without_interleaving,
)
from torch import Tensor

from copd_megatron.config.model import ModelConfig
from copd_megatron.metrics.timers import Timers
from copd_megatron.model.attention import KV
from copd_megatron.model.backbone import DTYPES, Backbone, Visual
from copd_megatron.model.shared_prefix import Pack, build_pack, pack_tokens
from copd_megatron.model.vision import VisionTower, stage_needs_features
from copd_megatron.parallel.groups import Groups
from copd_megatron.platform import device
from copd_megatron.rollout.prefill import Prefill
from copd_megatron.trainer.batching import Microbatch
from copd_megatron.types import Prompt

T = TypeVar("T")
AtEnd = Callable[[Tensor, Pack, Microbatch], tuple[Tensor | None, Any]]
"""(hidden [N, H], pack, microbatch) -> (loss to differentiate, or None; what to return)."""


class Runner:
    """Runs microbatches and counts the tokens it computed."""

    def __init__(self, backbone: Backbone, groups: Groups, visual: Callable[[Sequence[Prompt]], Visual | None],
                 prefill: Prefill | None = None):
        """``prefill``: of the rollout engine, whose store and kept states serve here too where they can."""
        self.backbone, self.groups, self.visual, self.prefill = backbone, groups, visual, prefill
        self.lower_states = None if prefill is None else prefill.lower_states
        self.on_run: Callable[[Sequence[Microbatch], bool], None] | None = None
        """Hears of every run before it starts: its microbatches, and whether they are differentiated (profiles)."""
        self._tokens, self._naive_tokens, self._kept_tokens, self._lower_tokens = 0.0, 0, 0, 0

    def work(self, part: str) -> dict[str, tuple[float, float]]:
        """(sum, weight) of what was computed since the last call: ``tokens/{part}``, the share that prefix sharing
        saved and, where states are kept from the rollout, the share of tokens that began at ``first_layer``."""
        tokens, naive, kept = float(self._tokens), float(self._naive_tokens), float(self._kept_tokens)
        sums = {f"tokens/{part}": (tokens, 0.0), "tokens/saved_share": (naive - tokens, naive)}
        if self.lower_states is not None and self.lower_states.budget_bytes:
            sums["tokens/kept_share"] = (kept, kept + self._lower_tokens)
        self._tokens, self._naive_tokens, self._kept_tokens, self._lower_tokens = 0.0, 0, 0, 0
        return sums

    def score(self, microbatches: Sequence[Microbatch], at_end: AtEnd) -> list[Any]:
        """Forward only. Returns what ``at_end`` returned per microbatch on the last stage, [] elsewhere."""
        with torch.no_grad():
            return self._run(microbatches, at_end, forward_only=True)

    def train(self, microbatches: Sequence[Microbatch], at_end: AtEnd) -> list[Any]:
        """Forward and backward; gradients add up in the adapters. Returns as ``score``."""
        return self._run(microbatches, at_end, forward_only=False)

    def _run(self, microbatches: Sequence[Microbatch], at_end: AtEnd, forward_only: bool) -> list[Any]:
        if not microbatches:
            return []
        if self.on_run is not None:
            self.on_run(microbatches, not forward_only)
        if self.prefill is None or not self.prefill.serves_training:
            return self._schedule(microbatches, at_end, forward_only)
        results, before = [], self.prefill.computed_tokens
        for part in self._within_budget(microbatches):
            prefixes = {prompt.content_hash: self.prefill.trunk(prompt, None, self.visual)
                        for prompt in self._prompts(part)}
            results += self._schedule(part, at_end, forward_only, prefixes)
        self._tokens += self.prefill.computed_tokens - before
        return results

    def _prompts(self, microbatches: Sequence[Microbatch]) -> list[Prompt]:
        """Distinct prompts that have a prefix."""
        prompts = {group.prompt.content_hash: group.prompt for batch in microbatches for group in batch.groups}
        rules = self.backbone.rules
        return [prompt for prompt in prompts.values() if len(prompt.token_ids) > rules.forced(prompt)]

    def _within_budget(self, microbatches: Sequence[Microbatch]) -> Iterator[list[Microbatch]]:
        """As many microbatches at a time as have their prefixes within the store's budget, at least one."""
        part: list[Microbatch] = []
        sizes: dict[str, int] = {}
        for batch in microbatches:
            more = {p.content_hash: self.prefill.bytes_of(p) for p in self._prompts([batch])}
            if part and sum((sizes | more).values()) > self.prefill.store.budget_bytes:
                yield part
                part, sizes = [], {}
            part.append(batch)
            sizes |= more
        yield part

    def _schedule(self, microbatches: Sequence[Microbatch], at_end: AtEnd, forward_only: bool,
                  prefixes: Mapping[str, Mapping[int, KV]] | None = None) -> list[Any]:
        """One run of Megatron's schedule; ``prefixes``: by content hash, for packs that do not hold them."""
        backbone, outside = self.backbone, prefixes is not None
        chunks, batches = backbone.chunks, self._filled_up(microbatches)
        packs: dict[int, Pack] = {}  # between the first and the last chunk of this stage

        def forward_step(iterator, model):
            number, layers = next(iterator)
            batch = batches[number]
            if layers is chunks[0]:
                packs[number] = self._pack(batch, outside)
                self._naive_tokens += packs[number].naive_tokens if number < len(microbatches) else 0
            pack = packs.pop(number) if layers is chunks[-1] else packs[number]
            evaluated = range(max(layers.start, pack.begins), layers.stop)
            sees = not outside and len(evaluated) and stage_needs_features(model.spec, evaluated)
            begins = pack.kept is not None and pack.first_layer in layers
            out = model(pack, self.visual(pack.prompts) if sees else None,
                        outside=[prefixes[prompt.content_hash] for prompt in pack.outside], layers=layers,
                        kept=self.lower_states.rows(pack.kept) if begins else None)

            def loss_of(hidden):
                loss, result = at_end(hidden, pack, batch) if number < len(microbatches) else (None, None)
                # A loss that needs no gradient (a microbatch of masked tokens only) still closes the graph.
                loss = hidden.sum() * 0 if loss is None else loss
                return loss, torch.zeros((), dtype=torch.int, device=hidden.device), result

            return out, loss_of

        turns = [iter([(number, layers) for number in range(len(batches))]) for layers in chunks]
        common = dict(forward_step_func=forward_step, num_microbatches=len(batches), seq_length=1, micro_batch_size=1,
                      forward_only=forward_only, pg_collection=self.groups.pg_collection)
        if self.groups.layout.pp == 1:
            return forward_backward_no_pipelining(data_iterator=turns[0], model=backbone, **common)
        common["p2p_communicator"] = P2PCommunicator(self.groups.pp, backbone.config)
        if len(chunks) == 1:
            return forward_backward_pipelining_without_interleaving(data_iterator=turns[0], model=backbone, **common)
        # One module serves as all of Megatron's model chunks: it is told the layers, and a chunk that is given its
        # input takes it at once.
        results = forward_backward_pipelining_with_interleaving(
            data_iterator=turns, model=[backbone] * len(chunks), **common)
        return results[:len(microbatches)]

    def _pack(self, batch: Microbatch, outside: bool) -> Pack:
        """A microbatch laid out, and counted."""
        backbone, states = self.backbone, self.lower_states
        pack = build_pack(batch.groups, backbone.rules, device(), share=backbone.share, outside=outside,
                          kept=None if states is None else states.owners)
        self._tokens += pack.upper.tokens
        self._kept_tokens += pack.kept.tokens if pack.kept is not None else 0
        self._lower_tokens += pack.lower.tokens if pack.lower is not None else 0
        return pack

    def _filled_up(self, microbatches: Sequence[Microbatch]) -> list[Microbatch]:
        """The microbatches, and for the interleaved schedule, which wants a multiple of the stages, as many repetitions
        of the smallest as are missing; they lead to no loss."""
        missing = self.groups.layout.filled_up(len(microbatches)) - len(microbatches)
        if not missing:
            return list(microbatches)
        smallest = min(microbatches, key=lambda batch: pack_tokens(batch.groups, self.backbone.rules))
        return [*microbatches, *[smallest] * missing]


def visual_features(model: ModelConfig, backbone: Backbone,
                    timers: Timers | None = None) -> Callable[[Sequence[Prompt]], Visual | None]:
    """The vision tower on stages that read its features; elsewhere nothing. ``timers``: a run's."""
    if not stage_needs_features(backbone.spec, backbone.layer_range):
        return lambda prompts: None
    return VisionTower(model.path, DTYPES[model.dtype], device(), timers=timers).features
