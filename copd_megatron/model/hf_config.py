"""From a Hugging Face ``config.json`` to a BackboneSpec; what is not understood is refused by name.

An option that this module does not know could change the forward, so it is an error rather than a guess.
Values and defaults are read through transformers' own configuration classes, so that old and new spellings of
the rotary options mean here what they mean there.
"""
from __future__ import annotations

import json
import math
from dataclasses import fields
from pathlib import Path
from typing import Any

from transformers import (
    LlamaConfig,
    PreTrainedConfig,
    Qwen2_5_VLConfig,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
    Qwen3VLConfig,
    Qwen3VLMoeConfig,
)
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from copd_megatron.model.spec import BackboneSpec, Family, MoeSpec, RopeSpec
from copd_megatron.types import UserError

CONFIG_CLASSES: dict[Family, type[PreTrainedConfig]] = {
    "qwen3_vl": Qwen3VLConfig,
    "qwen2_5_vl": Qwen2_5_VLConfig,
    "qwen3": Qwen3Config,
    "qwen2": Qwen2Config,
    "llama": LlamaConfig,
    "qwen3_moe": Qwen3MoeConfig,
    "qwen3_vl_moe": Qwen3VLMoeConfig,
}
"""The supported families by ``model_type``."""

ARCHITECTURES: dict[Family, str] = {
    "qwen3_vl": "Qwen3VLForConditionalGeneration",
    "qwen2_5_vl": "Qwen2_5_VLForConditionalGeneration",
    "qwen3": "Qwen3ForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "llama": "LlamaForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
    "qwen3_vl_moe": "Qwen3VLMoeForConditionalGeneration",
}

_QK_NORM = ("qwen3_vl", "qwen3", "qwen3_moe", "qwen3_vl_moe")
_QKV_BIAS = ("qwen2_5_vl", "qwen2")
"""Families whose q, k and v always have biases; the others follow ``attention_bias``."""
_MLP_BIAS = ("llama",)
"""Families whose MLP follows ``mlp_bias``; the others have none."""
_MOE = ("qwen3_moe", "qwen3_vl_moe")

_MROPE: dict[Family, tuple[tuple[int, int, int], bool]] = {
    "qwen3_vl": ((24, 20, 20), True),
    "qwen2_5_vl": ((16, 24, 24), False),
    "qwen3_vl_moe": ((24, 20, 20), True),
}
"""Rotary sections when config.json names none, and whether they are interleaved."""

_READ = frozenset({
    "model_type", "architectures", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
    "num_attention_heads", "num_key_value_heads", "head_dim", "hidden_act", "rms_norm_eps",
    "tie_word_embeddings", "attention_bias", "mlp_bias", "rope_parameters", "rope_scaling", "rope_theta",
    "partial_rotary_factor", "use_sliding_window", "sliding_window", "max_window_layers", "layer_types",
    "text_config", "vision_config", "image_token_id", "video_token_id", "max_position_embeddings",
})
"""Options that the spec (or its checks) takes into account."""

_READ_OF_MOE = frozenset({
    "num_experts", "num_local_experts", "num_experts_per_tok", "moe_intermediate_size", "norm_topk_prob",
    "decoder_sparse_step", "mlp_only_layers", "output_router_logits", "router_aux_loss_coef",
})
"""Those of families with MoE layers; the last two are of a loss that a frozen router has no use for."""

_NO_EFFECT = frozenset({
    "transformers_version", "dtype", "torch_dtype", "initializer_range", "use_cache", "attention_dropout",
    "bos_token_id", "eos_token_id", "pad_token_id", "pretraining_tp", "output_hidden_states",
    "output_attentions", "return_dict", "id2label", "label2id", "num_labels", "problem_type",
    "vision_start_token_id", "vision_end_token_id", "vision_token_id", "name_or_path", "chunk_size_feed_forward",
    "is_encoder_decoder", "is_llama_config", "transformers.js_config", "unsloth_fixed", "unsloth_version",
})
"""Options that never change the logits of a frozen backbone in evaluation mode."""

_OFF = frozenset({"use_mrope", "rope_interleaved"})
"""Options that transformers does not read and other software means something by, unless they are false."""

