"""One policy without training: a backbone with at most one adapter, as ``copd score`` and ``copd generate`` run it."""
from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from copd_megatron.checkpoint.adapter import Adapter
from copd_megatron.checkpoint.peft import load_peft_adapter, read_peft_adapter
from copd_megatron.config.model import AdapterConfig, ModelConfig
from copd_megatron.config.parallel import ParallelConfig
from copd_megatron.model.backbone import Backbone
from copd_megatron.model.prompt import PromptEncoder
from copd_megatron.model.spec import BackboneSpec
from copd_megatron.model.translate import check_backbone, load_backbone_weights
from copd_megatron.parallel.groups import Groups, init_distributed
from copd_megatron.parallel.layout import Layout
from copd_megatron.parallel.placement import Placement
from copd_megatron.platform import setup_platform
from copd_megatron.rollout.engine import VisualSource
from copd_megatron.trainer.forward import Runner, visual_features

ADAPTER = "adapter"
"""The policy's name in the bank, where it is not the backbone itself."""


@dataclass(frozen=True, eq=False)
class SinglePolicy:
    """A policy on this rank's shards; every replica holds a copy."""

    groups: Groups
    backbone: Backbone
    runner: Runner
    encoder: PromptEncoder
    visual: VisualSource
    name: str | None
    """``ADAPTER``, or None for the backbone."""
    invocation: tuple[int, ...] | None
    """What prompts must end in: the tokens from which an activated LoRA acts; None for others."""

    @classmethod
    def load(cls, model: ModelConfig, adapter: Path | None, parallel: ParallelConfig,
             template_args: dict[str, Any] | None = None) -> SinglePolicy:
        """Check what can be checked without weights, then load them. Every rank calls it.

        Raises:
            UserError: backbone, adapter or layout that do not fit; the same on every rank.
        """
        setup_platform()
        spec = check_backbone(model.path)
        encoder = PromptEncoder(model.path, template_args, text_only=True)
        section, invocation = AdapterConfig(targets=("q_proj",)), None  # never used: there is no adapter
        if adapter:
            found = read_peft_adapter(adapter, spec)
            section, invocation = _section(found), found.invocation_token_ids
        init_distributed(parallel)
        layout = Layout.of(_with_moe_experts(parallel, spec), torch.distributed.get_world_size())
        spec.check_layout(layout)
        groups = Groups.create(layout, Placement.build((ADAPTER,), layout.replicas), timeout_s=parallel.timeout_s)
        backbone = Backbone(spec, groups, model, section)
        load_backbone_weights(backbone, model.path)
        backbone.eval()
        if adapter:
            load_peft_adapter(backbone.bank, ADAPTER, adapter)
        visual = visual_features(model, backbone)
        return cls(groups, backbone, Runner(backbone, groups, visual), encoder, visual,
                   ADAPTER if adapter else None, invocation)


def _section(adapter: Adapter) -> AdapterConfig:
    """The adapter section that holds it, with as many layers free of it as there are."""
    modules = adapter.modules()
    rank = len(adapter.pair(modules[0])[0])
    first_layer = min(int(module.split(".")[1]) for module in modules)
    targets = tuple(dict.fromkeys(module.split(".")[3] for module in modules))
    return AdapterConfig(rank=rank, alpha=adapter.scaling * rank, first_layer=first_layer, targets=targets,
                         scope="completion" if adapter.invocation_token_ids else "sequence")


def _with_moe_experts(parallel: ParallelConfig, spec: BackboneSpec) -> ParallelConfig:
    """MoE experts cut over the tensor-parallel ranks: whole ones if their number permits, else each of them."""
    if spec.moe is None or parallel.tensor == 1:
        return parallel
    whole = spec.moe.experts % parallel.tensor == 0
    cut = "moe_expert" if whole else "moe_expert_tensor"
    return parallel.model_copy(update={cut: parallel.tensor, "sequence_parallel": True})
