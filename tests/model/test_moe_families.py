"""How checkpoints store MoE experts, what they must hold, and what changes no logit: packs, grouped products."""
from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText

from copd_megatron.config.model import AdapterConfig, ModelConfig
from copd_megatron.model.backbone import Backbone
from copd_megatron.model.hf_config import read_spec
from copd_megatron.model.prompt import PromptEncoder
from copd_megatron.model.shared_prefix import Leaf, LeafGroup, build_pack
from copd_megatron.model.translate import check_backbone, load_backbone_weights
from copd_megatron.types import UserError
from support.fused_experts import fused_copy
from support.pictures import mixed_questions
from support.tiny_models import tiny_model

CPU = torch.device("cpu")


@torch.no_grad()
def _logits(path: Path, groups, dtype: str = "float32", **model: object) -> torch.Tensor:
    """[N, V] for two completions of a text question, on one rank."""
    backbone = Backbone(read_spec(path), groups, ModelConfig(path=str(path), dtype=dtype, **model),
                        AdapterConfig(targets=("q_proj",)))
    load_backbone_weights(backbone, path)
    item = next(item for item in mixed_questions() if not item.media)
    lanes = [LeafGroup(PromptEncoder(path).encode(item, "text"), [Leaf(None, [40, 41, 42]), Leaf(None, [50, 40])])]
    return backbone(build_pack(lanes, backbone.rules, CPU)) @ backbone.head.weight.T


def _stored(tmp_path: Path, family: str, edit) -> Path:
    """A copy of a tiny checkpoint after ``edit(name, tensor)`` gave other tensors by name for each."""
    path = Path(shutil.copytree(tiny_model(family), tmp_path / family))
    tensors = load_file(path / "model.safetensors")
    edited = {new: part.clone(memory_format=torch.contiguous_format)
              for name, tensor in tensors.items() for new, part in edit(name, tensor).items()}
    save_file(edited, path / "model.safetensors", metadata={"format": "pt"})
    return path


def _turned(name: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
    """MoE experts as Qwen3-VL-MoE is published."""
    return {name: tensor.transpose(1, 2) if ".experts." in name else tensor}


def test_transposed_moe_experts_are_the_same(tmp_path, one_rank):
    """Published Qwen3-VL-MoE checkpoints store [in, out], files that transformers 5 writes [out, in]."""
    plain, groups = tiny_model("qwen3_vl_moe"), one_rank("only")
    path = _stored(tmp_path, "qwen3_vl_moe", _turned)
    assert torch.equal(_logits(path, groups), _logits(plain, groups))
    theirs = AutoModelForImageTextToText.from_pretrained(path).state_dict()
    for key, tensor in AutoModelForImageTextToText.from_pretrained(plain).state_dict().items():
        assert torch.equal(theirs[key], tensor), "transformers reads it differently"


def test_fused_moe_experts_are_the_same(tmp_path, one_rank):
    plain, groups = tiny_model("qwen3_moe"), one_rank("only")
    assert torch.equal(_logits(fused_copy(plain, tmp_path / "fused"), groups), _logits(plain, groups))


@pytest.mark.parametrize(("family", "edit", "named"), [
    ("qwen3_moe", lambda n, t: {} if n == "model.layers.3.mlp.experts.5.up_proj.weight" else {n: t},
     "'model.layers.3.mlp.experts.5.up_proj.weight' is missing, .* stored split"),
    ("qwen3_moe", lambda n, t: {} if n == "model.layers.1.mlp.gate.weight" else {n: t}, "layers.1.mlp.gate.weight"),
    ("qwen3_moe", lambda n, t: {n: t, n.replace("experts.5", "experts.6"): t}, "experts.6.* is unknown"),
    ("qwen3_vl_moe", lambda n, t: {n: t[:5] if n.endswith("0.mlp.experts.down_proj") else t},
     r"layers.0.mlp.experts.down_proj' has shape \[5, 32, 20\], config.json asks for \[6, 32, 20\]"),
    ("qwen3_vl_moe", lambda n, t: _turned(n, t) if "layers.0." in n else {n: t}, "stored fused"),
], ids=["missing", "no router", "too many", "too few", "mixed"])
def test_moe_experts_that_do_not_fit_the_config(tmp_path, family, edit, named):
    with pytest.raises(UserError, match=rf"^model\.path: .*{named}"):
        check_backbone(_stored(tmp_path, family, edit))


def test_sharing_prompts_changes_nothing(one_rank):
    """No token is dropped and none sees another's choice, so packs may hold what they like."""
    path, groups = tiny_model("qwen3_moe"), one_rank("only")
    shared, naive = (_logits(path, groups, "float64", prefix_sharing=sharing)
                     for sharing in (True, False))
    torch.testing.assert_close(shared, naive, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("bfloat16", 0.1)])
def test_grouped_products_are_the_reference(one_rank, dtype, tolerance):
    path, groups = tiny_model("qwen3_moe", moe_intermediate_size=24), one_rank("only")
    reference, grouped = (_logits(path, groups, dtype, moe_experts=backend)
                          for backend in ("reference", "grouped"))
    torch.testing.assert_close(grouped, reference, rtol=0, atol=tolerance)


@pytest.mark.parametrize("dtype", ["float64", "bfloat16"])
def test_grouped_products_that_are_not_possible(one_rank, dtype):
    with pytest.raises(UserError, match=r"^model\.moe_experts: grouped, with .*20 feed-forward rows"):
        _logits(tiny_model("qwen3_moe"), one_rank("only"), dtype, moe_experts="grouped")
