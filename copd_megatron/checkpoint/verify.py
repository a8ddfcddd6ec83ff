"""Do two things compute the same? Log-probs of the same answers under transformers (and PEFT) and under our backbone.

A side is a Hugging Face directory, alone or with a PEFT adapter. Each is evaluated by both stacks, one model in memory
at a time, and compared with the first side under transformers: max over tokens of |log p - log p_first|.
"""
from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from copd_megatron.checkpoint.peft import load_peft_adapter, read_peft_adapter
from copd_megatron.config.model import AdapterConfig, ModelConfig
from copd_megatron.model.backbone import DTYPES, Backbone
from copd_megatron.model.prompt import PromptEncoder
from copd_megatron.model.shared_prefix import Leaf, LeafGroup, build_pack
from copd_megatron.model.translate import check_backbone, load_backbone_weights
from copd_megatron.model.vision import VisionTower
from copd_megatron.model.vocab_parallel import score
from copd_megatron.parallel.groups import Groups
from copd_megatron.parallel.layout import Layout
from copd_megatron.parallel.placement import Placement
from copd_megatron.platform import device
from copd_megatron.tasks.media import load_image
from copd_megatron.types import Prompt, TaskItem, UserError

POLICY = "policy"


@dataclass(frozen=True)
class Side:
    """What is evaluated."""

    backbone: Path
    adapter: Path | None = None
    """PEFT folder."""

    def __str__(self) -> str:
        return str(self.backbone) if self.adapter is None else f"{self.backbone} + {self.adapter}"


@dataclass(frozen=True, eq=False)
class Question:
    """One prompt and the answer whose log-probs are compared."""

    prompt: Prompt
    answer: list[int]


@dataclass(frozen=True, eq=False)
class Scores:
    """Of all answer tokens of all questions, [T]."""

    logprobs: Tensor
    likeliest: Tensor
    """Ids of the most likely tokens."""


@dataclass(frozen=True)
class Row:
    """One side under one stack, against the first."""

    side: str
    stack: str
    tokens: int
    difference: float
    """Largest |log p - log p_first|, nats."""
    same_top1: float
    """Share of tokens at which the same token is the likeliest."""


def questions(backbone: Path, texts: Sequence[str], images: Sequence[Path], answer: str) -> list[Question]:
    """A user's turn for each text, and one that shows each image with the first text.

    Raises:
        UserError: an image cannot be read, or the backbone reads no images.
    """
    encoder = PromptEncoder(backbone)
    items = [TaskItem(f"text {i}", [{"role": "user", "content": text}], (), None) for i, text in enumerate(texts)]
    for i, path in enumerate(images):
        parts = [{"type": "image"}, {"type": "text", "text": texts[0]}]
        media = (load_image(str(path), Path.cwd()),)
        items.append(TaskItem(f"image {i}", [{"role": "user", "content": parts}], media, None))
    tokens = encoder.tokenize(answer)
    return [Question(encoder.encode(item, "verify"), tokens) for item in items]


def compare(sides: Sequence[Side], asked: Sequence[Question], dtype: str = "float32",
            note: Callable[[str], object] = lambda text: None) -> list[Row]:
    """Every side under both stacks; the first row is the first side under transformers, against itself.

    Raises:
        UserError: a side is broken or its parts do not fit each other.
    """
    for side in sides:  # before anything is loaded
        spec = check_backbone(side.backbone)
        if side.adapter:
            read_peft_adapter(side.adapter, spec)
    rows, first = [], None
    for side in sides:
        for stack, evaluate in (("transformers", theirs), ("copd_megatron", ours)):
            note(f"{side}: {stack}")
            scores = evaluate(side, asked, dtype)
            first = first or scores
            rows.append(Row(str(side), stack, len(scores.logprobs),
                            float((scores.logprobs - first.logprobs).abs().max()),
                            float((scores.likeliest == first.likeliest).double().mean())))
    return rows


@torch.no_grad()
def theirs(side: Side, asked: Sequence[Question], dtype: str) -> Scores:
    """By transformers, and the peft library where there is an adapter."""
    spec = check_backbone(side.backbone)
    auto = AutoModelForImageTextToText if spec.is_visual else AutoModelForCausalLM
    model = auto.from_pretrained(side.backbone, dtype=DTYPES[dtype], local_files_only=True)
    if side.adapter:
        try:
            model = PeftModel.from_pretrained(model, side.adapter)
        except ValueError as error:  # peft refuses what it has no place for
            raise UserError(f"{side.adapter}: peft cannot load it on {side.backbone} ({error}); an adapter of this "
                            "backbone is needed; if that has MoE layers, merge it or train attention only") from error
    model = model.to(device()).eval()
    parts = []
    for question in asked:
        start = len(question.prompt.token_ids)
        token_ids = torch.from_numpy(np.concatenate([question.prompt.token_ids, question.answer]))[None].to(device())
        logits = model(input_ids=token_ids, **_media(question.prompt, token_ids, model)).logits[0, start - 1:-1]
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
        parts.append((wide.gather(1, token_ids[0, start:, None])[:, 0], wide.argmax(-1)))
    return Scores(*(torch.cat(part).cpu() for part in zip(*parts)))


def _media(prompt: Prompt, token_ids: Tensor, model: nn.Module) -> dict[str, Tensor]:
    """What a vision-language model wants besides the tokens."""
    if prompt.visual is None:
        return {}
    config, visual = model.config, prompt.visual
    given = {"pixel_values": visual.image_patches, "image_grid_thw": visual.image_grids,
             "pixel_values_videos": visual.video_patches, "video_grid_thw": visual.video_grids,
             "second_per_grid_ts": visual.video_seconds}
    kinds = (token_ids == config.image_token_id).int() + 2 * (token_ids == config.video_token_id).int()
    tensors = {name: torch.from_numpy(array).to(device()) for name, array in given.items() if array is not None}
    return tensors | {"mm_token_type_ids": kinds}


@torch.no_grad()
def ours(side: Side, asked: Sequence[Question], dtype: str) -> Scores:
    """By our backbone on one rank."""
    spec = check_backbone(side.backbone)
    adapter = read_peft_adapter(side.adapter, spec) if side.adapter else None
    start = adapter.invocation_token_ids if adapter else None
    targets = sorted({module.split(".")[3] for module in adapter.modules()}) if adapter else ("q_proj",)
    groups = Groups.create(Layout(), Placement.build((POLICY,), 1))
    try:
        backbone = Backbone(spec, groups, ModelConfig(path=str(side.backbone), dtype=dtype),
                            AdapterConfig(scope="completion" if start else "sequence", targets=tuple(targets)))
        load_backbone_weights(backbone, side.backbone)
        if side.adapter:
            header = PromptEncoder(side.backbone).invocation_token_ids if start else None
            load_peft_adapter(backbone.bank, POLICY, side.adapter, header)
        tower = VisionTower(side.backbone, DTYPES[dtype], device()) if spec.is_visual else None
        parts = []
        for question in asked:
            leaf = Leaf(POLICY if side.adapter else None, question.answer)
            pack = build_pack([LeafGroup(question.prompt, [leaf])], backbone.rules, device())
            hidden = backbone(pack, tower.features(pack.prompts) if tower else None)
            scores = score(hidden, backbone.head, pack.target_ids, topk=1)
            parts.append((scores.logprobs_T, scores.topk_ids_TK[:, 0]))
        return Scores(*(torch.cat(part).cpu() for part in zip(*parts)))
    finally:
        groups.destroy()
