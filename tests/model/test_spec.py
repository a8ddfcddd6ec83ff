"""Backbone specs: what a config.json becomes, and what is refused by name."""
from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from support.tiny_models import FAMILIES, VOCABULARY, tiny_model

from copd_megatron.model.hf_config import read_spec
from copd_megatron.model.spec import RopeSpec
from copd_megatron.types import UserError


def _changed(tmp_path: Path, family: str, **changes: object) -> Path:
    """A directory with the config of a tiny checkpoint; "text_config.x" changes the nested one, None removes."""
    config = json.loads((tiny_model(family) / "config.json").read_text())
    for key, value in changes.items():
        *parents, leaf = key.split("__")
        node = config
        for parent in parents:
            node = node[parent]
        if value is None:
            del node[leaf]
        else:
            node[leaf] = value
    (tmp_path / "config.json").write_text(json.dumps(config))
    return tmp_path


def test_qwen3_vl():
    spec = read_spec(tiny_model("qwen3_vl"))
    assert (spec.family, spec.num_layers, spec.hidden_size, spec.ffn_hidden_size) == ("qwen3_vl", 4, 32, 48)
    assert (spec.num_heads, spec.num_kv_heads, spec.head_dim, spec.vocab_size) == (4, 2, 12, VOCABULARY)
    assert spec.rope == RopeSpec(1000.0, None, (2, 2, 2))
    assert spec.qk_norm and spec.tied_head and spec.is_visual and not spec.qkv_bias
    assert spec.deepstack_layers == 3 and spec.image_token_id != spec.video_token_id
    assert spec.norm_eps == 1e-5


def test_text_families():
    qwen, llama = read_spec(tiny_model("qwen3")), read_spec(tiny_model("llama"))
    assert qwen.qk_norm and not llama.qk_norm
    assert not qwen.is_visual and qwen.deepstack_layers == 0 and qwen.rope.mrope_section is None
    assert llama.rope.scaling == {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0,
                                  "high_freq_factor": 4.0, "original_max_position_embeddings": 32}
    assert hash(llama) != hash(qwen)


def test_older_spelling_of_rope_means_the_same(tmp_path):
    """Checkpoints from before transformers 5 keep rope_theta and rope_scaling apart."""
    old = _changed(tmp_path, "llama", rope_parameters=None, rope_theta=1000.0, rope_scaling={
        "type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32})
    assert read_spec(old) == read_spec(tiny_model("llama"))


@pytest.mark.parametrize("family,changes,named", [
    ("qwen3", {"model_type": "gpt_oss"}, "'gpt_oss'"),
    ("qwen3", {"model_type": None}, "family"),
    ("qwen3", {"architectures": ["Qwen3ForSequenceClassification"]}, "Qwen3ForSequenceClassification"),
    ("qwen3", {"quantization_config": {"quant_method": "fp8"}}, "quantization_config"),
    ("qwen3", {"attention_sinks": True}, "attention_sinks"),
    ("qwen3", {"hidden_act": "gelu"}, "'gelu'"),
    ("qwen3", {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 0, "layer_types": None},
     "sliding_attention"),
    ("qwen3", {"num_attention_heads": 5}, "num_key_value_heads"),
    ("llama", {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}}, "'yarn'"),
    ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4}}, "factor"),
    ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "betas": 1}}, "'betas'"),
    ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
     "partial_rotary_factor"),
    ("qwen3_vl", {"text_config__num_experts": 8}, "text_config.num_experts"),
    ("qwen3_vl", {"text_config__rope_parameters__mrope_interleaved": False}, "mrope_interleaved"),
    ("qwen3_vl", {"vision_config__out_hidden_size": 64}, "out_hidden_size"),
    ("qwen3_vl", {"vision_config__deepstack_visual_indexes": [0, 1, 2, 3, 3]}, "deepstack"),
    ("qwen3", {"hidden_size": "wide"}, "config.json"),
], ids=lambda value: "-".join(value) if isinstance(value, dict) else None)
def test_unsupported_is_refused_by_name(tmp_path, family, changes, named):
    with pytest.raises(UserError, match=r"^model\.path: ") as caught:
        read_spec(_changed(tmp_path, family, **changes))
    assert named in str(caught.value) and str(caught.value).count("; ") >= 2


@pytest.mark.parametrize("content", [None, "{", "[]"])
def test_missing_or_broken_config(tmp_path, content):
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(UserError, match=r"^model\.path: .*config\.json"):
        read_spec(tmp_path)


def test_unset_and_harmless_options_pass(tmp_path):
    path = _changed(tmp_path, "qwen3", _name_or_path="x", torch_dtype="bfloat16", id2label={"0": "a"})
    config = json.loads((path / "config.json").read_text()) | {"quantization_config": None}
    (path / "config.json").write_text(json.dumps(config))
    assert read_spec(path) == read_spec(tiny_model("qwen3"))


@pytest.mark.parametrize("tp,pp,named", [(3, 1, "3 does not divide"), (4, 1, "key/value heads"), (1, 5, "5 stages")])
def test_layouts_that_do_not_fit(tp, pp, named):
    spec = read_spec(tiny_model("qwen3"))
    with pytest.raises(UserError, match=r"^parallel\.(tensor|pipeline): ") as caught:
        spec.check_parallel(tp, pp)
    assert named in str(caught.value)
    spec.check_parallel(2, 4)


def test_padded_vocabulary():
    spec = read_spec(tiny_model("qwen3"))
    assert [spec.padded_vocab_size(tp) for tp in (1, 2, 4)] == [267, 268, 268]


def test_a_directory_needs_no_weights(tmp_path):
    for family in FAMILIES:
        shutil.copy(tiny_model(family) / "config.json", tmp_path)
        assert read_spec(tmp_path) == read_spec(tiny_model(family))
