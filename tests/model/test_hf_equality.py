"""On every layout the logits of every family, and the log-probs of what it answers, equal transformers': for text,
several images in one prompt, and video.

Ranks are forked once per world size and walk through its layouts and all checkpoints.
"""
from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from copd_megatron.config.model import AdapterConfig, ModelConfig
from copd_megatron.config.rollout import RolloutConfig
from copd_megatron.model.backbone import Backbone
from copd_megatron.model.hf_config import read_spec
from copd_megatron.model.prompt import PromptEncoder
from copd_megatron.model.shared_prefix import Leaf, LeafGroup, Pack, build_pack
from copd_megatron.model.translate import load_backbone_weights
from copd_megatron.model.vision import VisionTower, stage_needs_features
from copd_megatron.parallel.groups import Groups
from copd_megatron.parallel.layout import Layout
from copd_megatron.parallel.placement import Placement
from copd_megatron.rollout.engine import Request, SamplingParams, VisualSource
from copd_megatron.rollout.megatron_engine import MegatronEngine
from copd_megatron.types import Prompt, Segment
from support.pictures import mixed_questions, question
from support.policies import media_arguments
from support.ranks import run_ranks
from support.tiny_models import FAMILIES, MOE_FAMILIES, VISUAL_FAMILIES, tiny_model

CPU = torch.device("cpu")

TOLERANCE = {"float32": 1e-4, "float64": 5e-6}
"""Absolute, on logits of size 1. In float64 what is left is what transformers keeps in float32: norms, routers."""

COMPLETIONS = [[40, 41, 42, 43], [50, 40]]
ATTENTION = AdapterConfig(targets=("q_proj", "o_proj"))
"""Linears that every family has in every layer."""
GREEDY = SamplingParams(max_tokens=4, stop_token_ids=(), greedy=True)
"""Sampling would pick visual placeholders now and then, for which transformers wants pictures."""


def _rope(kind: str, **options: object) -> dict:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 1000.0, **options}}


CHECKPOINTS: dict[str, tuple[str, dict]] = {family: (family, {}) for family in (*FAMILIES, *MOE_FAMILIES)} | {
    "qwen3_vl, other head": ("qwen3_vl", {"tie_word_embeddings": False}),
    "qwen2_5_vl, other head, yarn": ("qwen2_5_vl", {"tie_word_embeddings": True} | _rope(
        "yarn", factor=4.0, original_max_position_embeddings=32, mrope_section=[2, 1, 1])),
    "qwen3, other head": ("qwen3", {"tie_word_embeddings": True}),
    "qwen2, other head, one key/value head, yarn": ("qwen2", {
        "tie_word_embeddings": False, "num_key_value_heads": 1} | _rope(
        "yarn", factor=8.0, original_max_position_embeddings=32, mscale=1.0, mscale_all_dim=0.4)),
    "llama, other head, one key/value head, linear": ("llama", {
        "tie_word_embeddings": True, "num_key_value_heads": 1} | _rope("linear", factor=3.0)),
    "llama, dynamic": ("llama", _rope("dynamic", factor=3.0)),
    "qwen3, longrope": ("qwen3", _rope("longrope", short_factor=[1.0, 1.1, 1.2, 1.3, 1.5, 2.0], long_factor=[4.0] * 6,
                                       factor=4.0, original_max_position_embeddings=128)),
    "qwen3_vl, one key/value head": ("qwen3_vl", {"num_key_value_heads": 1}),
    "qwen2_5_vl, one key/value head": ("qwen2_5_vl", {"num_key_value_heads": 1}),
    "qwen3, one key/value head, biases": ("qwen3", {"num_key_value_heads": 1, "attention_bias": True}),
    "llama, all heads, biases": ("llama", {"num_key_value_heads": 4, "attention_bias": True, "mlp_bias": True}),
    "qwen3_moe, other head and layers": ("qwen3_moe", {
        "norm_topk_prob": False, "decoder_sparse_step": 2, "mlp_only_layers": None, "tie_word_embeddings": True,
        "num_experts": 4, "num_experts_per_tok": 3, "num_key_value_heads": 1}),
    "qwen3_vl_moe, other head and layers": ("qwen3_vl_moe", {
        "num_experts_per_tok": 1, "mlp_only_layers": [], "tie_word_embeddings": False, "num_key_value_heads": 1}),
}
"""Name -> family and what is different: heads (tied or not) on one end of the pipeline or both, rotary scalings,
fewer key/value heads than ranks, biases, which layers are MoE and how they weigh."""


