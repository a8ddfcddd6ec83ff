"""From a Hugging Face ``config.json`` to a BackboneSpec; what is not understood is refused by name.

An option that this module does not know could change the forward, so it is an error rather than a guess.
Values and defaults are read through transformers' own configuration classes, so that old and new spellings of
the rotary options mean here what they mean there.
"""
from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers import LlamaConfig, PreTrainedConfig, Qwen3Config, Qwen3VLConfig

from copd_megatron.model.spec import BackboneSpec, Family, RopeSpec
from copd_megatron.types import UserError

CONFIG_CLASSES: dict[Family, type[PreTrainedConfig]] = {
    "qwen3_vl": Qwen3VLConfig,
    "qwen3": Qwen3Config,
    "llama": LlamaConfig,
}
"""The supported families by ``model_type``."""

ARCHITECTURES: dict[Family, str] = {
    "qwen3_vl": "Qwen3VLForConditionalGeneration",
    "qwen3": "Qwen3ForCausalLM",
    "llama": "LlamaForCausalLM",
}

_READ = frozenset({
    "model_type", "architectures", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
    "num_attention_heads", "num_key_value_heads", "head_dim", "hidden_act", "rms_norm_eps",
    "tie_word_embeddings", "attention_bias", "mlp_bias", "rope_parameters", "rope_scaling", "rope_theta",
    "partial_rotary_factor", "use_sliding_window", "sliding_window", "max_window_layers", "layer_types",
    "text_config", "vision_config", "image_token_id", "video_token_id", "max_position_embeddings",
})
"""Options that the spec (or its checks) takes into account."""

_NO_EFFECT = frozenset({
    "transformers_version", "dtype", "torch_dtype", "initializer_range", "use_cache", "attention_dropout",
    "bos_token_id", "eos_token_id", "pad_token_id", "pretraining_tp", "output_hidden_states",
    "output_attentions", "return_dict", "id2label", "label2id", "num_labels", "problem_type",
    "vision_start_token_id", "vision_end_token_id", "name_or_path", "chunk_size_feed_forward",
    "is_encoder_decoder",
})
"""Options that never change the logits of a frozen backbone in evaluation mode."""

_ROPE_OPTIONS: dict[str, frozenset[str]] = {
    "default": frozenset(),
    "linear": frozenset({"factor"}),
    "llama3": frozenset({"factor", "low_freq_factor", "high_freq_factor",
                         "original_max_position_embeddings"}),
}
"""Supported rotary scalings and the options each has besides theta."""


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
    _check_options(path, raw, "")
    config = load_hf_config(path)
    text = config.get_text_config()
    if family == "qwen3_vl":
        _check_options(path, raw.get("text_config") or {}, "text_config.")
        _check_vision(path, config)
    _check_values(path, text)
    return BackboneSpec(
        family=family,
        num_layers=text.num_hidden_layers,
        hidden_size=text.hidden_size,
        ffn_hidden_size=text.intermediate_size,
        num_heads=text.num_attention_heads,
        num_kv_heads=text.num_key_value_heads,
        head_dim=text.head_dim,
        vocab_size=text.vocab_size,
        norm_eps=text.rms_norm_eps,
        rope=_rope_spec(path, text, family),
        qk_norm=family in ("qwen3", "qwen3_vl"),
        qkv_bias=bool(text.attention_bias),
        o_bias=bool(text.attention_bias),
        mlp_bias=bool(getattr(text, "mlp_bias", False)) and family == "llama",
        tied_head=bool(config.tie_word_embeddings),
        deepstack_layers=len(config.vision_config.deepstack_visual_indexes) if family == "qwen3_vl" else 0,
        image_token_id=config.image_token_id if family == "qwen3_vl" else None,
        video_token_id=config.video_token_id if family == "qwen3_vl" else None,
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


def _check_options(path: str | Path, raw: dict[str, Any], prefix: str) -> None:
    """Refuse options outside the two lists; an unset (null) one has no effect."""
    for key, value in raw.items():
        if key in _READ or key in _NO_EFFECT or key.startswith("_") or value is None:
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
            raise _refusal(path, f"layer type {kind!r}", "supported is 'full_attention' in every layer")


def _check_vision(path: str | Path, config: Qwen3VLConfig) -> None:
    vision, text = config.vision_config, config.text_config
    if vision.out_hidden_size != text.hidden_size:
        raise _refusal(path, f"vision_config.out_hidden_size {vision.out_hidden_size}",
                       f"it must equal text_config.hidden_size {text.hidden_size}")
    if len(vision.deepstack_visual_indexes) > text.num_hidden_layers:
        raise _refusal(path, f"{len(vision.deepstack_visual_indexes)} deepstack levels",
                       f"at most one for each of the {text.num_hidden_layers} layers")


def _rope_spec(path: str | Path, text: PreTrainedConfig, family: Family) -> RopeSpec:
    rope = {key: value for key, value in (text.rope_parameters or {}).items() if value is not None}
    kind = rope.pop("rope_type", rope.pop("type", "default"))
    rope.pop("type", None)
    if kind not in _ROPE_OPTIONS:
        raise _refusal(path, f"rope scaling (rope_type) {kind!r}",
                       f"supported are {', '.join(_ROPE_OPTIONS)}")
    if rope.pop("partial_rotary_factor", 1.0) != 1.0:
        raise _refusal(path, "partial_rotary_factor other than 1", "the whole head must be rotated")
    theta = float(rope.pop("rope_theta"))
    section = None
    if family == "qwen3_vl":
        if not rope.pop("mrope_interleaved", True):
            raise _refusal(path, "mrope_interleaved = false", "qwen3_vl interleaves its rotary sections")
        section = tuple(rope.pop("mrope_section", (24, 20, 20)))
        if len(section) != 3:
            raise _refusal(path, f"mrope_section {list(section)}", "it has three numbers")
    unknown = sorted(set(rope) - _ROPE_OPTIONS[kind])
    if unknown:
        raise _refusal(path, f"rotary option {unknown[0]!r} with rope_type {kind!r}", "it is unknown")
    missing = sorted(_ROPE_OPTIONS[kind] - set(rope))
    if missing:
        raise _refusal(path, f"rope_type {kind!r} without {missing[0]!r}", "it is needed")
    scaling = None if kind == "default" else {"rope_type": kind, **rope}
    return RopeSpec(theta=theta, scaling=scaling, mrope_section=section)
