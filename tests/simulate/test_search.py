"""Thousands of ranks on one: a plan answers in well under five seconds, and the search says why layouts fail."""
from __future__ import annotations

import time
from dataclasses import replace

import pytest

from copd_megatron.config.losses import OpdConfig, RlvrConfig
from copd_megatron.config.model import AdapterConfig, ModelConfig
from copd_megatron.config.rollout import RolloutConfig
from copd_megatron.launch.plan import layout_text, make_plan, plan_json, plan_text, search_text
from copd_megatron.model.spec import BackboneSpec, MoeSpec, RopeSpec
from copd_megatron.parallel.layout import Layout
from copd_megatron.parallel.placement import Placement
from copd_megatron.simulate.cost import step_time
from copd_megatron.simulate.flops import PassStreams, Stream, UpdateShape, pass_flops, pass_streams
from copd_megatron.simulate.hardware import BUILT_IN
from copd_megatron.simulate.job import Job, PromptLengths
from copd_megatron.simulate.search import fullest, rank_kinds, search
from copd_megatron.types import Edge

QWEN3_VL_4B = BackboneSpec("qwen3_vl", 36, 2560, 9728, 32, 8, 128, 151936, 1e-6, RopeSpec(5e6, None, (24, 20, 20)),
                           True, False, False, False, True, 3, 151655, 151656)
EXPERTS = ("text", "image", "video")
H100 = BUILT_IN["h100"]


def big_job(**changes) -> Job:
    hub = [Edge("text", s, 1.0, "topk") for s in EXPERTS[1:]] + [Edge(t, "text", 1.0, "topk") for t in EXPERTS[1:]]
    job = Job(QWEN3_VL_4B, ModelConfig(path="-"), AdapterConfig(), RolloutConfig(), RlvrConfig(),
              OpdConfig(signal="topk"), 16384, EXPERTS, tuple(hub),
              {"text": PromptLengths(300), "image": PromptLengths(900, 700), "video": PromptLengths(4000, 3700)}, 1024,
              vision_bytes=820_000_000)
    return replace(job, **changes)


def test_4096_ranks_take_well_under_five_seconds_of_a_processor():
    start = time.process_time()
    layout = Layout(tp=4, pp=2, replicas=512)
    placement = Placement.build(EXPERTS, 512)
    plan = make_plan(big_job(), layout, placement, H100, "scatter")
    text = plan_text(plan) + layout_text(layout, placement)
    record = plan_json(plan, None, True)
    assert time.process_time() - start < 5
    assert "4096 ranks of h100" in text
    assert len(text.splitlines()) < 100
    assert len(record["ranks"]) == 4096
    assert record["ranks"][4095] | {"experts": [], "groups": {}} == {
        "rank": 4095, "replica": 511, "pp": 1, "cp": 0, "tp": 3, "ep": 0, "etp": 0, "experts": [], "groups": {}}
    assert record["ranks"][4095]["experts"] == ["video"]


def test_search_ranks_what_fits_and_explains_the_rest():
    found = search(big_job(), 24, H100, "scatter")
    fitting = [c for c in found if c.fits]
    assert fitting and found[:len(fitting)] == fitting
    assert [c.time.total for c in fitting] == sorted(c.time.total for c in fitting)
    assert all(c.peak_bytes <= H100.usable_bytes for c in fitting)
    assert all(c.tp * c.pp * c.cp * c.replicas == 24 for c in found)
    assert len({(c.tp, c.pp, c.cp, c.vp) for c in found}) == len(found)
    for stages, chunks in ((2, {1}), (3, {1, 2, 3, 4, 6, 12}), (4, {1, 3, 9}), (12, {1, 3})):  # of 36 layers
        assert {c.vp for c in found if (c.tp, c.pp) == (2, stages)} == chunks
    reasons = {(c.tp, c.pp, c.cp): c.reason for c in found if not c.fits}
    assert "query heads" in reasons[3, 1, 1]
    text = search_text(found, H100)
    assert all(reason in text for reason in reasons.values())


def test_search_names_the_largest_part_where_memory_is_short():
    small = replace(H100, name="small", memory_bytes=6e9)
    found = search(big_job(), 8, small, "scatter")
    whole = next(c for c in found if (c.tp, c.pp, c.cp) == (1, 1, 1))
    assert not whole.fits
    assert "small has 5.5 GB to plan with; most is" in whole.reason


@pytest.mark.parametrize("other", [Layout(tp=2), Layout(pp=2), Layout(tp=2, pp=2)], ids=lambda layout: layout.key)
def test_sharding_needs_less_memory_and_never_the_same_bytes_twice(other):
    job = big_job()
    one = fullest(rank_kinds(job, Layout(), Placement.build(EXPERTS, 1))).memory
    kinds = rank_kinds(job, other, Placement.build(EXPERTS, 1))
    assert fullest(kinds).memory.peak_bytes < one.peak_bytes
    layers = sum(kind.memory.always["layers"] for kind in kinds) * other.tp
    norms = 36 * (2 * 2560 + 2 * 128) * 2  # the only weights of a layer that are not cut
    assert layers == one.always["layers"] + (other.tp - 1) * norms


