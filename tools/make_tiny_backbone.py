"""Makes the tiny vision-language backbone of the quickstart: Qwen3-VL's architecture at 1.2 million parameters.

Supervised warm-up on training questions of the three procedural families. First the vision tower learns to see,
with language layers that are thrown away. Then new language layers on the frozen tower learn the easiest level of
each family for a few steps, until about half of the answers over all levels are right, so that reinforcement learning
has something to find that the tower can see. Held-out questions are only measured.

    python tools/make_tiny_backbone.py --out examples/tiny_backbone

The result is an ordinary Hugging Face directory (AutoModelForImageTextToText, AutoProcessor). The same seed on the
same machine gives the same weights.
"""
from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    GenerationConfig,
    PreTrainedTokenizerFast,
    Qwen2VLImageProcessor,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
)

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from copd_megatron.tasks.image import ImageTask
from copd_megatron.tasks.procedural import LEVELS, ProceduralTask
from copd_megatron.tasks.text import TextTask
from copd_megatron.tasks.video import VideoTask
from copd_megatron.types import TaskItem

IM_START, IM_END, END_OF_TEXT = "<|im_start|>", "<|im_end|>", "<|endoftext|>"
SPECIAL_TOKENS = (END_OF_TEXT, IM_START, IM_END, "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
VOCAB_SIZE = 512
ANSWER_TOKENS = 4
"""answer, ": ", the answer itself and the end token."""
BATCH_SIZE, PROBE_SIZE, PROBE_EVERY = 48, 96, 20
SHARES, STEPS = (0.84, 0.05, 0.11), 64
"""Of text, image and video in the second stage, and its length: chosen so that each is about half right in the end.
Insight into pictures comes suddenly and early, so they are rare."""
FORMAT_WEIGHT = 2.0
"""Of giving any answer of the family, right or wrong: so that reinforcement learning has more to find than the form."""
PATCH, MERGE, TEMPORAL = 8, 2, 2
VISION_DEPTH = 3
INIT_STD = 0.08
"""About 1 / sqrt(hidden size): the usual 0.02 makes so narrow a model slow to start."""
POSITION_STD = 0.5
"""Places are learnt sooner where they stand out against pixels of order 1."""

# Words with an optional leading space, single digits, ": " as one piece: "answer: 7" is three tokens.
PIECES = r": | ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+"

CHAT_TEMPLATE = """\
{%- for message in messages -%}
<|im_start|>{{ message['role'] }}
{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] -%}
{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% elif part['type'] == 'video' %}\
<|vision_start|><|video_pad|><|vision_end|>{% else %}{{ part['text'] }}{% endif %}
{%- endfor %}{% endif %}<|im_end|>
{% endfor -%}
{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""


def build_tokenizer(tasks: Sequence[ProceduralTask]) -> PreTrainedTokenizerFast:
    """A byte-level BPE of ``VOCAB_SIZE`` tokens over the wording of the tasks; any text can be encoded."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(PIECES), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    words = [IM_START.strip("<|>"), "system", "user", "assistant", "<0.2 seconds><1.2 seconds>"]
    for task in tasks:
        words += [question_text(task.item("train", index)) for index in range(300)]
        words += [f"answer: {answer}" for answer in task.answers]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE, min_frequency=1, special_tokens=list(SPECIAL_TOKENS), show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()))
    tokenizer.train_from_iterator(words, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=IM_END, pad_token=END_OF_TEXT, padding_side="left",
        additional_special_tokens=[token for token in SPECIAL_TOKENS if token not in (IM_END, END_OF_TEXT)],
        chat_template=CHAT_TEMPLATE, model_max_length=4096, clean_up_tokenization_spaces=False)


