"""The random backbone of the benchmarks: its command line options, its shape, its weights and its prompts."""
from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import get_args

import numpy as np
import torch
from bench_record import free_bytes, refuse_below

import copd_megatron.platform  # noqa: F401  (before any of Megatron)
from copd_megatron.config.model import AdapterConfig, ModelConfig
from copd_megatron.launch import calibrate
from copd_megatron.model.backbone import DTYPES, Backbone
from copd_megatron.model.fp8 import SCALE, is_fp8, quantised
from copd_megatron.model.spec import BackboneSpec, RopeSpec
from copd_megatron.parallel.groups import Groups
from copd_megatron.parallel.layout import Layout
from copd_megatron.platform import device
from copd_megatron.simulate.hardware import Hardware, load_hardware
from copd_megatron.simulate.memory import backbone_bytes
from copd_megatron.types import Prompt, UserError

CALIBRATE_S = 0.5
"""Seconds of each measurement of the machine's peaks."""


def add_shape_options(parser: argparse.ArgumentParser, first_layers: bool = False) -> None:
    """Options of the backbone and its adapters; defaults are sized for two CPU cores.

    ``first_layers``: ``--first-layer`` takes several, by default 0 and half depth.
    """
    for name, default, text in (
            ("layers", 6, "layers of the backbone"), ("hidden", 512, "hidden size"), ("heads", 8, "query heads"),
            ("kv-heads", 4, "key/value heads"), ("ffn", 1536, "feed-forward size"), ("vocab", 4096, "vocabulary"),
            ("rank", 16, "rank of the adapters")):
        parser.add_argument(f"--{name}", type=int, default=default, metavar="N", help=f"{text} (%(default)s)")
    parser.add_argument("--head-dim", type=int, metavar="N", help="size of each head (hidden size / heads)")
    several = {"nargs": "+", "help": "first adapted layers (0 and half depth)"}
    parser.add_argument("--first-layer", type=int, metavar="N", **several if first_layers else {
        "default": 0, "help": "first adapted layer (%(default)s)"})
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="float32", help="model.dtype (%(default)s)")
    for name in ("attention", "kernels"):
        parser.add_argument(f"--{name}", choices=get_args(ModelConfig.model_fields[name].annotation), default="auto",
                            help=f"model.{name} (%(default)s)")


def add_recompute_option(parser: argparse.ArgumentParser) -> None:
    """For what has a backward."""
    parser.add_argument("--recompute", choices=get_args(ModelConfig.model_fields["recompute"].annotation),
                        default="none", help="model.recompute (%(default)s)")


