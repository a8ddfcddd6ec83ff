"""Prompts equal those of transformers' processor and position arithmetic; what does not fit is refused."""
from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, AutoTokenizer

from copd_megatron.model.hf_config import read_spec
from copd_megatron.model.prompt import PromptEncoder
from copd_megatron.model.shared_prefix import Leaf, LeafGroup, PackRules, build_pack
from copd_megatron.types import FrameSample, Media, TaskItem, UserError
from support.pictures import clip, mixed_questions, picture, question
from support.tiny_models import CHAT_TEMPLATE, SPECIAL_TOKENS, VISUAL_FAMILIES, tiny_model


@pytest.fixture(scope="module")
def encoder() -> PromptEncoder:
    return PromptEncoder(tiny_model("qwen3_vl"))


@pytest.fixture(scope="module")
def text_encoder() -> PromptEncoder:
    return PromptEncoder(tiny_model("qwen3"))


def _processed(item: TaskItem, family: str) -> dict[str, torch.Tensor]:
    """The same question through the whole processor of transformers, pictures as PIL images."""
    processor = AutoProcessor.from_pretrained(tiny_model(family))
    images = [Image.fromarray(media.pixels) for media in item.media if media.kind == "image"]
    videos = [media for media in item.media if media.kind == "video"]
    about = [{"total_num_frames": len(v.pixels), "fps": v.fps, "frames_indices": list(range(len(v.pixels)))}
             for v in videos]
    return processor(
        text=[processor.apply_chat_template(item.messages, add_generation_prompt=True, tokenize=False)],
        images=images or None, videos=[v.pixels for v in videos] or None, video_metadata=about or None,
        do_sample_frames=False, return_tensors="pt")


@pytest.mark.parametrize("family", VISUAL_FAMILIES)
@pytest.mark.parametrize("item", mixed_questions(), ids=lambda item: item.key)
def test_prompts_equal_transformers(item, family):
    prompt, theirs = PromptEncoder(tiny_model(family)).encode(item, "shapes"), _processed(item, family)
    assert prompt.token_ids.dtype == np.int64 and prompt.token_ids.tolist() == theirs["input_ids"][0].tolist()
    visual = prompt.visual
    for name, ours in (("pixel_values", visual and visual.image_patches),
                       ("image_grid_thw", visual and visual.image_grids),
                       ("pixel_values_videos", visual and visual.video_patches),
                       ("video_grid_thw", visual and visual.video_grids),
                       ("second_per_grid_ts", visual and visual.video_seconds)):
        assert (ours is None) == (name not in theirs)
        if ours is not None:
            assert np.array_equal(ours, np.asarray(theirs[name], ours.dtype))
    kinds = theirs["mm_token_type_ids"]
    assert prompt.visual_index.tolist() == kinds[0].nonzero()[:, 0].tolist()
    model = AutoModelForImageTextToText.from_pretrained(tiny_model(family)).model
    answer = torch.tensor([[40, 41]])
    about = {name: theirs[name] for name in ("image_grid_thw", "video_grid_thw", "second_per_grid_ts")
             if name in theirs}
    positions, _ = model.get_rope_index(torch.cat([theirs["input_ids"], answer], 1),
                                        torch.cat([kinds, 0 * answer], 1), **about)
    assert np.array_equal(prompt.position_ids, positions[:, 0, :-2].numpy())
    assert positions[:, 0, -2:].tolist() == [[prompt.next_position, prompt.next_position + 1]] * 3
    assert (prompt.key, prompt.domain, prompt.item) == (item.key, "shapes", item)


