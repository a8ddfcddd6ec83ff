"""Exports in FP8 rows: the trainer's very bytes under any layout, and what vLLM and transformers read."""
from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText

from copd_kernels.rowwise_fp8.reference import dequantise, quantise_rows
from copd_megatron.checkpoint.adapter import Adapter
from copd_megatron.checkpoint.huggingface import save_merged, save_quantised
from copd_megatron.checkpoint.w8a8 import NOT_QUANTISED, rounded_weights
from copd_megatron.checkpoint.weight_stream import scale_name
from copd_megatron.model.translate import TEXT_PREFIX, check_backbone
from copd_megatron.types import UserError
from support.tiny_models import tiny_model

ROPE = {"rope_type": "default", "rope_theta": 1000.0, "mrope_section": [4, 2, 2], "mrope_interleaved": True}
PREFIX = TEXT_PREFIX["qwen3_vl"]


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def same_bytes(left: torch.Tensor, right: torch.Tensor) -> bool:
    return left.dtype == right.dtype and torch.equal(left.view(torch.uint8), right.view(torch.uint8))


@pytest.fixture(scope="module")
def backbone() -> Path:
    """A backbone that sees, in several files, of sizes that FP8 products take."""
    return tiny_model("qwen3_vl", head_dim=16, rope_parameters=ROPE, shard_bytes=60_000)


@pytest.fixture(scope="module")
def exported(backbone, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("w8a8") / "fp8"
    save_quantised(folder, backbone, rounded_weights(backbone, check_backbone(backbone)))
    return folder


def test_linears_become_rows_with_scales_and_the_rest_keeps_its_bytes(backbone, exported):
    before, after = weights_of(backbone), weights_of(exported)
    rounded = {name for name in before if "language_model.layers." in name and "_proj." in name}
    assert len(rounded) == 4 * 7 and after.keys() == before.keys() | set(map(scale_name, rounded))
    for name, tensor in before.items():
        if name not in rounded:
            assert same_bytes(after[name], tensor), name
            continue
        rows, scales = quantise_rows(tensor)
        assert same_bytes(after[name], rows) and same_bytes(after[scale_name(name)], scales), name
        assert scales.shape == (len(tensor), 1) and scale_name(name) == f"{name}_scale"


def test_configuration_and_index_say_so(backbone, exported):
    config, plain = (json.loads((folder / "config.json").read_text()) for folder in (exported, backbone))
    stated = config.pop("quantization_config")
    assert config == plain
    assert (stated["quant_method"], stated["format"]) == ("compressed-tensors", "float-quantized")
    group = stated["config_groups"]["group_0"]
    assert (group["weights"]["strategy"], group["input_activations"]["strategy"]) == ("channel", "token")
    assert group["input_activations"]["dynamic"] and not group["weights"]["dynamic"]
    index, after = json.loads((exported / "model.safetensors.index.json").read_text()), weights_of(exported)
    assert index["weight_map"].keys() == after.keys() and len(set(index["weight_map"].values())) > 1
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in after.values())
    for name, file in index["weight_map"].items():
        assert name in load_file(exported / file)
    assert {f.name for f in exported.iterdir()} == {f.name for f in backbone.iterdir()}


def test_a_merged_policy_is_rounded_once(backbone, tmp_path):
    """What becomes FP8 is W + delta in float32; other weights take --dtype."""
    name, (a, b) = f"{PREFIX}layers.1.mlp.up_proj.weight", (torch.randn(2, 32), torch.randn(48, 2))
    adapter = Adapter({"layers.1.mlp.up_proj.lora_A": a, "layers.1.mlp.up_proj.lora_B": b}, 0.5)
    save_merged(tmp_path / "out", backbone, adapter, PREFIX, torch.bfloat16,
                rounded=rounded_weights(backbone, check_backbone(backbone)))
    before, after = weights_of(backbone), weights_of(tmp_path / "out")
    rows, scales = quantise_rows(before[name] + (b @ a).mul_(0.5))
    assert same_bytes(after[name], rows) and same_bytes(after[scale_name(name)], scales)
    assert after[f"{PREFIX}norm.weight"].dtype == torch.bfloat16
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["dtype"] == "bfloat16" and "quantization_config" in config


