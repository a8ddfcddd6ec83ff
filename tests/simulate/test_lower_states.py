"""What the plan says of states that the rollout keeps: bytes beside the engine's own, operations beside the rules."""
from __future__ import annotations

from dataclasses import replace

import pytest

from copd_megatron.config.losses import OpdConfig
from copd_megatron.config.model import AdapterConfig
from copd_megatron.config.rollout import RolloutConfig
from copd_megatron.launch.plan import job_of
from copd_megatron.parallel.layout import Layout
from copd_megatron.simulate.cost import step_flops, step_time
from copd_megatron.simulate.flops import PassStreams, Stream, UpdateShape, pass_flops, pass_streams
from copd_megatron.simulate.hardware import BUILT_IN
from copd_megatron.simulate.lower_states import kept_bytes, kept_shares, sampled_here, wanted_bytes
from copd_megatron.simulate.memory import rank_memory
from copd_megatron.types import Edge
from simulate.test_search import EXPERTS, big_job
from support.toy_run import toy_config, toy_trainer

AMPLE = 1 << 40


def half_depth(budget=AMPLE, scope="sequence", **rollout):
    return big_job(adapter=AdapterConfig(scope=scope, first_layer=18),
                   rollout=RolloutConfig(lower_states_bytes=budget, **rollout))


@pytest.mark.parametrize("scope, store", [("sequence", 0), ("completion", 0), ("completion", 1 << 24)])
def test_planned_bytes_are_those_that_the_engine_keeps(scope, store, tmp_path):
    config = toy_config("qwen3", adapter={"rank": 3, "scope": scope, "first_layer": 2}, exchange={"topology": "hub"},
                        rollout={"lower_states_bytes": AMPLE, "prefix_store_bytes": store, "prompts_per_step": 4})
    job = job_of(config)
    with toy_trainer(config, tmp_path) as trainer:
        edges, states = trainer.schedule.edges(1), trainer.runner.lower_states
        asked = [*trainer.native.requests(1), *trainer.cross.requests(1, edges)]
        requests = [replace(a.request, params=replace(a.request.params, stop_token_ids=())) for a in asked]
        prompts = {r.prompt.content_hash: r.prompt for r in requests}
        with states.step():
            answers = trainer.collector.engine.generate(requests)
            real = states.bytes
            assert len(states.owners) == (0 if store else len(prompts)) + len(
                {(c.prompt.content_hash, *c.token_ids) for group in answers for c in group})
        planned = wanted_bytes(job, trainer.groups.placement, 0, 1)
        assert sum(planned) == pytest.approx(real, rel=0.1)
        assert (planned[1] == 0) == (store > 0)
        memory = rank_memory(job, Layout(), trainer.groups.placement, 0, 0)
        assert memory.phases["update"]["lower states"] == memory.phases["score"]["lower states"] == sum(planned)
        assert memory.phases["rollout"]["lower states"] > sum(planned)
        assert "lower states" not in memory.phases["evaluate"]


def test_only_the_stage_of_the_layer_holds_them():
    job, placement = half_depth(), big_job().place(1)
    held = ["lower states" in rank_memory(job, Layout(pp=4), placement, 0, stage).phases["score"] for stage in range(4)]
    assert held == [False, False, True, False]
    one, four = (rank_memory(job, Layout(cp=cp), placement, 0, 0).phases["score"]["lower states"] for cp in (1, 4))
    assert four == one / 4
    assert kept_bytes(half_depth(10**9), placement, 0, 1) == 10**9
    assert "lower states" not in rank_memory(big_job(), Layout(), placement, 0, 0).phases["score"]


def test_operations_of_what_was_kept_are_those_below_first_layer():
    """With one replica all that is scored was sampled there; half depth halves the forward of long completions."""
    job, placement = half_depth(), big_job().place(1)
    kept, computed = step_flops(job, placement, 0), step_flops(half_depth(0), placement, 0)
    assert kept["rollout"] == computed["rollout"]
    below = 0.0
    for domain, lengths in job.prompts.items():
        shape = UpdateShape(lengths.tokens, job.completion_tokens, job.rollout.group_size, 1, lengths.header_tokens)
        streams = PassStreams(pass_streams(shape, job.adapter, 1, True).below, Stream(), Stream(), 0)
        one = pass_flops(job.spec, job.adapter, streams, backward=False).total
        native = sum(g.count for g in job.groups(placement, 0) if g.domain == domain)
        crossing = sum(g.count for g in job.groups(placement, 0) if g.domain == domain and g.edge)
        # Updates of all groups, the backbone's scores of native ones, the teachers' of the others.
        below += one * (native + (native - crossing) + crossing)
    saved = sum(computed[p].total - kept[p].total for p in ("score", "update"))
    assert saved == pytest.approx(below, rel=1e-9)
    times = [step_time(j, Layout(), placement, BUILT_IN["h100"]) for j in (job, half_depth(0))]
    assert times[0].score < times[1].score and times[0].update < times[1].update
    assert times[0].rollout == times[1].rollout


def test_completions_find_room_before_prompts():
    placement = big_job().place(1)
    completions, prompts = wanted_bytes(half_depth(), placement, 0, 1)
    shares = [kept_shares(half_depth(int(room)), placement, 0, 1)
              for room in (0, completions / 2, completions, completions + prompts / 2, completions + prompts, AMPLE)]
    assert [c for c, _ in shares] == pytest.approx([0, 0.5, 1, 1, 1, 1], abs=1e-6)
    assert [p for _, p in shares] == pytest.approx([0, 0, 0, 0.5, 1, 1], abs=1e-6)
    totals = [step_flops(half_depth(int(room)), placement, 0)["score"].total
              for room in (0, completions / 2, completions, completions + prompts)]
    assert totals == sorted(totals, reverse=True) and len(set(totals)) == 4


def test_what_other_replicas_sampled_is_evaluated_from_the_lowest_layer():
    job = replace(half_depth(), experts=EXPERTS[:2], edges=(Edge("text", "image"), Edge("image", "text")))
    one, two = job.place(1), job.place(2)
    together = step_flops(job, one, 0)["score"].total
    apart = sum(step_flops(job, two, replica)["score"].total for replica in range(2))
    plain = step_flops(replace(job, rollout=RolloutConfig()), one, 0)["score"].total
    assert together < apart < plain
    native = replace(job, opd=OpdConfig(rollouts="native"))
    shares = [sampled_here(native, two, replica, group) for replica in range(2)
              for group in native.groups(two, replica) if group.edge]
    assert shares == [0, 0], "a student's native rollouts are the other replica's"
    assert all(sampled_here(native, one, 0, group) == 1 for group in native.groups(one, 0))
