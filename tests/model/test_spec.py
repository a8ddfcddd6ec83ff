"""Backbone specs: what a config.json becomes, and what is refused by name."""
from __future__ import annotations

import json
import shutil
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest

from copd_megatron.config.model import AdapterConfig
from copd_megatron.model.hf_config import read_spec
from copd_megatron.model.spec import MoeSpec, RopeSpec
from copd_megatron.parallel.layout import Layout
from copd_megatron.types import UserError
from support.tiny_models import FAMILIES, MOE_FAMILIES, VOCABULARY, tiny_model


def _changed(tmp_path: Path, family: str, **changes: object) -> Path:
    """A directory with the config of a tiny checkpoint, changed; ``a__b`` is b inside a, None removes."""
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
    assert spec.rope == RopeSpec(1000.0, None, (2, 2, 2), mrope_interleaved=True)
    assert spec.qk_norm and spec.tied_head and spec.is_visual and not spec.qkv_bias
    assert spec.deepstack_layers == 3 and spec.image_token_id != spec.video_token_id
    assert spec.norm_eps == 1e-5


def test_text_families():
    qwen, llama = read_spec(tiny_model("qwen3")), read_spec(tiny_model("llama"))
    assert qwen.qk_norm and not llama.qk_norm
    assert not qwen.is_visual and qwen.deepstack_layers == 0 and qwen.rope.mrope_section is None
    assert qwen.rope.frequencies is None and len(llama.rope.frequencies) == 4
    assert llama.rope.attention_factor == 1.0 and llama.rope.max_positions is None
    assert hash(llama) != hash(qwen)
    older = read_spec(tiny_model("qwen2"))
    assert older.qkv_bias and not older.o_bias and not older.qk_norm and older.head_dim == 12


def test_qwen2_5_vl():
    spec = read_spec(tiny_model("qwen2_5_vl"))
    assert spec.rope == RopeSpec(1000.0, None, (1, 2, 1), mrope_interleaved=False)
    assert spec.qkv_bias and not spec.o_bias and not spec.qk_norm and not spec.tied_head
    assert spec.is_visual and spec.deepstack_layers == 0 and spec.head_dim == 8


