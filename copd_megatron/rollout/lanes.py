"""Requests as lanes: which completions decode together, on which trunks, what is forced, and their noise.

Host side, NumPy only. Lanes of one prompt stay in one wave where they fit, so that its prefix is evaluated
once; within a wave lanes of one expert are neighbours, so that its adapters act on a slice.

Sampling noise is keyed by (seed, expert, noise key, prompt, sample, position), never by rank, wave or
neighbours.
"""
from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from copd_megatron.model.shared_prefix import PackRules
from copd_megatron.parallel.seeding import stable_hash, uniform
from copd_megatron.rollout.engine import Request
from copd_megatron.types import Prompt

BACKBONE_KEY = 0
"""Stands for the expert in the noise of the backbone itself."""


@dataclass(frozen=True, eq=False)
class Prefixes:
    """The distinct prompts of a wave and who needs a trunk of each.

    Waves that split one large group share one object, and so one evaluation.
    """

    prompts: tuple[Prompt, ...]
    owners: tuple[tuple[str | None, ...], ...]
    """Per prompt: the experts that need a trunk of their own; (None,) for one that all share; () for an empty
    prefix."""
    numbers: dict[tuple[int, str | None], int]
    """(prompt, owner) -> number of the trunk, 0 to trunks - 1."""


@dataclass(frozen=True, eq=False)
class Wave:
    """Lanes that decode together, [L] each."""

    request: np.ndarray
    """Index of the lane's request."""
    sample: np.ndarray
    """``Completion.sample``."""
    experts: tuple[tuple[str | None, slice], ...]
    """Each policy's lanes, in lane order."""
    trunk: np.ndarray
    """Number of the lane's trunk, -1 for none."""
    prefixes: Prefixes

    def __len__(self) -> int:
        return len(self.request)


def deal_requests(requests: Sequence[Request], ranks: int) -> list[int]:
    """The context rank that answers each request: prompts stay whole, lanes are balanced, the same on every rank."""
    by_prompt: dict[str, list[int]] = {}
    for index, request in enumerate(requests):
        by_prompt.setdefault(request.prompt.content_hash, []).append(index)
    lanes = {prompt: sum(requests[i].samples for i in own) for prompt, own in by_prompt.items()}
    rank_of, load = [0] * len(requests), [0] * ranks
    for prompt in sorted(by_prompt, key=lambda p: -lanes[p]):
        rank = load.index(min(load))
        load[rank] += lanes[prompt]
        for index in by_prompt[prompt]:
            rank_of[index] = rank
    return rank_of


def plan_waves(requests: Sequence[Request], rules: PackRules, max_lanes: int) -> Iterator[Wave]:
    """Waves of at most ``max_lanes`` lanes that together hold every completion of the requests once."""
    batch: list[list[tuple[int, int]]] = []
    for group in _same_prompt(requests, rules.sharing):
        if batch and sum(map(len, batch)) + len(group) > max_lanes:
            yield from _waves(batch, requests, rules, max_lanes)
            batch = []
        batch.append(group)
    if batch:
        yield from _waves(batch, requests, rules, max_lanes)


def _same_prompt(requests: Sequence[Request], sharing: bool) -> list[list[tuple[int, int]]]:
    """(request, sample) of all completions, grouped by what the model sees; each alone without sharing."""
    groups: dict[object, list[tuple[int, int]]] = {}
    for index, request in enumerate(requests):
        for sample in range(request.sample_offset, request.sample_offset + request.samples):
            key = request.prompt.content_hash if sharing else (index, sample)
            groups.setdefault(key, []).append((index, sample))
    return list(groups.values())


def _waves(batch: list[list[tuple[int, int]]], requests: Sequence[Request], rules: PackRules,
           max_lanes: int) -> Iterator[Wave]:
    """The lanes of some prompts as one wave, or as several with the same prefixes if they are too many."""
    prefixes = _prefixes(batch, requests, rules)
    lanes = [(index, sample, slot) for slot, group in enumerate(batch) for index, sample in group]
    policies = list(dict.fromkeys(requests[index].expert for index, _, _ in lanes))
    lanes.sort(key=lambda lane: policies.index(requests[lane[0]].expert))
    for start in range(0, len(lanes), max_lanes):
        part = lanes[start:start + max_lanes]
        experts = [requests[index].expert for index, _, _ in part]
        numbers = [prefixes.numbers.get((slot, trunk_owner(expert, rules)), -1)
                   for expert, (_, _, slot) in zip(experts, part)]
        slices = tuple((expert, slice(experts.index(expert), experts.index(expert) + experts.count(expert)))
                       for expert in dict.fromkeys(experts))
        yield Wave(np.array([lane[0] for lane in part]), np.array([lane[1] for lane in part]), slices,
                   np.array(numbers), prefixes)


