"""The completions of one prompt under the experts of a random backbone: scored and updated as the trainer does it."""
from __future__ import annotations

import argparse
import gc
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from bench_backbone import random_backbone, random_prompt, refuse_impossible_shapes
from bench_record import refuse_below
from torch import Tensor

from copd_megatron.config.model import AdapterConfig, ModelConfig
from copd_megatron.model.shared_prefix import Leaf, LeafGroup, StateKey, build_pack
from copd_megatron.model.spec import BackboneSpec
from copd_megatron.model.vocab_parallel import TokenScores, score
from copd_megatron.parallel.groups import Groups
from copd_megatron.platform import device
from copd_megatron.simulate.flops import UpdateShape


def add_group_options(parser: argparse.ArgumentParser) -> None:
    """Lengths and counts; defaults are sized for two CPU cores."""
    for name, default, text in (
            ("prefix", 256, "tokens of the prompt"), ("completion", 32, "tokens of each completion"),
            ("group", 8, "completions of the prompt"), ("experts", 3, "experts that score"),
            ("header", 3, "prompt tokens that scope completion adapts"),
            ("threads", 0, "CPU threads; 0: all cores"), ("repeats", 3, "timed runs")):
        parser.add_argument(f"--{name}", type=int, default=default, metavar="N", help=f"{text} (%(default)s)")


def refuse_impossible_groups(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """End the program with one line if there is no such group or no such backbone."""
    refuse_below(parser, options, prefix=1, completion=1, group=1, experts=1, header=1, repeats=1, threads=0)
    refuse_impossible_shapes(parser, options)
    if options.header > options.prefix:
        parser.error(f"--header: {options.header}; at most the prefix's {options.prefix}")


def shape_of(options: argparse.Namespace) -> UpdateShape:
    """Lengths and counts of the options."""
    return UpdateShape(options.prefix, options.completion, options.group, options.experts, options.header)


@dataclass(frozen=True)
class Lane:
    """One completion under one expert."""

    expert: str
    token_ids: tuple[int, ...]


class Group:
    """The same prompt, completions and weights for every backbone of a shape."""

    def __init__(self, spec: BackboneSpec, shape: UpdateShape, adapter: AdapterConfig, groups: Groups,
                 model: ModelConfig):
        self.shape, self.adapter = shape, adapter
        self.experts = [f"expert{n}" for n in range(shape.experts)]
        self.backbone = random_backbone(spec, adapter, groups, model, self.experts)
        rng = np.random.default_rng(0)
        self.prompt = random_prompt(rng, shape.prefix, shape.header, spec.vocab_size)
        self.completions = [tuple(ids) for ids in rng.integers(0, spec.vocab_size, (shape.group, shape.completion))]
        self.kept: dict[StateKey, Tensor] = {}
        """What `keep_states` has kept."""
        self.weights = torch.from_numpy(rng.normal(size=shape.group * shape.completion)).float().to(device())

    def lanes(self, experts: Sequence[str]) -> list[Lane]:
        """All completions under the first of the experts, then under the next."""
        return [Lane(expert, ids) for expert in experts for ids in self.completions]

    def evaluate(self, lanes: Sequence[Lane], sharing: bool = True, topk: int = 0,
                 begins_above: bool = False) -> tuple[Tensor, TokenScores]:
        """One pass: hidden states [lanes x R, H] and scores of the completions' tokens.

        Args:
            begins_above: at ``first_layer``, from what `keep_states` has kept.
        """
        rules = replace(self.backbone.rules, sharing=sharing)
        group = LeafGroup(self.prompt, [Leaf(lane.expert, lane.token_ids) for lane in lanes])
        pack = build_pack([group], rules, device(), kept=dict.fromkeys(self.kept, 0) if begins_above else None)
        given = torch.cat([self.kept[key] for key in pack.kept.keys[0]]) if begins_above else None
        hidden = self.backbone(pack, kept=given)
        return hidden, score(hidden, self.backbone.head, pack.target_ids, topk=topk)

    @torch.no_grad()
    def keep_states(self) -> None:
        """Keep what enters ``first_layer`` of the prompt and the completions, as a step's rollout does."""
        last, found = self.backbone.layers[self.adapter.first_layer - 1], []
        hook = last.register_forward_hook(lambda module, given, out: found.append(out[0]))
        self.evaluate(self.lanes(self.experts[:1]))
        hook.remove()
        forced = self.backbone.rules.forced(self.prompt)
        trunk, key = self.shape.prefix - forced, self.prompt.content_hash
        keys = [*([(key, None)] if trunk else []), *((key, ids) for ids in dict.fromkeys(self.completions))]
        sizes = [*([trunk] if trunk else []), *[forced + self.shape.completion - 1] * (len(keys) - bool(trunk))]
        self.kept = dict(zip(keys, torch.cat(found).split(sizes), strict=True))

    @torch.no_grad()
    def score(self, experts: Sequence[str], topk: int) -> tuple[Tensor, TokenScores]:
        """Teachers' scores of all completions in one pass."""
        return self.evaluate(self.lanes(experts), topk=min(topk, self.backbone.spec.vocab_size))

    def update(self) -> None:
        """Forward and backward of the first expert; the gradient stays in its adapters."""
        self.backbone.zero_grad()
        _, scores = self.evaluate(self.lanes(self.experts[:1]))
        (self.weights * scores.logprobs_T).sum().backward()

    def gradients(self) -> dict[str, Tensor]:
        """Of the first expert's adapters, by name."""
        return {name: p.grad for name, p in self.backbone.bank.parameters_of(self.experts[0]).items()}


def free_memory() -> None:
    """Give back what was dropped, before the next backbone is made."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