def stored(experts: dict[str, torch.Tensor], mlp: str, storage: str) -> dict[str, torch.Tensor]:
    """The MoE experts of a layer in one of the ways that families store them."""
    if storage == "split":
        return experts
    stacks = {}
    for name, parts in (("gate_up_proj", ("gate", "up")), ("down_proj", ("down",))):
        stack = torch.stack([torch.cat([experts[f"{mlp}experts.{e}.{part}_proj.weight"] for part in parts])
                             for e in range(6)])
        stacks[f"{mlp}experts.{name}"] = stack.mT.contiguous() if storage == "transposed" else stack
    return stacks


@pytest.mark.parametrize("storage", ["split", "fused", "transposed"])
def test_moe_experts_become_one_matrix_each(tmp_path, storage):
    """However they are stored; the numbers are those of each expert's rows."""
    family, changes = ("qwen3_vl_moe", {"rope_parameters": ROPE}) if storage == "transposed" else ("qwen3_moe", {})
    backbone = shutil.copytree(tiny_model(family, head_dim=16, moe_intermediate_size=16, **changes), tmp_path / "moe")
    tensors = {name: tensor for name, tensor in weights_of(backbone).items() if ".experts." not in name}
    want = {}
    for layer in (0, 1, 3):
        mlp = f"{TEXT_PREFIX[family]}layers.{layer}.mlp."
        own = {f"{mlp}experts.{e}.{part}_proj.weight": torch.randn(*(16, 32) if part != "down" else (32, 16))
               for e in range(6) for part in ("gate", "up", "down")}
        want |= own
        tensors |= stored(own, mlp, storage)
    save_file(tensors, backbone / "model.safetensors", {"format": "pt"})
    save_quantised(tmp_path / "out", backbone, rounded_weights(backbone, check_backbone(backbone)))
    after = weights_of(tmp_path / "out")
    assert {name for name in after if ".experts." in name} == want.keys() | set(map(scale_name, want))
    for name, tensor in want.items():
        rows, scales = quantise_rows(tensor)
        assert same_bytes(after[name], rows) and same_bytes(after[scale_name(name)], scales), name
    router = f"{TEXT_PREFIX[family]}layers.1.mlp.gate.weight"
    assert same_bytes(after[router], tensors[router])


def test_what_cannot_be_is_said(exported):
    with pytest.raises(UserError, match=r"fp8_rowwise: .*k_proj.weight is \[24, 32\]; FP8 products need multiples"):
        rounded_weights(tiny_model("qwen3"), check_backbone(tiny_model("qwen3")))
    with pytest.raises(UserError, match="option quantization_config"):
        check_backbone(exported)


def test_transformers_reads_them(exported, backbone):
    """With compressed-tensors: linears of the language model are the dequantised rows, all else is untouched."""
    pytest.importorskip("compressed_tensors", reason="compressed-tensors is not installed")
    from transformers import CompressedTensorsConfig
    model = AutoModelForImageTextToText.from_pretrained(
        exported, dtype=torch.float32, quantization_config=CompressedTensorsConfig(dequantize=True))
    after, loaded = weights_of(exported), dict(model.named_parameters())
    for name in rounded_weights(backbone, check_backbone(backbone)):
        want = dequantise(after[name], after[scale_name(name)])
        torch.testing.assert_close(loaded[name].float(), want, rtol=0, atol=0)
    for name, tensor in weights_of(backbone).items():
        if scale_name(name) not in after:
            assert torch.equal(loaded[name], tensor), name


def test_names_that_stay_fit_both_libraries():
    """By compressed-tensors' rule: "re:" patterns match from the start of a module's name."""
    for name in ("lm_head", "language_model.lm_head", "model.visual.blocks.0.attn.qkv", "visual.merger.linear_fc1",
                 "model.layers.3.mlp.gate"):
        assert any(re.match(pattern.removeprefix("re:"), name) for pattern in NOT_QUANTISED), name
    for name in ("model.layers.3.mlp.gate_proj", "model.layers.3.mlp.experts.5.gate_proj",
                 "language_model.model.layers.0.self_attn.q_proj"):
        assert not any(re.match(pattern.removeprefix("re:"), name) for pattern in NOT_QUANTISED), name