def refuse_impossible_shapes(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """End the program with one line if there is no such backbone."""
    if options.first_layer is None:
        options.first_layer = sorted({0, options.layers // 2})
    refuse_below(parser, options, layers=1, hidden=1, heads=1, kv_heads=1, ffn=1, vocab=1, rank=1, first_layer=0)
    if options.head_dim is None and options.hidden % (2 * options.heads):
        parser.error(f"--hidden: {options.hidden}; a multiple of 2 x the {options.heads} heads (head dims are even), "
                     "or another --head-dim")
    if options.head_dim is not None and (options.head_dim < 2 or options.head_dim % 2):
        parser.error(f"--head-dim: {options.head_dim}; even, at least 2")
    layers = options.first_layer if isinstance(options.first_layer, list) else [options.first_layer]
    if max(layers) >= options.layers:
        parser.error(f"--first-layer: {max(layers)}; below the {options.layers} --layers")
    if options.heads % options.kv_heads:
        parser.error(f"--kv-heads: {options.kv_heads}; a divisor of the {options.heads} heads")


def spec_of(options: argparse.Namespace) -> BackboneSpec:
    """The backbone of the options: Qwen3's layers, head and embedding apart."""
    return BackboneSpec(family="qwen3", num_layers=options.layers, hidden_size=options.hidden,
                        ffn_hidden_size=options.ffn, num_heads=options.heads, num_kv_heads=options.kv_heads,
                        head_dim=options.head_dim or options.hidden // options.heads,
                        vocab_size=options.vocab, norm_eps=1e-6,
                        rope=RopeSpec(1e6), qk_norm=True, qkv_bias=False, o_bias=False, mlp_bias=False,
                        tied_head=False, deepstack_layers=0)


def model_of(options: argparse.Namespace, **rest: str) -> ModelConfig:
    """How the backbone of the options is evaluated; ``rest``: more fields of the section."""
    return ModelConfig(path="-", dtype=options.dtype, attention=options.attention, kernels=options.kernels, **rest)


def add_hardware_option(parser: argparse.ArgumentParser) -> None:
    """The peaks that times are compared with."""
    parser.add_argument("--hardware", metavar="NAME|FILE", help="peaks: h100, h200, a100, cpu, or what copd calibrate "
                        "wrote (measured here)")


def peaks(options: argparse.Namespace) -> Hardware:
    """What `--hardware` names or this machine reaches; UserError if its FLOP/s in the dtype are unknown."""
    if options.hardware is None:
        print("measuring the machine ...", file=sys.stderr, flush=True)
    hardware = load_hardware(options.hardware) if options.hardware else calibrate.measure(CALIBRATE_S)
    hardware.flops(options.dtype)
    return hardware


def describe(spec: BackboneSpec, rank: int) -> str:
    """One line for people."""
    return (f"backbone: {spec.num_layers} layers of {spec.hidden_size}, {spec.num_heads} heads of {spec.head_dim} on "
            f"{spec.num_kv_heads}, feed-forward {spec.ffn_hidden_size}, vocabulary {spec.vocab_size}; "
            f"LoRA rank {rank} on every linear")


@torch.no_grad()
def random_backbone(spec: BackboneSpec, adapter: AdapterConfig, groups: Groups, model: ModelConfig,
                    experts: Sequence[str]) -> Backbone:
    """Weights that keep activations of order one; no adapter is zero, so that every gradient is exercised.

    They are drawn on the device, the same ones for every ``model.fp8``, in the backbone's dtype before they are
    quantised.

    Raises:
        UserError: they are larger than the memory that is free.
    """
    needed, free = sum(backbone_bytes(spec, Layout(), 0, model.dtype, model.fp8).values()), free_bytes()
    if needed > free:
        raise UserError(f"--layers, --hidden, --ffn, --vocab: the weights take {needed / 1e9:.1f} GB, "
                        f"{free / 1e9:.1f} GB are free; smaller sizes")
    backbone = Backbone(spec, groups, model, adapter)
    generator = torch.Generator(device()).manual_seed(0)

    def normal(shape: torch.Size) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device=device())

    for name, parameter in backbone.named_parameters():
        if "norm" in name:
            parameter.fill_(1.0)
        else:
            scale = 1.0 if "embedding" in name else parameter.shape[-1] ** -0.5
            _fill(backbone, name, (scale * normal(parameter.shape)).to(backbone.dtype))
    for expert in experts:
        backbone.bank.add_expert(expert, seed=0)
        for name, parameter in backbone.bank.parameters_of(expert).items():
            if name.endswith("lora_B"):
                parameter.copy_(0.05 * normal(parameter.shape))
        backbone.bank.changed(expert)
    return backbone


def _fill(backbone: Backbone, name: str, values: torch.Tensor) -> None:
    """Set a frozen weight as a checkpoint's is, whole; Transformer Engine's rounds what is copied into it."""
    parameter = backbone.get_parameter(name)
    if is_fp8(parameter):
        values, scales = quantised(values, slice(None))
        backbone.get_buffer(f"{name.rpartition('.')[0]}.{SCALE}").copy_(scales)
    parameter.copy_(values)


def random_prompt(rng: np.random.Generator, tokens: int, header: int, vocab_size: int, key: str = "bench") -> Prompt:
    """A text prompt; its content is known by ``key``."""
    positions = np.broadcast_to(np.arange(tokens), (3, tokens)).copy()
    return Prompt(key, "bench", rng.integers(0, vocab_size, tokens), positions, tokens, None,
                  np.zeros(0, np.int64), header, key)
