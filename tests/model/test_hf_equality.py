"""On every layout the logits of every family equal transformers': for text, several images in one prompt, and video.

Ranks are forked once per world size and walk through its layouts and all checkpoints.
"""
from __future__ import annotations

from functools import cache
from typing import NamedTuple

import numpy as np
import pytest
import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from copd_megatron.config.model import AdapterConfig, ModelConfig
from copd_megatron.model.backbone import Backbone
from copd_megatron.model.hf_config import read_spec
from copd_megatron.model.prompt import PromptEncoder
from copd_megatron.model.shared_prefix import Leaf, LeafGroup, build_pack
from copd_megatron.model.translate import load_backbone_weights
from copd_megatron.model.vision import VisionTower, stage_needs_features
from copd_megatron.parallel.groups import Groups
from copd_megatron.parallel.layout import Layout
from copd_megatron.parallel.placement import Placement
from copd_megatron.types import Prompt
from support.pictures import mixed_questions, question
from support.ranks import run_ranks
from support.tiny_models import FAMILIES, VISUAL_FAMILIES, tiny_model

CPU = torch.device("cpu")

TOLERANCE = {"float32": 1e-4, "float64": 5e-6}
"""Absolute, on logits of size 1. In float64 what is left is transformers' RMSNorm, which stays in float32."""

COMPLETIONS = [[40, 41, 42, 43], [50, 40]]


def _rope(kind: str, **options: object) -> dict:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 1000.0, **options}}


CHECKPOINTS: dict[str, tuple[str, dict]] = {family: (family, {}) for family in FAMILIES} | {
    "qwen3_vl, other head": ("qwen3_vl", {"tie_word_embeddings": False}),
    "qwen2_5_vl, other head, yarn": ("qwen2_5_vl", {"tie_word_embeddings": True} | _rope(
        "yarn", factor=4.0, original_max_position_embeddings=32, mrope_section=[2, 1, 1])),
    "qwen3, other head": ("qwen3", {"tie_word_embeddings": True}),
    "qwen2, other head, yarn": ("qwen2", {"tie_word_embeddings": False} | _rope(
        "yarn", factor=8.0, original_max_position_embeddings=32, mscale=1.0, mscale_all_dim=0.4)),
    "llama, linear": ("llama", _rope("linear", factor=3.0)),
    "llama, dynamic": ("llama", _rope("dynamic", factor=3.0)),
    "qwen3, longrope": ("qwen3", _rope("longrope", short_factor=[1.0, 1.1, 1.2, 1.3, 1.5, 2.0], long_factor=[4.0] * 6,
                                       factor=4.0, original_max_position_embeddings=128)),
}
"""Name -> family and what is different: heads (tied or not) on one end of the pipeline or both, rotary scalings."""


class Run(NamedTuple):
    """One evaluation of a checkpoint on the ranks of one replica."""

    checkpoint: str
    tp: int
    pp: int
    dtype: str = "float32"


RUNS: dict[int, list[Run]] = {
    1: [Run(name, 1, 1, dtype) for name in CHECKPOINTS for dtype in TOLERANCE],
    2: [Run(name, *layout) for layout in ((2, 1), (1, 2)) for name in CHECKPOINTS],
    4: [Run(name, 2, 2) for name in CHECKPOINTS if name in FAMILIES or "other head" in name],
}
"""World size -> runs. With PP 2 the last of Qwen3-VL's three deepstack levels is added on the second stage. One rank
also runs in float64, where an approximation would show."""


def _path(checkpoint: str):
    family, options = CHECKPOINTS[checkpoint]
    return tiny_model(family, **options)


@cache
def _prompts(checkpoint: str) -> list[Prompt]:
    """Text for every family; for the visual ones several images, a video, and both mixed."""
    encoder = PromptEncoder(_path(checkpoint))
    return [encoder.encode(item, item.key) for item in mixed_questions()
            if encoder.spec.is_visual or not item.media]


@cache
@torch.no_grad()
def _reference(checkpoint: str, dtype: str) -> torch.Tensor:
    """[N, V]: transformers' logits that predict each completion token, prompt by prompt."""
    return _logits(_path(checkpoint), _prompts(checkpoint), dtype)


@torch.no_grad()
def _logits(path, prompts: list[Prompt], dtype: str) -> torch.Tensor:
    auto = AutoModelForImageTextToText if read_spec(path).is_visual else AutoModelForCausalLM
    model = auto.from_pretrained(path, dtype=getattr(torch, dtype))
    rows = []
    for prompt in prompts:
        for completion in COMPLETIONS:
            token_ids = torch.from_numpy(np.concatenate([prompt.token_ids, completion[:-1]]))[None]
            logits = model(input_ids=token_ids, **_media_arguments(prompt, token_ids, model.config)).logits[0]
            rows.append(logits[len(prompt.token_ids) - 1 :])
    return torch.cat(rows)


