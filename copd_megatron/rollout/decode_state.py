"""The lanes of a wave while they decode: what each is fed next, and what each has answered so far.

All lanes advance in lockstep: after n own rows, lane i has answered n - forced_i + 1 tokens. Per-lane facts
are tensors; the host learns one number per step, how many lanes still run.
"""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from copd_megatron.model.shared_prefix import PackRules
from copd_megatron.platform import on_device
from copd_megatron.rollout.engine import Request
from copd_megatron.rollout.lanes import ForcedRows, LaneNoise, Wave
from copd_megatron.rollout.sampling import LaneSampling

NOISE_STEPS = 64
"""Steps whose noise is drawn and moved to the device at once."""

NO_TOKEN = -1
"""Fills the stop tokens of lanes that have fewer than others; no token has this id."""


@dataclass(frozen=True, eq=False)
class Answers:
    """What a wave's lanes answered, on the host; rows hold ``lengths`` tokens and then padding."""

    token_ids: np.ndarray
    """[L, T] int64."""
    logprobs: np.ndarray
    """[L, T] at the training temperature."""
    sampled_logprobs: np.ndarray
    """[L, T] under the distribution sampled from."""
    lengths: np.ndarray
    """[L], at least 1."""
    stopped: np.ndarray
    """[L] bool: ended by a stop token."""
    fed: np.ndarray
    """[L] rows that the lane was fed until its last token was sampled, forced ones included."""


