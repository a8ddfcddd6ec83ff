"""Every layout trains the very same experts as one rank (float64), under every topology and transport.

On replayed rollouts an OPD step (native and cross batches) has the same gradients within 1e-9, the same adapters
within 1e-8 and the same metrics. Runs that sample freely, from images and videos, give identical tokens. Ranks are
forked once per world size and walk through its layouts.
"""
import functools
from pathlib import Path

import pytest
import torch

from copd_megatron.checkpoint.adapter import Adapter
from copd_megatron.checkpoint.peft import save_peft_adapter
from copd_megatron.config.parallel import ParallelConfig
from copd_megatron.model.translate import TEXT_PREFIX
from copd_megatron.parallel.layout import Layout
from support.ranks import run_ranks
from support.replay import assert_same_step, one_step
from support.tiny_models import tiny_model
from support.toy_run import randomise, run_steps, toy_config, toy_trainer

STEP = 1
"""Of three OPD steps; the first and the last also measure agreement, which is not compared here."""
TARGETS = ("q_proj", "o_proj", "up_proj", "down_proj")

COMPLETION = {"scope": "completion", "first_layer": 1}
OVERLAPS = {("text", "image"): 0.6, ("text", "video"): 0.9, ("image", "video"): 0.7}
EDGES = [["old", "text"], ["video", "text"], {"teacher": "backbone", "student": "image", "signal": "full"},
         {"teacher": "text", "student": "image", "beta": 0.5, "prompts": "video"}, ["image", "video"]]
VARIANTS = {
    "sequence": {"exchange": {"topology": EDGES, "transport": "auto"}},
    "sequence, split, selective, minibatches, topk": {
        "optimizer": {"microbatch_tokens": 44}, "adapter": {"first_layer": 2}, "model": {"recompute": "selective"},
        "rlvr": {"minibatches_per_rollout": 2}, "opd": {"signal": "topk", "topk": 8},
        "exchange": {"topology": "ring", "transport": "scatter"}},
    "sequence, split, full": {
        "optimizer": {"microbatch_tokens": 44}, "model": {"recompute": "full"},
        "exchange": {"topology": "full", "transport": "gather_adapters"}},
    "completion, full": {
        "adapter": COMPLETION, "model": {"recompute": "full"},
        "exchange": {"topology": "adaptive(1)", "transport": "scatter"}},
    "completion, split, full vocabulary": {
        "optimizer": {"microbatch_tokens": 36}, "adapter": COMPLETION, "opd": {"signal": "full"},
        "exchange": {"topology": "hub", "transport": "gather_adapters"}},
    "completion, split, stored prefixes, native rollouts": {
        "optimizer": {"microbatch_tokens": 36}, "adapter": COMPLETION, "rollout": {"prefix_store_bytes": 40_000},
        "opd": {"rollouts": "native", "prompts": "both"}, "exchange": {"topology": "full", "transport": "scatter"}},
    "naive": {
        "model": {"prefix_sharing": False, "attention": "reference"}, "adapter": {"scope": "completion"},
        "exchange": {"topology": "gossip", "transport": "scatter"}},
    "four experts, student_topk": {
        "experts": ("text", "image", "video", "audio"), "opd": {"signal": "student_topk", "topk": 5},
        "exchange": {"topology": "expander(2)", "transport": "auto"}},
    "moe, split, selective": {
        "optimizer": {"microbatch_tokens": 44}, "adapter": {"targets": ("q_proj", "v_proj", "up_proj")},
        "model": {"recompute": "selective"}, "exchange": {"topology": "hub", "transport": "scatter"}},
    "moe, completion, full": {
        "adapter": COMPLETION | {"targets": ("o_proj", "down_proj")}, "model": {"recompute": "full"},
        "exchange": {"topology": "ring", "transport": "gather_adapters"}},
    "moe, deep": {
        "adapter": {"targets": ("q_proj", "up_proj")}, "exchange": {"topology": "hub", "transport": "scatter"}},
    "deep, split, selective": {
        "optimizer": {"microbatch_tokens": 44}, "adapter": {"first_layer": 3}, "model": {"recompute": "selective"},
        "exchange": {"topology": "hub", "transport": "scatter"}},
    "deep, stored": {
        "adapter": COMPLETION, "rollout": {"prefix_store_bytes": 1 << 20}, "opd": {"signal": "topk", "topk": 8},
        "exchange": {"topology": "ring", "transport": "scatter"}},
}
S, SELECTIVE, S_FULL, C_FULL, C_SPLIT, STORED, NAIVE, FOUR, MOE, MOE_FULL, MOE_DEEP, DEEP, DEEP_STORED = VARIANTS

