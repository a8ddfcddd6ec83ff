"""Random policies, the same on every layout, and log-probs of completions in our stack and transformers'."""
from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from copd_megatron.config.model import AdapterConfig, ModelConfig
from copd_megatron.config.trainer import OptimizerConfig
from copd_megatron.model.adapter_bank import AdapterBank
from copd_megatron.model.backbone import Backbone, stage_layers
from copd_megatron.model.hf_config import read_spec
from copd_megatron.model.shared_prefix import Leaf, LeafGroup, build_pack
from copd_megatron.model.spec import BackboneSpec
from copd_megatron.model.translate import load_backbone_weights
from copd_megatron.model.vision import VisionTower
from copd_megatron.model.vocab_parallel import score
from copd_megatron.parallel.groups import Groups
from copd_megatron.parallel.seeding import generator_for
from copd_megatron.trainer.optimizer import ExpertOptimizer
from copd_megatron.types import Prompt

CPU = torch.device("cpu")
COMPLETIONS = ((40, 41, 42, 43), (50, 40))
"""Token ids of the answers whose log-probs are compared."""


def noise(*names: str, shape: Sequence[int], scale: float = 0.3) -> Tensor:
    """float32 normal(0, scale), a function of the names alone."""
    return scale * torch.randn(*shape, generator=generator_for(5, *names), dtype=torch.float64).float()


def make_bank(groups: Groups, spec: BackboneSpec, adapter: AdapterConfig) -> AdapterBank:
    """This rank's bank, with random trainable policies of the experts it hosts."""
    layers = stage_layers(spec.num_layers, groups.layout.pp, groups.coords.pp)
    bank = AdapterBank(spec, adapter, groups, layers, torch.float32, CPU)
    for expert in groups.hosted:
        put_random(bank, expert)
    return bank


def put_random(bank: AdapterBank, policy: str, trainable: bool = True) -> None:
    """Both factors random: unlike a fresh expert, the policy differs from the backbone."""
    rank = bank.config.rank
    factors = {name: bank.shard(name, noise(policy, name, shape=bank.full_shape(name, rank)))
               for name in bank.factor_names()}
    bank.put(policy, factors, bank.config.alpha / rank, trainable)


def make_optimizers(bank: AdapterBank, updates: dict[str, int] | None = None) -> dict[str, ExpertOptimizer]:
    """Optimizers of the hosted experts: fresh, or with random moments after ``updates[expert]`` updates."""
    optimizers = {e: ExpertOptimizer(e, bank, bank.groups, OptimizerConfig()) for e in bank.groups.hosted}
    for expert, optimizer in optimizers.items():
        if count := (updates or {}).get(expert, 0):
            rank = bank.config.rank
            optimizer.load_state_dict(
                {name: {"exp_avg": _moment(bank, expert, name, "first", rank),
                        "exp_avg_sq": _moment(bank, expert, name, "second", rank).square(),
                        "step": torch.tensor(float(count))} for name in bank.factor_names()}, count)
    return optimizers


def _moment(bank: AdapterBank, expert: str, name: str, which: str, rank: int) -> Tensor:
    return bank.shard(name, noise(expert, name, which, shape=bank.full_shape(name, rank))).contiguous()


def our_logprobs(path: Path, groups: Groups, adapter: AdapterConfig, policies: dict[str, dict[str, Tensor]],
                 prompts: Sequence[Prompt], scalings: dict[str, float] | None = None) -> dict[str, Tensor]:
    """Policy -> [N] log-probs of COMPLETIONS on every prompt, float32, one rank, all policies in one pack."""
    backbone = Backbone(groups=groups, adapter=adapter, model=ModelConfig(path=str(path), dtype="float32"),
                        spec=read_spec(path))
    load_backbone_weights(backbone, path)
    for policy, factors in policies.items():
        backbone.bank.put(policy, factors, (scalings or {}).get(policy, adapter.alpha / adapter.rank))
    lanes = [LeafGroup(prompt, [Leaf(policy, list(tokens)) for policy in policies for tokens in COMPLETIONS])
             for prompt in prompts]
    pack = build_pack(lanes, backbone.rules, CPU)
    visual = VisionTower(path, torch.float32, CPU).features(pack.prompts) if backbone.spec.is_visual else None
    with torch.no_grad():
        logprobs_N = score(backbone(pack, visual), backbone.head, pack.target_ids).logprobs_T
    rows = logprobs_N.split(pack.leaf_lengths)
    width = len(COMPLETIONS)
    return {policy: torch.cat([row for i, row in enumerate(rows) if i // width % len(policies) == number])
            for number, policy in enumerate(policies)}


@torch.no_grad()
def transformers_logprobs(model: nn.Module, prompts: Sequence[Prompt]) -> Tensor:
    """[N] log-probs of COMPLETIONS on every prompt under a transformers or PEFT model."""
    rows = []
    for prompt in prompts:
        for completion in COMPLETIONS:
            token_ids = torch.from_numpy(np.concatenate([prompt.token_ids, completion]))[None]
            logits = model(input_ids=token_ids, **media_arguments(prompt, token_ids, model.config)).logits[0]
            start = len(prompt.token_ids)
            logprobs = logits[start - 1:-1].log_softmax(-1)
            rows.append(logprobs.gather(1, token_ids[0, start:, None])[:, 0])
    return torch.cat(rows)


def media_arguments(prompt: Prompt, token_ids: Tensor, config) -> dict[str, Tensor]:
    """What a transformers model of a visual family wants besides the tokens."""
    if prompt.visual is None:
        return {}
    visual = prompt.visual
    arrays = {"pixel_values": visual.image_patches, "image_grid_thw": visual.image_grids,
              "pixel_values_videos": visual.video_patches, "video_grid_thw": visual.video_grids,
              "second_per_grid_ts": visual.video_seconds}
    kinds = (token_ids == config.image_token_id).int() + 2 * (token_ids == config.video_token_id).int()
    given = {name: torch.from_numpy(array) for name, array in arrays.items() if array is not None}
    return given | {"mm_token_type_ids": kinds}
