"""Planned bytes beside real ones: shards and optimizers to the byte, what autograd saves, the peak of an update.

Real means the storages of the trainer's own tensors: a view counts as all that it keeps alive.
"""
from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from megatron.core.pipeline_parallel.schedules import get_pp_rank_microbatches

from copd_kernels.prefix_attention import fused
from copd_megatron.config.loading import apply_overrides, load_recipe
from copd_megatron.config.losses import OpdConfig, RlvrConfig
from copd_megatron.config.model import AdapterConfig, ModelConfig
from copd_megatron.config.rollout import RolloutConfig
from copd_megatron.config.tasks import ExpertConfig
from copd_megatron.config.trainer import OptimizerConfig
from copd_megatron.launch.plan import job_of, layout_of
from copd_megatron.model.backbone import Backbone
from copd_megatron.model.hf_config import read_spec
from copd_megatron.model.layer_spec import transformer_config
from copd_megatron.model.shared_prefix import Leaf, LeafGroup, build_pack
from copd_megatron.model.spec import MoeSpec
from copd_megatron.parallel.groups import Groups
from copd_megatron.parallel.layout import Layout
from copd_megatron.parallel.placement import Placement
from copd_megatron.rollout.kv_cache import OwnCache
from copd_megatron.simulate.activations import Width, backward_bytes, saved_bytes
from copd_megatron.simulate.inputs import vision_bytes
from copd_megatron.simulate.job import Job, PromptLengths
from copd_megatron.simulate.memory import (
    MOE_EXPERTS,
    adapter_bytes,
    backbone_bytes,
    in_flight,
    on_rank,
    own_capacity,
    rank_memory,
)
from copd_megatron.simulate.ranks import rank_records
from copd_megatron.trainer.batching import Lane, Sample, make_microbatches
from copd_megatron.trainer.optimizer import ExpertOptimizer
from copd_megatron.types import Completion, Segment
from support.live_bytes import PeakBytes, allocated_bytes, saved_by_autograd, storage_bytes
from support.random_backbone import SPEC, make_prompt
from support.ranks import run_ranks
from support.tiny_models import tiny_model
from support.toy_run import toy_config, toy_trainer
from support.toy_tasks import LetterTask

ROOT = Path(__file__).resolve().parents[2]
WIDE = replace(SPEC, num_layers=4, hidden_size=64, ffn_hidden_size=160, num_heads=8, head_dim=16, vocab_size=301)

MOE_WIDE = replace(WIDE, family="qwen3_vl_moe",
                   moe=MoeSpec(experts=8, top_k=2, ffn_hidden_size=96, norm_topk=True, layers=(0, 2, 3)))


def make_job(spec=WIDE, model=None, adapter=None, prompts=40, completion=12, **rollout) -> Job:
    return Job(spec, ModelConfig(path="-", **(model or {})), AdapterConfig(**{"rank": 3, **(adapter or {})}),
               RolloutConfig(**{"prompts_per_step": 4, "group_size": 4, **rollout}), RlvrConfig(), OpdConfig(), 10**6,
               ("a", "b"), (), dict.fromkeys(("a", "b"), PromptLengths(prompts)), completion)


def real_bytes(path: Path, layout: Layout, placement: Placement, record: dict) -> list[tuple]:
    """(what, planned, real) on this rank: shards by part, one expert with its optimizer, every group's members."""
    spec = read_spec(path)
    groups = Groups.create(layout, placement)
    backbone = Backbone(spec, groups, ModelConfig(path="-", dtype="bfloat16"), AdapterConfig(rank=3, first_layer=1))
    for parameter in backbone.parameters():
        parameter.data.normal_()
    for expert in groups.hosted:
        backbone.bank.add_expert(expert, 0)
        optimizer = ExpertOptimizer(expert, backbone.bank, groups, OptimizerConfig())
        optimizer.step()
    job = make_job(spec, {"dtype": "bfloat16"}, {"first_layer": 1})
    own = list(backbone.bank.parameters_of(groups.hosted[0]).values())
    table = [backbone.embedding.weight] if groups.is_first_stage else []
    tail = [backbone.final_norm.weight, backbone.output_weight] if groups.is_last_stage else []
    tail = [t for t in tail if not any(t is other for other in table)]
    moe = storage_bytes(p for name, p in backbone.layers.named_parameters() if ".experts." in name)
    real = {"embedding": storage_bytes(table), "layers": storage_bytes(backbone.layers.parameters()) - moe,
            **({MOE_EXPERTS: moe} if moe else {}), "head": storage_bytes(tail), "adapters": storage_bytes(own),
            "gradients": storage_bytes(p.grad for p in own),
            "optimizer": storage_bytes(t for s in optimizer.state_dict().values() for t in s.values())}
    planned = backbone_bytes(spec, layout, groups.coords.pp, "bfloat16") | adapter_bytes(job, layout, groups.coords.pp)
    rows = [(name, planned[name], real[name]) for name in real]
    mine = record["ranks"][groups.rank]
    for kind in ("tp", "pp", "replica", "exchange"):
        members = dist.get_process_group_ranks(getattr(groups, kind))
        rows.append((kind, record["groups"][kind][mine["groups"][kind]], members))
    if layout.ep > 1:
        rows.append(("moe_expert", record["groups"]["moe_expert"][mine["groups"]["moe_expert"]],
                     dist.get_process_group_ranks(groups.pg_collection.ep)))
    for expert in groups.hosted:
        kind = f"adapter/{expert}"
        rows.append((kind, record["groups"][kind][mine["groups"][kind]],
                     dist.get_process_group_ranks(groups.adapter[expert])))
    groups.destroy()
    return rows


