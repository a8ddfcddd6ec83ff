"""From completions to microbatches: which lanes are evaluated together, within a token budget."""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from torch import Tensor

from copd_megatron.exchange.payload import Signal
from copd_megatron.model.shared_prefix import Leaf, LeafGroup, PackRules, pack_tokens
from copd_megatron.rollout.engine import Request
from copd_megatron.types import Completion, Edge

NativePlace = tuple[str, int]
"""An expert and a place in its native batch of the step, counted over all replicas."""


@dataclass(eq=False)
class Sample:
    """One completion that an expert learns from in this step, with all that its loss needs.

    Tensors are [R], on the last pipeline stage only.
    """

    completion: Completion
    expert: str
    """The policy that is updated; it sampled the completion too, unless that is reused."""
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

    @property
    def is_off_policy(self) -> bool:
        """Whether another policy sampled it (``opd.rollouts=native``)."""
        return self.completion.expert != self.expert

    @property
    def length(self) -> int:
        """R, completion tokens."""
        return len(self.loss_mask)

    @cached_property
    def loss_mask(self) -> np.ndarray:
        """[R] bool: True where the policy sampled the token."""
        return np.array(self.completion.loss_mask, bool)

    @cached_property
    def engine_logprobs(self) -> np.ndarray:
        """[R] float64 of the engine at the training temperature; 0 at the environment's tokens."""
        return np.array(self.completion.logprobs, np.float64)


@dataclass(frozen=True, eq=False)
class Asked:
    """A rollout request and what its completions are for; becomes one sample per completion."""

    request: Request
    slot: int
    slots: int
    edge: Edge | None = None
    native: NativePlace | None = None
    """Where its prompt is among the native ones, for a cross request."""

    def sample(self, completion: Completion, advantage: float = 0.0) -> Sample:
        """What the expert that was asked learns from one completion."""
        return Sample(completion, self.request.expert, self.edge, advantage, slot=self.slot, slots=self.slots)


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


def make_microbatches(lanes: Sequence[Lane], rules: PackRules, budget: int,
                      whole_samples: bool = False) -> list[Microbatch]:
    """Sort lanes into microbatches of at most ``budget`` tokens.

    Lanes of one prompt stay together; a group that alone exceeds the budget is split over its lanes
    and its prompt is evaluated again in each part. What cannot be split passes alone, over the budget.

    Args:
        whole_samples: never part the lanes of one sample, so that its policies can be compared.
    """
    by_prompt: dict[str, dict[object, list[Lane]]] = {}
    for lane in lanes:
        # By content, not by name: two tasks may call different questions by the same key.
        units = by_prompt.setdefault(lane.sample.completion.prompt.content_hash, {})
        units.setdefault(lane.sample if whole_samples else lane, []).append(lane)
    batches: list[list[LeafGroup]] = []
    order: list[list[Lane]] = []
    filled = budget + 1
    for units in by_prompt.values():
        for part in _split(list(units.values()), rules, budget):
            group = _leaf_group(part)
            size = pack_tokens([group], rules)
            if filled + size > budget:
                batches.append([])
                order.append([])
                filled = 0
            batches[-1].append(group)
            order[-1] += [lane for unit in part for lane in unit]
            filled += size
    return [Microbatch(tuple(groups), tuple(own)) for groups, own in zip(batches, order)]


def _leaf_group(units: Sequence[Sequence[Lane]]) -> LeafGroup:
    lanes = [lane for unit in units for lane in unit]
    return LeafGroup(lanes[0].sample.completion.prompt,
                     [Leaf(lane.policy, lane.sample.completion.token_ids) for lane in lanes])


def _split(units: list[list[Lane]], rules: PackRules, budget: int) -> list[list[list[Lane]]]:
    """Halve a group of units until each part fits, or has one."""
    if len(units) == 1 or pack_tokens([_leaf_group(units)], rules) <= budget:
        return [units]
    middle = len(units) // 2
    return _split(units[:middle], rules, budget) + _split(units[middle:], rules, budget)