PUBLISHED = {
    "Qwen3-VL-4B-Instruct": {
        "architectures": ["Qwen3VLForConditionalGeneration"], "image_token_id": 151655,
        "model_type": "qwen3_vl",
        "text_config": {
            "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 151643, "dtype": "bfloat16",
            "eos_token_id": 151645, "head_dim": 128, "hidden_act": "silu", "hidden_size": 2560,
            "initializer_range": 0.02, "intermediate_size": 9728, "max_position_embeddings": 262144,
            "model_type": "qwen3_vl_text", "num_attention_heads": 32, "num_hidden_layers": 36,
            "num_key_value_heads": 8, "rms_norm_eps": 1e-6, "rope_theta": 5000000,
            "tie_word_embeddings": True,
            "rope_scaling": {"mrope_interleaved": True, "mrope_section": [24, 20, 20],
                             "rope_type": "default"},
            "use_cache": True, "vocab_size": 151936},
        "tie_word_embeddings": True, "transformers_version": "4.57.0.dev0", "video_token_id": 151656,
        "vision_config": {
            "deepstack_visual_indexes": [5, 11, 17], "depth": 24, "hidden_act": "gelu_pytorch_tanh",
            "hidden_size": 1024, "in_channels": 3, "initializer_range": 0.02, "intermediate_size": 4096,
            "model_type": "qwen3_vl", "num_heads": 16, "num_position_embeddings": 2304,
            "out_hidden_size": 2560, "patch_size": 16, "spatial_merge_size": 2, "temporal_patch_size": 2},
        "vision_end_token_id": 151653, "vision_start_token_id": 151652},
    "Qwen3-4B": {
        "architectures": ["Qwen3ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
        "bos_token_id": 151643, "eos_token_id": 151645, "head_dim": 128, "hidden_act": "silu",
        "hidden_size": 2560, "initializer_range": 0.02, "intermediate_size": 9728,
        "max_position_embeddings": 40960, "max_window_layers": 36, "model_type": "qwen3",
        "num_attention_heads": 32, "num_hidden_layers": 36, "num_key_value_heads": 8, "rms_norm_eps": 1e-6,
        "rope_scaling": None, "rope_theta": 1000000, "sliding_window": None, "tie_word_embeddings": True,
        "torch_dtype": "bfloat16", "transformers_version": "4.51.0", "use_cache": True,
        "use_sliding_window": False, "vocab_size": 151936},
    "Qwen2.5-7B-Instruct with yarn": {
        "architectures": ["Qwen2ForCausalLM"], "use_mrope": False, "attention_dropout": 0.0, "bos_token_id": 151643,
        "eos_token_id": 151645, "hidden_act": "silu", "hidden_size": 3584, "initializer_range": 0.02,
        "intermediate_size": 18944, "max_position_embeddings": 32768, "max_window_layers": 28,
        "model_type": "qwen2", "num_attention_heads": 28, "num_hidden_layers": 28, "num_key_value_heads": 4,
        "rms_norm_eps": 1e-6, "rope_theta": 1000000.0, "sliding_window": 131072, "tie_word_embeddings": False,
        "rope_scaling": {"factor": 4.0, "original_max_position_embeddings": 32768, "type": "yarn"},
        "torch_dtype": "bfloat16", "transformers_version": "4.43.1", "use_cache": True,
        "use_sliding_window": False, "vocab_size": 152064},
    "Qwen2.5-VL-7B-Instruct": {
        "architectures": ["Qwen2_5_VLForConditionalGeneration"], "attention_dropout": 0.0, "bos_token_id": 151643,
        "eos_token_id": 151645, "vision_start_token_id": 151652, "vision_end_token_id": 151653,
        "vision_token_id": 151654, "image_token_id": 151655, "video_token_id": 151656, "hidden_act": "silu",
        "hidden_size": 3584, "initializer_range": 0.02, "intermediate_size": 18944,
        "max_position_embeddings": 128000, "max_window_layers": 28, "model_type": "qwen2_5_vl",
        "num_attention_heads": 28, "num_hidden_layers": 28, "num_key_value_heads": 4, "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0, "sliding_window": 32768, "tie_word_embeddings": False,
        "torch_dtype": "bfloat16", "transformers_version": "4.41.2", "use_cache": True,
        "use_sliding_window": False, "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
        "vocab_size": 152064,
        "vision_config": {
            "depth": 32, "hidden_act": "silu", "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16,
            "in_chans": 3, "out_hidden_size": 3584, "patch_size": 14, "spatial_merge_size": 2,
            "spatial_patch_size": 14, "window_size": 112, "fullatt_block_indexes": [7, 15, 23, 31],
            "tokens_per_second": 2, "temporal_patch_size": 2}},
    "Qwen3-30B-A3B": {
        "architectures": ["Qwen3MoeForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
        "bos_token_id": 151643, "decoder_sparse_step": 1, "eos_token_id": 151645, "head_dim": 128, "hidden_act": "silu",
        "hidden_size": 2048, "initializer_range": 0.02, "intermediate_size": 6144, "max_position_embeddings": 40960,
        "max_window_layers": 48, "mlp_only_layers": [], "model_type": "qwen3_moe", "moe_intermediate_size": 768,
        "norm_topk_prob": True, "num_attention_heads": 32, "num_experts": 128, "num_experts_per_tok": 8,
        "num_hidden_layers": 48, "num_key_value_heads": 4, "output_router_logits": False, "rms_norm_eps": 1e-6,
        "rope_scaling": None, "rope_theta": 1000000.0, "router_aux_loss_coef": 0.001, "sliding_window": None,
        "tie_word_embeddings": False, "torch_dtype": "bfloat16", "transformers_version": "4.51.0", "use_cache": True,
        "use_sliding_window": False, "vocab_size": 151936},
    "Qwen3-VL-30B-A3B-Instruct": {
        "architectures": ["Qwen3VLMoeForConditionalGeneration"], "image_token_id": 151655, "model_type": "qwen3_vl_moe",
        "text_config": {
            "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 151643, "decoder_sparse_step": 1,
            "dtype": "bfloat16", "eos_token_id": 151645, "head_dim": 128, "hidden_act": "silu", "hidden_size": 2048,
            "initializer_range": 0.02, "intermediate_size": 6144, "max_position_embeddings": 262144,
            "mlp_only_layers": [], "model_type": "qwen3_vl_moe_text", "moe_intermediate_size": 768,
            "norm_topk_prob": True, "num_attention_heads": 32, "num_experts": 128, "num_experts_per_tok": 8,
            "num_hidden_layers": 48, "num_key_value_heads": 4, "rms_norm_eps": 1e-6, "rope_theta": 5000000,
            "rope_scaling": {"mrope_interleaved": True, "mrope_section": [24, 20, 20], "rope_type": "default"},
            "use_cache": True, "vocab_size": 151936},
        "tie_word_embeddings": False, "transformers_version": "4.57.0.dev0", "video_token_id": 151656,
        "vision_config": {
            "deepstack_visual_indexes": [8, 16, 24], "depth": 27, "hidden_act": "gelu_pytorch_tanh",
            "hidden_size": 1152, "in_channels": 3, "initializer_range": 0.02, "intermediate_size": 4304,
            "model_type": "qwen3_vl_moe", "num_heads": 16, "num_position_embeddings": 2304,
            "out_hidden_size": 2048, "patch_size": 16, "spatial_merge_size": 2, "temporal_patch_size": 2},
        "vision_end_token_id": 151653, "vision_start_token_id": 151652},
    "Llama-3.2-1B-Instruct": {
        "architectures": ["LlamaForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
        "bos_token_id": 128000, "eos_token_id": [128001, 128008, 128009], "head_dim": 64,
        "hidden_act": "silu",
        "hidden_size": 2048, "initializer_range": 0.02, "intermediate_size": 8192,
        "max_position_embeddings": 131072, "mlp_bias": False, "model_type": "llama",
        "num_attention_heads": 32, "num_hidden_layers": 16, "num_key_value_heads": 8, "pretraining_tp": 1,
        "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "tie_word_embeddings": True, "torch_dtype": "bfloat16",
        "rope_scaling": {"factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
                         "original_max_position_embeddings": 8192, "rope_type": "llama3"},
        "transformers_version": "4.45.0.dev0", "use_cache": True, "vocab_size": 128256},
}
"""Configurations in the form in which these models are published, older spellings included."""


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configurations(tmp_path, name):
    (tmp_path / "config.json").write_text(json.dumps(PUBLISHED[name]))
    spec = read_spec(tmp_path)
    layers, hidden, theta, section = {"Qwen3-VL-4B-Instruct": (36, 2560, 5e6, (24, 20, 20)),
                                      "Qwen3-4B": (36, 2560, 1e6, None),
                                      "Qwen2.5-7B-Instruct with yarn": (28, 3584, 1e6, None),
                                      "Qwen2.5-VL-7B-Instruct": (28, 3584, 1e6, (16, 24, 24)),
                                      "Qwen3-30B-A3B": (48, 2048, 1e6, None),
                                      "Qwen3-VL-30B-A3B-Instruct": (48, 2048, 5e6, (24, 20, 20)),
                                      "Llama-3.2-1B-Instruct": (16, 2048, 5e5, None)}[name]
    assert (spec.num_layers, spec.hidden_size, spec.rope.theta, spec.rope.mrope_section) == (
        layers, hidden, theta, section)
    older, moe = name.startswith("Qwen2.5"), "A3B" in name
    assert (spec.num_kv_heads, spec.tied_head) == ((4, False) if older or moe else (8, True))
    assert spec.qkv_bias == older and spec.head_dim == (64 if name.startswith("Llama") else 128)
    assert (spec.rope.frequencies is not None) == (name in ("Llama-3.2-1B-Instruct",
                                                         "Qwen2.5-7B-Instruct with yarn"))
    assert spec.rope.mrope_interleaved == (name != "Qwen2.5-VL-7B-Instruct")
    assert spec.moe == (MoeSpec(128, 8, 768, True, tuple(range(48))) if moe else None)
    spec.check_parallel(4, 16)


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
    ("llama", {"rope_parameters": {"rope_type": "proportional", "rope_theta": 1e4, "factor": 2.0}}, "'proportional'"),
    ("llama", {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 0.0}}, "yarn"),
    ("llama", {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0, "alpha": 3}}, "'alpha'"),
    ("llama", {"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 3,
                                   "long_factor": [1.0] * 3}}, "longrope"),
    ("qwen2", {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 2, "layer_types": None},
     "use_sliding_window"),
    ("qwen2", {"use_mrope": True}, "use_mrope"),
    ("qwen2", {"head_dim": None, "hidden_size": 28}, "head_dim 7"),
    ("qwen2_5_vl", {"text_config__head_dim": 12}, "head_dim 12"),
    ("qwen2_5_vl", {"text_config__rope_parameters__mrope_section": [1, 1, 1]}, "add up to 4"),
    ("qwen2_5_vl", {"vision_config__window_kind": "hash"}, "vision_config.window_kind"),
    ("qwen2_5_vl", {"vision_config__in_chans": 4}, "vision_config.in_chans"),
    ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4}}, "factor"),
    ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "betas": 1}}, "'betas'"),
    ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
     "partial_rotary_factor"),
    ("qwen3_vl", {"text_config__num_experts": 8}, "text_config.num_experts"),
    ("qwen3_vl", {"text_config__rope_parameters__mrope_interleaved": False}, "mrope_interleaved"),
    ("qwen3_vl", {"vision_config__out_hidden_size": 64}, "out_hidden_size"),
    ("qwen3_vl", {"vision_config__deepstack_visual_indexes": [0, 1, 2, 3, 3]}, "deepstack"),
    ("qwen3", {"hidden_size": "wide"}, "config.json"),
    ("qwen3", {"num_experts": 8}, "num_experts"),
    ("qwen3_moe", {"num_experts_per_tok": 7}, "num_experts_per_tok 7 of num_experts 6"),
    ("qwen3_moe", {"decoder_sparse_step": 0}, "decoder_sparse_step 0"),
    ("qwen3_moe", {"use_sliding_window": True, "sliding_window": 64}, "use_sliding_window"),
    ("qwen3_moe", {"shared_expert_intermediate_size": 64}, "shared_expert_intermediate_size"),
    ("qwen3_moe", {"moe_capacity_factor": 1.5}, "moe_capacity_factor"),
    ("qwen3_vl_moe", {"text_config__norm_topk_prob": False}, "text_config.norm_topk_prob"),
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