class DecodeState:
    """Lanes of one wave, some of which may have been dropped since (``keep``).

    Per step, with n own rows fed so far: ``inputs`` -> forward -> n grows -> ``ready`` lanes are sampled with
    ``how`` and ``uniforms`` -> ``record``.
    """

    def __init__(self, wave: Wave, requests: Sequence[Request], rules: PackRules, seed: int,
                 device: torch.device):
        self.device, self.wave = device, wave
        self.forced = ForcedRows.build(wave, requests, rules)
        self.lanes = np.arange(len(wave))
        """Lanes of the wave that are still in the batch."""
        params = [requests[index].params for index in wave.request.tolist()]
        self.how = LaneSampling(*(np.array([getattr(p, name) for p in params])
                                  for name in ("temperature", "top_p", "greedy")))
        most_stops = max(len(p.stop_token_ids) for p in params)
        self._stops = self._put([[*p.stop_token_ids] + [NO_TOKEN] * (most_stops - len(p.stop_token_ids))
                                 for p in params])
        self._max_tokens = self._put([p.max_tokens for p in params])
        self._noise = LaneNoise(seed, wave, requests) if self.how.any_random else None
        self._noise_first, self._noise_block = 0, None
        self._lengths = torch.zeros(len(wave), dtype=torch.int64, device=device)
        self._stopped = torch.zeros(len(wave), dtype=torch.bool, device=device)
        self._steps: list[Tensor] = []
        self._flushed: list[tuple[np.ndarray, int, np.ndarray]] = []
        self._answers = np.zeros(len(wave), np.int64), np.zeros(len(wave), bool)
        self.fed = np.zeros(len(wave), np.int64)
        """As ``Answers.fed``, of lanes that have been dropped."""
        self._place_forced()

    def _put(self, values) -> Tensor:
        return on_device(np.asarray(values, np.int64), self.device)

    def _place_forced(self) -> None:
        forced = self.forced
        self._forced_ids, self._forced_positions = self._put(forced.token_ids), self._put(forced.positions)
        self._forced_lengths, self._offsets = self._put(forced.lengths), self._put(forced.offsets)

    @property
    def first_rows(self) -> int:
        """Rows that every lane is fed in the first step."""
        return int(self.forced.lengths.min())

    def inputs(self, fed: int) -> tuple[Tensor, Tensor]:
        """Token ids [L c] and position ids [3, L c] of the next step after ``fed`` own rows.

        c is ``first_rows`` in the first step, then 1.
        """
        if fed == 0:
            rows = self.first_rows
            return self._forced_ids[:, :rows].reshape(-1), self._forced_positions[:, :, :rows].reshape(3, -1)
        if fed >= self._forced_ids.shape[1]:
            return self._tokens, (self._offsets + fed).expand(3, -1)
        token_ids = torch.where(self._forced_lengths <= fed, self._tokens, self._forced_ids[:, fed])
        return token_ids, self._forced_positions[:, :, fed]

    def ready(self, fed: int) -> np.ndarray | None:
        """Lanes (of the batch) whose next token is to be sampled after ``fed`` own rows; None for all."""
        ready = self.forced.lengths <= fed
        return None if ready.all() else np.flatnonzero(ready)

    def uniforms(self, fed: int) -> Tensor:
        """[L] float64 noise for the tokens sampled after ``fed`` own rows."""
        if self._noise is None:
            return torch.zeros(len(self.lanes), dtype=torch.float64, device=self.device)
        if self._noise_block is None or fed >= self._noise_first + NOISE_STEPS:
            everyone = np.zeros((len(self.wave), NOISE_STEPS), np.int64)
            # Completion positions; those of lanes that are still being fed their prompt are not read.
            everyone[self.lanes] = (fed - self.forced.prompt_rows)[:, None] + np.arange(NOISE_STEPS)
            block = self._noise.uniforms(everyone)[self.lanes]
            self._noise_first = fed
            self._noise_block = on_device(np.ascontiguousarray(block.T), self.device)
        return self._noise_block[fed - self._noise_first]

    def record(self, fed: int, sampled: Tensor) -> int:
        """Take [3, L] float64 (token ids, log-probs, sampled log-probs; any values where not ``ready``).

        Returns how many lanes still run.
        """
        if not self._steps:
            self._first_step = fed
        self._steps.append(sampled)
        self._tokens = sampled[0].long()
        answered = fed - self._forced_lengths + 1
        hit = (self._tokens[:, None] == self._stops).any(1)
        ends = (answered >= 1) & (self._lengths == 0) & (hit | (answered >= self._max_tokens))
        self._lengths = torch.where(ends, answered, self._lengths)
        self._stopped |= ends & hit
        return int((self._lengths == 0).sum())

    def keep_running(self) -> np.ndarray:
        """Drop the lanes that have ended; returns which positions of the batch stay."""
        kept = self._flush()
        where = on_device(kept, self.device)
        self.lanes, self.how, self.forced = self.lanes[kept], self.how.select(kept), self.forced.select(kept)
        self._stops, self._max_tokens, self._lengths, self._stopped, self._tokens = (
            x.index_select(0, where) for x in (self._stops, self._max_tokens, self._lengths, self._stopped,
                                               self._tokens))
        if self._noise_block is not None:
            self._noise_block = self._noise_block.index_select(1, where)
        self._place_forced()
        return kept

    def _flush(self) -> np.ndarray:
        """Bring the present batch's steps to the host; returns the positions of the lanes that still run."""
        lengths, stopped = self._lengths.cpu().numpy(), self._stopped.cpu().numpy()
        self._answers[0][self.lanes], self._answers[1][self.lanes] = lengths, stopped
        self.fed[self.lanes] = self.forced.lengths + lengths - 1
        first = self._first_step - self.forced.lengths
        self._flushed.append((self.lanes, first, torch.stack(self._steps).cpu().numpy()))
        self._steps = []
        return np.flatnonzero(lengths == 0)

    def answers(self) -> Answers:
        """All lanes' answers, once none runs.

        Raises:
            FloatingPointError: a log-prob is not a number, so hidden states were not finite.
        """
        self._flush()
        lengths, stopped = self._answers
        table = np.zeros((3, len(self.wave), lengths.max()))
        for lanes, first, steps in self._flushed:
            columns = first[:, None] + np.arange(len(steps))
            inside = (columns >= 0) & (columns < lengths[lanes, None])
            rows = np.broadcast_to(lanes[:, None], columns.shape)
            table[:, rows[inside], columns[inside]] = steps.transpose(1, 2, 0)[:, inside]
        if not np.isfinite(table).all():
            raise FloatingPointError("rollout: a log-prob is not finite; the hidden states overflowed")
        return Answers(table[0].astype(np.int64), table[1], table[2], lengths, stopped, self.fed)