def build_processor(tokenizer: PreTrainedTokenizerFast) -> Qwen3VLProcessor:
    """Qwen3-VL's processor for small pictures: 48 x 48 pixels are 9 visual tokens and are never resized."""
    shared = dict(patch_size=PATCH, temporal_patch_size=TEMPORAL, merge_size=MERGE,
                  image_mean=[0.5] * 3, image_std=[0.5] * 3)
    token_pixels = (PATCH * MERGE) ** 2
    images = Qwen2VLImageProcessor(size={"shortest_edge": token_pixels, "longest_edge": 64 * token_pixels}, **shared)
    videos = Qwen3VLVideoProcessor(
        size={"shortest_edge": TEMPORAL * token_pixels, "longest_edge": 32 * 64 * token_pixels},
        cap_pixels_per_frame=False, **shared)
    return Qwen3VLProcessor(images, tokenizer, videos, chat_template=CHAT_TEMPLATE)


def build_model(tokenizer: PreTrainedTokenizerFast) -> Qwen3VLForConditionalGeneration:
    """Random weights. Three deepstack features reach text layers 0 to 2, beyond half of the four layers."""
    ids = tokenizer.convert_tokens_to_ids
    config = Qwen3VLConfig(
        text_config=dict(
            vocab_size=len(tokenizer), hidden_size=128, intermediate_size=256, num_hidden_layers=4,
            num_attention_heads=4, num_key_value_heads=2, head_dim=32, max_position_embeddings=4096,
            initializer_range=INIT_STD, tie_word_embeddings=True,
            pad_token_id=ids(END_OF_TEXT), eos_token_id=ids(IM_END),
            rope_parameters=dict(rope_type="default", rope_theta=10_000.0, mrope_section=[6, 5, 5],
                                 mrope_interleaved=True)),
        vision_config=dict(
            depth=VISION_DEPTH, hidden_size=64, intermediate_size=256, num_heads=4, patch_size=PATCH,
            spatial_merge_size=MERGE, temporal_patch_size=TEMPORAL, out_hidden_size=128,
            initializer_range=INIT_STD, num_position_embeddings=36, deepstack_visual_indexes=list(range(VISION_DEPTH))),
        image_token_id=ids("<|image_pad|>"), video_token_id=ids("<|video_pad|>"),
        vision_start_token_id=ids("<|vision_start|>"), vision_end_token_id=ids("<|vision_end|>"),
        tie_word_embeddings=True)
    model = Qwen3VLForConditionalGeneration(config)
    torch.nn.init.normal_(model.model.visual.pos_embed.weight, std=POSITION_STD)
    model.generation_config = GenerationConfig(
        eos_token_id=ids(IM_END), pad_token_id=ids(END_OF_TEXT), max_new_tokens=8)
    return model


def question_text(item: TaskItem) -> str:
    """The wording of a question without its media."""
    content = item.messages[0]["content"]
    return content if isinstance(content, str) else content[-1]["text"]


def encode(processor: Qwen3VLProcessor, items: Sequence[TaskItem], answers: bool) -> dict[str, torch.Tensor]:
    """One left-padded batch; with ``answers`` each prompt is followed by its answer and the end token."""
    texts = [processor.apply_chat_template(item.messages, tokenize=False, add_generation_prompt=True)
             + (f"answer: {item.answer}{IM_END}" if answers else "") for item in items]
    images = [media.pixels for item in items for media in item.media if media.kind == "image"]
    videos = [media for item in items for media in item.media if media.kind == "video"]
    media = {}
    if images:
        media["images"] = images
    if videos:
        media["videos"] = [video.pixels for video in videos]
        media["video_metadata"] = [dict(total_num_frames=len(video.pixels), fps=video.fps,
                                        frames_indices=list(range(len(video.pixels)))) for video in videos]
        media["do_sample_frames"] = False
    return dict(processor(text=texts, padding=True, return_tensors="pt", **media))