@pytest.mark.parametrize("layout", [
    Layout(tp=2, pp=2), Layout(pp=2, replicas=2), Layout(tp=2, ep=2, sequence_parallel=True, replicas=2),
    Layout(tp=2, cp=2, ep=2, etp=2, sequence_parallel=True)], ids=lambda layout: layout.key)
def test_shards_adapters_optimizer_and_groups_are_the_trainers(layout):
    # Made here, so that no rank removes them.
    paths = [tiny_model("qwen3"), tiny_model("qwen3_vl"), tiny_model("qwen2_5_vl", num_key_value_heads=1)]
    if layout.ep > 1:
        paths = [tiny_model("qwen3_moe"), tiny_model("qwen3_vl_moe")]
    placement = Placement.build(("a", "b"), layout.replicas)
    record = rank_records(layout, placement)

    def all_families():
        return [row for path in paths for row in real_bytes(path, layout, placement, record)]

    for rank, rows in enumerate(run_ranks(4, all_families)):
        for what, planned, real in rows:
            assert planned == real, (rank, what)


def test_interleaved_stages_hold_as_many_microbatches_as_megatron_runs_ahead():
    layout = Layout(pp=3, vp=2)

    def ahead(batches):
        groups = Groups.create(layout, Placement.build(("a",), 1))
        config = transformer_config(replace(SPEC, num_layers=6), groups, torch.float32)
        _, _, warmup, left = get_pp_rank_microbatches(layout.filled_up(batches), layout.vp,
                                                      config.microbatch_group_size_per_vp_stage,
                                                      p2p_communicator=P2PCommunicator(groups.pp, config))
        groups.destroy()
        return warmup + min(left, 1)

    for batches in (1, 4, 9):
        assert run_ranks(3, ahead, batches) == [in_flight(layout, stage, batches) * layout.vp for stage in range(3)]


@pytest.fixture
def as_on_cuda(monkeypatch):
    """Attention's backward in the compute type: on a CPU it works on float32 copies, which the plan does not count."""
    def backward(*tensors_and_causal):
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            *tensors_and_causal[:-1], 0.0, tensors_and_causal[-1])

    monkeypatch.setattr(fused, "attend_backward", backward)


def held_by_a_pass(job: Job, layout: Layout) -> dict[str, float]:
    """Bytes of one forward and backward on this rank, planned and real: what autograd keeps, and the peak."""
    groups = Groups.create(layout, Placement.build(("a", "b"), layout.replicas))
    try:
        backbone = Backbone(job.spec, groups, job.model, job.adapter)
        backbone.bank.add_expert("a", 0)
        for parameter in backbone.parameters():
            parameter.data.normal_(0, 0.05)
            parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
        generator = torch.Generator().manual_seed(0)
        leaves = [[Leaf("a", torch.randint(7, 300, (12,), generator=generator).tolist()) for _ in range(4)]
                  for _ in range(4)]
        pack = build_pack([LeafGroup(make_prompt(i, 40), own) for i, own in enumerate(leaves)], backbone.rules,
                          torch.device("cpu"), share=backbone.share)
        with PeakBytes() as made:
            with saved_by_autograd(backbone.parameters()) as saved:
                hidden = backbone(pack)
            # What the plan has and the graph has not yet: the head's means for this rank's rows, and of context ranks
            # all rows that are scored.
            head = hidden.numel() // layout.cp * 4 + (storage_bytes([hidden]) if layout.cp > 1 else 0)
            real = sum(size for size, _ in saved.values()) + head
            saved.clear()
            made.peak = made.now
            hidden.sum().backward()
    finally:
        groups.destroy()
    rows = sum((job.rows("a", 4) for _ in range(3)), job.rows("a", 4))
    assert rows.tokens == pack.upper.tokens
    rows, width = on_rank(rows, layout), Width.of(job, layout)
    planned = saved_bytes(job, layout, layout.pp - 1, rows, width)
    return {"planned": planned, "real": real, "planned peak": planned + backward_bytes(job, layout, rows, width),
            "peak": made.peak - storage_bytes([hidden]) + head}


