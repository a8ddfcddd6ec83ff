"""Seconds of scoring and update over pipeline stages: each stage has the operations of its own layers."""
from __future__ import annotations

from dataclasses import replace

import pytest

from copd_megatron.config.model import AdapterConfig, ModelConfig
from copd_megatron.config.rollout import RolloutConfig
from copd_megatron.launch.plan import make_plan
from copd_megatron.model.backbone import stage_layers
from copd_megatron.model.spec import BackboneSpec, RopeSpec
from copd_megatron.parallel.layout import Layout
from copd_megatron.simulate.cost import step_flops, step_time
from copd_megatron.simulate.flops import Flops, UpdateShape, pass_flops, pass_streams, recomputed_flops
from copd_megatron.simulate.hardware import Hardware
from copd_megatron.simulate.job import Job, PromptLengths
from simulate.test_search import H100, big_job
from support.random_backbone import MOE_SPEC, SPEC

SMALL = BackboneSpec("qwen3", num_layers=4, hidden_size=8, ffn_hidden_size=16, num_heads=2, num_kv_heads=1, head_dim=4,
                     vocab_size=32, norm_eps=1e-6, rope=RopeSpec(1e4), qk_norm=True, qkv_bias=False, o_bias=False,
                     mlp_bias=False, tied_head=True, deepstack_layers=0)
ONE_A_SECOND = Hardware("counter", 1e30, {"float32": 1.0}, {"float32": 1.0}, 1e30, 1e30, 1e30, 0.0, 0.0, 8,
                        attention_achieved=1.0, operation_s=0.0)
"""Operations take a second each and nothing else takes time."""
AMPLE = 1 << 40

# Two completions of 3 tokens after a prompt of 6, scope sequence: a trunk of 5 and two leaves of 1 + 3 - 1 rows.
ROWS = 5 + 2 * 3
PAIRS = 15 + 2 * (6 + 3 * 5)
WEIGHTS = 64 + 32 + 32 + 64 + 3 * 128  # q, k, v, o; gate, up, down
ADAPTER_WIDTHS = 16 + 12 + 12 + 16 + 3 * 24  # in + out of the same
RANK = 2
LAYER = 2 * ROWS * WEIGHTS + 4 * 4 * 2 * PAIRS  # forward without adapters
ADAPTERS = 2 * ROWS * RANK * ADAPTER_WIDTHS
HEAD = 2 * 8 * 32 * (2 * 3)
BACKWARD = 2 * ROWS * WEIGHTS + 2 * ADAPTERS + 2.5 * 4 * 4 * 2 * PAIRS
TO_NOBODY = 2 * ROWS * (64 + 32 + 32) + 2 * ROWS * RANK * 3 * 8  # the input of the first adapted q, k, v


def small_job(first_layer: int, kept_bytes: int, prompts: int = 1, recompute: str = "none") -> Job:
    adapter = AdapterConfig(rank=RANK, first_layer=first_layer)
    rollout = RolloutConfig(prompts_per_step=prompts, group_size=2, max_completion_tokens=3,
                            lower_states_bytes=kept_bytes)
    model = ModelConfig(path="-", dtype="float32", recompute=recompute)
    return big_job(spec=SMALL, experts=("text",), edges=(), model=model, adapter=adapter, rollout=rollout,
                   microbatch_tokens=ROWS, prompts={"text": PromptLengths(6)}, completion_tokens=3, vision_bytes=0)


TWO_STAGES = Layout(pp=2)


def counted(job: Job, layout: Layout = TWO_STAGES) -> tuple[float, float]:
    """(score, update) operations of the longest way through the pipeline."""
    time = step_time(job, layout, job.place(1), ONE_A_SECOND, opd=False)
    return time.score, time.update


@pytest.mark.parametrize("prompts", [1, 3])
def test_stages_above_the_first_adapted_layer_do_all_the_work_where_states_are_kept(prompts):
    """Stage 0 of 2 holds the layers below ``first_layer`` alone: with states kept it has nothing to do, and the other
    one works without a break, once per microbatch (a prompt each)."""
    score, update = counted(small_job(2, AMPLE, prompts))
    above = 2 * LAYER + HEAD
    assert score == prompts * above
    assert update == prompts * (above + 2 * ADAPTERS + 2 * BACKWARD - TO_NOBODY + HEAD)


@pytest.mark.parametrize("prompts", [1, 3])
def test_a_stage_below_the_first_adapted_layer_has_no_backward(prompts):
    """It is passed by the first microbatch before the longest stage begins, and hidden behind that afterwards."""
    score, update = counted(small_job(2, 0, prompts))
    assert score == prompts * (2 * LAYER + HEAD) + 2 * LAYER
    assert update == 2 * LAYER + prompts * (2 * LAYER + 2 * ADAPTERS + 2 * BACKWARD - TO_NOBODY + 2 * HEAD)