LAYOUTS = {  # world size -> (parallel section, variant); replicas are what is left
    2: [({"tensor": 2}, C_SPLIT), ({"tensor": 2, "sequence_parallel": True}, S), ({"context": 2}, S),
        ({"context": 2}, C_FULL), ({"pipeline": 2}, S_FULL), ({}, FOUR), ({"pipeline": 2}, STORED),
        ({"tensor": 2, "sequence_parallel": True, "moe_expert": 2}, MOE), ({"context": 2, "moe_expert": 2}, MOE_FULL),
        ({"pipeline": 2}, MOE), ({"tensor": 2, "sequence_parallel": True, "moe_expert_tensor": 2}, MOE_FULL)],
    3: [({}, C_SPLIT), ({"pipeline": 3}, SELECTIVE), ({"pipeline": 3, "virtual_pipeline": 2}, DEEP),
        ({"pipeline": 3, "virtual_pipeline": 2}, DEEP_STORED)],
    4: [({"context": 4}, C_SPLIT), ({"tensor": 2, "context": 2, "sequence_parallel": True}, C_SPLIT),
        ({"tensor": 2, "context": 2}, NAIVE), ({"pipeline": 2, "context": 2}, SELECTIVE),
        ({"tensor": 2, "pipeline": 2, "sequence_parallel": True}, C_FULL),
        ({"tensor": 2, "sequence_parallel": True}, SELECTIVE), ({}, S), ({"pipeline": 2}, C_SPLIT),
        ({"tensor": 2, "context": 2, "sequence_parallel": True, "moe_expert": 2, "moe_expert_tensor": 2}, MOE),
        ({"pipeline": 2, "context": 2, "moe_expert": 2}, MOE_FULL),
        ({"tensor": 2, "sequence_parallel": True}, STORED)],
    6: [({"pipeline": 2}, S_FULL), ({"context": 2}, SELECTIVE), ({"tensor": 2, "sequence_parallel": True}, NAIVE),
        ({"context": 2, "pipeline": 3, "virtual_pipeline": 2}, DEEP),
        ({"context": 2, "pipeline": 3, "virtual_pipeline": 2, "moe_expert": 2}, MOE_DEEP)],
    8: [({"tensor": 2, "pipeline": 2, "context": 2, "sequence_parallel": True}, S_FULL),
        ({"tensor": 2, "pipeline": 2, "context": 2}, C_FULL), ({"context": 8}, S),
        ({"tensor": 2, "context": 2, "sequence_parallel": True}, C_FULL), ({"pipeline": 2, "context": 2}, C_SPLIT),
        ({"tensor": 2, "pipeline": 2}, FOUR)],
}
CASES = [(world, number) for world, layouts in LAYOUTS.items() for number in range(len(layouts))]


def _config(variant, parallel, old="-", **sections):
    """``old``: folder of the frozen teacher; ``sections`` lie over the variant's."""
    layers = 7 if "deep" in variant else 3
    path = tiny_model("qwen3", num_hidden_layers=layers)
    if variant.startswith("moe"):
        path = tiny_model("qwen3_moe", num_hidden_layers=layers, mlp_only_layers=[1])
    merged = {"model": {"path": str(path), "dtype": "float64"},
              "adapter": {"rank": 3, "alpha": 6.0, "targets": TARGETS},
              "optimizer": {"lr": 1e-2, "warmup_steps": 2, "microbatch_tokens": 200},
              "rollout": {"prompts_per_step": 2, "group_size": 2, "max_completion_tokens": 3},
              "schedule": {"cycles": 1, "rl_steps": 0, "opd_steps": 3}, "metrics": {"rollouts": False}}
    for name, section in [*VARIANTS[variant].items(), *sections.items()]:
        merged[name] = {**merged.get(name, {}), **section} if isinstance(section, dict) else section
    if merged["exchange"]["topology"] is EDGES:
        merged["exchange"]["frozen_teachers"] = {"old": str(old)}
    experts = merged.pop("experts", ("text", "image", "video"))
    return toy_config("qwen3", experts, **merged, parallel=parallel)


@pytest.fixture(scope="module")
def old(tmp_path_factory):
    """A PEFT folder with random factors."""
    folder = tmp_path_factory.mktemp("frozen")
    config = _config(S_FULL, {})
    with toy_trainer(config, folder / "run") as trainer:
        randomise(trainer, scale=0.3, alike=True)
        bank = trainer.runner.backbone.bank
        factors = {name: p.detach().clone() for name, p in bank.parameters_of("text").items()}
        save_peft_adapter(folder / "old", Adapter(factors, 2.0), TEXT_PREFIX["qwen3"], Path(config.model.path))
    return folder / "old"


@pytest.fixture(scope="module")
def truth(old, tmp_path_factory):
    """Variant -> what one rank makes of it, with the rollouts it sampled."""
    folder = tmp_path_factory.mktemp("one_rank")
    configs = {variant: _config(variant, {}, old) for variant in VARIANTS}
    return run_ranks(1, lambda: {v: one_step(c, folder, STEP, overlaps=OVERLAPS) for v, c in configs.items()},
                     timeout_s=240)[0]