@pytest.mark.parametrize(("scope", "dtype", "first_layer", "targets", "recompute"), [
    ("sequence", "float32", 0, None, "none"), ("sequence", "bfloat16", 2, None, "none"),
    ("completion", "float32", 1, None, "none"), ("sequence", "float32", 1, ("o_proj", "down_proj"), "none"),
    ("sequence", "float32", 0, None, "selective"), ("completion", "bfloat16", 1, None, "selective"),
    ("sequence", "float32", 0, ("q_proj", "up_proj"), "selective"), ("sequence", "float32", 0, None, "full")])
def test_a_pass_holds_what_is_planned(scope, dtype, first_layer, targets, recompute, as_on_cuda):
    """What autograd keeps after the forward, within 2 %, and the peak of forward and backward, within 10 %."""
    adapter = {"scope": scope, "first_layer": first_layer, **({"targets": targets} if targets else {})}
    found = held_by_a_pass(make_job(model={"dtype": dtype, "recompute": recompute}, adapter=adapter), Layout())
    assert found["planned"] == pytest.approx(found["real"], rel=0.02)
    assert found["planned peak"] == pytest.approx(found["peak"], rel=0.1)


SHARED_OUT = [
    (Layout(tp=2, sequence_parallel=True), "sequence", "float32", "none"),
    (Layout(tp=2, sequence_parallel=True), "completion", "bfloat16", "selective"),
    (Layout(tp=2, sequence_parallel=True), "sequence", "float32", "full"),
    (Layout(cp=2), "completion", "float32", "none"), (Layout(cp=2), "sequence", "bfloat16", "none"),
    (Layout(cp=2), "sequence", "float32", "selective")]


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_a_pass_of_moe_layers_holds_what_is_planned(recompute, as_on_cuda):
    job = make_job(MOE_WIDE, model={"dtype": "bfloat16", "recompute": recompute})
    found = held_by_a_pass(job, Layout())
    assert found["planned"] == pytest.approx(found["real"], rel=0.02)
    assert found["planned peak"] == pytest.approx(found["peak"], rel=0.1)


def test_a_pass_of_shared_out_rows_holds_what_is_planned(as_on_cuda):
    """The same on each of two ranks that share out rows, the first within 3 %: adapted rows are not even halves."""
    jobs = [(make_job(model={"dtype": dtype, "recompute": recompute}, adapter={"scope": scope, "first_layer": 1}),
             layout)
            for layout, scope, dtype, recompute in SHARED_OUT]
    for rank in run_ranks(2, lambda: [held_by_a_pass(*job) for job in jobs]):
        for case, found in zip(SHARED_OUT, rank):
            assert found["planned"] == pytest.approx(found["real"], rel=0.03), case
            assert found["planned peak"] == pytest.approx(found["peak"], rel=0.1), case


def test_tiny_recipe_is_planned_within_a_tenth_of_what_an_update_holds(tmp_path):
    """Compared: weights, adapters, gradients and Adam's state of the trainer that ``examples/quickstart.py`` builds,
    byte by byte, and the peak of one update of an OPD step: all of these plus the most bytes of tensors made in the
    update that ever lived together. Completions are random and of full length, as the plan assumes; 8 prompts per
    expert instead of 32 keep it short. The vision feature cache, which fills during a run, is left out of both. What
    rollout and scoring hold besides is compared more loosely, within a fifth."""
    config = apply_overrides(load_recipe(ROOT / "examples/quickstart.py"),
                             ["rollout.prompts_per_step=8", "metrics.progress=off", "metrics.tensorboard=false"])
    job = job_of(config)
    layout, placement = layout_of(config, 1)
    planned = rank_memory(job, layout, placement, 0, 0)
    with toy_trainer(config, tmp_path) as trainer:
        step = config.schedule.rl_steps
        edges = trainer.schedule.edges(step)
        generator = torch.Generator().manual_seed(0)
        asks, samples = [*trainer.native.requests(step), *trainer.cross.requests(step, edges)], []
        for asked in asks:
            for number in range(config.rollout.group_size):
                ids = torch.randint(10, 400, (8,), generator=generator).tolist()
                answer = Completion(asked.request.prompt, asked.request.expert, number,
                                    [Segment(ids, "policy", [-1.0] * 8, [-1.0] * 8)])
                samples.append(asked.sample(answer, advantage=0.5))
        requests = [replace(asked.request, params=replace(asked.request.params, stop_token_ids=()))
                    for asked in asks]
        trainer.runner.visual([request.prompt for request in requests])
        with PeakBytes() as rollout:
            trainer.collector.engine.generate(requests, trainer.runner.visual)
        with PeakBytes() as score:
            trainer.scoring.score(samples, step, edges, trainer.timers)
        backbone, tower = trainer.runner.backbone, trainer.runner.visual.__self__
        with PeakBytes() as update:
            trainer.learner.update(samples)
        parameters = [p for e in config.experts for p in backbone.bank.parameters_of(e).values()]
        states = [t for o in trainer.learner.optimizers.values() for s in o.state_dict().values() for t in s.values()]
        real = {"embedding": storage_bytes([backbone.embedding.weight]),
                "layers": storage_bytes(backbone.layers.parameters()),
                "head": storage_bytes([backbone.final_norm.weight]), "adapters": storage_bytes(parameters),
                "gradients": storage_bytes(p.grad for p in parameters), "optimizer": storage_bytes(states),
                "vision tower": storage_bytes([*tower.module.parameters(), *tower.module.buffers()])}
    always = {part: size for part, size in planned.always.items() if part != "vision cache"}
    assert always == real
    # Gradients and Adam's state were made inside the block.
    measured = sum(real.values()) - real["gradients"] - real["optimizer"] + update.peak
    assert sum(always.values()) + sum(planned.phases["update"].values()) == pytest.approx(measured, rel=0.1)
    assert sum(planned.phases["rollout"].values()) == pytest.approx(rollout.peak, rel=0.2)
    assert sum(planned.phases["score"].values()) == pytest.approx(score.peak, rel=0.2)


