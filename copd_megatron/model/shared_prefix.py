"""A microbatch as one flat token stream in which the completions of a group share their prompt.

A *pack* holds groups; a group is a prompt and its lanes, each lane one completion evaluated by one
expert. Its tokens become trunks (the prompt) and leaves (the completions). A leaf starts with forced
prompt tokens, the last one (scope ``sequence``) or the whole generation header (scope
``completion``), so that its hidden states predict all its completion tokens. Equal completions of one
expert are one leaf.

Which trunks and leaves are distinct depends on the layer (DESIGN: a state is expert-free iff no
adapter acted before it): below ``first_layer`` one trunk per prompt and one leaf per distinct
completion; from there on one leaf per lane, and one trunk per (prompt, expert) in scope
``sequence``, still one per prompt in scope ``completion``. The two streams are the pack's levels;
``fanout`` maps the rows of the upper to those of the lower.

States that were kept where they enter ``first_layer`` are left out of the lower stream: upper rows continue them as
they continue lower rows.

Without prefix sharing every lane is one trunk that carries its own copy of the prompt.
"""
from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from copd_megatron.model.row_share import WHOLE, RowShare
from copd_megatron.model.spec import RopeSpec
from copd_megatron.model.stream import Level, Span, place, to_tensor
from copd_megatron.types import Prompt

StateKey = tuple[str, tuple[int, ...] | None]
"""What hidden states below ``first_layer`` depend on: content hash of the prompt, and token ids of the completion; None
for the prompt's prefix. Example: ``("9f..", (17, 4, 2))``."""


@dataclass(frozen=True)
class Leaf:
    """One lane: ``token_ids`` (the completion) evaluated by ``lane`` (an expert, or None: the backbone)."""

    lane: str | None
    token_ids: Sequence[int]


@dataclass(frozen=True)
class LeafGroup:
    """A prompt with the lanes to evaluate on it."""

    prompt: Prompt
    leaves: Sequence[Leaf]


@dataclass(frozen=True)
class KeptRows:
    """Hidden states that enter ``first_layer`` and are given, each by the context rank that kept it."""

    keys: tuple[tuple[StateKey, ...], ...]
    """By context rank, in the order of their rows."""
    rows: int
    """Of the context rank that gives most; every rank's are filled up to as many."""
    tokens: int
    """Rows of all context ranks, filling left out."""


@dataclass(frozen=True)
class Pack:
    """A microbatch ready for the backbone."""

    prompts: tuple[Prompt, ...]
    first_layer: int
    lower: Level | None
    """The stream of the layers below ``first_layer``, without what was kept; None when that is 0."""
    upper: Level
    share: RowShare
    """Whose rows this rank holds."""
    fanout: Tensor | None
    """[T upper] row of the lower stream that each upper row continues; where rows are shared out, of all ranks'
    rows one after the other. Kept rows follow them."""
    scored_rows: Tensor
    """[n] upper rows whose hidden states predict completion tokens: leaf by leaf (n = N), or, where rows are
    shared out, those of this rank, filled up to the n of the rank with most."""
    scored_order: Tensor | None
    """[N] place of each completion token's row, leaf by leaf, in all ranks' ``scored_rows`` one after the other;
    None where rows are not shared out."""
    target_ids: Tensor
    """[N] those completion tokens."""
    leaf_lengths: tuple[int, ...]
    """Completion tokens per leaf, in the order the groups list them."""
    naive_tokens: int
    """Tokens the same lanes take when every lane carries its own prompt (for the share saved)."""
    trunk_rows: dict[tuple[int, str | None], tuple[range, range]]
    """(group, lane) -> rows of its trunk in the lower and in the upper stream (the same range twice
    when there is no lower); empty without prefix sharing."""
    outside: tuple[Prompt, ...] = ()
    """Prompts whose prefixes are in no stream: their keys and values are given, one after the other."""
    kept: KeptRows | None = None
    """Hidden states that are given; None without any."""

    @property
    def begins(self) -> int:
        """First layer that has rows to evaluate."""
        return self.first_layer if self.lower is not None and self.lower.tokens == 0 else 0

    def level(self, layer: int) -> Level:
        """The stream that enters global layer ``layer``."""
        return self.lower if self.lower is not None and layer < self.first_layer else self.upper


@dataclass(frozen=True)
class PackRules:
    """What decides the shape of a pack: adapter scope, first adapted layer, and whether to share."""

    scope: str = "sequence"
    first_layer: int = 0
    sharing: bool = True
    rope: RopeSpec | None = None
    """Of the backbone, whose rotary frequencies may hold up to some length only."""

    def check_length(self, prompt: Prompt, tokens: int) -> None:
        """Raise UserError if the backbone has no positions for ``tokens`` more after this prompt."""
        if self.rope is not None:
            self.rope.check_length(prompt.next_position + tokens, f"{prompt.key!r} with {tokens} completion tokens")

    def forced(self, prompt: Prompt) -> int:
        """How many prompt tokens a leaf starts with."""
        return prompt.header_tokens if self.scope == "completion" else 1