@pytest.fixture(scope="module")
def outcomes(truth, old, tmp_path_factory):
    """World size -> number of the layout -> what each rank found."""
    folder = tmp_path_factory.mktemp("many_ranks")

    def walk(runs):
        return [one_step(config, folder, STEP, recording, OVERLAPS) | {"recording": None} for config, recording in runs]

    @functools.cache
    def of_world(world):
        runs = [(_config(variant, parallel, old), truth[variant]["recording"]) for parallel, variant in LAYOUTS[world]]
        return list(zip(*run_ranks(world, walk, runs, timeout_s=280)))

    return of_world


def _replicas(world, parallel):
    return Layout.of(ParallelConfig(**parallel), world).replicas


def test_there_are_enough_layouts():
    """At least 24; and every transport and topology where replicas are several, so that things cross."""
    assert len(CASES) >= 24 and max(LAYOUTS) == 8
    used = {(tuple(sorted(parallel.items())), world, variant) for world, layouts in LAYOUTS.items()
            for parallel, variant in layouts}
    assert len(used) == len(CASES)
    crossing = [VARIANTS[variant]["exchange"] for world, layouts in LAYOUTS.items() for parallel, variant in layouts
                if _replicas(world, parallel) > 1]
    assert {exchange["transport"] for exchange in crossing} == {"scatter", "gather_adapters", "auto"}
    names = {exchange["topology"] for exchange in crossing if exchange["topology"] is not EDGES}
    assert names == {"hub", "full", "ring", "expander(2)", "gossip", "adaptive(1)"}
    assert any(exchange["topology"] is EDGES for exchange in crossing)  # with frozen teachers


@pytest.mark.parametrize(("world", "number"), CASES, ids=lambda v: str(v))
def test_layout_equals_one_rank(world, number, truth, outcomes):
    parallel, variant = LAYOUTS[world][number]
    ranks, want = outcomes(world)[number], truth[variant]
    assert_same_step(ranks, want)
    for rank in ranks:
        if _replicas(world, parallel) > 1:
            assert rank["metrics"]["exchange/moved_bytes"] == _bytes_by_transport(rank["metrics"], variant) > 0


def _bytes_by_transport(metrics, variant):
    counts = {t: metrics[f"exchange/{t}_bytes"] for t in ("scatter", "gather_adapters")}
    return counts.get(VARIANTS[variant]["exchange"]["transport"], min(counts.values()))


def test_the_step_moves_every_factor(truth):
    for variant, result in truth.items():
        assert all(float(g.abs().max()) > 1e-5 for own in result["gradients"].values() for g in own.values()), variant
        assert any(name.startswith("edge/") for name in result["metrics"])


def test_groups_are_split_where_the_name_says_so(truth, tmp_path):
    """A part of a group evaluates the prompt again, and changes nothing."""
    for variant in (S_FULL, C_SPLIT):
        config = _config(variant, {}, optimizer={"microbatch_tokens": 200})
        whole = one_step(config, tmp_path, STEP, truth[variant]["recording"])
        assert truth[variant]["metrics"]["tokens/update"] > whole["metrics"]["tokens/update"]
        for expert, factors in whole["gradients"].items():
            for name, factor in factors.items():
                torch.testing.assert_close(truth[variant]["gradients"][expert][name], factor, rtol=0, atol=1e-9)


@pytest.mark.parametrize(("world", "parallel", "store"), [
    (4, {"pipeline": 2, "context": 2}, 0), (4, {"tensor": 2, "sequence_parallel": True}, 0),
    (3, {"pipeline": 3, "virtual_pipeline": 2}, 0), (3, {"pipeline": 3, "virtual_pipeline": 2}, 1 << 20)], ids=str)
def test_free_sampling_gives_identical_tokens(world, parallel, store, tmp_path, free_truth):
    config, want = free_truth
    rollout = config.rollout.model_copy(update={"prefix_store_bytes": store})
    config = config.model_copy(update={"parallel": ParallelConfig(**parallel), "rollout": rollout})
    for got in run_ranks(world, run_steps, config, tmp_path, timeout_s=240):
        assert got["tokens"] == want["tokens"]
        for expert, factors in want["adapters"].items():
            for name, factor in factors.items():
                torch.testing.assert_close(got["adapters"][expert][name], factor, rtol=0, atol=1e-8)


@pytest.fixture(scope="module")
def free_truth(tmp_path_factory):
    """A run that samples images and videos freely, and what one rank makes of it."""
    config = toy_config(model={"path": str(tiny_model("qwen3_vl", num_hidden_layers=6)), "dtype": "float64"},
                        rollout={"prompts_per_step": 2, "group_size": 3, "max_completion_tokens": 5},
                        adapter={"rank": 3, "alpha": 6.0, "first_layer": 1}, metrics={"rollouts": False})
    want = run_ranks(1, run_steps, config, tmp_path_factory.mktemp("free"))[0]
    assert len(want["tokens"]) == 2 and all(want["tokens"])
    assert any(edge for _, edge, _, _ in want["tokens"][1])
    for expert, factors in want["adapters"].items():
        assert max(f.abs().max() for n, f in factors.items() if n.endswith("lora_B")) > 1e-3, expert
    return config, want
