"""Drawing one token per lane from a head whose vocabulary is sharded over the tensor-parallel ranks.

Inverse CDF in the order of token ids: with M_r the probability mass of rank r's shard, the uniform number u
picks the rank with sum_{s<r} M_s <= u < sum_{s<=r} M_s, and (u - sum_{s<r} M_s) / M_r the token within it.
Only masses travel (one number per rank and lane) and the chosen token; logits never leave their rank, and the
same u gives the same token however the vocabulary is cut.

Shape suffixes: L lanes, V this rank's real vocabulary rows, R ranks of the tensor-parallel group.
"""
from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from copd_megatron.model.vocab_parallel import Head, shard_logits
from copd_megatron.platform import on_device

BISECTIONS = {torch.float32: 32, torch.float64: 64}
"""Halvings that tell any two different log-probs apart near the boundary of a nucleus: tokens that compete
for it have at most half of the mass (-0.69), and the search starts from an interval of at most 40 nats."""


class Sampled(NamedTuple):
    """One token per lane, equal on every rank of the head's group."""

    token_ids_L: Tensor
    """int64 global ids."""
    logprobs_L: Tensor
    """At the training temperature, untruncated; float32, or float64 for float64 hidden states."""
    sampled_logprobs_L: Tensor
    """Under the distribution that was sampled from; 0 for greedy lanes."""


@dataclass(frozen=True, eq=False)
class LaneSampling:
    """How each lane draws its token; host arrays of [L]."""

    temperature_L: np.ndarray
    top_p_L: np.ndarray
    greedy_L: np.ndarray
    """bool; the other two are not read where it is set."""

    def select(self, lanes: np.ndarray | slice) -> LaneSampling:
        """The settings of some lanes."""
        return LaneSampling(self.temperature_L[lanes], self.top_p_L[lanes], self.greedy_L[lanes])

    @cached_property
    def any_greedy(self) -> bool:
        """Whether some lane takes the most likely token."""
        return bool(self.greedy_L.any())

    @cached_property
    def any_random(self) -> bool:
        """Whether some lane needs a uniform number."""
        return not self.greedy_L.all()

    @cached_property
    def truncated(self) -> np.ndarray:
        """int64 index of the lanes that draw from a nucleus."""
        return np.flatnonzero((self.top_p_L < 1) & ~self.greedy_L)


@torch.no_grad()
def sample(hidden_LH: Tensor, head: Head, how: LaneSampling, uniform_L: Tensor,
           temperature: float) -> Sampled:
    """Draw the next token of each lane.

    Args:
        hidden_LH: final-normed hidden states, the same on every rank of ``head.group``.
        head: padded vocabulary rows are never drawn.
        how: settings per lane.
        uniform_L: float64 in (0, 1), the same on every rank; not read for greedy lanes.
        temperature: the training temperature, of ``Sampled.logprobs_L``.
    """
    parts = [_sample_chunk(hidden_LH[rows], head, how.select(rows), uniform_L[rows], temperature)
             for rows in list(head.chunks(hidden_LH)) or [slice(0, 0)]]
    return parts[0] if len(parts) == 1 else Sampled(*(torch.cat(columns) for columns in zip(*parts)))


def _sample_chunk(hidden_LH: Tensor, head: Head, how: LaneSampling, uniform_L: Tensor,
                  temperature: float) -> Sampled:
    policy_LV = shard_logits(hidden_LH, head, temperature)
    if policy_LV.shape[1] == 0:  # A rank of padding only: one token without mass keeps reductions defined.
        policy_LV = policy_LV.new_full((len(policy_LV), 1), float("-inf"))
    if not how.any_random:
        shard_L, local_L = _most_likely(policy_LV, head)
        lse_L = _gather(policy_LV.logsumexp(1), head).logsumexp(0)
        token_ids_L, logprobs_L, _ = _pick(policy_LV, policy_LV, shard_L, local_L, head)
        return Sampled(token_ids_L, logprobs_L - lse_L, torch.zeros_like(lse_L))
    drawn_LV = _drawn_logits(policy_LV, head, how, temperature)
    masses_RL, cumulative_LV = _masses(drawn_LV, head)
    drawn_lse_L = lse_L = masses_RL.logsumexp(0)
    if drawn_LV is not policy_LV:
        lse_L = _gather(policy_LV.logsumexp(1), head).logsumexp(0)
    shard_L, local_L = _invert(masses_RL, cumulative_LV, uniform_L, head)
    if how.any_greedy:
        greedy_L = on_device(how.greedy_L, shard_L.device)
        best = _most_likely(policy_LV, head)
        shard_L, local_L = (torch.where(greedy_L, *both) for both in zip(best, (shard_L, local_L)))
    token_ids_L, logits_L, drawn_logits_L = _pick(policy_LV, drawn_LV, shard_L, local_L, head)
    drawn_logprobs_L = drawn_logits_L - drawn_lse_L
    if how.any_greedy:
        drawn_logprobs_L = drawn_logprobs_L.masked_fill(greedy_L, 0.0)
    return Sampled(token_ids_L, logits_L - lse_L, drawn_logprobs_L)