@pytest.mark.parametrize("family", VISUAL_FAMILIES)
def test_pixel_budgets_and_frame_times_are_the_processors(family):
    """A budget for pictures, one for videos, and frames taken out of a longer video, through the whole processor."""
    image = replace(picture(1, 96, 64), pixel_budget=(None, 2048))
    sample = FrameSample((0, 9, 20, 29), 30, 10.0)
    video = replace(clip(2, 4, 64, 96), pixel_budget=(256, 4096), sample=sample, fps=4 / 30 * 10)
    item = question("budgets", image, video)
    processor = AutoProcessor.from_pretrained(tiny_model(family))
    theirs = processor(
        text=[processor.apply_chat_template(item.messages, add_generation_prompt=True, tokenize=False)],
        images=[Image.fromarray(image.pixels)], videos=[video.pixels], do_sample_frames=False, return_tensors="pt",
        video_metadata=[{"total_num_frames": 30, "fps": 10.0, "frames_indices": list(sample.indices)}],
        images_kwargs={"size": {"shortest_edge": 256, "longest_edge": 2048}},
        videos_kwargs={"size": {"shortest_edge": 256, "longest_edge": 4096}})
    encoder = PromptEncoder(tiny_model(family))
    prompt = encoder.encode(item, "shapes")
    assert prompt.token_ids.tolist() == theirs["input_ids"][0].tolist()
    assert np.array_equal(prompt.visual.image_patches, theirs["pixel_values"])
    assert np.array_equal(prompt.visual.video_patches, theirs["pixel_values_videos"])
    if family == "qwen2_5_vl":
        assert np.array_equal(prompt.visual.video_seconds, np.asarray(theirs["second_per_grid_ts"], np.float64))
        assert prompt.visual.video_seconds == pytest.approx([2 / (4 / 30 * 10)])
    assert prompt.visual.image_grids.prod() * 64 <= 2048 < encoder.encode(
        question("free", replace(image, pixel_budget=(None, None))), "shapes").visual.image_grids.prod() * 64
    with pytest.raises(UserError, match="have the pixel budgets"):
        encoder.encode(question("two", image, replace(image, pixel_budget=(None, 4096))), "shapes")
    with pytest.raises(UserError, match="at least 999999999"):
        encoder.encode(question("much", replace(image, pixel_budget=(999999999, None))), "shapes")


def test_a_text_is_a_prompt_as_it_stands(encoder, text_encoder, tmp_path):
    item = TaskItem("key", [], (), None)
    prompt = text_encoder.encode_text(item, "2+3=", "rows")
    assert prompt.token_ids.tolist() == text_encoder.tokenize("2+3=") and prompt.header_tokens == 0
    with pytest.raises(UserError, match="no tokens"):
        text_encoder.encode_text(item, "", "rows")
    assert encoder.placeholders("<|video_pad|> <|image_pad|>") == ("video", "image")
    assert text_encoder.placeholders("<|image_pad|>") == ()
    shutil.copytree(tiny_model("qwen3"), tmp_path / "base")
    (tmp_path / "base/chat_template.jinja").unlink()
    base = PromptEncoder(tmp_path / "base", text_only=True)
    assert base.encode_text(item, "2+3=", "rows").token_ids.tolist() == prompt.token_ids.tolist()
    with pytest.raises(UserError, match="has no chat template"):
        base.encode(question("chat"), "rows")


def test_media_keep_the_order_of_their_tokens(encoder):
    prompt = encoder.encode(mixed_questions()[3], "d")
    assert prompt.visual.order == ("video", "image", "video")
    tokens = prompt.token_ids[prompt.visual_index]
    changes = [tokens[0], *tokens[1:][np.diff(tokens) != 0]]
    spec = encoder.spec
    assert changes == [spec.video_token_id, spec.image_token_id, spec.video_token_id]


def test_text_positions_and_header(text_encoder):
    prompt = text_encoder.encode(question("q", text="2+3="), "text")
    assert np.array_equal(prompt.position_ids, np.tile(np.arange(len(prompt.token_ids)), (3, 1)))
    assert prompt.next_position == len(prompt.token_ids) and prompt.visual is None
    assert prompt.visual_index.size == 0
    assert prompt.header_tokens == 3
    header = text_encoder.decode(prompt.token_ids[-3:], skip_special_tokens=False)
    assert header == "<|im_start|>assistant\n"
    assert text_encoder.invocation_token_ids == tuple(prompt.token_ids[-3:])


