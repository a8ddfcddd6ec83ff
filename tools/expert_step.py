"""One OPD step of N experts, run and measured: bytes at the collectives, operations as PyTorch dispatches them.

The trainer's own scoring, exchange and update (`Scoring`, `Learner`) on a tiny random backbone; prompts and completions
are random tokens of one length, so that nothing has to be sampled. `expert_scaling.py` sets the measurements beside
what it counts.
"""
from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from bench_backbone import random_backbone
from torch.utils.flop_counter import FlopCounterMode

from copd_megatron.config.model import ModelConfig
from copd_megatron.config.trainer import OptimizerConfig
from copd_megatron.exchange.gather import gathered_teachers
from copd_megatron.exchange.wire import Wire
from copd_megatron.metrics.timers import Timers
from copd_megatron.model.spec import BackboneSpec, RopeSpec
from copd_megatron.parallel.groups import Groups
from copd_megatron.parallel.layout import Layout
from copd_megatron.parallel.seeding import generator_for
from copd_megatron.rollout.engine import SamplingParams
from copd_megatron.simulate.job import Job
from copd_megatron.trainer.batching import Sample
from copd_megatron.trainer.forward import Runner
from copd_megatron.trainer.learner import Learner
from copd_megatron.trainer.opd_phase import CrossBatch
from copd_megatron.trainer.optimizer import ExpertOptimizer
from copd_megatron.trainer.scoring import Scoring
from copd_megatron.types import Completion, Edge, Prompt, Segment

TINY = BackboneSpec(family="qwen3", num_layers=2, hidden_size=64, ffn_hidden_size=128, num_heads=4, num_kv_heads=2,
                    head_dim=16, vocab_size=512, norm_eps=1e-6, rope=RopeSpec(1e6), qk_norm=True, qkv_bias=False,
                    o_bias=False, mlp_bias=False, tied_head=False, deepstack_layers=0)


class RandomPrompts:
    """Stands where tasks do: prompt number ``position`` of a domain is random tokens."""

    def __init__(self, job: Job):
        self.job = job

    def train(self, domain: str, position: int) -> Prompt:
        """A prompt, the same on every rank."""
        lengths, name = self.job.prompts[domain], f"{domain}/{position}"
        ids = torch.randint(self.job.spec.vocab_size, (lengths.tokens,), generator=generator_for(0, name)).numpy()
        places = np.broadcast_to(np.arange(lengths.tokens), (3, lengths.tokens)).copy()
        return Prompt(name, domain, ids, places, lengths.tokens, None, np.zeros(0, np.int64), lengths.header_tokens,
                      name)

    def position(self, domain: str, step: int, place: int) -> int:
        """Of a place of a domain's native batch."""
        return place


def run_jobs(jobs: Sequence[Job]) -> list[dict[str, float]]:
    """Measurements of each job's step on one replica per rank of the default group, summed over all ranks."""
    layout = Layout(replicas=dist.get_world_size())
    groups = Groups.create(layout, jobs[0].place(layout.replicas))
    backbone = random_backbone(jobs[0].spec, jobs[0].adapter, groups,
                               ModelConfig(path="-", dtype="float32"), groups.hosted)
    return [_over_ranks(_measure(job, groups, Runner(backbone, groups, lambda prompts: None))) for job in jobs]


def _measure(job: Job, groups: Groups, runner: Runner) -> dict[str, float]:
    """This rank's part of one step."""
    bank, prompts = runner.backbone.bank, RandomPrompts(job)
    params = SamplingParams(max_tokens=job.completion_tokens, stop_token_ids=())
    cross = CrossBatch(prompts, groups, job.rollout, job.opd, prompts, params)
    scoring = Scoring(runner, groups, cross, job.rlvr, job.opd, job.rollout, job.microbatch_tokens, "scatter")
    optimizers = {e: ExpertOptimizer(e, bank, groups, OptimizerConfig()) for e in groups.hosted}
    learner = Learner(runner, groups, optimizers, job.rlvr, job.opd, job.rollout, job.microbatch_tokens)
    samples = list(_samples(job, groups, cross))
    with _counted_bytes() as scattered, FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION) as flops:
        scoring.score(samples, 0, job.edges, Timers())
        score_flops = flops.get_total_flops()
        learner.update(samples)
        update_flops = flops.get_total_flops() - score_flops
    with _counted_bytes() as gathered, gathered_teachers(bank, groups, job.edges, Wire(groups.exchange)):
        pass
    return {"scatter_bytes": sum(scattered), "gather_bytes": sum(gathered), "score_flops": score_flops,
            "update_flops": update_flops}


def _samples(job: Job, groups: Groups, cross: CrossBatch) -> Iterator[Sample]:
    """What the rollouts of this replica would have been."""
    native, here = job.rollout.prompts_per_step, groups.coords.replica
    for expert in groups.hosted:
        for slot in groups.placement.share(expert, here, native):
            yield from _group(job, cross.source.train(expert, slot), expert, None, slot, native)
        for share in cross.shares(job.edges, expert):
            for slot in groups.placement.share(expert, here, share.count):
                prompt = cross.prompt(job.edges, share.edge.teacher, expert, 0, slot)
                yield from _group(job, prompt, expert, share.edge, slot, share.count)


def _group(job: Job, prompt: Prompt, expert: str, edge: Edge | None, slot: int, slots: int) -> Iterator[Sample]:
    for number in range(job.rollout.group_size):
        generator = generator_for(1, expert, prompt.key, str(number))
        ids = torch.randint(job.spec.vocab_size, (job.completion_tokens,), generator=generator).tolist()
        logprobs = [-math.log(job.spec.vocab_size)] * len(ids)
        completion = Completion(prompt, expert, number, [Segment(ids, "policy", logprobs, logprobs)], "length")
        yield Sample(completion, expert, edge, 1.0 if number % 2 else -1.0, slot=slot, slots=slots)


@contextmanager
def _counted_bytes() -> Iterator[list[int]]:
    """Bytes that leave this rank by all-to-alls, one entry per call."""
    true, sent = dist.all_to_all_single, []

    def counting(received: torch.Tensor, out: torch.Tensor, sizes_in: Sequence[int] | None = None,
                 sizes_out: Sequence[int] | None = None, group: Any = None, **rest: Any) -> Any:
        ranks, own = dist.get_world_size(group), dist.get_rank(group)
        rows = list(sizes_out or [len(out) // ranks] * ranks)
        sent.append((sum(rows) - rows[own]) * out[:1].numel() * out.element_size() if len(out) else 0)
        return true(received, out, sizes_in, sizes_out, group=group, **rest)

    dist.all_to_all_single = counting
    try:
        yield sent
    finally:
        dist.all_to_all_single = true


def _attention_flops(q: Sequence[int], k: Sequence[int], v: Sequence[int], *_: Any, **__: Any) -> int:
    """Two products of all queries with all keys, masked ones included."""
    batch, heads, queries, width = q
    return 2 * batch * heads * queries * k[-2] * (width + v[-1])


def _attention_backward_flops(grad: Sequence[int], q: Sequence[int], k: Sequence[int], v: Sequence[int], *_: Any,
                              **__: Any) -> int:
    """Five products for the forward's two."""
    return _attention_flops(q, k, v) * 5 // 2


CPU_ATTENTION = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops,
                 torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward_flops}
"""What PyTorch's counter does not know of."""


def _over_ranks(own: dict[str, float]) -> dict[str, float]:
    total = torch.tensor(list(own.values()), dtype=torch.float64)
    dist.all_reduce(total)
    return dict(zip(own, total.tolist()))
