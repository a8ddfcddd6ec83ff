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

Without prefix sharing every lane is one trunk that carries its own copy of the prompt.
"""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from copd_kernels.prefix_attention.plan import Plan
from copd_megatron.types import Prompt


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
class Span:
    """A trunk or a leaf of a stream, before it has a place."""

    lane: str | None
    token_ids: np.ndarray
    positions: np.ndarray
    """[3, tokens]."""
    prompt: int
    """Index of its prompt in the pack."""
    trunk: tuple | None
    """Key of the trunk it attends to; None for trunks."""
    adapted_from: int
    """Offset of the first adapted token in the span."""
    visual_tokens: np.ndarray
    """Offsets in the span that carry visual features (all of the prompt's, or none)."""


@dataclass(frozen=True)
class Part:
    """Rows of a stream that pass a layer in one call."""

    rows: slice
    spans: tuple[tuple[int, int, int, int], ...]
    """(start, stop, trunk start, trunk stop), see ``copd_kernels.prefix_attention``; starts and stops
    count from the part's first row, trunks from the first row of the part that holds them."""
    plan: Plan
    routing: tuple[tuple[str, Tensor | slice], ...]
    """(expert, rows of this part) for the adapted rows."""


@dataclass(frozen=True)
class Level:
    """One placed stream: tensors on the device, [T] rows."""

    token_ids: Tensor
    position_ids: Tensor
    """[3, T]."""
    visual_index: Tensor
    """[n] rows that carry visual features."""
    visual_source: Tensor
    """[n] row of the concatenated features of the pack's prompts."""
    parts: tuple[Part, ...]
    """One, or two: trunks that need no gradient, then the leaves that attend to them."""

    @property
    def tokens(self) -> int:
        """T."""
        return self.token_ids.shape[0]


@dataclass(frozen=True)
class Pack:
    """A microbatch ready for the backbone."""

    prompts: tuple[Prompt, ...]
    first_layer: int
    lower: Level | None
    """The stream of the layers below ``first_layer``; None when that is 0."""
    upper: Level
    fanout: Tensor | None
    """[T upper] row of the lower stream that each upper row continues."""
    scored_rows: Tensor
    """[N] upper rows whose hidden states predict the completion tokens, leaf by leaf."""
    target_ids: Tensor
    """[N] those completion tokens."""
    leaf_lengths: tuple[int, ...]
    """Completion tokens per leaf, in the order the groups list them."""
    naive_tokens: int
    """Tokens the same lanes take when every lane carries its own prompt (for the share saved)."""
    trunk_rows: dict[tuple[int, str | None], tuple[range, range]]
    """(group, lane) -> rows of its trunk in the lower and in the upper stream (the same range twice
    when there is no lower); empty without prefix sharing."""

    def level(self, layer: int) -> Level:
        """The stream that enters global layer ``layer``."""
        return self.lower if self.lower is not None and layer < self.first_layer else self.upper


@dataclass(frozen=True)
class PackRules:
    """What decides the shape of a pack: adapter scope, first adapted layer, and whether to share."""

    scope: str = "sequence"
    first_layer: int = 0
    sharing: bool = True

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
               trunks_only: bool = False) -> Pack:
    """Lay the lanes of all groups out as streams.

    Leaves keep their order: row blocks of ``scored_rows`` follow the groups, and the leaves in each.
    A leaf without tokens contributes no rows. With ``trunks_only`` (the prefill of decoding) the
    leaves only say which lanes need a trunk.
    """
    streams = _Streams(groups, rules, trunks_only)
    upper, upper_rows = _place(streams.upper, streams, device)
    lower, lower_rows, fanout = None, upper_rows, None
    if rules.first_layer > 0:
        lower, lower_rows = _place(streams.lower, streams, device, frozen=True)
        below = [np.arange(lower_rows[streams.origin[k]].start, lower_rows[streams.origin[k]].stop)
                 for k in sorted(upper_rows, key=lambda k: upper_rows[k].start)]
        fanout = _tensor(below, device)
    scored = [np.arange(len(ids)) + upper_rows[key].start + first for key, first, ids in streams.leaves if ids]
    targets = [np.asarray(ids, np.int64) for _, _, ids in streams.leaves]
    naive = sum(len(g.prompt.token_ids) + len(leaf.token_ids) - 1 for g in groups for leaf in g.leaves)
    origin = streams.origin if lower is not None else {}
    trunk_rows = {pair: (lower_rows[origin.get(key, key)], upper_rows[key])
                  for pair, key in streams.trunks.items()}
    return Pack(tuple(g.prompt for g in groups), rules.first_layer, lower, upper, fanout,
                _tensor(scored, device), _tensor(targets, device),
                tuple(len(ids) for _, _, ids in streams.leaves), naive, trunk_rows)


