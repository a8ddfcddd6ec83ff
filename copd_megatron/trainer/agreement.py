"""How far two experts are apart on each other's states: the paper's overlap and symmetric KL.

O_k(a, b) = mean over a's own states of |top_k(a) & top_k(b)| / k; reported for a pair as the mean of both
directions. Symmetric KL: mean of KL(a || b) on a's states and KL(b || a) on b's, exact over the vocabulary.
"""
from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from copd_megatron.metrics.names import pair_name
from copd_megatron.model.shared_prefix import Pack, pack_tokens
from copd_megatron.model.vocab_parallel import full_divergence, score
from copd_megatron.trainer.batching import Lane, Microbatch, Sample, make_microbatches
from copd_megatron.trainer.forward import Runner
from copd_megatron.trainer.learner import Sums, add_sums


def measure_agreement(runner: Runner, samples: Sequence[Sample], experts: Sequence[str], k: int, tokens: int,
                      temperature: float, microbatch_tokens: int) -> Sums:
    """Agreement of all pairs on the hosted experts' native samples, at most ``tokens`` per expert.

    Needs every expert's adapters in the bank (``exchange.gather``).
    """
    lanes = []
    for expert in experts:
        left = tokens
        for sample in samples:
            if sample.expert != expert or not sample.is_native or left <= 0:
                continue
            left -= len(sample.completion.token_ids)
            lanes += [Lane(sample, policy) for policy in experts]

    def at_end(hidden: Tensor, pack: Pack, batch: Microbatch):
        head = runner.backbone.head
        width = min(k, head.vocab_size)
        scores = score(hidden, head, pack.target_ids, temperature=temperature, topk=width)
        pieces = torch.arange(len(hidden), device=hidden.device).split(pack.leaf_lengths)
        rows: dict[tuple[str, str], list[Tensor]] = {}
        for lane, piece in zip(batch.lanes, pieces):
            rows.setdefault((lane.sample.expert, lane.policy), []).append(piece)
        sums: Sums = {}
        for (own, policy), theirs in rows.items():
            if policy == own:
                continue
            mine, other = torch.cat(rows[own, own]), torch.cat(theirs)
            ids, other_ids = scores.topk_ids_TK[mine], scores.topk_ids_TK[other]
            common = (ids[:, :, None] == other_ids[:, None, :]).any(2).double().mean(1)
            kl = full_divergence(hidden[mine], hidden[other], head, "reverse", temperature=temperature)
            add_sums(sums, {pair_name(own, policy, "overlap"): (common.sum(), float(len(mine))),
                            pair_name(own, policy, "symmetric_kl"): (kl.double().sum(), float(len(mine)))})
        return None, sums

    total: Sums = {}
    for part in runner.score(_whole_samples(lanes, runner, microbatch_tokens), at_end):
        add_sums(total, part)
    return total


def _whole_samples(lanes: Sequence[Lane], runner: Runner, budget: int) -> list[Microbatch]:
    """Microbatches that keep all lanes of a sample together, so that every pair can be compared."""
    by_sample: dict[Sample, list[Lane]] = {}
    for lane in lanes:
        by_sample.setdefault(lane.sample, []).append(lane)
    batches, filled = [], budget + 1
    for group in by_sample.values():
        (single,) = make_microbatches(group, runner.backbone.rules, 1 << 62)
        size = pack_tokens(single.groups, runner.backbone.rules)
        if filled + size > budget:
            batches.append([])
            filled = 0
        batches[-1] += group
        filled += size
    return [make_microbatches(group, runner.backbone.rules, 1 << 62)[0] for group in batches]