_VISION_SYNONYMS = {"in_chans": "in_channels", "spatial_patch_size": "patch_size"}
"""Options of older vision towers that transformers does not read, and those that it reads instead."""

_ROPE_OPTIONS: dict[str, tuple[frozenset[str], frozenset[str]]] = {
    "default": (frozenset(), frozenset()),
    "linear": (frozenset({"factor"}), frozenset()),
    "dynamic": (frozenset({"factor"}), frozenset()),
    "yarn": (frozenset({"factor", "original_max_position_embeddings"}),
             frozenset({"attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"})),
    "longrope": (frozenset({"short_factor", "long_factor", "original_max_position_embeddings"}),
                 frozenset({"factor", "attention_factor"})),
    "llama3": (frozenset({"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"}),
               frozenset()),
}
"""Supported rotary scalings and the options each needs, and may have, besides theta."""


def read_spec(path: str | Path) -> BackboneSpec:
    """The spec of the backbone in directory ``path``; reads ``config.json`` only.

    Raises UserError (``model.path: ...``) when the file is missing or broken, or names a family, rotary
    scaling or option that is not supported.
    """
    raw = read_json(Path(path) / "config.json")
    family = raw.get("model_type")
    if family not in CONFIG_CLASSES:
        raise _refusal(path, f"family (model_type) {family!r}", f"supported are {', '.join(CONFIG_CLASSES)}")
    _check_architecture(path, raw, family)
    _check_options(path, raw, "", family)
    config = load_hf_config(path)
    text, visual = config.get_text_config(), family in _MROPE
    if visual:
        _check_options(path, raw.get("text_config") or {}, "text_config.", family)
        _check_vision(path, config, raw.get("vision_config") or {})
    head_dim = _head_dim(path, text, family)
    _check_values(path, text)
    attention_bias = bool(getattr(text, "attention_bias", False)) and family not in _QKV_BIAS
    return BackboneSpec(
        family=family,
        num_layers=text.num_hidden_layers,
        hidden_size=text.hidden_size,
        ffn_hidden_size=text.intermediate_size,
        num_heads=text.num_attention_heads,
        num_kv_heads=text.num_key_value_heads,
        head_dim=head_dim,
        vocab_size=text.vocab_size,
        norm_eps=text.rms_norm_eps,
        rope=_rope_spec(path, text, family, head_dim),
        qk_norm=family in _QK_NORM,
        qkv_bias=attention_bias or family in _QKV_BIAS,
        o_bias=attention_bias,
        mlp_bias=bool(getattr(text, "mlp_bias", False)) and family in _MLP_BIAS,
        tied_head=bool(config.tie_word_embeddings),
        deepstack_layers=len(getattr(config.vision_config, "deepstack_visual_indexes", ())) if visual else 0,
        image_token_id=config.image_token_id if visual else None,
        video_token_id=config.video_token_id if visual else None,
        moe=_moe_spec(path, text, family),
    )


def load_hf_config(path: str | Path) -> PreTrainedConfig:
    """The transformers configuration object of a supported backbone directory."""
    raw = read_json(Path(path) / "config.json")
    try:
        return CONFIG_CLASSES[raw["model_type"]].from_dict(raw)
    except Exception as error:  # transformers raises many kinds for values of a wrong type
        reason = str(error).strip().splitlines()[-1]
        raise UserError(f"model.path: {path}/config.json: transformers cannot read it ({reason}); a valid "
                        "configuration is needed; copy it anew from the model's source") from error


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object read from ``file``; UserError when it is missing or not a JSON object."""
    if not file.is_file():
        raise UserError(f"model.path: {file} does not exist; a backbone is a local Hugging Face directory "
                        "with config.json, safetensors and a tokenizer; give the path of one")
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(f"model.path: {file} is not JSON ({error}); a complete file is needed; copy it anew "
                        "from the model's source") from error
    if not isinstance(content, dict):
        raise UserError(f"model.path: {file} holds {type(content).__name__}, not a JSON object; copy it anew")
    return content


def _refusal(path: str | Path, what: str, allowed: str) -> UserError:
    return UserError(f"model.path: {path}/config.json: {what} is not supported; {allowed}; "
                     "use a backbone that fits, nothing is approximated")


def _check_architecture(path: str | Path, raw: dict[str, Any], family: Family) -> None:
    """A classifier or reward model has the family's ``model_type`` but another head."""
    for name in raw.get("architectures") or ():
        if name != ARCHITECTURES[family]:
            raise _refusal(path, f"architecture {name!r}", f"{family} must be {ARCHITECTURES[family]}")


