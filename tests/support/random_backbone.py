"""A small random backbone on one rank, with random adapters, and prompts with invented media."""
from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from copd_megatron.config.model import AdapterConfig, ModelConfig
from copd_megatron.model.backbone import Backbone
from copd_megatron.model.spec import BackboneSpec, MoeSpec, RopeSpec
from copd_megatron.model.te import rounds_what_is_copied
from copd_megatron.parallel.groups import Groups
from copd_megatron.parallel.layout import Layout
from copd_megatron.parallel.placement import Placement
from copd_megatron.types import Prompt

SPEC = BackboneSpec(family="qwen3_vl", num_layers=3, hidden_size=32, ffn_hidden_size=48, num_heads=4, num_kv_heads=2,
                    head_dim=8, vocab_size=37, norm_eps=1e-6, rope=RopeSpec(1e4, None, (2, 1, 1)), qk_norm=True,
                    qkv_bias=False, o_bias=False, mlp_bias=False, tied_head=False, deepstack_layers=2,
                    image_token_id=5, video_token_id=6)
MOE_SPEC = replace(SPEC, family="qwen3_vl_moe", moe=MoeSpec(experts=4, top_k=2, ffn_hidden_size=24, norm_topk=True,
                                                            layers=(0, 2)))


def one_rank_groups(experts=("a", "b")) -> Groups:
    """Groups of a world of one."""
    return Groups.create(Layout(tp=1, pp=1, replicas=1), Placement.build(experts, 1))


def make_backbone(groups: Groups, *, scope="sequence", first_layer=0, sharing=True, dtype="float64",
                  attention="flash", recompute="none", spec=SPEC, experts=("a", "b"),
                  checked=False, fp8="none", norms="auto") -> Backbone:
    """Every weight normal(0, 0.2), every adapter factor normal(0, 0.1), all seeded by name."""
    backbone = Backbone(spec, groups,
                        ModelConfig(path="-", dtype=dtype, prefix_sharing=sharing, attention=attention,
                                    recompute=recompute, fp8=fp8, norms=norms),
                        AdapterConfig(rank=3, alpha=6.0, scope=scope, first_layer=first_layer), checked)
    for number, (name, parameter) in enumerate(sorted(backbone.named_parameters())):
        centre = 1.0 if "norm" in name else 0.0
        value = centre + 0.2 * torch.randn(parameter.shape, dtype=torch.float64,
                                           generator=torch.Generator().manual_seed(number))
        # Transformer Engine's weights quantise what is copied into them, and not from float64.
        parameter.data.copy_(value.to(parameter.dtype) if rounds_what_is_copied(parameter) else value)
    for number, expert in enumerate(experts):
        backbone.bank.add_expert(expert, seed=1)
        for key, parameter in backbone.bank.parameters_of(expert).items():
            generator = torch.Generator().manual_seed(1000 * number + sum(map(ord, key)))
            parameter.data.copy_(0.1 * torch.randn(parameter.shape, dtype=torch.float64, generator=generator))
    return backbone


def make_prompt(seed: int, length: int, visual_tokens: int = 0, header: int = 3) -> Prompt:
    """A random prompt whose first tokens, if any are visual, sit at positions like an image's."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(7, 37, length)
    positions = np.broadcast_to(np.arange(length), (3, length)).copy()
    index = np.arange(1, 1 + visual_tokens)
    tokens[index] = 5
    if visual_tokens:
        positions[1, index] = 1 + np.arange(visual_tokens) // 2
        positions[2, index] = 1 + np.arange(visual_tokens) % 2
    return Prompt(f"p{seed}", "toy", tokens, positions, int(positions.max()) + 1, None, index, header, str(seed))


def make_visual(prompts, spec=SPEC, dtype=torch.float64):
    """Invented features for the prompts' visual tokens: (merged, deepstack)."""
    count = sum(len(p.visual_index) for p in prompts)
    generator = torch.Generator().manual_seed(count)
    make = lambda: torch.randn(count, spec.hidden_size, dtype=torch.float64, generator=generator).to(dtype)  # noqa: E731
    return make(), [make() for _ in range(spec.deepstack_layers)]