def test_families_agree_on_text(encoder, text_encoder):
    item = TaskItem("q", [{"role": "system", "content": "Be brief."},
                          {"role": "user", "content": [{"type": "text", "text": "Hé? 1"}]}], (), "1")
    one, other = encoder.encode(item, "d"), text_encoder.encode(item, "d")
    assert np.array_equal(one.token_ids, other.token_ids) and one.content_hash == other.content_hash


def test_decoding(text_encoder):
    ids = text_encoder.tokenize("naïve 2+3<|im_end|>")
    assert text_encoder.decode(ids) == "naïve 2+3"
    assert text_encoder.decode(np.asarray(ids), skip_special_tokens=False).endswith("<|im_end|>")
    assert text_encoder.token_texts(text_encoder.tokenize("2 +<|im_end|>")) == ["2", " ", "+", "<|im_end|>"]


def test_stop_tokens(text_encoder, tmp_path):
    ids = {text_encoder.tokenizer.convert_tokens_to_ids(token) for token in ("<|im_end|>", "<|endoftext|>")}
    assert set(text_encoder.stop_token_ids) == ids
    bare = _copy(tmp_path, "qwen3")
    (bare / "generation_config.json").unlink()
    assert PromptEncoder(bare).stop_token_ids == (text_encoder.tokenizer.convert_tokens_to_ids("<|im_end|>"),)


def test_content_hash_is_about_content(encoder):
    one = encoder.encode(question("a", picture(1, 32, 32)), "x")
    assert encoder.encode(question("b", picture(1, 32, 32)), "y").content_hash == one.content_hash
    changed = picture(1, 32, 32)
    changed.pixels[0, 0, 0] ^= 255
    others = [question("a", changed), question("a", picture(1, 32, 32), text="how few?"), question("a")]
    hashes = {encoder.encode(item, "x").content_hash for item in others}
    assert len(hashes | {one.content_hash}) == 4 and len(one.content_hash) == 64


def test_time_is_content_where_positions_count_it():
    """The same frames at another rate: other positions in Qwen2.5-VL, other timestamps in Qwen3-VL."""
    for family in VISUAL_FAMILIES:
        encoder = PromptEncoder(tiny_model(family))
        slow, fast = (encoder.encode(question("v", clip(1, 4, 32, 32, fps=fps)), "x") for fps in (1.0, 4.0))
        assert slow.content_hash != fast.content_hash
        same = np.array_equal(slow.position_ids, fast.position_ids)
        assert same == (family != "qwen2_5_vl") == (slow.visual.video_seconds is None)
    assert slow.visual.video_seconds.tolist() == [2.0] and fast.visual.video_seconds.tolist() == [0.5]


