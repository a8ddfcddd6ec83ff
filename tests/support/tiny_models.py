"""Random tiny Hugging Face checkpoints of every supported family, made once per test session.

Weights are drawn from a fixed seed and the norms are away from one, so that a swapped, missing or mis-sliced
tensor changes the logits. The vocabulary is odd on purpose: tensor parallelism must pad it.
"""
from __future__ import annotations

import atexit
import functools
import json
import os
import shutil
import tempfile
from pathlib import Path

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    ProcessorMixin,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLMoeConfig,
    Qwen3VLMoeForConditionalGeneration,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
)

FAMILIES = ("qwen3_vl", "qwen2_5_vl", "qwen3", "qwen2", "llama")
VISUAL_FAMILIES = ("qwen3_vl", "qwen3_vl_moe", "qwen2_5_vl")
MOE_FAMILIES = ("qwen3_moe", "qwen3_vl_moe")

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>",
                  "<|image_pad|>", "<|video_pad|>")
ROLE_TOKENS = ("system", "user", "assistant")

CHAT_TEMPLATE = (
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + message.role + '\n' }}"
    "{%- if message.content is string %}{{- message.content }}"
    "{%- else %}{%- for part in message.content %}"
    "{%- if part.type == 'image' %}{{- '<|vision_start|><|image_pad|><|vision_end|>' }}"
    "{%- elif part.type == 'video' %}{{- '<|vision_start|><|video_pad|><|vision_end|>' }}"
    "{%- else %}{{- part.text }}{%- endif %}{%- endfor %}{%- endif %}"
    "{{- '<|im_end|>\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"
)

VOCABULARY = 267
"""One more than the tokenizer has: real vocabularies are larger than their tokenizers, and this one is
odd."""

PATCH, MERGE = 8, 2
"""Side of a vision patch in pixels, and patches per side that merge into one token."""

_TEXT = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4,
             num_key_value_heads=2, head_dim=12, max_position_embeddings=512, rms_norm_eps=1e-5)

_MOE = dict(num_experts=6, num_experts_per_tok=2, moe_intermediate_size=20, mlp_only_layers=[2])


def tiny_model(family: str, **overrides: object) -> Path:
    """Directory of a tiny checkpoint of ``family`` (one of FAMILIES or MOE_FAMILIES).

    ``overrides`` change the (text) configuration, e.g. ``tie_word_embeddings=True`` or
    ``attention_bias=True``; ``seed`` changes the weights and ``shard_bytes`` splits them into files of at
    most that size. Same arguments, same directory: treat it as read-only and copy it to break it.
    """
    return _make(family, json.dumps(overrides, sort_keys=True))


@functools.cache
def _make(family: str, overrides: str) -> Path:
    options = json.loads(overrides)
    seed, shard_bytes = options.pop("seed", 0), options.pop("shard_bytes", None)
    path = Path(tempfile.mkdtemp(prefix=f"tiny_{family}_"))
    atexit.register(_remove, path, os.getpid())
    tokenizer = tiny_tokenizer()
    model = _randomise(_BUILDERS[family](tokenizer, options), seed)
    model.generation_config = GenerationConfig(eos_token_id=[tokenizer.convert_tokens_to_ids("<|im_end|>"),
                                                             tokenizer.convert_tokens_to_ids("<|endoftext|>")])
    model.save_pretrained(path, **({"max_shard_size": shard_bytes} if shard_bytes else {}))
    (_processor(family, tokenizer) if family in VISUAL_FAMILIES else tokenizer).save_pretrained(path)
    return path


def _remove(path: Path, owner: int) -> None:
    """Forked ranks inherit exit handlers; only the process that made the directory removes it."""
    if os.getpid() == owner:
        shutil.rmtree(path, ignore_errors=True)


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level tokenizer: 256 bytes, the role names, and Qwen's special tokens (266 in all)."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([*alphabet, *ROLE_TOKENS])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], fuse_unk=False))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(r"\s+|\S+"), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in ROLE_TOKENS])
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL_TOKENS])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>",
                                   pad_token="<|endoftext|>", clean_up_tokenization_spaces=False)
    fast.chat_template = CHAT_TEMPLATE
    return fast


def _processor(family: str, tokenizer: PreTrainedTokenizerFast) -> ProcessorMixin:
    sizes = dict(patch_size=PATCH, merge_size=MERGE, temporal_patch_size=2,
                 size={"shortest_edge": (PATCH * MERGE) ** 2, "longest_edge": 64 * (PATCH * MERGE) ** 2})
    whole, video = {"qwen2_5_vl": (Qwen2_5_VLProcessor, Qwen2VLVideoProcessor)}.get(
        family, (Qwen3VLProcessor, Qwen3VLVideoProcessor))
    return whole(image_processor=Qwen2VLImageProcessor(**sizes), tokenizer=tokenizer,
                 video_processor=video(**sizes, cap_pixels_per_frame=False), chat_template=CHAT_TEMPLATE)


