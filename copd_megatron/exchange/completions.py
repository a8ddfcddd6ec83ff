"""Native completions brought to the replicas whose students learn from them (``opd.rollouts=native``).

Which replica of an expert has sampled which of its prompts only that expert's replicas know. So a replica asks all that
host the expert, and the one that has the completions answers: token ids, who wrote them, and the engine's log-probs
in float64, so that a student elsewhere learns from the very same numbers. All-to-alls over the exchange group; every
rank of a replica gets the same.
"""
from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from copd_megatron.exchange.wire import Wire, as_bytes, from_bytes
from copd_megatron.parallel.groups import Groups
from copd_megatron.platform import device
from copd_megatron.types import Completion, Prompt, Segment

Place = tuple[str, int]
"""An expert and a place in its native batch of the step, counted over all replicas."""
ORIGINS = ("policy", "environment")
FINISHES = ("stop", "length")


def fetch_completions(wanted: Mapping[Place, Prompt], own: Mapping[Place, Sequence[Completion]], groups: Groups,
                      checked: bool = False) -> dict[Place, list[Completion]]:
    """The native completions of every place that is wanted here, ungraded. All replicas call it together.

    Args:
        wanted: place -> its prompt.
        own: this replica's native groups of the step, those whose prompts nothing has replaced.
        checked: a checksum with every message (``parallel.debug_checks``).

    Raises:
        RuntimeError: nobody has sampled what is wanted.
    """
    found = {place: list(own[place]) for place in wanted if place in own}
    if groups.layout.replicas > 1:
        wire = Wire(groups.exchange, checked)
        asked = _ask([place for place in wanted if place not in found], wire, groups)
        found |= _answer([[place for place in places if place in own] for places in asked], own, wanted, wire, groups)
    missing = sorted(wanted.keys() - found.keys())
    if missing:
        raise RuntimeError(f"no replica has native completions of {missing[0]} ({len(missing)} places in all)")
    return {place: [replace(c, prompt=prompt, reward=0.0, reward_parts={}, extracted=None) for c in found[place]]
            for place, prompt in wanted.items()}


def _ask(places: Sequence[Place], wire: Wire, groups: Groups) -> list[list[Place]]:
    """Send each host of an expert the places that are missing; what every replica asks of this one."""
    placement, here = groups.placement, groups.coords.replica
    out = [[n for expert, slot in places if peer != here and peer in placement.replicas_of(expert)
            for n in (placement.experts.index(expert), slot)] for peer in range(wire.size)]
    messages = wire.trade_ragged([[_bytes(numbers, torch.int32)] for numbers in out])
    asked = [_numbers(message, torch.int32) for message in messages]
    return [[(placement.experts[n], slot) for n, slot in zip(own[::2], own[1::2])] for own in asked]


def _answer(to_send: Sequence[Sequence[Place]], own: Mapping[Place, Sequence[Completion]],
            wanted: Mapping[Place, Prompt], wire: Wire, groups: Groups) -> dict[Place, list[Completion]]:
    """Send what was asked for; what the others send."""
    experts, found = groups.placement.experts, {}
    parts = [[(place, c) for place in places for c in own[place]] for places in to_send]
    integers = wire.trade_ragged([[_bytes(write_integers(part, experts), torch.int32)] for part in parts])
    floats = wire.trade_ragged([[_bytes(write_logprobs(part), torch.float64)] for part in parts])
    for message, logprobs in zip(integers, floats):
        read = read_completions(_numbers(message, torch.int32), _numbers(logprobs, torch.float64), experts, wanted)
        for place, completion in read:
            found.setdefault(place, []).append(completion)
    return found


def write_integers(completions: Iterable[tuple[Place, Completion]], experts: Sequence[str]) -> list[int]:
    """All but the log-probs: per completion expert, slot, sample, finish and number of segments; per segment origin,
    length and token ids."""
    numbers = []
    for (expert, slot), completion in completions:
        numbers += [experts.index(expert), slot, completion.sample, FINISHES.index(completion.finish),
                    len(completion.segments)]
        for segment in completion.segments:
            numbers += [ORIGINS.index(segment.origin), len(segment.token_ids), *segment.token_ids]
    return numbers


def write_logprobs(completions: Iterable[tuple[Place, Completion]]) -> list[float]:
    """Log-probs of the tokens that the policy sampled, in order."""
    return [value for _, completion in completions for segment in completion.segments for value in segment.logprobs]


def read_completions(integers: Sequence[int], logprobs: Sequence[float], experts: Sequence[str],
                     prompts: Mapping[Place, Prompt]) -> list[tuple[Place, Completion]]:
    """Inverse of both; the distribution that was sampled from is the policy itself, as in all training."""
    completions, at, scored = [], 0, 0
    while at < len(integers):
        number, slot, sample, finish, count = integers[at:at + 5]
        at += 5
        segments = []
        for _ in range(count):
            origin, length = ORIGINS[integers[at]], integers[at + 1]
            tokens = list(integers[at + 2:at + 2 + length])
            own = list(logprobs[scored:scored + length]) if origin == "policy" else []
            segments.append(Segment(tokens, origin, own, list(own)))
            at, scored = at + 2 + length, scored + len(own)
        place = experts[number], slot
        completions.append((place, Completion(prompts[place], experts[number], sample, segments, FINISHES[finish])))
    return completions


def _bytes(numbers: Sequence[float], dtype: torch.dtype) -> Tensor:
    return as_bytes(torch.tensor(numbers, dtype=dtype, device=device()))


def _numbers(message: Tensor, dtype: torch.dtype) -> list:
    return from_bytes(message, dtype).tolist()