class Run(NamedTuple):
    """One evaluation of a checkpoint on the ranks of one replica."""

    checkpoint: str
    layout: Layout = Layout()
    dtype: str = "float32"


DENSE, MOE = ([name for name, (family, _) in CHECKPOINTS.items() if (family in MOE_FAMILIES) == moe]
              for moe in (False, True))
SP = {"sequence_parallel": True}
RUNS: dict[int, list[Run]] = {
    1: [Run(name, dtype=dtype) for name in CHECKPOINTS for dtype in TOLERANCE],
    2: [*(Run(name, layout) for layout in (Layout(tp=2), Layout(pp=2)) for name in DENSE),
        *(Run(name, layout) for layout in (
            Layout(pp=2), Layout(tp=2, **SP), Layout(tp=2, ep=2, **SP), Layout(tp=2, etp=2, **SP), Layout(cp=2, ep=2),
            Layout(cp=2)) for name in MOE)],
    4: [*(Run(name, Layout(tp=2, pp=2)) for name in DENSE if name in FAMILIES or "other head" in name),
        *(Run(name, Layout(tp=4)) for name in DENSE if name in FAMILIES or "key/value" in name),
        *(Run(name, layout) for layout in (
            Layout(tp=2, cp=2, ep=2, etp=2, **SP), Layout(tp=2, pp=2, ep=2, **SP)) for name in MOE)],
}
"""World size -> runs. With PP 2 the last of Qwen3-VL's three deepstack levels is added on the second stage, with TP 4
two key/value heads are on two ranks each. One rank also runs in float64, where an approximation would show."""


def _path(checkpoint: str) -> Path:
    family, options = CHECKPOINTS[checkpoint]
    return tiny_model(family, **options)


@cache
def _prompts(checkpoint: str) -> list[Prompt]:
    """Text for every family; for the visual ones several images, a video, and both mixed."""
    encoder = PromptEncoder(_path(checkpoint))
    return [encoder.encode(item, item.key) for item in mixed_questions()
            if encoder.spec.is_visual or not item.media]


@cache
def _model(checkpoint: str, dtype: str) -> nn.Module:
    auto = AutoModelForImageTextToText if read_spec(_path(checkpoint)).is_visual else AutoModelForCausalLM
    # Its grouped products of MoE experts do not know float64.
    plain = {"experts_implementation": "eager"} if checkpoint in MOE else {}
    return auto.from_pretrained(_path(checkpoint), dtype=getattr(torch, dtype), **plain)


@cache
def _reference(checkpoint: str, dtype: str) -> torch.Tensor:
    """[N, V]: transformers' logits that predict each completion token, prompt by prompt."""
    model = _model(checkpoint, dtype)
    return torch.cat([_logits(model, prompt, tokens) for prompt in _prompts(checkpoint) for tokens in COMPLETIONS])


@cache
def _logprobs(checkpoint: str, dtype: str, answers: tuple[tuple[int, ...], ...]) -> torch.Tensor:
    """[N]: transformers' log-prob of each token of one answer per prompt."""
    rows = []
    for prompt, answer in zip(_prompts(checkpoint), answers):
        logprobs = _logits(_model(checkpoint, dtype), prompt, answer).log_softmax(-1)
        rows.append(logprobs.gather(1, torch.tensor(answer)[:, None])[:, 0])
    return torch.cat(rows)


@torch.no_grad()
def _logits(model: nn.Module, prompt: Prompt, completion: Sequence[int]) -> torch.Tensor:
    """[R, V]."""
    token_ids = torch.from_numpy(np.concatenate([prompt.token_ids, completion[:-1]]))[None]
    logits = model(input_ids=token_ids, **media_arguments(prompt, token_ids, model.config)).logits[0]
    return logits[len(prompt.token_ids) - 1 :]


@torch.no_grad()
def _ours(groups: Groups, run: Run) -> tuple[torch.Tensor | None, list[Segment]]:
    """[N, V] whole-vocabulary logits on the last stage (None on others), and what the engine answers to each prompt."""
    path, prompts = _path(run.checkpoint), _prompts(run.checkpoint)
    spec = read_spec(path)
    backbone = Backbone(spec, groups, ModelConfig(path=str(path), dtype=run.dtype), ATTENTION)
    load_backbone_weights(backbone, path)
    lanes = [LeafGroup(prompt, [Leaf(None, tokens) for tokens in COMPLETIONS]) for prompt in prompts]
    pack = build_pack(lanes, backbone.rules, CPU, share=backbone.share)
    looks = stage_needs_features(spec, backbone.layer_range)
    features = VisionTower(path, backbone.dtype, CPU).features if looks else _no_features
    engine = MegatronEngine(backbone, groups, RolloutConfig(), seed=0)
    answers = engine.generate([Request(prompt, None, 1, GREEDY, (1,)) for prompt in prompts], features)
    return _evaluate(groups, backbone, pack, features), [group[0].segments[0] for group in answers]