def _check_options(path: str | Path, raw: dict[str, Any], prefix: str, family: Family) -> None:
    """Refuse options outside the family's lists; an unset (null) one has no effect."""
    read = _READ | _READ_OF_MOE if family in _MOE else _READ
    for key, value in raw.items():
        if key in read or key in _NO_EFFECT or key.startswith("_") or value is None:
            continue
        if key in _OFF and value is False:
            continue
        raise _refusal(path, f"option {prefix}{key} = {value!r:.60}",
                       "it is unknown and may change the model")


def _check_values(path: str | Path, text: PreTrainedConfig) -> None:
    """Refuse known options with values that the backbone does not implement."""
    if text.hidden_act != "silu":
        raise _refusal(path, f"hidden_act {text.hidden_act!r}", "supported is 'silu'")
    if text.num_attention_heads % text.num_key_value_heads:
        raise _refusal(path, f"num_key_value_heads {text.num_key_value_heads}",
                       f"it must divide num_attention_heads {text.num_attention_heads}")
    for kind in getattr(text, "layer_types", None) or ():
        if kind != "full_attention":
            raise _refusal(path, f"layer type {kind!r} (layer_types, use_sliding_window)",
                           "supported is 'full_attention' in every layer")


def _head_dim(path: str | Path, text: PreTrainedConfig, family: Family) -> int:
    """Width of a head; most families may choose it, Qwen2.5-VL's is hidden_size / num_attention_heads."""
    even = text.hidden_size // text.num_attention_heads
    head_dim = getattr(text, "head_dim", None) or even
    if family == "qwen2_5_vl" and (head_dim != even or text.hidden_size % text.num_attention_heads):
        raise _refusal(path, f"head_dim {head_dim} with hidden_size {text.hidden_size}",
                       f"in {family} it is hidden_size / num_attention_heads, a whole number")
    if head_dim % 2:
        raise _refusal(path, f"head_dim {head_dim}", "rotary positions turn pairs, so it must be even")
    return head_dim


def _check_vision(path: str | Path, config: PreTrainedConfig, raw: dict[str, Any]) -> None:
    """The tower is transformers' own: it has the options that its configuration class knows, no others."""
    vision, text = config.vision_config, config.get_text_config()
    known = {field.name for field in fields(vision)} | _NO_EFFECT | {"model_type"}
    for key, value in raw.items():
        same = getattr(vision, _VISION_SYNONYMS.get(key, ""), None)
        if key not in known and value is not None and value != same and not key.startswith("_"):
            raise _refusal(path, f"option vision_config.{key} = {value!r:.60}",
                           "it is unknown and may change the model")
    if vision.out_hidden_size != text.hidden_size:
        raise _refusal(path, f"vision_config.out_hidden_size {vision.out_hidden_size}",
                       f"it must equal text_config.hidden_size {text.hidden_size}")
    levels = len(getattr(vision, "deepstack_visual_indexes", ()))
    if levels > text.num_hidden_layers:
        raise _refusal(path, f"{levels} deepstack levels",
                       f"at most one for each of the {text.num_hidden_layers} layers")


