"""Features equal transformers', in token order; the cache neither changes them nor outgrows its budget."""
from __future__ import annotations

import shutil
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText

from copd_megatron.model.hf_config import read_spec
from copd_megatron.model.prompt import PromptEncoder
from copd_megatron.model.vision import VisionTower, stage_needs_features
from copd_megatron.types import Prompt, UserError
from support.pictures import clip, mixed_questions, picture, question
from support.tiny_models import VISUAL_FAMILIES, tiny_model

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def encoder() -> PromptEncoder:
    return _encoder("qwen3_vl")


@cache
def _encoder(family: str) -> PromptEncoder:
    return PromptEncoder(tiny_model(family))


@pytest.fixture(scope="module")
def prompts(encoder) -> dict[str, Prompt]:
    return {item.key: encoder.encode(item, "d") for item in mixed_questions()}


def _tower(dtype: torch.dtype = torch.float32, family: str = "qwen3_vl", **options: int) -> VisionTower:
    return VisionTower(tiny_model(family), dtype, CPU, **options)


def _equal(left, right) -> bool:
    return torch.equal(left[0], right[0]) and all(torch.equal(a, b) for a, b in zip(left[1], right[1]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("key", ["images", "video", "mixed"])
@pytest.mark.parametrize("family", VISUAL_FAMILIES)
@torch.no_grad()
def test_features_equal_transformers(family, key, dtype):
    """Bit for bit: it is the same module on the same patches."""
    spec = read_spec(tiny_model(family))
    prompt = _encoder(family).encode(next(item for item in mixed_questions() if item.key == key), "d")
    model = AutoModelForImageTextToText.from_pretrained(tiny_model(family), dtype=dtype).model
    merged, deepstack = _tower(dtype, family).features([prompt])
    assert merged.dtype == dtype and merged.shape == (len(prompt.visual_index), 32)
    assert len(deepstack) == spec.deepstack_layers == (0 if family == "qwen2_5_vl" else 3)
    tokens = prompt.token_ids[prompt.visual_index]
    for kind, token, patches, grids in (
            ("image", spec.image_token_id, prompt.visual.image_patches, prompt.visual.image_grids),
            ("video", spec.video_token_id, prompt.visual.video_patches, prompt.visual.video_grids)):
        rows = torch.from_numpy(tokens == token)
        assert rows.any() == (patches is not None)
        if patches is None:
            continue
        theirs = getattr(model, f"get_{kind}_features")(torch.from_numpy(patches), torch.from_numpy(grids))
        assert torch.equal(merged[rows], torch.cat(theirs.pooler_output))
        for ours, level in zip(deepstack, getattr(theirs, "deepstack_features", ())):
            assert torch.equal(ours[rows], torch.cat(level))


def test_prompts_are_concatenated_and_text_adds_nothing(prompts):
    tower = _tower()
    merged, deepstack = tower.features([prompts["mixed"], prompts["text"], prompts["images"]])
    parts = [tower.features([prompts[key]]) for key in ("mixed", "images")]
    assert torch.equal(merged, torch.cat([part[0] for part in parts]))
    assert torch.equal(deepstack[2], torch.cat([part[1][2] for part in parts]))
    assert tower.features([prompts["text"]]) is None and tower.features([]) is None


def test_no_gradient_and_usable_in_a_graph(prompts):
    merged, _ = _tower().features([prompts["images"]])
    assert not merged.requires_grad and not merged.is_inference()


def test_a_hit_equals_a_miss(prompts, encoder):
    tower, images = _tower(), prompts["images"]
    first = tower.features([images])
    again = tower.features([encoder.encode(question("renamed", *images.item.media), "d")])
    assert again[0].data_ptr() == first[0].data_ptr(), "equal content under another key was computed again"
    assert _equal(again, _tower(cache_bytes=0).features([images]))


@pytest.mark.parametrize("family", VISUAL_FAMILIES)
def test_company_changes_no_bit(family):
    """A prompt's features are the same alone and in any place of a batch, full or filled up."""
    encoder = _encoder(family)
    shown = [encoder.encode(question(f"p{seed}", picture(seed, 48, 48)), "d") for seed in range(16)]
    shown += [encoder.encode(question(f"v{seed}", clip(seed, 4, 32, 48)), "d") for seed in range(2)]
    tower = _tower(family=family, cache_bytes=0)
    alone = [tower.features([prompt]) for prompt in shown]
    for order in (list(range(18))[::-1], [5, 16, 2, 9]):
        merged, deepstack = tower.features([shown[i] for i in order])
        assert torch.equal(merged, torch.cat([alone[i][0] for i in order]))
        for level in range(encoder.spec.deepstack_layers):
            assert torch.equal(deepstack[level], torch.cat([alone[i][1][level] for i in order]))


def test_the_cache_keeps_its_budget(encoder):
    shown = [encoder.encode(question(f"p{seed}", picture(seed, 32, 32)), "d") for seed in range(3)]
    fresh = _tower(cache_bytes=0)
    size = fresh.features(shown[:1])[0].nbytes * 4
    assert fresh.cached_bytes == 0
    tower = _tower(cache_bytes=2 * size)
    where = {}
    for number in (0, 1, 0, 2):
        where[number] = tower.features([shown[number]])[0].data_ptr()
        assert tower.cached_bytes <= 2 * size
    assert tower.cached_bytes == 2 * size
    assert tower.features([shown[0]])[0].data_ptr() == where[0], "the most recently used one was dropped"
    for prompt in shown:
        assert _equal(tower.features([prompt]), fresh.features([prompt]))


@pytest.mark.parametrize("change,named", [
    (lambda name, tensors: tensors.pop(name), "is missing"),
    (lambda name, tensors: tensors.update({name: tensors[name][:-1]}), "has shape"),
    (lambda name, tensors: tensors.update({f"{name}.extra": tensors[name]}), "is unknown"),
], ids=["missing", "shape", "unknown"])
def test_broken_towers(tmp_path, change, named):
    path = Path(shutil.copytree(tiny_model("qwen3_vl"), tmp_path / "broken"))
    tensors = load_file(path / "model.safetensors")
    change("model.visual.blocks.1.mlp.linear_fc1.weight", tensors)
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, path / "model.safetensors")
    with pytest.raises(UserError, match=r"^model\.path: .*visual\.blocks\.1\.mlp\.linear_fc1") as caught:
        VisionTower(path, torch.float32, CPU)
    assert named in str(caught.value)


def test_which_stages_look():
    """Three deepstack levels: stages that start at layer 0, 1 or 2."""
    visual, text = read_spec(tiny_model("qwen3_vl")), read_spec(tiny_model("qwen3"))
    assert [stage_needs_features(visual, range(start, 4)) for start in range(4)] == [True, True, True, False]
    assert not stage_needs_features(text, range(4))
