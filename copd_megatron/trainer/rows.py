"""The token rows of one microbatch: per-sample facts spread over tokens, and sums over tokens of a group.

Shape suffixes: S samples, N completion tokens of all samples in order, the pack's scored rows.
"""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from copd_megatron.platform import on_device
from copd_megatron.trainer.batching import Microbatch, Sample


@dataclass(frozen=True, eq=False)
class Rows:
    """What the loss knows about each token before the forward, on the device of the hidden states."""

    samples: tuple[Sample, ...]
    lengths: tuple[int, ...]
    """[S] completion tokens of each sample."""
    sample_N: Tensor
    """int64, index of each token's sample."""
    mask_N: Tensor
    """bool, True where the policy sampled the token."""
    weights_N: Tensor
    """Of each token in the reduced loss."""
    engine_logprobs_N: Tensor

    @classmethod
    def of(cls, batch: Microbatch, hidden_NH: Tensor) -> Rows:
        """Rows of a microbatch whose lanes are its samples' own; floats are float32, or float64 for float64 states."""
        samples = tuple(lane.sample for lane in batch.lanes)
        lengths = tuple(sample.length for sample in samples)
        dtype = torch.promote_types(hidden_NH.dtype, torch.float32)
        facts_4N = np.stack([np.repeat(np.arange(len(samples), dtype=np.float64), lengths),
                             *(np.concatenate([getattr(s, name) for s in samples], dtype=np.float64)
                               for name in ("loss_mask", "weights", "engine_logprobs"))])
        sample_N, mask_N, weights_N, engine_N = on_device(facts_4N, hidden_NH.device)
        return cls(samples, lengths, sample_N.long(), mask_N.bool(), weights_N.to(dtype), engine_N.to(dtype))

    def spread(self, values: Sequence[float]) -> Tensor:
        """[N] one value per sample, repeated over its tokens."""
        per_sample = on_device(np.asarray(values, np.float64), self.sample_N.device)
        return per_sample.to(self.weights_N.dtype)[self.sample_N]

    def marked(self, chosen: Sequence[bool]) -> Tensor:
        """[N] bool, the tokens of the chosen samples."""
        return on_device(np.asarray(chosen, bool), self.sample_N.device)[self.sample_N]

    def joined(self, tensors: Sequence[Tensor | None], default_N: Tensor) -> Tensor:
        """[N] per-sample tensors in a row, in ``default_N``'s dtype; its values for samples that have none."""
        pieces = default_N.split(self.lengths)
        return torch.cat([own if given is None else given.to(own.dtype) for given, own in zip(tensors, pieces)])

    def of_samples(self, chosen: Sequence[int], rows_N: Tensor) -> Tensor:
        """Rows of the given samples (by index), in their order; the same tensor where that is all of them."""
        if list(chosen) == list(range(len(self.samples))):
            return rows_N
        pieces = rows_N.split(self.lengths)
        return torch.cat([pieces[i] for i in chosen])

    def sums(self, columns: Mapping[str, Tensor], group_of: Sequence[int | None], groups: int) -> dict[str, Tensor]:
        """name -> [groups] sum of each column over the loss tokens of the samples in each group.

        ``group_of``: [S] group of each sample; None leaves it out. Detached; columns are [N].
        """
        # One group more than asked collects what is left out.
        group_N = self.spread([groups if g is None else g for g in group_of]).long().masked_fill(~self.mask_N, groups)
        stacked_CN = torch.stack([c.detach().to(self.weights_N.dtype) for c in columns.values()])
        sums_CG = stacked_CN.new_zeros(len(columns), groups + 1).index_add_(1, group_N, stacked_CN)
        return dict(zip(columns, sums_CG[:, :groups]))
