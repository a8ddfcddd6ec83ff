"""Experts become one policy: linear combinations of their weight deltas.

uniform: theta_0 + mean of deltas. weighted: theta_0 + sum of weighted deltas. task_arithmetic: theta_0 + scale x sum
of deltas (Ilharco et al. 2023, arXiv:2212.04089). concat: theta_0 + sum of deltas. With LoRA all are exact as one
rank-concatenated adapter.
"""
from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from copd_megatron.checkpoint.adapter import merge_weights
from copd_megatron.config.trainer import MergeConfig
from copd_megatron.exchange.gather import gathered_adapters
from copd_megatron.model.adapter_bank import AdapterBank
from copd_megatron.parallel.groups import Groups

MERGED = "merged"


@contextmanager
def all_policies(bank: AdapterBank, groups: Groups, experts: Sequence[str], config: MergeConfig) -> Iterator[list[str]]:
    """Within the block every replica holds every expert and the merged policy; yields their names."""
    with gathered_adapters(bank, groups, experts):
        bank.put_combination(MERGED, merge_weights(experts, config))
        try:
            yield [*experts, MERGED]
        finally:
            bank.remove(MERGED)