def _prefixes(batch: list[list[tuple[int, int]]], requests: Sequence[Request], rules: PackRules) -> Prefixes:
    prompts = tuple(requests[group[0][0]].prompt for group in batch)
    owners = []
    for prompt, group in zip(prompts, batch):
        needed = dict.fromkeys(trunk_owner(requests[index].expert, rules) for index, _ in group)
        owners.append(tuple(needed) if len(prompt.token_ids) > rules.forced(prompt) else ())
    pairs = [(slot, owner) for slot, names in enumerate(owners) for owner in names]
    return Prefixes(prompts, tuple(owners), {pair: number for number, pair in enumerate(pairs)})


def trunk_owner(expert: str | None, rules: PackRules) -> str | None:
    """Whose adapters act on the prefix of this expert's lanes; None: nobody's, the trunk is shared by all."""
    return expert if rules.scope == "sequence" else None


@dataclass(frozen=True, eq=False)
class ForcedRows:
    """What every lane is fed before its own samples: the prompt's last tokens, then earlier segments.

    F: forced rows of the lane with most.
    """

    token_ids: np.ndarray
    """[L, F], 0 beyond the lane's own."""
    positions: np.ndarray
    """[3, L, F] position ids of the lane's rows 0 to F - 1, forced or not."""
    lengths: np.ndarray
    """[L] forced rows, at least 1."""
    offsets: np.ndarray
    """[L] position id of the lane's row k, once past its prompt, is k + offset (in all three rows)."""
    prompt_rows: np.ndarray
    """[L] how many of the forced rows are prompt tokens."""

    @classmethod
    def build(cls, wave: Wave, requests: Sequence[Request], rules: PackRules) -> ForcedRows:
        """Forced rows of a wave's lanes."""
        distinct, of_lane = np.unique(wave.request, return_inverse=True)
        rows = [_forced_of(requests[index], rules) for index in distinct]
        lengths = np.array([len(ids) for ids, _, _ in rows])
        prompt_rows = np.array([rules.forced(requests[index].prompt) for index in distinct])
        offsets = np.array([offset for _, _, offset in rows])
        token_ids = np.zeros((len(rows), lengths.max()), np.int64)
        positions = np.broadcast_to(np.arange(lengths.max()) + offsets[:, None], (3, *token_ids.shape)).copy()
        for line, (ids, known, _) in enumerate(rows):
            token_ids[line, :len(ids)] = ids
            positions[:, line, :known.shape[1]] = known
        return cls(token_ids, positions, lengths, offsets, prompt_rows).select(of_lane)

    def select(self, lanes: np.ndarray) -> ForcedRows:
        """The rows of some lanes."""
        return ForcedRows(self.token_ids[lanes], self.positions[:, lanes], self.lengths[lanes],
                          self.offsets[lanes], self.prompt_rows[lanes])


def _forced_of(request: Request, rules: PackRules) -> tuple[np.ndarray, np.ndarray, int]:
    """Forced token ids, position ids [3, n] of the n that are prompt tokens, and the offset of later ones."""
    prompt, rows = request.prompt, rules.forced(request.prompt)
    prior = [token for segment in request.prior for token in segment.token_ids]
    ids = np.concatenate([prompt.token_ids[-rows:], np.asarray(prior, np.int64)])
    return ids, prompt.position_ids[:, -rows:], prompt.next_position - rows


class LaneNoise:
    """Uniform numbers of a wave's lanes, by position in the completion."""

    def __init__(self, seed: int, wave: Wave, requests: Sequence[Request]):
        self.seed = seed
        experts = np.array([BACKBONE_KEY if r.expert is None else stable_hash(r.expert) for r in requests])
        prompts = np.array([stable_hash(r.prompt.key) for r in requests])
        by_key: dict[tuple[int, ...], list[int]] = {}
        for lane, index in enumerate(wave.request.tolist()):
            by_key.setdefault(requests[index].noise_key, []).append(lane)
        self._groups = []
        for key, lanes in by_key.items():
            rows = np.array(lanes)
            index = wave.request[rows, None]
            self._groups.append((rows, (experts[index], *key, prompts[index], wave.sample[rows, None])))

    def uniforms(self, positions: np.ndarray) -> np.ndarray:
        """[L, n] float64 in (0, 1) for every lane of the wave at completion positions [L, n]."""
        noise = np.empty(positions.shape)
        for rows, keys in self._groups:
            noise[rows] = uniform(self.seed, *keys, positions[rows])
        return noise