def pack_tokens(groups: Sequence[LeafGroup], rules: PackRules) -> int:
    """Tokens of the wider stream of a pack, without building it (for microbatching)."""
    total = 0
    for group in groups:
        lanes = {leaf.lane for leaf in group.leaves}
        forced = rules.forced(group.prompt)
        prefix = len(group.prompt.token_ids) - forced
        if not rules.sharing:
            copies, distinct = len(group.leaves), [leaf.token_ids for leaf in group.leaves]
        else:
            copies = len(lanes) if rules.scope == "sequence" else 1
            distinct = [ids for _, ids in {(leaf.lane, tuple(leaf.token_ids)) for leaf in group.leaves}]
        leaves = sum(forced + max(0, len(ids) - 1) for ids in distinct)
        total += copies * prefix + leaves
    return total


def build_pack(groups: Sequence[LeafGroup], rules: PackRules, device: torch.device,
               trunks_only: bool = False, share: RowShare = WHOLE, outside: bool = False,
               kept: Mapping[StateKey, int] | None = None) -> Pack:
    """Lay the lanes of all groups out as streams.

    Leaves keep their order: row blocks of ``scored_rows`` follow the groups, and the leaves in each.
    A leaf without tokens contributes no rows. With ``trunks_only`` (the prefill of decoding) the
    leaves only say which lanes need a trunk. With ``share`` the tensors are those of this rank's rows.
    With ``outside`` (scope ``completion``) trunks are left out, see ``Pack.outside``.
    ``kept``: states that were kept, and the context rank that has them, see ``Pack.kept``.
    """
    streams = _Streams(groups, rules, trunks_only, outside)
    apart = rules.scope == "completion" and rules.sharing and not trunks_only
    upper, upper_rows = place(streams.upper, streams.prompts, device, share, apart, outside=streams.rows_outside)
    lower, lower_rows, fanout, given = None, upper_rows, None, None
    if rules.first_layer > 0:
        found = streams.leave_out(kept or {})
        lower, lower_rows = place(streams.lower, streams.prompts, device, share, frozen=True,
                                  outside=streams.rows_outside)
        given, given_rows = _kept_rows(found, kept or {}, share.context, lower.layout.rows)
        lower_rows = lower_rows | given_rows
        below = np.zeros(upper.layout.rows, np.int64)
        for key, rows in upper_rows.items():
            below[rows.start:rows.stop] = np.arange(*_ends(lower_rows[streams.origin[key]]))
        places = lower.layout.gathered_places()
        if given is not None:
            places = np.append(places, len(places) + np.arange(share.context * given.rows))
        fanout = to_tensor([places[below[upper.layout.mine()]]], device)
    scored = [np.arange(len(ids)) + upper_rows[key].start + first for key, first, ids in streams.leaves if ids]
    scored_rows, scored_order = upper.layout.share_out(np.concatenate(scored) if scored else _NOTHING)
    targets = [np.asarray(ids, np.int64) for _, _, ids in streams.leaves]
    naive = sum(len(g.prompt.token_ids) + len(leaf.token_ids) - 1 for g in groups for leaf in g.leaves)
    origin = streams.origin if lower is not None else {}
    trunk_rows = {pair: (lower_rows[origin.get(key, key)], upper_rows[key])
                  for pair, key in streams.trunks.items() if key in upper_rows}
    return Pack(tuple(g.prompt for g in groups), rules.first_layer, lower, upper, share, fanout,
                to_tensor([scored_rows], device),
                None if scored_order is None else to_tensor([scored_order], device), to_tensor(targets, device),
                tuple(len(ids) for _, _, ids in streams.leaves), naive, trunk_rows, tuple(streams.outside.values()),
                given)


def _kept_rows(found: Mapping[tuple, tuple[StateKey, Span]], kept: Mapping[StateKey, int], ranks: int,
               first: int) -> tuple[KeptRows | None, dict[tuple, range]]:
    """What was kept, and the rows of each of its spans from row ``first`` on, context rank by context rank."""
    if not found:
        return None, {}
    own: list[list[tuple]] = [[] for _ in range(ranks)]
    for span, (state, _) in found.items():
        own[kept[state]].append(span)
    lengths = [[len(found[key][1].token_ids) for key in keys] for keys in own]
    most, rows = max(map(sum, lengths)), {}
    for rank, keys in enumerate(own):
        start = first + rank * most
        for key, length in zip(keys, lengths[rank]):
            rows[key] = range(start, start + length)
            start += length
    keys = tuple(tuple(found[key][0] for key in spans) for spans in own)
    return KeptRows(keys, most, sum(map(sum, lengths))), rows


def _ends(rows: range) -> tuple[int, int]:
    return rows.start, rows.stop