def test_prompts_end_where_frequencies_change():
    """A dynamic scaling takes other frequencies for all tokens once the context is longer than trained."""
    item, rope = question("a", text="how long?"), {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    size = len(PromptEncoder(tiny_model("llama")).encode(item, "x").token_ids)
    fits, short = (tiny_model("llama", rope_parameters=rope, max_position_embeddings=n) for n in (size, size - 1))
    prompt = PromptEncoder(fits).encode(item, "x")
    with pytest.raises(UserError, match=f"^model.path: prompt 'a' reaches position {size}, .* beyond {size - 1}; "):
        PromptEncoder(short).encode(item, "x")
    rules, one, two = PackRules(rope=read_spec(fits).rope), [7], [7, 8]
    build_pack([LeafGroup(prompt, [Leaf("e", one)])], rules, torch.device("cpu"))
    with pytest.raises(UserError, match=f"^model.path: 'a' with 1 completion tokens reaches position {size + 1}, "):
        build_pack([LeafGroup(prompt, [Leaf("e", two)])], rules, torch.device("cpu"))


def test_template_arguments(tmp_path):
    path = _copy(tmp_path, "qwen3")
    answer_at_once = "{%- if not think %}{{- '#\n' }}{%- endif %}"
    template = CHAT_TEMPLATE.replace("assistant\n' }}", "assistant\n' }}" + answer_at_once)
    (path / "chat_template.jinja").write_text(template)
    lengths = [PromptEncoder(path, {"think": think}).encode(question("q"), "d").header_tokens
               for think in (True, False)]
    assert lengths == [3, 5]


@pytest.mark.parametrize("item,named", [
    (TaskItem("k", [{"role": "user", "content": [{"type": "image"}]}], (), ""), "['image'] but its media"),
    (TaskItem("k", [{"role": "user", "content": "hi"}], (picture(1, 32, 32),), ""), "show [] but"),
    (TaskItem("k", [{"role": "user", "content": [{"type": "video"}, {"type": "image"}]}],
              (picture(1, 32, 32), clip(1, 2, 32, 32)), ""), "['video', 'image']"),
    (question("k", picture(1, 32, 32), text="say <|image_pad|>"), "['image', 'image']"),
    (question("k", Media("image", np.zeros((32, 32, 3)))), "float64"),
    (question("k", Media("image", np.zeros((32, 32), np.uint8))), "[32, 32]"),
    (question("k", Media("video", np.zeros((32, 32, 3), np.uint8))), "[frames, height, width, 3]"),
    (question("k", Media("image", np.zeros((0, 32, 3), np.uint8))), "[0, 32, 3]"),
    (question("k", picture(1, 4, 1000)), "aspect ratio"),
    (question("k", clip(1, 1, 32, 32)), "a video cannot be processed"),
], ids=["no media", "not shown", "other order", "placeholder in text", "floats", "grey", "no frames", "empty",
        "aspect", "one frame"])
def test_questions_that_do_not_fit(encoder, item, named):
    with pytest.raises(UserError, match=r"^tasks: question 'k': ") as caught:
        encoder.encode(item, "d")
    assert named in str(caught.value)


def test_text_families_cannot_see(text_encoder):
    with pytest.raises(UserError, match="question 'k': .*qwen3 reads text only"):
        text_encoder.encode(question("k", picture(1, 32, 32)), "d")


def _copy(tmp_path: Path, family: str) -> Path:
    return Path(shutil.copytree(tiny_model(family), tmp_path / family))


def test_a_template_without_a_header(tmp_path):
    """Scope sequence works with it, scope completion cannot."""
    path = _copy(tmp_path, "qwen3")
    template = "{% for m in messages %}[INST]{{ m.content }}[/INST]{% endfor %}"
    (path / "chat_template.jinja").write_text(template)
    encoder = PromptEncoder(path)
    assert encoder.encode(question("q"), "d").header_tokens == 0
    with pytest.raises(UserError, match=r"^adapter\.scope: completion"):
        _ = encoder.invocation_token_ids


def test_directories_that_do_not_fit(tmp_path):
    def refused(path: Path, named: str) -> None:
        with pytest.raises(UserError, match=rf"^model\.path: .*{named}"):
            PromptEncoder(path)

    (path := _copy(tmp_path / "a", "qwen3")).joinpath("chat_template.jinja").unlink()
    refused(path, "no chat template")
    (path := _copy(tmp_path / "b", "qwen3")).joinpath("tokenizer.json").write_text("{")
    refused(path, "tokenizer cannot be loaded")
    (path := _copy(tmp_path / "c", "qwen3_vl")).joinpath("processor_config.json").unlink()
    refused(path, "processor cannot be loaded")
    path = _copy(tmp_path / "d", "qwen3")
    tokenizer = AutoTokenizer.from_pretrained(path)
    tokenizer.add_tokens(["<one>", "<two>"])
    tokenizer.save_pretrained(path)
    refused(path, "the tokenizer has id 267, the backbone 267")
    path = _copy(tmp_path / "e", "qwen3")
    path.joinpath("generation_config.json").unlink()
    settings = json.loads((path / "tokenizer_config.json").read_text())
    (path / "tokenizer_config.json").write_text(json.dumps(settings | {"eos_token": None}))
    refused(path, "no stop token")


def test_special_tokens_are_single_ids(text_encoder):
    """The tiny tokenizer behaves as a real one; otherwise the tests above would prove little."""
    assert all(len(text_encoder.tokenize(token)) == 1 for token in SPECIAL_TOKENS)
