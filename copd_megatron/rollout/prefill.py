"""Prefixes evaluated once, before whatever continues them: side by side in packs, or one by one for the store.

Without a store (``rollout.prefix_store_bytes=0``) the distinct prefixes of a wave are packed, which is the fastest
way to evaluate them once. With one, each is evaluated alone, whether it is kept or not: its keys and values then depend
on nothing but itself, so that it does not matter to a single bit what was found and what was evicted.

Where adapters begin above the lowest layer in scope ``sequence``, a prefix has two parts: the lower one is shared by
all experts, and is kept with the hidden states that leave it, from which any expert's upper part starts.
"""
from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from copd_megatron.config.rollout import RolloutConfig
from copd_megatron.model.attention import KV
from copd_megatron.model.backbone import Backbone, layer_chunks
from copd_megatron.model.shared_prefix import Leaf, LeafGroup, Pack, PackRules, build_pack, pack_tokens
from copd_megatron.model.vision import stage_needs_features
from copd_megatron.parallel.collectives import reduce_scalars
from copd_megatron.parallel.groups import Groups
from copd_megatron.platform import device
from copd_megatron.rollout.engine import VisualSource
from copd_megatron.rollout.kv_cache import PrefixBlock, joined_block, prefix_blocks, similar_lengths
from copd_megatron.rollout.lanes import Prefixes
from copd_megatron.rollout.lower_states import LowerStates
from copd_megatron.rollout.prefix_store import (
    PrefixCounters,
    PrefixKey,
    PrefixPart,
    PrefixStore,
    exactness,
    prefix_keys,
)
from copd_megatron.rollout.relay import StageRelay
from copd_megatron.types import Prompt