def test_stages_of_equal_layers_differ_by_the_head_and_what_nobody_needs():
    for recompute, again in (("none", 0), ("full", LAYER + ADAPTERS), ("selective", 4 * 4 * 2 * PAIRS)):
        score, update = counted(small_job(0, 0, 3, recompute))
        assert score == 3 * (2 * LAYER + HEAD) + 2 * LAYER
        stage = 2 * (LAYER + ADAPTERS + BACKWARD + again)
        assert update == 3 * (stage + 2 * HEAD) + stage - TO_NOBODY


def test_a_layer_that_is_shared_out_unevenly_makes_its_stage_the_longest():
    """Of 3 stages the first has two layers; from layer 1 on they are adapted."""
    assert [stage_layers(4, 3, stage) for stage in range(3)] == [[0, 1], [2], [3]]
    forward, back = LAYER + ADAPTERS, BACKWARD
    first = LAYER + forward + back - TO_NOBODY
    middle, last = forward + back, forward + back + 2 * HEAD
    assert counted(small_job(1, 0, 3), Layout(pp=3))[1] == 3 * max(first, last) + first + middle + last - max(
        first, last)
    kept = [first - LAYER, middle, last]
    assert counted(small_job(1, AMPLE, 3), Layout(pp=3))[1] == 3 * last + sum(kept) - last


def test_interleaved_stages_share_out_what_lies_above():
    job = big_job(adapter=AdapterConfig(first_layer=18), rollout=RolloutConfig(lower_states_bytes=AMPLE))
    assert stage_layers(36, 3, 0, 12) == list(range(0, 36, 3))
    whole, shared = (step_time(job, Layout(pp=3, vp=vp), job.place(1), H100) for vp in (1, 12))
    assert shared.update < 0.8 * whole.update and shared.score < 0.8 * whole.score


@pytest.mark.parametrize("scope", ["sequence", "completion"])
@pytest.mark.parametrize("targets, first_layer", [(("q_proj", "down_proj"), 1), (("gate_proj",), 0), (("v_proj",), 2)])
@pytest.mark.parametrize("spec", [SPEC, MOE_SPEC], ids=["dense", "moe"])
def test_operations_of_stages_are_those_of_the_whole(spec, targets, first_layer, scope):
    adapter = AdapterConfig(rank=3, targets=targets, first_layer=first_layer, scope=scope)
    streams = pass_streams(UpdateShape(9, 4, group=3, experts=2), adapter, 2, True)
    for stages in range(1, spec.num_layers + 1):
        parts = [stage_layers(spec.num_layers, stages, stage) for stage in range(stages)]
        for backward in (False, True):
            own = [pass_flops(spec, adapter, streams, backward, layers=layers) for layers in parts]
            assert sum(own, Flops()) == pass_flops(spec, adapter, streams, backward)
            assert [part.head > 0 for part in own] == [False] * (stages - 1) + [True]
            assert all(min(part.linears, part.attention, part.adapters) >= 0 for part in own)
        again = [recomputed_flops(spec, adapter, streams, "full", layers) for layers in parts]
        assert sum(again, Flops()) == recomputed_flops(spec, adapter, streams, "full")


def test_a_steps_operations_are_shared_out_over_stages():
    job = big_job(adapter=AdapterConfig(first_layer=18), rollout=RolloutConfig(lower_states_bytes=10**9))
    whole, placement = step_flops(job, job.place(1), 0), job.place(1)
    parts = [step_flops(job, placement, 0, layers=stage_layers(36, 5, stage)) for stage in range(5)]
    for phase, flops in whole.items():
        assert sum(part[phase].total for part in parts) == pytest.approx(flops.total, rel=1e-12)


def test_nothing_is_launched_or_sent_below_states_that_are_kept():
    """Launches and messages alone: layers below have neither, so that half depth costs as much as half the layers."""
    slow = replace(ONE_A_SECOND, peak_flops={"float32": 1e30}, operation_s=1e-3, intra_node_latency_s=1e-6,
                   intra_node_bandwidth=1e6)
    half = replace(SMALL, num_layers=2)
    for layout in (Layout(), Layout(tp=2), Layout(cp=2)):
        kept, computed = (small_job(2, room, 3) for room in (AMPLE, 0))
        short = replace(small_job(0, 0, 3), spec=half)
        times = [step_time(job, layout, job.place(1), slow, opd=False) for job in (kept, computed, short)]
        for phase in ("score", "update"):
            above, both, alone = (getattr(time, phase) for time in times)
            assert above == pytest.approx(alone, rel=1e-9) and both > 1.2 * above


def test_a_plan_of_kept_states_takes_no_less_time_on_two_stages_than_its_upper_half_on_one():
    """By half depth on 2 stages nothing is gained over the upper stage alone: both take its operations."""
    job = big_job(adapter=AdapterConfig(first_layer=18), rollout=RolloutConfig(lower_states_bytes=AMPLE))
    one, two = (make_plan(job, Layout(pp=pp), job.place(1), H100, "scatter").times["opd"] for pp in (1, 2))
    assert two.update >= one.update and two.score >= one.score
    even = big_job()
    one, two = (make_plan(even, Layout(pp=pp), even.place(1), H100, "scatter").times["opd"] for pp in (1, 2))
    assert two.update < 0.6 * one.update
