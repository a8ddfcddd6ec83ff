"""Rotary angles equal transformers' bit for bit, and Megatron turns heads by them as transformers does."""
from __future__ import annotations

import json

import pytest
import torch
from megatron.core.models.common.embeddings.rope_utils import _apply_rotary_pos_emb_bshd
from transformers import AutoConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLRotaryEmbedding
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLTextRotaryEmbedding

from copd_megatron.model.hf_config import load_hf_config, read_spec
from copd_megatron.model.rope import inverse_frequencies, position_row_of_frequency, rotary_frequencies
from copd_megatron.model.spec import RopeSpec
from copd_megatron.types import UserError
from support.tiny_models import tiny_model

SCALINGS = {
    "default": {},
    "linear": {"factor": 3.0},
    "dynamic": {"factor": 3.0},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 256},
    "yarn, attention factor": {"factor": 4.0, "original_max_position_embeddings": 64, "attention_factor": 0.7,
                               "beta_fast": 20, "beta_slow": 2, "truncate": False},
    "yarn, mscale": {"factor": 8.0, "original_max_position_embeddings": 64, "mscale": 1.0, "mscale_all_dim": 0.5},
    "longrope": {"short_factor": [1.0 + i / 8 for i in range(32)], "long_factor": [2.0] * 32, "factor": 4.0,
                 "original_max_position_embeddings": 256},
    "llama3": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
               "original_max_position_embeddings": 256},
}


def _positions(rows: int, tokens: int = 40) -> torch.Tensor:
    return torch.randint(0, 5000, (rows, tokens), generator=torch.Generator().manual_seed(rows))


def _config(tmp_path, name: str, older: bool = False):
    """A Llama configuration file with this scaling, in today's or the older spelling."""
    rope = SCALINGS[name] | {"rope_type": name.split(",")[0]}
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 256,
              "num_attention_heads": 4, "num_hidden_layers": 1, "max_position_embeddings": 1024}
    if older:
        config |= {"rope_theta": 5e5, "rope_scaling": {**rope, "type": rope.pop("rope_type")}}
    else:
        config["rope_parameters"] = rope | {"rope_theta": 5e5}
    (tmp_path / "config.json").write_text(json.dumps(config))
    return tmp_path


@pytest.mark.parametrize("older", [False, True], ids=["rope_parameters", "rope_scaling"])
@pytest.mark.parametrize("name", SCALINGS)
def test_scalings_equal_transformers(tmp_path, name, older):
    """Frequencies and attention factor to the bit, at every length that is not refused."""
    path = _config(tmp_path, name, older)
    spec, theirs = read_spec(path), LlamaRotaryEmbedding(AutoConfig.from_pretrained(path))
    assert torch.equal(inverse_frequencies(spec.rope, 64), theirs.inv_freq)
    assert spec.rope.attention_factor == theirs.attention_scaling
    assert (spec.rope.attention_factor != 1) == (name.startswith("yarn") or name == "longrope")
    limit = {"dynamic": 1024, "longrope": 256}.get(name)
    assert spec.rope.max_positions == limit
    plain = 1.0 / 5e5 ** (torch.arange(0, 64, 2) / 64)
    assert torch.equal(theirs.inv_freq, plain) == (name in ("default", "dynamic"))
    theirs(torch.zeros(1), torch.arange(limit or 4096)[None])
    assert torch.equal(theirs.inv_freq, inverse_frequencies(spec.rope, 64)), "fixed up to the limit"
    if limit is not None:
        theirs(torch.zeros(1), torch.arange(limit + 1)[None])
        assert not torch.equal(theirs.inv_freq, inverse_frequencies(spec.rope, 64)), "other ones beyond it"
        spec.rope.check_length(limit, "text")
        with pytest.raises(UserError, match=f"^model.path: text reaches position {limit + 1}, .* beyond {limit}; "):
            spec.rope.check_length(limit + 1, "text")


def test_plain_rows_follow_the_temporal_position():
    spec = read_spec(tiny_model("llama"))
    positions = _positions(3)
    cos, _ = LlamaRotaryEmbedding(load_hf_config(tiny_model("llama")))(torch.zeros(1), positions[:1])
    assert torch.equal(rotary_frequencies(spec, positions).cos()[:, 0, 0], cos[0])


@pytest.mark.parametrize("family,module", [
    ("qwen3_vl", Qwen3VLTextRotaryEmbedding), ("qwen2_5_vl", Qwen2_5_VLRotaryEmbedding)])
def test_rows_of_sections_equal_transformers(family, module):
    spec = read_spec(tiny_model(family))
    positions = _positions(3)
    cos, sin = module(load_hf_config(tiny_model(family)).text_config)(torch.zeros(1), positions[:, None])
    ours = rotary_frequencies(spec, positions)
    assert ours.shape == (40, 1, 1, spec.head_dim) and ours.dtype == torch.float32
    assert torch.equal(ours.cos()[:, 0, 0], cos[0]) and torch.equal(ours.sin()[:, 0, 0], sin[0])


def test_sections_of_the_published_model():
    """Qwen3-VL: 24, 20, 20 of 64 frequencies; T H W alternate up to frequency 59, the rest follows T."""
    rows = position_row_of_frequency(RopeSpec(5e6, None, (24, 20, 20)), 128)
    assert rows.bincount().tolist() == [24, 20, 20]
    assert rows[:6].tolist() == [0, 1, 2, 0, 1, 2] and rows[60:].tolist() == [0, 0, 0, 0]
    rows = position_row_of_frequency(RopeSpec(1e6, None, (16, 24, 24), mrope_interleaved=False), 128)
    assert rows.tolist() == [0] * 16 + [1] * 24 + [2] * 24


def test_megatron_applies_them_as_transformers_does():
    spec = read_spec(tiny_model("llama"))
    positions = _positions(3)
    heads = torch.randn(1, 4, 40, spec.head_dim)
    cos, sin = LlamaRotaryEmbedding(load_hf_config(tiny_model("llama")))(heads, positions[:1])
    theirs, _ = apply_rotary_pos_emb(heads, heads, cos, sin)
    ours = _apply_rotary_pos_emb_bshd(heads.permute(2, 0, 1, 3), rotary_frequencies(spec, positions))
    torch.testing.assert_close(ours.permute(1, 2, 0, 3), theirs, rtol=0, atol=1e-6)