class Warmup:
    """Supervised training on training questions, each task drawn with its share of the batch."""

    def __init__(self, model, processor, shares: Mapping[ProceduralTask, float], seed: int) -> None:
        self.model, self.processor, self.shares = model, processor, shares
        self.drawn = dict.fromkeys(shares, PROBE_SIZE)
        self.rng = np.random.default_rng(seed)

    def run(self, steps: int, learning_rate: float, enough: float = 1.01) -> None:
        """``steps`` steps of AdamW, or fewer when every task's accuracy is at least ``enough``."""
        trained = [p for p in self.model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=learning_rate, weight_decay=0.01, betas=(0.9, 0.95))
        started = time.monotonic()
        for step in range(1, steps + 1):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate * min(1.0, step / 20)
            optimizer.zero_grad()
            right, allowed = self.answer_logprobs(self.draw(BATCH_SIZE))
            loss = -(right.sum(-1) + FORMAT_WEIGHT * allowed).mean()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            if step % PROBE_EVERY == 0 or step == steps:
                accuracy = {task.domain: self.accuracy(task) for task in self.shares}
                shown = " ".join(f"{domain} {100 * a:.0f} %" for domain, a in accuracy.items())
                print(f"step {step:4d} {time.monotonic() - started:5.0f} s  loss {loss.item():.2f}  {shown}",
                      flush=True)
                if min(accuracy.values()) >= enough:
                    return

    def draw(self, batch_size: int) -> list[tuple[ProceduralTask, TaskItem]]:
        """The next training questions."""
        tasks = list(self.shares)
        items = []
        for choice in self.rng.choice(len(tasks), size=batch_size, p=list(self.shares.values())):
            items.append((tasks[choice], tasks[choice].item("train", self.drawn[tasks[choice]])))
            self.drawn[tasks[choice]] += 1
        return items

    def answer_logprobs(self, drawn: Sequence[tuple[ProceduralTask, TaskItem]]) -> tuple[torch.Tensor, torch.Tensor]:
        """[items, 4] log-probability of each token of "answer", ": ", the answer and the end token; [items] that the
        answer is one of the family's, right or wrong."""
        batch = encode(self.processor, [item for _, item in drawn], answers=True)
        logits = self.model(**batch, logits_to_keep=ANSWER_TOKENS + 1).logits[:, :-1]
        logprobs = torch.log_softmax(logits, -1)
        ids = self.processor.tokenizer.convert_tokens_to_ids
        allowed = [torch.logsumexp(at_answer[ids(list(task.answers))], 0)
                   for at_answer, (task, _) in zip(logprobs[:, -2], drawn)]
        targets = batch["input_ids"][:, -ANSWER_TOKENS:, None]
        return logprobs.gather(-1, targets).squeeze(-1), torch.stack(allowed)

    @torch.no_grad()
    def accuracy(self, task: ProceduralTask) -> float:
        """Share of training questions, none of them trained on, whose answer is the most likely one."""
        right = []
        for start in range(0, PROBE_SIZE, 64):
            items = [task.item("train", i) for i in range(start, min(start + 64, PROBE_SIZE))]
            batch = encode(self.processor, items, answers=True)
            logits = self.model(**batch, logits_to_keep=ANSWER_TOKENS + 1).logits[:, :-1]
            right += (logits.argmax(-1) == batch["input_ids"][:, -ANSWER_TOKENS:]).all(-1).tolist()
        return float(np.mean(right))


@torch.no_grad()
def sample(model, processor, items: Sequence[TaskItem], samples: int) -> list[list[str]]:
    """``samples`` completions of each item at temperature 1; one greedy completion where ``samples`` is 0."""
    texts: list[list[str]] = []
    for start in range(0, len(items), 64):
        batch = encode(processor, items[start:start + 64], answers=False)
        how = dict(do_sample=True, num_return_sequences=samples, top_k=0) if samples else dict(do_sample=False)
        output = model.generate(**batch, **how, max_new_tokens=8)[:, batch["input_ids"].shape[1]:]
        decoded = processor.tokenizer.batch_decode(output, skip_special_tokens=True)
        each = max(1, samples)
        texts += [decoded[i:i + each] for i in range(0, len(decoded), each)]
    return texts