def test_an_expert_adds_its_adapters_and_optimizer_and_nothing_else(tmp_path):
    """Allocated bytes after one real step at 8 experts minus at 1 = 7 x (adapters, gradients, Adam), within 2 %."""
    base = toy_config("qwen3", ("text",), adapter={"rank": 16}, schedule={"opd_steps": 0},
                      rollout={"prompts_per_step": 1, "group_size": 2}, metrics={"overlap_tokens": 1})
    allocated = {}
    for count in (1, 8):
        task = ExpertConfig(task=LetterTask, task_args={"letter": "a", "media": None})
        config = base.model_copy(update={"experts": {f"e{n}": task for n in range(count)}})
        before = allocated_bytes()
        with toy_trainer(config, tmp_path / str(count)) as trainer:
            trainer.train_step(0, "rlvr")
            allocated[count] = allocated_bytes() - before
            one = sum(adapter_bytes(job_of(config, 8), Layout(), 0).values())
        del trainer
    assert allocated[8] - allocated[1] == pytest.approx(7 * one, rel=0.02)


@pytest.mark.parametrize("budget", [40, 150, 700, 10**6])
@pytest.mark.parametrize("scope", ["sequence", "completion"])
def test_microbatches_are_the_trainers(scope, budget):
    job = replace(make_job(adapter={"scope": scope}), microbatch_tokens=budget)
    groups = job.groups(Placement.build(("a", "b"), 1), 0)
    generator = torch.Generator().manual_seed(0)
    lanes = []
    for place, group in enumerate(groups):
        for number in range(group.count):
            prompt = make_prompt(100 * place + number, 40)
            lanes += [Lane(Sample(Completion(prompt, group.student, n, [Segment(
                torch.randint(7, 30, (12,), generator=generator).tolist())]), group.student), group.student)
                for n in range(4)]
    real = [build_pack(batch.groups, job.rules, torch.device("cpu")) for batch in
            make_microbatches(lanes, job.rules, budget)]
    planned = job.microbatches(groups)
    assert [rows.tokens for rows in planned] == [pack.upper.tokens for pack in real]
    assert [rows.scored for rows in planned] == [len(pack.target_ids) for pack in real]


@pytest.mark.parametrize(("forced", "completion"), [(1, 1), (1, 16), (1, 17), (3, 40), (20, 2), (20, 100)])
def test_own_cache_grows_as_planned(forced, completion):
    cache = OwnCache()
    for rows in [forced] + [1] * (completion - 1):
        cache.advance(rows)
        k, _ = cache.append(1, *(torch.zeros(2, 1, rows, 4) for _ in range(2)))
    assert own_capacity(forced, completion) == k.untyped_storage().nbytes() // (2 * 4 * 4)


def test_vision_tower_is_counted_without_being_allocated():
    path = tiny_model("qwen3_vl")
    before, spec = allocated_bytes(), read_spec(path)
    single, half = (vision_bytes(path, spec, dtype) for dtype in ("float32", "bfloat16"))
    assert allocated_bytes() == before
    assert 1.99 * half < single < 2 * half  # rotary frequencies stay float32
    assert vision_bytes(path, replace(spec, image_token_id=None), "float32") == 0
