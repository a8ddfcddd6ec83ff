"""What one update on given prompts and completions is made of, whoever computes it, and how it is timed."""
from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from bench_record import peak_of
from transformers import AutoTokenizer

import copd_megatron.platform  # noqa: F401  (before any of Megatron, whose notices it silences)
from copd_megatron.checkpoint.adapter import Adapter
from copd_megatron.checkpoint.peft import save_peft_adapter
from copd_megatron.config.model import AdapterConfig
from copd_megatron.model.adapter_bank import MODULE_OF, factor_shape
from copd_megatron.model.spec import BackboneSpec
from copd_megatron.model.translate import TEXT_PREFIX
from copd_megatron.types import UserError

STUDENT, TEACHER = "student", "teacher"
UNCLIPPED = 1e9
"""Gradient norm that is never reached: clipped gradients would hide a wrong scale."""
LEARNING_RATE = 1e-30
"""AdamW runs and changes nothing, so that every repetition is the same."""


@dataclass(frozen=True)
class Work:
    """What both sides do. One microbatch is the completions of one prompt."""

    row: str
    options: argparse.Namespace
    adapters: Path
    """Holds PEFT folders ``student`` and ``teacher``."""
    header: tuple[int, ...]
    prompts: np.ndarray
    """[P, tokens], each ending in the header."""
    completions: np.ndarray
    """[P, G, R]"""
    advantages: np.ndarray
    """[P, G], of mean 0 in each group."""


@dataclass(frozen=True)
class Outcome:
    """What one side computed and what it took."""

    gradients: dict[str, np.ndarray]
    """By factor, "layers.3.mlp.up_proj.lora_A"; float32."""
    seconds: float
    peak_bytes: int


def make_work(row: str, options: argparse.Namespace, spec: BackboneSpec, folder: Path) -> Work:
    """Random tokens, the header only where it belongs, and adapters that are nowhere zero.

    Raises:
        UserError: prompts are too short for the header.
    """
    header = header_of(options.model)
    if options.prompt_tokens <= len(header):
        raise UserError(f"--prompt-tokens: {options.prompt_tokens}; more than the header's {len(header)}")
    rng = np.random.default_rng(0)
    ordinary = np.setdiff1d(np.arange(min(spec.vocab_size, 40_000)), header)
    prompts = rng.choice(ordinary, (options.prompts, options.prompt_tokens))
    prompts[:, -len(header):] = header
    completions = rng.choice(ordinary, (options.prompts, options.group, options.completion_tokens))
    advantages = rng.normal(size=(options.prompts, options.group))
    advantages -= advantages.mean(1, keepdims=True)
    for seed, name in enumerate((STUDENT, TEACHER)):
        generator = torch.Generator().manual_seed(seed)
        names = [f"layers.{layer}.{MODULE_OF[p]}.{p}.{factor}" for layer in range(spec.num_layers)
                 for p in AdapterConfig().targets for factor in ("lora_A", "lora_B")]
        shapes = {name: factor_shape(spec, name, options.rank) for name in names}
        factors = {n: 0.02 * torch.randn(shape, generator=generator) for n, shape in shapes.items()}
        invoked = header if row == "completion" else None
        save_peft_adapter(folder / name, Adapter(factors, 1.0, invoked), TEXT_PREFIX[spec.family], options.model)
    return Work(row, options, folder, header, prompts, completions, advantages)


def header_of(model: Path) -> tuple[int, ...]:
    """The generation header as tokens."""
    return tuple(AutoTokenizer.from_pretrained(model).encode("<|im_start|>assistant\n", add_special_tokens=False))


def timed(name: str, update: Callable[[], None], gradients: Callable[[], dict[str, torch.Tensor]],
          repeats: int) -> Outcome:
    """The first update loads what is loaded once, the second tells peak and gradients, of the others the median of
    the seconds counts. Says when each is done."""
    def once(number: int) -> float:
        start = time.perf_counter()
        update()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds = time.perf_counter() - start
        print(f"    {name}: update {number} of {2 + repeats}, {seconds:.2f} s", flush=True)
        return seconds

    once(1)
    _, peak_bytes = peak_of(lambda: once(2))
    kept = {name: gradient.float().cpu().numpy().copy() for name, gradient in gradients().items()}
    return Outcome(kept, statistics.median(once(3 + n) for n in range(repeats)), peak_bytes)
