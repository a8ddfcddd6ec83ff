"""How far two experts are apart on each other's states: the paper's overlap and symmetric KL.

O_k(a, b) = mean over a's own states of |top_k(a) & top_k(b)| / k; reported for a pair as the mean of both
directions. Symmetric KL: mean of KL(a || b) on a's states and KL(b || a) on b's, exact over the vocabulary.
"""
from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from copd_megatron.losses.topk_kl import topk_overlap
from copd_megatron.metrics.names import pair_name
from copd_megatron.model.policy_comparison import compare_policies
from copd_megatron.model.shared_prefix import Pack
from copd_megatron.parallel.collectives import all_gather_objects
from copd_megatron.parallel.groups import Groups
from copd_megatron.platform import on_device
from copd_megatron.trainer.batching import Lane, Microbatch, Sample, make_microbatches
from copd_megatron.trainer.forward import Runner
from copd_megatron.trainer.step_metrics import Sums, add_sums


def measure_agreement(runner: Runner, samples: Sequence[Sample], experts: Sequence[str], k: int, tokens: int,
                      temperature: float, microbatch_tokens: int) -> Sums:
    """Agreement of all pairs on the hosted experts' native samples, about ``tokens`` per expert.

    Needs every expert's adapters in the bank (``exchange.gather``). Completions of one prompt are taken
    together, so that they share its evaluation.
    """
    chosen = {expert: _first(samples, expert, tokens, runner.groups) for expert in runner.groups.hosted}
    lanes = [Lane(sample, policy) for sample in samples
             if sample.is_native and _place(sample) in chosen[sample.expert] for policy in experts]

    def at_end(hidden: Tensor, pack: Pack, batch: Microbatch) -> tuple[None, Sums]:
        return None, _pair_sums(runner, hidden, pack, batch, k, temperature)

    total: Sums = {}
    batches = make_microbatches(lanes, runner.backbone.rules, microbatch_tokens, whole_samples=True)
    for part in runner.score(batches, at_end):
        add_sums(total, part)
    return total


def _place(sample: Sample) -> tuple[int, int]:
    """Which completion of its expert's batch it is."""
    return sample.slot, sample.completion.sample


def _first(samples: Sequence[Sample], expert: str, tokens: int, groups: Groups) -> set[tuple[int, int]]:
    """The first completions of an expert's native batch with ``tokens`` in all: the same on any number of replicas.

    Every replica of the expert calls it together.
    """
    mine = [(_place(s), s.length) for s in samples if s.is_native and s.expert == expert]
    chosen, left = set(), tokens
    for place, length in sorted(row for part in all_gather_objects(mine, groups.adapter[expert]) for row in part):
        if left <= 0:
            break
        chosen.add(place)
        left -= length
    return chosen


def _pair_sums(runner: Runner, hidden: Tensor, pack: Pack, batch: Microbatch, k: int, temperature: float) -> Sums:
    """Sums over the states of one microbatch: own policy against each other one."""
    head = runner.backbone.head
    rows: dict[str, dict[str, list[np.ndarray]]] = {}
    for lane, start in zip(batch.lanes, np.cumsum((0, *pack.leaf_lengths))):
        # The environment's tokens are no state of the policy.
        own = start + np.flatnonzero(lane.sample.loss_mask)
        rows.setdefault(lane.sample.expert, {}).setdefault(lane.policy, []).append(own)
    sums: Sums = {}
    for expert, by_policy in rows.items():
        states = {policy: hidden[on_device(np.concatenate(pieces), hidden.device)]
                  for policy, pieces in by_policy.items()}
        own = states.pop(expert)
        found = compare_policies(own, list(states.values()), head, min(k, head.vocab_size), temperature=temperature)
        for place, policy in enumerate(states):
            common = topk_overlap(found.topk_ids_TNK[:, 0], found.topk_ids_TNK[:, place + 1])
            add_sums(sums, {pair_name(expert, policy, "overlap"): (common.double().sum(), float(len(own))),
                            pair_name(expert, policy, "symmetric_kl"): (found.kl_TP[:, place].double().sum(),
                                                                        float(len(own)))})
    return sums