@pytest.mark.parametrize("tp,pp,vp,named", [
    (3, 1, 1, "3 does not fit the backbone's 4 query heads"), (8, 1, 1, "query heads"), (1, 5, 1, "5 stages"),
    (1, 3, 2, "2 chunks of layers on each of 3 stages for the backbone's 4 layers; allowed is 1 to 1")])
def test_layouts_that_do_not_fit(tp, pp, vp, named):
    spec = read_spec(tiny_model("qwen3"))
    with pytest.raises(UserError, match=r"^parallel\.(tensor|pipeline|virtual_pipeline): ") as caught:
        spec.check_parallel(tp, pp, vp)
    assert named in str(caught.value)
    spec.check_parallel(2, 4)
    spec.check_parallel(4, 1)


def test_key_value_heads_are_copied_where_there_are_fewer_than_ranks():
    """Ranks must hold whole heads or copies of one: 3 heads fit 1, 3 and 6 ranks, not 2 or 4."""
    spec = replace(read_spec(tiny_model("qwen3")), num_heads=12, num_kv_heads=3)
    assert [spec.kv_groups(tp) // tp for tp in (1, 3, 6)] == [3, 1, 1]
    for tp in (1, 3, 6):
        spec.check_parallel(tp, 1)
    for tp in (2, 4):
        with pytest.raises(UserError, match=f"^parallel.tensor: {tp} does not fit the backbone's 3 key/value heads"):
            spec.check_parallel(tp, 1)


@pytest.mark.parametrize(("ep", "etp"), [(2, 1), (1, 2)])
def test_a_dense_backbone_has_no_moe_experts_to_cut(ep, etp):
    spec = read_spec(tiny_model("qwen3"))
    spec.check_layout(Layout(tp=2))
    with pytest.raises(UserError, match=rf"^parallel\.moe_expert, .*: {ep} x {etp}, but the backbone has no MoE"):
        spec.check_layout(Layout(tp=2, ep=ep, etp=etp))


def test_moe_layers():
    text, visual = (read_spec(tiny_model(family)) for family in MOE_FAMILIES)
    assert text.moe == MoeSpec(experts=6, top_k=2, ffn_hidden_size=20, norm_topk=True, layers=(0, 1, 3))
    assert visual.moe == text.moe and visual.is_visual and visual.deepstack_layers == 3 and text.head_dim == 12
    assert [text.is_moe(i) for i in range(4)] == [True, True, False, True]
    assert text.has_linear(0, "o_proj") and text.has_linear(2, "up_proj") and not text.has_linear(3, "up_proj")
    every_other = read_spec(tiny_model("qwen3_moe", decoder_sparse_step=2, mlp_only_layers=[3], norm_topk_prob=False))
    assert every_other.moe.layers == (1,) and not every_other.moe.norm_topk
    assert read_spec(tiny_model("qwen3_moe", decoder_sparse_step=9)).moe is None


@pytest.mark.parametrize(("layout", "named"), [
    (Layout(cp=4, ep=4), r"^parallel\.moe_expert: 4 does not divide the backbone's 6 MoE experts"),
    (Layout(cp=3, etp=3), r"^parallel\.moe_expert_tensor: 3 does not divide the 20 feed-forward rows"),
    (Layout(tp=2, ep=2), r"^parallel\.sequence_parallel: false with parallel\.tensor=2"),
    (Layout(tp=2), r"^parallel\.sequence_parallel: false"),
    (Layout(tp=3, sequence_parallel=True), r"^parallel\.tensor: 3 does not fit the backbone's 4 query heads"),
])
def test_layouts_that_do_not_fit_moe_layers(layout, named):
    with pytest.raises(UserError, match=named) as caught:
        read_spec(tiny_model("qwen3_moe")).check_layout(layout)
    assert str(caught.value).count("; ") >= 2


def test_feed_forward_of_dense_layers_matters_where_there_are_any():
    odd = {"intermediate_size": 47, "tp": 2}
    for dense, fits in (([2], False), ([], True)):
        spec = read_spec(tiny_model("qwen3_moe", intermediate_size=odd["intermediate_size"], mlp_only_layers=dense))
        with nullcontext() if fits else pytest.raises(UserError, match="47 feed-forward rows"):
            spec.check_layout(Layout(tp=odd["tp"], sequence_parallel=True))


@pytest.mark.parametrize(("first_layer", "targets", "named"), [
    (0, ("q_proj", "up_proj"), None), (3, ("q_proj",), None),
    (3, ("q_proj", "up_proj", "down_proj"), r"^adapter\.targets: up_proj, down_proj; from adapter\.first_layer=3 on"),
    (4, ("q_proj",), r"^adapter\.first_layer: 4; the backbone has 4 layers"),
])
def test_adapters_need_linears_of_their_own(first_layer, targets, named):
    spec = read_spec(tiny_model("qwen3_moe"))
    with pytest.raises(UserError, match=named) if named else nullcontext():
        spec.check_adapter(AdapterConfig(first_layer=first_layer, targets=targets))


def test_padded_vocabulary():
    spec = read_spec(tiny_model("qwen3"))
    assert [spec.padded_vocab_size(tp) for tp in (1, 2, 4)] == [267, 268, 268]


def test_a_directory_needs_no_weights(tmp_path):
    for family in FAMILIES:
        shutil.copy(tiny_model(family) / "config.json", tmp_path)
        assert read_spec(tmp_path) == read_spec(tiny_model(family))