def _tensor(parts: Sequence[np.ndarray], device: torch.device, axis: int = 0) -> Tensor:
    joined = np.concatenate(parts, axis) if parts else np.zeros(0, np.int64)
    return torch.from_numpy(np.ascontiguousarray(joined)).to(device)


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

    def __init__(self, groups: Sequence[LeafGroup], rules: PackRules, trunks_only: bool):
        self.rules, self.trunks_only = rules, trunks_only
        self.upper: dict[tuple, Span] = {}
        self.lower: dict[tuple, Span] = {}
        self.origin: dict[tuple, tuple] = {}
        self.leaves: list[tuple[tuple, int, Sequence[int]]] = []
        self.trunks: dict[tuple[int, str | None], tuple] = {}
        self.prompts = [g.prompt for g in groups]
        for index, group in enumerate(groups):
            for number, leaf in enumerate(group.leaves):
                self._add(index, group.prompt, number, leaf)

    def _add(self, index: int, prompt: Prompt, number: int, leaf: Leaf) -> None:
        rules, content = self.rules, tuple(leaf.token_ids)
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
            if trunk not in self.upper:
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

    def _below(self, key: tuple, shared: tuple) -> None:
        """Register the expert-free state below ``first_layer`` that this upper span continues."""
        if self.rules.first_layer == 0:
            return
        self.origin[key] = shared
        if shared not in self.lower:
            span = self.upper[key]
            trunk = None if span.trunk is None else ("trunk", span.prompt)
            self.lower[shared] = Span(None, span.token_ids, span.positions, span.prompt, trunk, 0,
                                      span.visual_tokens)


def _place(spans: dict[tuple, Span], streams: _Streams, device: torch.device,
           frozen: bool = False) -> tuple[Level, dict[tuple, range]]:
    """Give every span its rows, lane by lane, so that the rows of one expert are contiguous.

    In scope ``completion`` the trunks come first, as a part of their own: they need no gradient.
    """
    rules = streams.rules
    apart = rules.scope == "completion" and rules.sharing and not frozen and not streams.trunks_only
    lanes = {lane: i for i, lane in enumerate(dict.fromkeys(s.lane for s in spans.values()))}
    order = sorted(spans, key=lambda k: (apart and k[0] != "trunk", lanes[spans[k].lane]))
    rows, total, trunk_total = {}, 0, 0
    for key in order:
        rows[key] = range(total, total + len(spans[key].token_ids))
        total = rows[key].stop
        if apart and key[0] == "trunk":
            trunk_total = total
    cuts = [slice(0, trunk_total), slice(trunk_total, total)] if trunk_total else [slice(0, total)]
    parts = tuple(_part(cut, [k for k in order if cut.start <= rows[k].start < cut.stop], spans, rows,
                        device, frozen) for cut in cuts)
    ordered = [spans[k] for k in order]
    visual_index, visual_source = _visual(ordered, [rows[k].start for k in order], streams.prompts)
    level = Level(_tensor([s.token_ids for s in ordered], device),
                  _tensor([s.positions for s in ordered], device, 1),
                  torch.from_numpy(visual_index).to(device), torch.from_numpy(visual_source).to(device), parts)
    return level, rows


def _part(cut: slice, keys: Sequence[tuple], spans: dict[tuple, Span], rows: dict[tuple, range],
          device: torch.device, frozen: bool) -> Part:
    first = cut.start
    ranges = []
    for key in keys:
        trunk = rows[spans[key].trunk] if spans[key].trunk is not None else range(0)
        ranges.append((rows[key].start - first, rows[key].stop - first, trunk.start, trunk.stop))
    routing = () if frozen else _routing([spans[k] for k in keys], [r[0] for r in ranges], device)
    return Part(cut, tuple(ranges), Plan.build(ranges, cut.stop - first, device), routing)


def _visual(spans: Sequence[Span], starts: Sequence[int], prompts: Sequence[Prompt]) -> tuple[np.ndarray, np.ndarray]:
    """Rows that carry visual features, and which feature each carries."""
    first = np.concatenate([[0], np.cumsum([len(p.visual_index) for p in prompts])]).astype(np.int64)
    rows, sources = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
    for span, start in zip(spans, starts):
        if len(span.visual_tokens):
            rows.append(start + span.visual_tokens)
            sources.append(first[span.prompt] + np.arange(len(span.visual_tokens)))
    return np.concatenate(rows), np.concatenate(sources)


def _routing(spans: Sequence[Span], starts: Sequence[int], device: torch.device):
    """(expert, rows) with one slice where an expert's rows are contiguous, else an index."""
    rows: dict[str, list[tuple[int, int]]] = {}
    for span, start in zip(spans, starts):
        if span.lane is None:
            continue
        ranges = rows.setdefault(span.lane, [])
        begin, end = start + span.adapted_from, start + len(span.token_ids)
        if ranges and ranges[-1][1] == begin:
            ranges[-1] = (ranges[-1][0], end)
        else:
            ranges.append((begin, end))
    routing = []
    for lane, ranges in rows.items():
        if len(ranges) == 1:
            routing.append((lane, slice(*ranges[0])))
        else:
            index = np.concatenate([np.arange(*r) for r in ranges])
            routing.append((lane, torch.from_numpy(index).to(device)))
    return tuple(routing)