class Prefill:
    """Evaluates prefixes on this rank's shards; all ranks of a replica (of a context rank) make the same calls."""

    def __init__(self, backbone: Backbone, groups: Groups, config: RolloutConfig, lower_states: LowerStates):
        self.backbone, self.groups, self.lower_states = backbone, groups, lower_states
        self.relay = StageRelay(backbone, groups)
        rules = backbone.rules
        # The naive engine differs in one thing: equal prefixes are evaluated again for every completion.
        self.rules = PackRules(rules.scope, rules.first_layer, sharing=True)
        self.pack_tokens = config.max_prompt_tokens
        self.layers = backbone.spec.num_layers
        pp = groups.layout.pp
        self.chunks = layer_chunks(self.layers, pp * groups.layout.vp)
        self.stages = [self.chunks[stage::pp] for stage in range(pp)]
        self.store = PrefixStore(config.prefix_store_bytes, self.layers) if config.prefix_store_bytes else None
        self._packed_tokens = 0.0
        self._told = PrefixCounters()

    @property
    def computed_tokens(self) -> float:
        """Prefix tokens evaluated so far, averaged over the layers."""
        return self._packed_tokens + (self.store.counters.computed_tokens if self.store is not None else 0.0)

    @property
    def serves_training(self) -> bool:
        """Whether scoring and updates take prefixes from here: there is a store, no gradient flows into prefixes, and
        every rank needs what it has evaluated itself (context ranks would need each other's)."""
        return self.store is not None and self.rules.scope == "completion" and self.groups.layout.cp == 1

    def forget_old(self) -> None:
        """Drop what policies that have changed or are gone left behind."""
        if self.store is not None:
            bank = self.backbone.bank
            self.store.keep_current({exactness(name, bank.version_of(name)) for name in bank.slots})

    def blocks(self, prefixes: Prefixes, visual: VisualSource | None) -> list[PrefixBlock]:
        """All trunks of a wave, for its decode steps."""
        if self.store is None:
            return self._packed_blocks(prefixes, visual)
        trunks = list(prefixes.numbers)
        lengths = [len(prefixes.prompts[slot].token_ids) - self.rules.forced(prefixes.prompts[slot])
                   for slot, _ in trunks]
        blocks = []
        for run in similar_lengths(lengths):
            own = [trunks[place] for place in run]
            blocks.append(joined_block([prefixes.numbers[key] for key in own],
                                       [self.trunk(prefixes.prompts[slot], owner, visual) for slot, owner in own]))
        return blocks

    @torch.no_grad()
    def trunk(self, prompt: Prompt, owner: str | None, visual: VisualSource | None) -> dict[int, KV]:
        """1-based layer of this stage -> K, V [P, kv_heads, d] of a prompt's prefix, from the store if it is there.

        Args:
            owner: whose adapters act on the prefix; None: nobody's.
        """
        layers: dict[int, KV] = {}
        hidden: Tensor | None = None
        for key in self._keys(prompt, owner):
            part = self.store.fetch(key, self._bytes(key), lambda key=key, entering=hidden: self._evaluate(
                prompt, owner, key, entering, visual))
            layers |= part.layers
            hidden = part.hidden
            if key.end == self.rules.first_layer:
                self.lower_states.keep((prompt.content_hash, None), key.tokens, hidden)
        return layers

    def bytes_of(self, prompt: Prompt) -> int:
        """What a prefix that all experts share counts with in the store."""
        return sum(map(self._bytes, self._keys(prompt, None)))

    def work(self) -> dict[str, tuple[float, float]]:
        """Metric -> (sum, weight) of what was done since the last call, over the context ranks of this replica."""
        store = self.store
        counted = PrefixCounters() if store is None else store.counters
        now = replace(counted, computed_tokens=self.computed_tokens)
        done = {name: value - vars(self._told)[name] for name, value in vars(now).items()}
        self._told = now
        done = reduce_scalars(done | {"ranks": 1, "bytes": 0 if store is None else store.bytes}, self.groups.cp)
        sums = {"prefix/computed_tokens": (done["computed_tokens"], 0.0)}
        if store is not None:
            sums |= {f"prefix/{name}": (done[name], 0.0) for name in ("saved_tokens", "recomputed_tokens")}
            sums |= {"prefix/bytes": (done["bytes"], done["ranks"]),
                     "prefix/hit_rate": (done["hits"], done["hits"] + done["misses"])}
        return sums

    def _keys(self, prompt: Prompt, owner: str | None) -> list[PrefixKey]:
        version = 0 if owner is None else self.backbone.bank.version_of(owner)
        return prefix_keys(prompt, self.layers, self.rules, owner, version)

    def _bytes(self, key: PrefixKey) -> int:
        """Of a part on the rank that holds most of it."""
        spec, item, tp = self.backbone.spec, self.backbone.dtype.itemsize, self.groups.layout.tp
        layer = 2 * spec.kv_groups(tp) // tp * spec.head_dim
        border = spec.hidden_size if key.end < self.layers else 0
        numbers = max(sum(layer * len(_common(chunk, key)) + border * (key.end in chunk) for chunk in own)
                      for own in self.stages)
        return key.tokens * numbers * item

    def _chunk_of(self, layer: int) -> int:
        return next(number for number, chunk in enumerate(self.chunks) if layer in chunk)

    def _evaluate(self, prompt: Prompt, owner: str | None, key: PrefixKey, entering: Tensor | None,
                  visual: VisualSource | None) -> PrefixPart:
        """A part of a prefix, alone; the stage that goes on from it keeps the hidden states."""
        here, stages = self.groups.coords.pp, len(self.stages)
        first, last = self._chunk_of(key.first), self._chunk_of(min(key.end, self.layers - 1))
        if all(chunk % stages != here for chunk in range(first, last + 1)):
            return PrefixPart()
        backbone, capture = self.backbone, {}
        pack = build_pack([LeafGroup(prompt, [Leaf(owner, ())])], self.rules, device(), trunks_only=True)

        def stage(chunk: range) -> Tensor:
            own = _common(chunk, key)
            if not own:
                return backbone.take_input_tensor()
            return backbone(pack, self._features(pack, own, visual), capture, layers=own)

        hidden = self.relay.run([key.tokens] * len(backbone.chunks), stage, first, last, entering)
        return PrefixPart(capture, hidden.clone() if key.end < self.layers and here == last % stages else None)

    def _features(self, pack: Pack, layers: range, visual: VisualSource | None):
        """What the vision tower says about the pack's prompts, if these layers read it."""
        seen = any(len(prompt.visual_index) for prompt in pack.prompts)
        return visual(pack.prompts) if seen and stage_needs_features(self.backbone.spec, layers) else None

    def _packed_blocks(self, prefixes: Prefixes, visual: VisualSource | None) -> list[PrefixBlock]:
        """Evaluate all trunks of a wave, pack by pack."""
        blocks = []
        for slots in self._pack_slots(prefixes):
            groups = [_trunks_of(prefixes, slot) for slot in slots]
            pack = build_pack(groups, self.rules, device(), trunks_only=True)
            capture: dict[int, KV] = {}
            border: list[Tensor] = []
            self.relay.run([pack.level(max(chunk.start - 1, 0)).tokens for chunk in self.backbone.chunks],
                           partial(self._run_trunks, pack, capture, visual, border))
            if self.lower_states.recording:
                self._keep_states(pack, border)
            numbers = {(place, owner): prefixes.numbers[slot, owner]
                       for place, slot in enumerate(slots) for owner in prefixes.owners[slot]}
            blocks += prefix_blocks(pack, capture, numbers)
            self._packed_tokens += sum(pack.level(layer).tokens for layer in range(self.layers)) / self.layers
        return blocks

    def _run_trunks(self, pack: Pack, capture: dict[int, KV], visual: VisualSource | None, border: list[Tensor],
                    chunk: range) -> Tensor:
        at_border = border.append if self.lower_states.recording else None
        return self.backbone(pack, self._features(pack, chunk, visual), capture, layers=chunk, at_border=at_border)

    def _keep_states(self, pack: Pack, border: Sequence[Tensor]) -> None:
        """Keep what entered ``first_layer`` (on the stage that holds it) of every prompt of an evaluated pack."""
        for place, rows in {place: lower for (place, _), (lower, _) in pack.trunk_rows.items()}.items():
            states = border[0][rows.start:rows.stop].clone() if border else None
            self.lower_states.keep((pack.prompts[place].content_hash, None), len(rows), states)

    def _pack_slots(self, prefixes: Prefixes) -> Iterator[list[int]]:
        """Prompts to evaluate together: as many as ``rollout.max_prompt_tokens`` holds, at least one."""
        slots, total = [], 0
        for slot, owners in enumerate(prefixes.owners):
            if not owners:
                continue
            tokens = pack_tokens([_trunks_of(prefixes, slot)], self.rules)
            if slots and total + tokens > self.pack_tokens:
                yield slots
                slots, total = [], 0
            slots.append(slot)
            total += tokens
        if slots:
            yield slots


def _common(own: range, key: PrefixKey) -> range:
    """The layers of a part that a chunk has."""
    return range(max(own.start, key.first), max(own.start, key.first, min(own.stop, key.end)))


def _trunks_of(prefixes: Prefixes, slot: int) -> LeafGroup:
    """One prompt with a leaf for each trunk that it needs."""
    return LeafGroup(prefixes.prompts[slot], [Leaf(owner, ()) for owner in prefixes.owners[slot]])