def blank(item: TaskItem) -> TaskItem:
    """The same question with black pictures."""
    return replace(item, media=tuple(replace(media, pixels=np.zeros_like(media.pixels)) for media in item.media))


def evaluate(model, processor, tasks: Sequence[ProceduralTask], questions: int, samples: int = 8) -> list[str]:
    """A table of held-out accuracy: greedy, with pictures blanked, avg@k and pass@k at temperature 1, parseable."""
    model.eval()
    rows = [f"{'held out':16s}{'n':>6s}{'greedy':>8s}{'blank':>8s}{'avg@8':>8s}{'pass@8':>8s}{'parsed':>8s}"]
    for task in tasks:
        items = [task.item("held_out", index) for index in range(questions)]
        greedy = [texts[0] for texts in sample(model, processor, items, 0)]
        blanked = [texts[0] for texts in sample(model, processor, [blank(item) for item in items], 0)]
        sampled = sample(model, processor, items, samples)
        scores = np.array([[task.verify(item, text)["accuracy"] for text in (one, dark, *many)]
                           for item, one, dark, many in zip(items, greedy, blanked, sampled)])
        parsed = np.array([task.extract(many[0]) is not None for many in sampled])
        kinds = np.array([item.extra["kind"] for item in items])
        for name, chosen in [(task.domain, kinds == kinds)] + [(f"  {k}", kinds == k) for k in task.chosen_kinds]:
            part = scores[chosen]
            cells = (part[:, 0].mean(), part[:, 1].mean(), part[:, 2:].mean(), part[:, 2:].max(1).mean(),
                     parsed[chosen].mean())
            rows.append(f"{name:16s}{chosen.sum():6d}" + "".join(f"{100 * value:8.1f}" for value in cells))
    return rows


def quickstart_tasks(levels: Sequence[int] = LEVELS) -> list[ProceduralTask]:
    """The questions of examples/quickstart.py: one kind per family; stories are told without distraction."""
    return [TextTask(kinds=["difference"], levels=(1,)), ImageTask(kinds=["compare"], levels=levels),
            VideoTask(kinds=["direction"], levels=levels)]


def main(argv: Sequence[str] | None = None) -> None:
    """Build, teach to see, teach to answer, save, measure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("examples/tiny_backbone"), help="folder to write")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--held-out", type=int, default=1024, help="held-out questions per domain to measure")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads; another number, other roundings")
    options = parser.parse_args(argv)

    torch.manual_seed(options.seed)
    torch.set_num_threads(options.threads)
    _, image, video = quickstart_tasks((1, 2))
    processor = build_processor(build_tokenizer([TextTask(), ImageTask(), VideoTask()]))
    print("1. the vision tower learns to see")
    teacher = build_model(processor.tokenizer)
    Warmup(teacher, processor, {image: 0.5, video: 0.5}, options.seed).run(400, 1e-3, enough=0.92)
    print("2. new language layers on the frozen tower learn the easiest questions of each family")
    model = build_model(processor.tokenizer)
    model.model.visual.load_state_dict(teacher.model.visual.state_dict())
    model.model.visual.requires_grad_(False)
    Warmup(model, processor, dict(zip(quickstart_tasks((1,)), SHARES)), options.seed).run(STEPS, 1e-3)
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} million parameters, "
          f"{len(processor.tokenizer)} tokens")
    model.save_pretrained(options.out)
    processor.save_pretrained(options.out)
    size = sum(path.stat().st_size for path in options.out.iterdir())
    print(f"wrote {options.out} ({size / 1e6:.1f} MB)")
    print("\n".join(evaluate(model, processor, quickstart_tasks(), options.held_out)))


if __name__ == "__main__":
    main()
