"""From completions to microbatches: which lanes are evaluated together, within a token budget."""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from torch import Tensor

from copd_megatron.exchange.payload import Signal
from copd_megatron.model.shared_prefix import Leaf, LeafGroup, PackRules, pack_tokens
from copd_megatron.types import Completion, Edge


@dataclass(eq=False)
class Sample:
    """One completion that an expert learns from in this step, with all that its loss needs.

    Tensors are [R], on the last pipeline stage only.
    """

    completion: Completion
    expert: str
    """The policy that sampled it and is updated."""
    edge: Edge | None = None
    """The OPD edge of a cross sample; None: native, learns from its reward."""
    advantage: float = 0.0
    """Group advantage of a native sample."""
    weights: np.ndarray = field(default_factory=lambda: np.zeros(0))
    """[R] float64: sum over all ranks of weights x loss is the reduced loss; 0 where masked."""
    old_logprobs: Tensor | None = None
    """Policy at the start of the step; None: the training forward itself (ratio exactly 1)."""
    backbone_logprobs: Tensor | None = None
    reference_logprobs: Tensor | None = None
    """Of the KL penalty's reference, where that is not the backbone."""
    signal: Signal | None = None
    """What the teacher returned for a cross sample."""
    delta: Tensor | None = None
    """[R] log teacher - log student, set by the update (for the record)."""
    slot: int = 0
    """Place of its prompt in the whole batch, over all replicas: decides the minibatch."""
    slots: int = 1
    """Prompts of that batch."""

    @property
    def is_native(self) -> bool:
        """Whether the reward, not a teacher, drives it."""
        return self.edge is None


@dataclass(frozen=True, eq=False)
class Lane:
    """One evaluation: the sample's completion under a policy (None: the backbone)."""

    sample: Sample
    policy: str | None


@dataclass(frozen=True, eq=False)
class Microbatch:
    """Groups that pass the backbone together; ``lanes`` in the order of the groups' leaves."""

    groups: tuple[LeafGroup, ...]
    lanes: tuple[Lane, ...]


def make_microbatches(lanes: Sequence[Lane], rules: PackRules, budget: int) -> list[Microbatch]:
    """Sort lanes into microbatches of at most ``budget`` tokens.

    Lanes of one prompt stay together; a group that alone exceeds the budget is split over its lanes
    and its prompt is evaluated again in each part. A single lane over the budget passes alone.
    """
    by_prompt: dict[str, list[Lane]] = {}
    for lane in lanes:
        by_prompt.setdefault(lane.sample.completion.prompt.key, []).append(lane)
    batches: list[list[list[Lane]]] = []
    filled = budget + 1
    for group in by_prompt.values():
        for part in _split(group, rules, budget):
            size = pack_tokens([_leaf_group(part)], rules)
            if filled + size > budget:
                batches.append([])
                filled = 0
            batches[-1].append(part)
            filled += size
    return [Microbatch(tuple(_leaf_group(g) for g in batch), tuple(lane for g in batch for lane in g))
            for batch in batches]


def _leaf_group(lanes: Sequence[Lane]) -> LeafGroup:
    return LeafGroup(lanes[0].sample.completion.prompt,
                     [Leaf(lane.policy, lane.sample.completion.token_ids) for lane in lanes])


def _split(group: list[Lane], rules: PackRules, budget: int) -> list[list[Lane]]:
    """Halve a group until each part fits, or has one lane."""
    if len(group) == 1 or pack_tokens([_leaf_group(group)], rules) <= budget:
        return [group]
    middle = len(group) // 2
    return _split(group[:middle], rules, budget) + _split(group[middle:], rules, budget)
