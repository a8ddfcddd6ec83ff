"""Rotary angles equal transformers' bit for bit, and Megatron turns heads by them as transformers does."""
from __future__ import annotations

import dataclasses

import pytest
import torch
from megatron.core.models.common.embeddings.rope_utils import _apply_rotary_pos_emb_bshd
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLTextRotaryEmbedding

from copd_megatron.model.hf_config import load_hf_config, read_spec
from copd_megatron.model.rope import inverse_frequencies, position_row_of_frequency, rotary_frequencies
from copd_megatron.model.spec import RopeSpec
from copd_megatron.types import UserError
from support.tiny_models import tiny_model

LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 256}


def _positions(rows: int, tokens: int = 40) -> torch.Tensor:
    return torch.randint(0, 5000, (rows, tokens), generator=torch.Generator().manual_seed(rows))


@pytest.mark.parametrize("scaling", [None, {"rope_type": "linear", "factor": 3.0}, LLAMA3],
                         ids=["default", "linear", "llama3"])
def test_frequencies_equal_transformers(scaling):
    parameters = {"rope_theta": 5e5, **(scaling or {"rope_type": "default"})}
    config = LlamaConfig(hidden_size=256, num_attention_heads=4, rope_parameters=parameters)
    assert torch.equal(inverse_frequencies(RopeSpec(5e5, scaling), 64), LlamaRotaryEmbedding(config).inv_freq)


def test_plain_rows_follow_the_temporal_position():
    spec = read_spec(tiny_model("llama"))
    positions = _positions(3)
    cos, _ = LlamaRotaryEmbedding(load_hf_config(tiny_model("llama")))(torch.zeros(1), positions[:1])
    assert torch.equal(rotary_frequencies(spec, positions).cos()[:, 0, 0], cos[0])


def test_interleaved_rows_equal_transformers():
    spec = read_spec(tiny_model("qwen3_vl"))
    positions = _positions(3)
    theirs = Qwen3VLTextRotaryEmbedding(load_hf_config(tiny_model("qwen3_vl")).text_config)
    cos, sin = theirs(torch.zeros(1), positions[:, None])
    ours = rotary_frequencies(spec, positions)
    assert ours.shape == (40, 1, 1, spec.head_dim) and ours.dtype == torch.float32
    assert torch.equal(ours.cos()[:, 0, 0], cos[0]) and torch.equal(ours.sin()[:, 0, 0], sin[0])


def test_sections_of_the_published_model():
    """Qwen3-VL: 24, 20, 20 of 64 frequencies; T H W alternate up to frequency 59, the rest follows T."""
    rows = position_row_of_frequency(RopeSpec(5e6, None, (24, 20, 20)), 128)
    assert rows.bincount().tolist() == [24, 20, 20]
    assert rows[:6].tolist() == [0, 1, 2, 0, 1, 2] and rows[60:].tolist() == [0, 0, 0, 0]


def test_megatron_applies_them_as_transformers_does():
    spec = read_spec(tiny_model("llama"))
    positions = _positions(3)
    heads = torch.randn(1, 4, 40, spec.head_dim)
    cos, sin = LlamaRotaryEmbedding(load_hf_config(tiny_model("llama")))(heads, positions[:1])
    theirs, _ = apply_rotary_pos_emb(heads, heads, cos, sin)
    ours = _apply_rotary_pos_emb_bshd(heads.permute(2, 0, 1, 3), rotary_frequencies(spec, positions))
    torch.testing.assert_close(ours.permute(1, 2, 0, 3), theirs, rtol=0, atol=1e-6)


def test_unknown_scaling_is_refused():
    spec = read_spec(tiny_model("llama"))
    broken = dataclasses.replace(spec, rope=RopeSpec(1e4, {"rope_type": "yarn"}))
    with pytest.raises(UserError, match="'yarn'"):
        rotary_frequencies(broken, _positions(3))
