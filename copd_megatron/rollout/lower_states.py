"""Hidden states that enter ``adapter.first_layer``, kept by a step's rollout: its scoring and update begin there.

No adapter acts below that layer, so a completion's states there are the same for every policy and never go stale; of
the layers below nothing else is needed, as keys and values of the upper ones are made from these states. Decoding has
made them row by row, which rounds differently than a pack does: what begins from them equals what would be computed up
to rounding, not to the bit.

They lie on the pipeline stage that holds the layer, whole on each of its tensor-parallel ranks. Every rank of the
replica knows what is kept and which context rank has it. What finds no room is evaluated when it is needed; prompts
give way to completions, as a prompt is evaluated anyway while one of its completions is.
"""
from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from copd_megatron.model.backbone import Backbone
from copd_megatron.model.shared_prefix import KeptRows, StateKey
from copd_megatron.parallel.collectives import reduce_scalars
from copd_megatron.parallel.groups import Groups
from copd_megatron.platform import device, on_device
from copd_megatron.rollout.kv_cache import FIRST_CAPACITY


class LowerStates:
    """What this rank keeps of the present step. Ranks of a replica make the same calls in the same order."""

    def __init__(self, backbone: Backbone, groups: Groups, budget_bytes: int):
        """``budget_bytes``: of one rank; 0 keeps nothing."""
        self.groups, self.budget_bytes, self.bytes = groups, budget_bytes, 0
        self.row_bytes = backbone.spec.hidden_size * backbone.dtype.itemsize
        self.empty = torch.empty(0, 1, backbone.spec.hidden_size, dtype=backbone.dtype, device=device())
        self.recording = False
        """Whether what is sampled now is kept."""
        self._rows: dict[StateKey, int] = {}
        self._states: dict[StateKey, Tensor] = {}
        self._owners: dict[StateKey, int] = {}
        self._new: list[StateKey] = []
        self._new_prompts: list[StateKey] = []

    @property
    def owners(self) -> Mapping[StateKey, int]:
        """What is kept, and the context rank that has it; the same on every rank of the replica."""
        return self._owners

    @contextmanager
    def step(self) -> Iterator[None]:
        """Keep what is sampled within, and forget it all at the end."""
        self.recording = self.budget_bytes > 0
        try:
            yield
        finally:
            self.recording = False
            self.forget(list(self._owners.keys() | self._rows.keys()))
            self.news()

    def keep(self, key: StateKey, rows: int, states: Tensor | None) -> None:
        """Keep one more while there is room.

        Args:
            rows: of the states; counted on every stage, so that all keep the same.
            states: [rows, 1, H], not to be changed; None on stages that do not hold the layer.
        """
        if not self.recording or key in self._rows:
            return
        size, is_prompt = rows * self.row_bytes, key[1] is None
        while self.bytes + size > self.budget_bytes and self._new_prompts and not is_prompt:
            self.forget([self._new_prompts.pop()])  # the latest: completions of earlier ones are all here
        if self.bytes + size > self.budget_bytes:
            return
        self._rows[key] = rows
        self.bytes += size
        (self._new_prompts if is_prompt else self._new).append(key)
        if states is not None:
            self._states[key] = states

    def news(self) -> list[StateKey]:
        """What was kept here since the last call, to be told to the other context ranks."""
        new, self._new, self._new_prompts = self._new + self._new_prompts, [], []
        return new

    def heard(self, news: Iterable[Iterable[StateKey]]) -> None:
        """Take in what each context rank has kept; of what several have, the first one's counts."""
        for rank, keys in enumerate(news):
            for key in keys:
                self._owners.setdefault(key, rank)

    def forget(self, keys: Iterable[StateKey]) -> None:
        """Drop what nobody will ask for; keys that are not kept are passed over."""
        for key in keys:
            self._owners.pop(key, None)
            self._states.pop(key, None)
            self.bytes -= self._rows.pop(key, 0) * self.row_bytes

    def work(self) -> dict[str, tuple[float, float]]:
        """Metric -> (sum, weight) of what is kept now; nothing without a budget."""
        if not self.budget_bytes:
            return {}
        held = reduce_scalars({"bytes": self.bytes, "ranks": 1}, self.groups.cp)
        return {"memory/lower_states_bytes": (held["bytes"], held["ranks"])}

    def rows(self, kept: KeptRows) -> Tensor:
        """[context ranks x ``kept.rows``, 1, H] of a pack; all ranks of the stage that holds the layer call it."""
        own = torch.cat([self.empty, *(self._states[key] for key in kept.keys[self.groups.coords.cp])])
        if len(kept.keys) == 1:
            return own
        filled = own.new_zeros(kept.rows, *own.shape[1:])
        filled[:len(own)] = own
        everybody = [torch.empty_like(filled) for _ in kept.keys]
        dist.all_gather(everybody, filled, group=self.groups.cp)
        return torch.cat(everybody)


class BorderRows:
    """States of a wave's lanes at the border while they decode, in one tensor that grows as ``OwnCache`` does."""

    def __init__(self, lanes: int):
        self.lanes = np.arange(lanes)
        """Lanes of the wave that are still in the batch."""
        self.ended: dict[int, Tensor] = {}
        """Lane of the wave -> [rows, 1, H] until its last token; empty on stages that do not hold the layer."""
        self._rows: Tensor | None = None
        self._length = 0

    def append(self, hidden: Tensor) -> None:
        """Take this step's rows, [L c, 1, H]: c rows of each lane, lane by lane."""
        new = hidden[:, 0].unflatten(0, (len(self.lanes), -1))
        stop = self._length + new.shape[1]
        if self._rows is None or self._rows.shape[1] < stop:
            room = max(FIRST_CAPACITY, stop, 0 if self._rows is None else 2 * self._rows.shape[1])
            grown = new.new_empty(len(new), room, new.shape[2])
            if self._rows is not None:
                grown[:, :self._length] = self._rows[:, :self._length]
            self._rows = grown
        self._rows[:, self._length:stop] = new
        self._length = stop

    def keep(self, places: np.ndarray, fed: np.ndarray) -> None:
        """Go on with the lanes at some places of the batch; the others have ended.

        Args:
            fed: rows of each lane of the wave until its last token; read of those that have ended.
        """
        if self._rows is not None:
            for place in np.setdiff1d(np.arange(len(self.lanes)), places):
                lane = int(self.lanes[place])
                self.ended[lane] = self._rows[place, :fed[lane], None].clone()
            self._rows = self._rows.index_select(0, on_device(places, self._rows.device))
        self.lanes = self.lanes[places]