def _token_ids(tokenizer: PreTrainedTokenizerFast) -> dict[str, int]:
    return {f"{name}_token_id": tokenizer.convert_tokens_to_ids(f"<|{token}|>") for name, token in (
        ("image", "image_pad"), ("video", "video_pad"),
        ("vision_start", "vision_start"), ("vision_end", "vision_end"))}


def _qwen3_vl(tokenizer: PreTrainedTokenizerFast, options: dict, config: type = Qwen3VLConfig,
              model: type = Qwen3VLForConditionalGeneration) -> PreTrainedModel:
    tied = options.pop("tie_word_embeddings", True)
    rope = {"rope_type": "default", "rope_theta": 1000.0, "mrope_section": [2, 2, 2],
            "mrope_interleaved": True}
    text = _TEXT | {"vocab_size": VOCABULARY, "rope_parameters": rope} | options
    vision = dict(depth=4, hidden_size=16, num_heads=2, intermediate_size=24, patch_size=PATCH,
                  spatial_merge_size=MERGE, temporal_patch_size=2, out_hidden_size=text["hidden_size"],
                  num_position_embeddings=36, deepstack_visual_indexes=[0, 1, 2])
    return model(config(text_config=text, vision_config=vision, tie_word_embeddings=tied, **_token_ids(tokenizer)))


def _qwen3_vl_moe(tokenizer: PreTrainedTokenizerFast, options: dict) -> PreTrainedModel:
    return _qwen3_vl(tokenizer, _MOE | options, Qwen3VLMoeConfig, Qwen3VLMoeForConditionalGeneration)


def _qwen3_moe(tokenizer: PreTrainedTokenizerFast, options: dict) -> PreTrainedModel:
    defaults = _TEXT | _MOE | {"vocab_size": VOCABULARY, "tie_word_embeddings": False, "norm_topk_prob": True}
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**defaults | options))


def _qwen2_5_vl(tokenizer: PreTrainedTokenizerFast, options: dict) -> PreTrainedModel:
    """Windows of 2 x 2 merged tokens in every second vision layer; 3 temporal positions per second of video."""
    tied = options.pop("tie_word_embeddings", False)
    rope = {"rope_type": "default", "rope_theta": 1000.0, "mrope_section": [1, 2, 1]}
    text = _TEXT | {"vocab_size": VOCABULARY, "rope_parameters": rope, "bos_token_id": None,
                    "eos_token_id": None} | options
    del text["head_dim"]
    vision = dict(depth=4, hidden_size=16, num_heads=2, intermediate_size=24, patch_size=PATCH,
                  spatial_merge_size=MERGE, temporal_patch_size=2, out_hidden_size=text["hidden_size"],
                  window_size=2 * PATCH * MERGE, fullatt_block_indexes=[1, 3], tokens_per_second=3)
    return Qwen2_5_VLForConditionalGeneration(
        Qwen2_5_VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=tied, **_token_ids(tokenizer)))


def _qwen2(tokenizer: PreTrainedTokenizerFast, options: dict) -> PreTrainedModel:
    return Qwen2ForCausalLM(Qwen2Config(**_TEXT | {"vocab_size": VOCABULARY, "tie_word_embeddings": True} | options))


def _qwen3(tokenizer: PreTrainedTokenizerFast, options: dict) -> PreTrainedModel:
    return Qwen3ForCausalLM(Qwen3Config(**_TEXT | {"vocab_size": VOCABULARY, "tie_word_embeddings": False}
                                        | options))


def _llama(tokenizer: PreTrainedTokenizerFast, options: dict) -> PreTrainedModel:
    rope = {"rope_type": "llama3", "rope_theta": 1000.0, "factor": 4.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 32}
    defaults = _TEXT | {"vocab_size": VOCABULARY, "head_dim": 8, "rope_parameters": rope,
                        "bos_token_id": None, "eos_token_id": None}
    return LlamaForCausalLM(LlamaConfig(**defaults | options))


_BUILDERS = {"qwen3_vl": _qwen3_vl, "qwen2_5_vl": _qwen2_5_vl, "qwen3": _qwen3, "qwen2": _qwen2, "llama": _llama,
             "qwen3_moe": _qwen3_moe, "qwen3_vl_moe": _qwen3_vl_moe}


@torch.no_grad()
def _randomise(model: PreTrainedModel, seed: int) -> PreTrainedModel:
    """Fill every parameter in name order: norms around 1, matrices with gain about 1, biases around 0."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in sorted(model.named_parameters()):
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.dim() > 1:
            parameter.copy_(noise * parameter[0].numel() ** -0.5)
        else:
            parameter.copy_(0.2 * noise + ("norm" in name and name.endswith("weight")))
    return model.eval()
