"""On every layout the logits equal transformers': for text, several images in one prompt, and video."""
from __future__ import annotations

from functools import cache

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
from support.tiny_models import FAMILIES, tiny_model

CPU = torch.device("cpu")
LAYOUTS = [(1, 1), (2, 1), (1, 2), (2, 2)]
"""(TP, PP). With PP 2 the last of the three deepstack levels is added on the second stage."""

TOLERANCE = {"float32": 1e-4, "float64": 5e-6}
"""Absolute, on logits of size 1. In float64 what is left is transformers' RMSNorm, which stays in float32."""

COMPLETIONS = [[40, 41, 42, 43], [50, 40]]


@cache
def _prompts(family: str) -> list[Prompt]:
    """Text for every family; for the visual one several images, a video, and both mixed."""
    encoder = PromptEncoder(tiny_model(family))
    return [encoder.encode(item, item.key) for item in mixed_questions()
            if encoder.spec.is_visual or not item.media]


def _groups(family: str) -> list[LeafGroup]:
    return [LeafGroup(prompt, [Leaf(None, tokens) for tokens in COMPLETIONS]) for prompt in _prompts(family)]


@torch.no_grad()
def _reference(path, prompts: list[Prompt], dtype: str) -> torch.Tensor:
    """[N, V]: transformers' logits that predict each completion token, prompt by prompt."""
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
def _ours(path, groups: Groups, lanes: list[LeafGroup], dtype: str, sharing: bool) -> torch.Tensor | None:
    """[N, V] whole-vocabulary logits on the last stage, None on others."""
    spec = read_spec(path)
    backbone = Backbone(spec, groups, ModelConfig(path=str(path), dtype=dtype, prefix_sharing=sharing),
                        AdapterConfig())
    load_backbone_weights(backbone, path)
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


def _on_rank(path, layout: tuple[int, int], lanes: list[LeafGroup], dtype: str, sharing: bool = True):
    groups = Groups.create(Layout(tp=layout[0], pp=layout[1], replicas=1), Placement.build(("only",), 1))
    return _ours(path, groups, lanes, dtype, sharing)


def _check(path, family: str, layout: tuple[int, int], dtype: str = "float32") -> None:
    want = _reference(path, _prompts(family), dtype)
    results = run_ranks(layout[0] * layout[1], _on_rank, path, layout, _groups(family), dtype)
    got = [logits for logits in results if logits is not None]
    assert len(got) == layout[0]
    for logits in got:
        torch.testing.assert_close(logits, want, rtol=0, atol=TOLERANCE[dtype])
    assert want.std() > 0.3, "the model says the same whatever it sees"


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: f"tp{layout[0]}-pp{layout[1]}")
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_equal_transformers(family, layout):
    _check(tiny_model(family), family, layout)


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_equal_transformers_in_float64(family):
    """Tighter than float32 allows: an approximation would show."""
    _check(tiny_model(family), family, (1, 1), "float64")


@pytest.mark.parametrize("family,tied", [("qwen3_vl", False), ("qwen3", True)])
def test_other_head(family, tied):
    """Tied heads live on both ends of the pipeline; untied ones are a tensor of their own."""
    _check(tiny_model(family, tie_word_embeddings=tied), family, (2, 2))


def test_media_change_the_answer():
    """The equality would mean little if neither side looked: swapping two images changes the logits."""
    path = tiny_model("qwen3_vl")
    prompt = next(p for p in _prompts("qwen3_vl") if p.key == "images")
    swapped = PromptEncoder(path).encode(question("swapped", *prompt.item.media[::-1]), "image")
    assert (_reference(path, [prompt], "float32") - _reference(path, [swapped], "float32")).abs().max() > 0.05