def test_recompute_trades_memory_for_time():
    layout, placement = Layout(), Placement.build(("text",), 1)
    jobs = [big_job(experts=("text",), edges=(), model=ModelConfig(path="-", recompute=mode))
            for mode in ("none", "selective", "full")]
    none, some, least = (fullest(rank_kinds(job, layout, placement)).memory.phases["update"]["activations"]
                         for job in jobs)
    assert least < none / 5 and least < some < none
    times = [step_time(job, layout, placement, H100) for job in jobs]
    assert len({replace(time, update=0) for time in times}) == 1
    # What is added is the time of the forward: of attention, or of the layers.
    rollout = jobs[0].rollout
    streams = pass_streams(UpdateShape(300, 1024, rollout.group_size, 1, 3), jobs[0].adapter, 1, True)
    forward = pass_flops(QWEN3_VL_4B, jobs[0].adapter, streams, backward=False) * rollout.prompts_per_step
    attention = forward.attention / H100.peak_flops["bfloat16"] / H100.attention_achieved
    linears = (forward.linears + forward.adapters) / H100.flops("bfloat16")
    assert [time.update - times[0].update for time in times[1:]] == pytest.approx([attention, attention + linears])


def test_more_replicas_never_take_longer():
    job = big_job()
    totals = [step_time(job, Layout(replicas=n), Placement.build(EXPERTS, n), H100).update for n in (1, 3, 12, 96)]
    assert totals == sorted(totals, reverse=True)
    assert totals[0] / totals[-1] > 40


def test_experts_alone_exchange_nothing_and_still_have_a_plan():
    plan = make_plan(big_job(edges=()), Layout(), Placement.build(EXPERTS, 1), H100, "scatter")
    assert "nothing is exchanged" in plan_text(plan)
    assert set(plan.times) == {"rlvr"}


QWEN3_30B_A3B = BackboneSpec("qwen3_moe", 48, 2048, 6144, 32, 4, 128, 151936, 1e-6, RopeSpec(1e6), True, False, False,
                             False, False, 0, moe=MoeSpec(128, 8, 768, True, tuple(range(48))))


def moe_job() -> Job:
    return big_job(spec=QWEN3_30B_A3B, adapter=AdapterConfig(targets=("q_proj", "k_proj", "v_proj", "o_proj")),
                   vision_bytes=0)


def test_moe_experts_are_shared_out_over_their_ranks():
    """30.5 billion weights, of which 29 billion are MoE experts'; a token passes 3.3 billion, table and head too."""
    job = moe_job()
    whole = rank_kinds(job, Layout(), job.place(1))[0].memory.always
    assert whole["moe experts"] == 2 * 48 * 128 * 3 * 2048 * 768
    weights = ("embedding", "layers", "moe experts", "head")
    assert sum(whole[part] for part in weights) == pytest.approx(61.1e9, rel=1e-2)
    for layout in (Layout(cp=8, ep=8), Layout(tp=4, cp=2, ep=2, etp=4, sequence_parallel=True)):
        shared = rank_kinds(job, layout, job.place(1))[0].memory.always
        assert shared["moe experts"] * 8 == whole["moe experts"]
    one = pass_flops(QWEN3_30B_A3B, job.adapter, PassStreams(Stream(), Stream(1, 1), Stream(), 1), backward=False)
    assert (one.linears + one.head) / 2 + 2048 * 151936 == pytest.approx(3.35e9, rel=1e-2)


def test_search_tries_every_way_to_share_out_moe_experts():
    found = search(moe_job(), 8, H100, "scatter")
    shapes = {(c.tp, c.pp, c.cp, c.ep, c.etp) for c in found if c.vp == 1}
    assert len({replace(c, peak_bytes=0.0, time=None, reason="") for c in found}) == len(found)
    assert {(1, 1, 8, 8, 1), (1, 1, 8, 1, 1), (4, 1, 2, 8, 1), (4, 1, 2, 2, 4)} <= shapes
    text = search_text(found, H100)
    assert text.count(" ETP ") == 2 and any(c.fits and c.ep == 8 for c in found)
    spread, whole = (next(c for c in found if (c.tp, c.pp, c.cp, c.ep, c.etp) == (1, 1, 8, ep, 1)) for ep in (8, 1))
    assert spread.fits and spread.peak_bytes < whole.peak_bytes - 40e9


def test_rows_on_their_way_to_moe_experts_take_time():
    job = moe_job()
    times = {ep: step_time(job, Layout(cp=8, ep=ep), job.place(1), H100) for ep in (1, 8)}
    assert times[8].update > times[1].update and times[8].score > times[1].score
    assert times[8].rollout != times[1].rollout