_NOTHING = np.zeros(0, np.int64)


def _continued(prompt: Prompt, start: int, content: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and positions [3, n] of the prompt from ``start`` on and the completion without its last token."""
    inputs = np.array(content[:-1], np.int64)
    tokens = np.concatenate([prompt.token_ids[start:], inputs])
    positions = np.empty((3, len(tokens)), np.int64)
    seen = len(prompt.token_ids) - start
    positions[:, :seen] = prompt.position_ids[:, start:]
    positions[:, seen:] = np.arange(prompt.next_position, prompt.next_position + len(inputs))
    return tokens, positions


class _Streams:
    """The distinct spans of both levels, keyed so that equal keys are equal states."""

    def __init__(self, groups: Sequence[LeafGroup], rules: PackRules, trunks_only: bool, without_trunks: bool):
        self.rules, self.trunks_only, self.without_trunks = rules, trunks_only, without_trunks
        self.upper: dict[tuple, Span] = {}
        self.lower: dict[tuple, Span] = {}
        self.origin: dict[tuple, tuple] = {}
        self.leaves: list[tuple[tuple, int, Sequence[int]]] = []
        self.trunks: dict[tuple[int, str | None], tuple] = {}
        self.outside: dict[str, Prompt] = {}
        """Content hash -> prompt whose trunk is given."""
        self.rows_outside: dict[tuple, range] = {}
        """Trunk -> its rows among the given ones."""
        self.prompts = [g.prompt for g in groups]
        for index, group in enumerate(groups):
            for number, leaf in enumerate(group.leaves):
                self._add(index, group.prompt, number, leaf)

    def _add(self, index: int, prompt: Prompt, number: int, leaf: Leaf) -> None:
        rules, content = self.rules, tuple(leaf.token_ids)
        rules.check_length(prompt, len(content[:-1]))
        forced = rules.forced(prompt)
        prefix = len(prompt.token_ids) - forced
        everything = rules.scope == "sequence"
        if not rules.sharing:
            key = ("whole", index, number)
            self.upper[key] = Span(leaf.lane, *_continued(prompt, 0, content), index, None,
                                   0 if everything else prefix, prompt.visual_index)
            self._below(key, key)
            self.leaves.append((key, len(prompt.token_ids) - 1, content))
            return
        owner = leaf.lane if everything else None
        trunk, lane = ("trunk", index, owner), ("leaf", index, leaf.lane, content)
        if prefix:
            self.trunks[index, leaf.lane] = trunk
            if self.without_trunks:
                self._given(trunk, prompt, prefix)
            elif trunk not in self.upper:
                self.upper[trunk] = Span(owner, prompt.token_ids[:prefix], prompt.position_ids[:, :prefix], index,
                                         None, 0, prompt.visual_index)
                self._below(trunk, ("trunk", index))
        if self.trunks_only:
            return
        if lane not in self.upper:
            self.upper[lane] = Span(leaf.lane, *_continued(prompt, prefix, content), index,
                                    trunk if prefix else None, 0, _NOTHING)
            self._below(lane, ("leaf", index, content))
        self.leaves.append((lane, forced - 1, content))

    def _given(self, trunk: tuple, prompt: Prompt, prefix: int) -> None:
        """Where a trunk that is in no stream is among the given ones; equal prompts have one."""
        alike = [rows for key, rows in self.rows_outside.items()
                 if self.prompts[key[1]].content_hash == prompt.content_hash]
        start = max((rows.stop for rows in self.rows_outside.values()), default=0)
        self.rows_outside[trunk] = alike[0] if alike else range(start, start + prefix)
        self.outside.setdefault(prompt.content_hash, prompt)

    def _below(self, key: tuple, shared: tuple) -> None:
        """Register the expert-free state below ``first_layer`` that this upper span continues."""
        if self.rules.first_layer == 0:
            return
        self.origin[key] = shared
        if shared not in self.lower:
            span = self.upper[key]
            trunk = span.trunk if self.without_trunks or span.trunk is None else ("trunk", span.prompt)
            self.lower[shared] = Span(None, span.token_ids, span.positions, span.prompt, trunk, 0,
                                      span.visual_tokens)

    def leave_out(self, kept: Container[StateKey]) -> dict[tuple, tuple[StateKey, Span]]:
        """Take what was kept out of the lower level; a trunk stays while a leaf that attends to it does.

        Returns:
            Key in the lower level -> what was kept, and its span.
        """
        found = {key: ((self.prompts[key[1]].content_hash, key[2] if key[0] == "leaf" else None), span)
                 for key, span in self.lower.items() if key[0] != "whole"}
        found = {key: own for key, own in found.items() if own[0] in kept}
        attended = {span.trunk for key, span in self.lower.items() if key[0] == "leaf" and key not in found}
        found = {key: own for key, own in found.items() if key not in attended}
        for key in found:
            del self.lower[key]
        return found
