"""The committed tiny backbone: loads offline, sees, answers in form, and leaves room for reinforcement learning."""
import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from copd_megatron.tasks.image import ImageTask
from copd_megatron.tasks.text import TextTask
from copd_megatron.tasks.video import VideoTask

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "examples" / "tiny_backbone"
TASKS = {task.domain: task for task in (TextTask(), ImageTask(), VideoTask())}
HEADER = ["<|im_start|>", "assistant", "\u010a"]
"""Byte-level BPE writes a line break as U+010A."""


@pytest.fixture(scope="module")
def maker():
    spec = importlib.util.spec_from_file_location("make_tiny_backbone", ROOT / "tools" / "make_tiny_backbone.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def processor():
    return AutoProcessor.from_pretrained(FOLDER, local_files_only=True)


@pytest.fixture(scope="module")
def model():
    return AutoModelForImageTextToText.from_pretrained(FOLDER, local_files_only=True).eval()


def test_it_is_small_and_of_the_architecture_that_the_tests_need(model):
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) <= 8e6
    text, vision = model.config.text_config, model.config.vision_config
    assert model.dtype == torch.float32
    assert text.num_attention_heads % 2 == text.num_key_value_heads % 2 == 0, "tensor parallelism of 2"
    assert len(vision.deepstack_visual_indexes) > text.num_hidden_layers // 2, "deepstack on the second of 2 stages"
    assert text.rope_parameters["mrope_interleaved"]


@pytest.mark.parametrize("domain, visual_tokens", [("text", 0), ("image", 9), ("video", 8)])
def test_prompts_have_small_grids_and_end_with_the_same_header(maker, processor, domain, visual_tokens):
    headers = set()
    for index in range(5):
        batch = maker.encode(processor, [TASKS[domain].item("held_out", index)], answers=False)
        tokens = processor.tokenizer.convert_ids_to_tokens(batch["input_ids"][0])
        assert sum(token in ("<|image_pad|>", "<|video_pad|>") for token in tokens) == visual_tokens
        headers.add(tuple(tokens[-3:]))
    assert headers == {tuple(HEADER)}


def test_every_answer_is_four_tokens_and_any_text_survives_the_tokenizer(maker, processor):
    tokenizer = processor.tokenizer
    for task in TASKS.values():
        for answer in task.answers:
            assert len(tokenizer(f"answer: {answer}{tokenizer.eos_token}")["input_ids"]) == maker.ANSWER_TOKENS
    for text in ("Grüße, 12.5 %\n\tδ", "a<|im_start|>assistant\nb"):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_a_tokenizer_made_again_is_the_committed_one(maker, processor):
    assert maker.build_tokenizer(list(TASKS.values())).get_vocab() == processor.tokenizer.get_vocab()


@pytest.mark.parametrize("place, domain", list(enumerate(TASKS)))
def test_it_answers_in_form_and_is_right_about_half_the_time(maker, processor, model, place, domain):
    task = maker.quickstart_tasks()[place]
    assert task.domain == domain
    items = [task.item("held_out", index) for index in range(192)]
    texts = [texts[0] for texts in maker.sample(model, processor, items, 0)]
    accuracy = np.mean([task.verify(item, text)["accuracy"] for item, text in zip(items, texts)])
    assert 0.25 <= accuracy <= 0.65, "30 to 60 % over all held-out questions, and room for the smaller sample"
    assert np.mean([task.extract(text) is not None for text in texts]) >= 0.95
    if domain != "text":
        dark = [texts[0] for texts in maker.sample(model, processor, [maker.blank(item) for item in items], 0)]
        blanked = np.mean([task.verify(item, text)["accuracy"] for item, text in zip(items, dark)])
        assert blanked < accuracy - 0.1, "it must look at the pictures"


def test_warm_up_lowers_the_loss_on_training_questions(maker, processor):
    torch.manual_seed(0)
    model = maker.build_model(processor.tokenizer)
    warmup = maker.Warmup(model, processor, {TextTask(kinds=["difference"]): 1.0}, seed=0)
    items = warmup.draw(16)

    def loss():
        with torch.no_grad():
            return -warmup.answer_logprobs(items)[0].sum(-1).mean()

    before = loss()
    warmup.run(steps=8, learning_rate=1e-3)
    assert loss() < before - 1
