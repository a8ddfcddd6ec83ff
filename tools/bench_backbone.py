"""The random backbone of the benchmarks: its command line options, its shape, its weights and its prompts."""
from __future__ import annotations

import argparse
from collections.abc import Sequence

import numpy as np
import torch
from bench_record import refuse_below

import copd_megatron.platform  # noqa: F401  (before any of Megatron)
from copd_megatron.config.model import AdapterConfig, ModelConfig
from copd_megatron.model.backbone import DTYPES, Backbone
from copd_megatron.model.spec import BackboneSpec, RopeSpec
from copd_megatron.parallel.groups import Groups
from copd_megatron.types import Prompt


def add_shape_options(parser: argparse.ArgumentParser) -> None:
    """Options of the backbone and its adapters; defaults are sized for two CPU cores."""
    for name, default, text in (
            ("layers", 6, "layers of the backbone"), ("hidden", 512, "hidden size"), ("heads", 8, "query heads"),
            ("kv-heads", 4, "key/value heads"), ("ffn", 1536, "feed-forward size"), ("vocab", 4096, "vocabulary"),
            ("rank", 16, "rank of the adapters"), ("first-layer", 0, "first adapted layer")):
        parser.add_argument(f"--{name}", type=int, default=default, metavar="N", help=f"{text} (%(default)s)")
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="float32")


def refuse_impossible_shapes(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """End the program with one line if there is no such backbone."""
    refuse_below(parser, options, layers=1, hidden=1, heads=1, kv_heads=1, ffn=1, vocab=1, rank=1, first_layer=0)
    if options.hidden % (2 * options.heads):
        parser.error(f"--hidden: {options.hidden}; a multiple of 2 x the {options.heads} heads (head dims are even)")
    if options.heads % options.kv_heads:
        parser.error(f"--kv-heads: {options.kv_heads}; a divisor of the {options.heads} heads")


def spec_of(options: argparse.Namespace) -> BackboneSpec:
    """The backbone of the options: Qwen3's layers, head and embedding apart."""
    return BackboneSpec(family="qwen3", num_layers=options.layers, hidden_size=options.hidden,
                        ffn_hidden_size=options.ffn, num_heads=options.heads, num_kv_heads=options.kv_heads,
                        head_dim=options.hidden // options.heads, vocab_size=options.vocab, norm_eps=1e-6,
                        rope=RopeSpec(1e6), qk_norm=True, qkv_bias=False, o_bias=False, mlp_bias=False,
                        tied_head=False, deepstack_layers=0)


def describe(spec: BackboneSpec, rank: int) -> str:
    """One line for people."""
    return (f"backbone: {spec.num_layers} layers of {spec.hidden_size}, {spec.num_heads} heads on "
            f"{spec.num_kv_heads}, feed-forward {spec.ffn_hidden_size}, vocabulary {spec.vocab_size}; "
            f"LoRA rank {rank} on every linear")


def random_backbone(spec: BackboneSpec, adapter: AdapterConfig, groups: Groups, dtype: str,
                    experts: Sequence[str]) -> Backbone:
    """Weights that keep activations of order one; no adapter is zero, so that every gradient is exercised."""
    backbone = Backbone(spec, groups, ModelConfig(path="-", dtype=dtype), adapter)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in backbone.named_parameters():
        if "norm" in name:
            parameter.data.fill_(1.0)
        else:
            scale = 1.0 if "embedding" in name else parameter.shape[-1] ** -0.5
            parameter.data.copy_(scale * torch.randn(parameter.shape, generator=generator))
    for expert in experts:
        backbone.bank.add_expert(expert, seed=0)
        for name, parameter in backbone.bank.parameters_of(expert).items():
            if name.endswith("lora_B"):
                parameter.data.copy_(0.05 * torch.randn(parameter.shape, generator=generator))
        backbone.bank.changed(expert)
    return backbone


def random_prompt(rng: np.random.Generator, tokens: int, header: int, vocab_size: int, key: str = "bench") -> Prompt:
    """A text prompt; its content is known by ``key``."""
    positions = np.broadcast_to(np.arange(tokens), (3, tokens)).copy()
    return Prompt(key, "bench", rng.integers(0, vocab_size, tokens), positions, tokens, None,
                  np.zeros(0, np.int64), header, key)
