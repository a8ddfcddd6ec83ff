"""Bytes between replicas: what travels, what does not, and how both transports grow."""
from __future__ import annotations

from dataclasses import replace

import pytest

from copd_megatron.config.losses import OpdConfig, RlvrConfig
from copd_megatron.config.model import AdapterConfig, ModelConfig
from copd_megatron.config.rollout import RolloutConfig
from copd_megatron.exchange.request import HEADER
from copd_megatron.parallel.layout import Layout
from copd_megatron.parallel.placement import Placement
from copd_megatron.simulate.job import Job, PromptLengths
from copd_megatron.simulate.memory import adapter_bytes
from copd_megatron.simulate.traffic import (
    FULL_VOCABULARY,
    chosen,
    gather,
    payload_bytes,
    scatter,
    traffic_by_transport,
    transfers,
)
from copd_megatron.types import Edge
from support.random_backbone import SPEC


def make_job(names=("a", "b", "c"), edges=None, **opd) -> Job:
    pairs = [("a", "b"), ("a", "c"), ("b", "a")] if edges is None else edges
    return Job(SPEC, ModelConfig(path="-", dtype="float32"), AdapterConfig(rank=2),
               RolloutConfig(prompts_per_step=7, group_size=2), RlvrConfig(), OpdConfig(**{"topk": 4, **opd}), 1000,
               tuple(names), tuple(Edge(t, s, 1.0, "topk") for t, s in pairs),
               dict.fromkeys(names, PromptLengths(9)), 5)


def kind_of(edge: Edge) -> str:
    return edge.signal


def test_co_hosted_experts_exchange_nothing():
    job, layout = make_job(), Layout(tp=2)
    for traffic in traffic_by_transport(job, layout, Placement.build(job.experts, 1)).values():
        assert traffic.step_bytes == traffic.rank_bytes == 0


def test_scatter_counts_token_ids_out_and_signals_back():
    job = make_job(edges=[("a", "b")])
    layout, placement = Layout(tp=2, replicas=2), Placement(("a", "b", "c"), 2, ((0,), (1,), (1,)))
    tokens, completions = 7 * 2 * 5, 7 * 2
    payload = 4 + 4 * 4 + 4 * 4 + 4  # log-prob, ids, log-probs, tail
    rounds = 4 * completions
    traffic = scatter(job, layout, placement, kind_of)
    assert traffic.step_bytes == 2 * (tokens * payload + rounds + completions * (HEADER + 5) * 4)
    assert traffic.rank_bytes == tokens * payload + rounds


@pytest.mark.parametrize("replicas", [1, 2, 3, 5, 8])
def test_every_cross_prompt_is_scored_once(replicas):
    job = make_job()
    placement = Placement.build(job.experts, replicas)
    for edge in job.edges:
        moves = [move for move in transfers(job, placement) if move[0] == edge]
        assert sum(prompts for *_, prompts in moves) == job.cross_prompts(edge)
        assert all(host in placement.replicas_of(edge.teacher) for _, _, host, _ in moves)


def test_gather_depends_on_adapters_and_replicas_only():
    job, layout = make_job(), Layout(replicas=3)
    placement = Placement.build(job.experts, 3)
    one = adapter_bytes(job, layout, 0)["adapters"]
    assert gather(job, layout, placement).step_bytes == 3 * one  # a to b and c, b to a
    assert gather(job, layout, placement).rank_bytes == one
    assert gather(replace(job, completion_tokens=500), layout, placement) == gather(job, layout, placement)


def test_payloads_are_the_codecs_and_auto_takes_the_cheaper():
    job, layout = make_job(), Layout(replicas=3)
    placement = Placement.build(job.experts, 3)
    assert payload_bytes(job, "sampled") == 4
    assert payload_bytes(job, "full") == 4 * SPEC.hidden_size
    assert payload_bytes(job, FULL_VOCABULARY) == 4 * SPEC.vocab_size
    assert chosen(job, layout, placement, "auto")[0] == "scatter"
    assert chosen(replace(job, completion_tokens=100_000), layout, placement, "auto")[0] == "gather_adapters"
    assert chosen(replace(job, completion_tokens=100_000), layout, placement, "scatter")[0] == "scatter"