def _pick(policy_LV: Tensor, drawn_LV: Tensor, shard_L: Tensor, local_L: Tensor,
          head: Head) -> tuple[Tensor, Tensor, Tensor]:
    """Global id and both logits of the token in row ``local_L`` of rank ``shard_L``, known to every rank."""
    logits = [x.gather(1, local_L[:, None])[:, 0].double() for x in (policy_LV, drawn_LV)]
    # Only the owner contributes to the sum; float64 holds every id and logit exactly.
    picked_3L = torch.stack([(local_L + head.vocab_start).double(), *logits])
    picked_3L = torch.where(shard_L == _rank(head), picked_3L, 0.0)
    if head.group is not None:
        dist.all_reduce(picked_3L, group=head.group)
    return picked_3L[0].long(), picked_3L[1].to(policy_LV.dtype), picked_3L[2].to(policy_LV.dtype)


def _drawn_logits(policy_LV: Tensor, head: Head, how: LaneSampling, temperature: float) -> Tensor:
    """Logits of the distribution to draw from: each lane's own temperature, -inf outside its nucleus."""
    drawn_LV = policy_LV
    ratio_L = np.where(how.greedy_L, 1.0, temperature / how.temperature_L)
    if (ratio_L != 1).any():
        drawn_LV = policy_LV * on_device(ratio_L, policy_LV.device).to(policy_LV.dtype)[:, None]
    if len(how.truncated):
        lanes = on_device(how.truncated, policy_LV.device)
        top_p_L = on_device(how.top_p_L[how.truncated], policy_LV.device).to(policy_LV.dtype)
        nucleus_LV = _nucleus(drawn_LV.index_select(0, lanes), top_p_L, head)
        drawn_LV = drawn_LV.index_copy(0, lanes, nucleus_LV)
    return drawn_LV


def _nucleus(logits_LV: Tensor, top_p_L: Tensor, head: Head) -> Tensor:
    """Logits with -inf outside the nucleus {v: log p_v >= t}, t the highest threshold that leaves it top_p.

    t is bisected between 0 and log((1 - p) / vocabulary): tokens below that weigh less than 1 - p together.
    """
    logprobs_LV = logits_LV - _gather(logits_LV.logsumexp(1), head).logsumexp(0)[:, None]
    probs_LV = logprobs_LV.exp()
    low_L = torch.log1p(-top_p_L) - float(np.log(head.vocab_size))
    high_L = torch.zeros_like(low_L)
    for _ in range(BISECTIONS[logits_LV.dtype]):
        middle_L = (low_L + high_L) / 2
        mass_L = (probs_LV * (logprobs_LV >= middle_L[:, None])).sum(1)
        if head.group is not None:
            dist.all_reduce(mass_L, group=head.group)
        reached_L = mass_L >= top_p_L
        low_L = torch.where(reached_L, middle_L, low_L)
        high_L = torch.where(reached_L, high_L, middle_L)
    return logits_LV.masked_fill(logprobs_LV < low_L[:, None], float("-inf"))


def _most_likely(logits_LV: Tensor, head: Head) -> tuple[Tensor, Tensor]:
    """(rank, row in its shard) of the highest logit; the lowest id among equals: argmax takes the first."""
    local_L = logits_LV.argmax(1)
    best_RL = _gather(logits_LV.gather(1, local_L[:, None])[:, 0], head)
    return best_RL.argmax(0), local_L


def _masses(logits_LV: Tensor, head: Head) -> tuple[Tensor, Tensor]:
    """Unnormalised log-mass [R, L] of each shard, and cumulative masses [L, V] of this one up to a factor."""
    # A shard whose tokens are all cut off has a peak of -inf; any finite one gives it masses of 0.
    peak_L1 = logits_LV.amax(1, keepdim=True).clamp_(min=torch.finfo(logits_LV.dtype).min)
    cumulative_LV = (logits_LV - peak_L1).exp_().cumsum_(1)
    return _gather(peak_L1[:, 0] + cumulative_LV[:, -1].log(), head), cumulative_LV


def _invert(log_masses_RL: Tensor, cumulative_LV: Tensor, uniform_L: Tensor,
            head: Head) -> tuple[Tensor, Tensor]:
    """(rank, row within its shard) that each uniform number falls on; rows count on their own rank only."""
    share_RL = log_masses_RL.double().softmax(0)
    until_RL = share_RL.cumsum(0)
    # Rounding may leave the last sum below u; then the last rank with any mass is meant.
    last_L = len(share_RL) - 1 - (share_RL.flip(0) > 0).long().argmax(0)
    shard_L = torch.minimum((until_RL <= uniform_L).sum(0), last_L)
    mine = _rank(head)
    within_L = (uniform_L - until_RL[mine] + share_RL[mine]) / share_RL[mine]
    total_L1 = cumulative_LV[:, -1:]
    target_L1 = within_L.to(cumulative_LV.dtype)[:, None] * total_L1
    found_L1 = torch.searchsorted(cumulative_LV, target_L1, right=True)
    last_L1 = torch.searchsorted(cumulative_LV, total_L1.contiguous())
    return shard_L, torch.minimum(found_L1, last_L1)[:, 0].clamp(0, cumulative_LV.shape[1] - 1)


def _gather(values_L: Tensor, head: Head) -> Tensor:
    """[R, L]: every rank's numbers."""
    if head.group is None:
        return values_L[None]
    gathered = [torch.empty_like(values_L) for _ in range(dist.get_world_size(head.group))]
    dist.all_gather(gathered, values_L.contiguous(), group=head.group)
    return torch.stack(gathered)


def _rank(head: Head) -> int:
    return 0 if head.group is None else dist.get_rank(head.group)
