"""What a plan must be told about backbone and data, read without weights: tower sizes, prompt lengths."""
from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from transformers import AutoModel

from copd_megatron.config.tasks import ExpertConfig
from copd_megatron.model.backbone import DTYPES
from copd_megatron.model.hf_config import load_hf_config
from copd_megatron.model.prompt import PromptEncoder
from copd_megatron.model.spec import BackboneSpec
from copd_megatron.simulate.job import PromptLengths
from copd_megatron.tasks.loading import build_task

SAMPLES = 16
"""Prompts of each task whose mean length counts."""


def vision_bytes(path: str | Path, spec: BackboneSpec, dtype: str) -> int:
    """Bytes of the vision tower's weights and buffers; 0 for text backbones. Built on "meta": nothing is allocated."""
    if not spec.is_visual:
        return 0
    with torch.device("meta"):
        tower = AutoModel.from_config(load_hf_config(path).vision_config, dtype=DTYPES[dtype])
    return sum(t.numel() * t.element_size() for t in (*tower.parameters(), *tower.buffers()))


def measured_lengths(path: str | Path, experts: Mapping[str, ExpertConfig]) -> dict[str, PromptLengths]:
    """Mean lengths of the first training prompts of every expert's task, rounded up.

    Raises:
        UserError: the backbone has no tokenizer, or a task cannot be built.
    """
    encoder = PromptEncoder(path)
    return {name: _lengths(encoder, name, config) for name, config in experts.items()}


def _lengths(encoder: PromptEncoder, name: str, config: ExpertConfig) -> PromptLengths:
    task = build_task(config, name)
    size = task.size("train")
    count = SAMPLES if size is None else min(SAMPLES, size)
    prompts = [encoder.encode(task.item("train", index), name) for index in range(count)]
    if not prompts:
        return PromptLengths(1)
    return PromptLengths(-(-sum(len(p.token_ids) for p in prompts) // count),
                         -(-sum(len(p.visual_index) for p in prompts) // count),
                         max(1, max(p.header_tokens for p in prompts)))