def _no_features(prompts: Sequence[Prompt]) -> None:
    """Of stages that do not look."""


def _evaluate(groups: Groups, backbone: Backbone, pack: Pack, features: VisualSource) -> torch.Tensor | None:
    spec = backbone.spec
    if not groups.is_first_stage:
        received = torch.empty(len(pack.upper.layout.mine()), 1, spec.hidden_size, dtype=backbone.dtype)
        dist.recv(received, group=groups.pp, group_src=dist.get_rank(groups.pp) - 1)
        backbone.set_input_tensor(received)
    hidden = backbone(pack, features(pack.prompts))
    if not groups.is_last_stage:
        dist.send(hidden.contiguous(), group=groups.pp, group_dst=dist.get_rank(groups.pp) + 1)
        return None
    logits = hidden @ backbone.head.weight.T
    shards = [torch.empty_like(logits) for _ in range(groups.layout.tp)]
    dist.all_gather(shards, logits, group=groups.tp)
    return torch.cat(shards, dim=-1)[:, : spec.vocab_size]


def _walk(runs: list[Run]) -> list[tuple[torch.Tensor | None, list[Segment]]]:
    results, groups = [], None
    for run in runs:
        if groups is None or groups.layout != run.layout:
            if groups is not None:
                groups.destroy()
            groups = Groups.create(run.layout, Placement.build(("only",), 1))
        results.append(_ours(groups, run))
    return results


@cache
def _outcomes(world: int) -> list[list[tuple[torch.Tensor | None, list[Segment]]]]:
    """Run -> what each rank found."""
    for run in RUNS[world]:
        _prompts(run.checkpoint)  # once, before the ranks are forked
    return list(zip(*run_ranks(world, _walk, RUNS[world], timeout_s=240)))


CASES = [(world, number) for world, runs in RUNS.items() for number in range(len(runs))]


@pytest.mark.parametrize("world,number", CASES, ids=lambda value: str(value))
def test_logits_equal_transformers(world, number):
    run, want = RUNS[world][number], _reference(RUNS[world][number].checkpoint, RUNS[world][number].dtype)
    got = [logits for logits, _ in _outcomes(world)[number] if logits is not None]
    assert len(got) == run.layout.tp * run.layout.cp, run
    for logits in got:
        torch.testing.assert_close(logits, want, rtol=0, atol=TOLERANCE[run.dtype], msg=lambda text: f"{run}: {text}")
        assert torch.equal(logits.argmax(-1), want.argmax(-1))
    assert want.std() > 0.3, "the model says the same whatever it sees"


@pytest.mark.parametrize("world,number", CASES, ids=lambda value: str(value))
def test_decoded_logprobs_equal_transformers(world, number):
    """Decoding step by step gives the log-probs of one whole forward over prompt and answer."""
    run = RUNS[world][number]
    (_, answers), *others = _outcomes(world)[number]
    assert all(segments == answers for _, segments in others), "ranks of a replica know the same answers"
    want = _logprobs(run.checkpoint, run.dtype, tuple(tuple(answer.token_ids) for answer in answers))
    got = torch.tensor([logprob for answer in answers for logprob in answer.logprobs], dtype=want.dtype)
    torch.testing.assert_close(got, want, rtol=0, atol=TOLERANCE[run.dtype], msg=lambda text: f"{run}: {text}")
    assert len(got) == GREEDY.max_tokens * len(answers)


@pytest.mark.parametrize("family", VISUAL_FAMILIES)
def test_media_change_the_answer(family):
    """The equality would mean little if neither side looked: swapping two images changes the logits."""
    model, shown = _model(family, "float32"), next(p for p in _prompts(family) if p.key == "images")
    swapped = PromptEncoder(tiny_model(family)).encode(question("swapped", *shown.item.media[::-1]), "image")
    one, other = (_logits(model, prompt, COMPLETIONS[0]) for prompt in (shown, swapped))
    assert (one - other).abs().max() > 0.05