def _media_arguments(prompt: Prompt, token_ids: torch.Tensor, config) -> dict[str, torch.Tensor]:
    if prompt.visual is None:
        return {}
    visual = prompt.visual
    arrays = {"pixel_values": visual.image_patches, "image_grid_thw": visual.image_grids,
              "pixel_values_videos": visual.video_patches, "video_grid_thw": visual.video_grids}
    kinds = (token_ids == config.image_token_id).int() + 2 * (token_ids == config.video_token_id).int()
    if visual.video_seconds is not None:
        arrays["second_per_grid_ts"] = visual.video_seconds
    given = {name: torch.from_numpy(array) for name, array in arrays.items() if array is not None}
    return given | {"mm_token_type_ids": kinds}


@torch.no_grad()
def _ours(groups: Groups, run: Run) -> torch.Tensor | None:
    """[N, V] whole-vocabulary logits on the last stage, None on others."""
    path, prompts = _path(run.checkpoint), _prompts(run.checkpoint)
    spec = read_spec(path)
    backbone = Backbone(spec, groups, ModelConfig(path=str(path), dtype=run.dtype), AdapterConfig())
    load_backbone_weights(backbone, path)
    lanes = [LeafGroup(prompt, [Leaf(None, tokens) for tokens in COMPLETIONS]) for prompt in prompts]
    pack = build_pack(lanes, backbone.rules, CPU)
    visual = None
    if stage_needs_features(spec, backbone.layer_range):
        visual = VisionTower(path, backbone.dtype, CPU).features(pack.prompts)
    if not groups.is_first_stage:
        received = torch.empty(pack.upper.tokens, 1, spec.hidden_size, dtype=backbone.dtype)
        dist.recv(received, group=groups.pp, group_src=dist.get_rank(groups.pp) - 1)
        backbone.set_input_tensor(received)
    hidden = backbone(pack, visual)
    if not groups.is_last_stage:
        dist.send(hidden.contiguous(), group=groups.pp, group_dst=dist.get_rank(groups.pp) + 1)
        return None
    logits = hidden @ backbone.head.weight.T
    shards = [torch.empty_like(logits) for _ in range(groups.layout.tp)]
    dist.all_gather(shards, logits, group=groups.tp)
    return torch.cat(shards, dim=-1)[:, : spec.vocab_size]


def _walk(runs: list[Run]) -> list[torch.Tensor | None]:
    results, groups = [], None
    for run in runs:
        layout = Layout(tp=run.tp, pp=run.pp, replicas=1)
        if groups is None or groups.layout != layout:
            if groups is not None:
                groups.destroy()
            groups = Groups.create(layout, Placement.build(("only",), 1))
        results.append(_ours(groups, run))
    return results


@cache
def _outcomes(world: int) -> list[list[torch.Tensor]]:
    """Run -> the logits of every rank that has any."""
    for run in RUNS[world]:
        _prompts(run.checkpoint)  # once, before the ranks are forked
    return [[logits for logits in ranks if logits is not None]
            for ranks in zip(*run_ranks(world, _walk, RUNS[world], timeout_s=240))]


CASES = [(world, number) for world, runs in RUNS.items() for number in range(len(runs))]


@pytest.mark.parametrize("world,number", CASES, ids=lambda value: str(value))
def test_logits_equal_transformers(world, number):
    run, want = RUNS[world][number], _reference(RUNS[world][number].checkpoint, RUNS[world][number].dtype)
    got = _outcomes(world)[number]
    assert len(got) == run.tp, run
    for logits in got:
        torch.testing.assert_close(logits, want, rtol=0, atol=TOLERANCE[run.dtype], msg=lambda text: f"{run}: {text}")
        assert torch.equal(logits.argmax(-1), want.argmax(-1))
    assert want.std() > 0.3, "the model says the same whatever it sees"


@pytest.mark.parametrize("family", VISUAL_FAMILIES)
def test_media_change_the_answer(family):
    """The equality would mean little if neither side looked: swapping two images changes the logits."""
    path = tiny_model(family)
    prompt = next(p for p in _prompts(family) if p.key == "images")
    swapped = PromptEncoder(path).encode(question("swapped", *prompt.item.media[::-1]), "image")
    assert (_logits(path, [prompt], "float32") - _logits(path, [swapped], "float32")).abs().max() > 0.05