def _moe_spec(path: str | Path, text: PreTrainedConfig, family: Family) -> MoeSpec | None:
    """Which layers are MoE, and how their routers choose; None if all are dense."""
    if family not in _MOE:
        return None
    if getattr(text, "sliding_window", None) is not None:
        raise _refusal(path, "use_sliding_window = true", "supported is full attention in every layer")
    if text.decoder_sparse_step < 1 or not 1 <= text.num_experts_per_tok <= max(1, text.num_experts):
        raise _refusal(path, f"decoder_sparse_step {text.decoder_sparse_step} with num_experts_per_tok "
                       f"{text.num_experts_per_tok} of num_experts {text.num_experts}",
                       "a step is 1 or more, and a token passes 1 to all MoE experts")
    norm = getattr(text, "norm_topk_prob", True)
    if family == "qwen3_vl_moe" and not norm:
        raise _refusal(path, "text_config.norm_topk_prob = false", f"{family} always normalises")
    layers = tuple(i for i in range(text.num_hidden_layers) if i not in text.mlp_only_layers
                   and text.num_experts > 0 and (i + 1) % text.decoder_sparse_step == 0)
    if not layers:
        return None
    return MoeSpec(text.num_experts, text.num_experts_per_tok, text.moe_intermediate_size, bool(norm), layers)


def _rope_spec(path: str | Path, text: PreTrainedConfig, family: Family, head_dim: int) -> RopeSpec:
    rope = {key: value for key, value in (text.rope_parameters or {}).items() if value is not None}
    kind = rope.pop("rope_type", rope.pop("type", "default"))
    rope.pop("type", None)
    if kind not in _ROPE_OPTIONS:
        raise _refusal(path, f"rope scaling (rope_type) {kind!r}",
                       f"supported are {', '.join(_ROPE_OPTIONS)}")
    if rope.pop("partial_rotary_factor", 1.0) != 1.0:
        raise _refusal(path, "partial_rotary_factor other than 1", "the whole head must be rotated")
    theta = float(rope.pop("rope_theta"))
    section, interleaved = _mrope(path, rope, family, head_dim)
    needed, optional = _ROPE_OPTIONS[kind]
    unknown = sorted(set(rope) - needed - optional)
    if unknown:
        raise _refusal(path, f"rotary option {unknown[0]!r} with rope_type {kind!r}", "it is unknown")
    missing = sorted(needed - set(rope))
    if missing:
        raise _refusal(path, f"rope_type {kind!r} without {missing[0]!r}", "it is needed")
    frequencies, attention_factor, limit = None, 1.0, None
    if kind == "dynamic":
        limit = text.max_position_embeddings  # up to here it is plain rotary
    elif kind != "default":
        frequencies, attention_factor = _scaled(path, text, kind, head_dim)
        limit = rope["original_max_position_embeddings"] if kind == "longrope" else None
    return RopeSpec(theta, frequencies, section, interleaved, attention_factor, limit)


def _mrope(path: str | Path, rope: dict[str, Any], family: Family,
           head_dim: int) -> tuple[tuple[int, int, int] | None, bool]:
    """Sections of a visual family, and whether they are interleaved; their options leave ``rope``."""
    if family not in _MROPE:
        return None, True
    default, interleaved = _MROPE[family]
    if rope.pop("mrope_interleaved", interleaved) != interleaved:
        raise _refusal(path, f"mrope_interleaved = {json.dumps(not interleaved)}",
                       f"{family} {'interleaves' if interleaved else 'does not interleave'} its rotary sections")
    section = tuple(rope.pop("mrope_section", default))
    if len(section) != 3:
        raise _refusal(path, f"mrope_section {list(section)}", "it has three numbers")
    if not interleaved and sum(section) != head_dim // 2:
        raise _refusal(path, f"mrope_section {list(section)} with heads of {head_dim}",
                       f"its numbers add up to {head_dim // 2}")
    return section, interleaved


def _scaled(path: str | Path, text: PreTrainedConfig, kind: str, head_dim: int) -> tuple[tuple[float, ...], float]:
    """Frequencies and attention factor as transformers computes them from the very configuration."""
    try:
        tensor, factor = ROPE_INIT_FUNCTIONS[kind](text)
        frequencies, factor = tuple(tensor.tolist()), float(factor)
    except (ArithmeticError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise _refusal(path, f"rope scaling {kind!r} with {text.rope_parameters}",
                       f"transformers cannot compute it ({error})") from error
    usable = len(frequencies) == head_dim // 2 and all(math.isfinite(f) and f > 0 for f in (*frequencies, factor))
    if not usable:
        raise _refusal(path, f"rope scaling {kind!r} with {text.rope_parameters}",
                       f"it must give {head_dim // 2} positive frequencies and a positive attention factor")
    return frequencies, factor
