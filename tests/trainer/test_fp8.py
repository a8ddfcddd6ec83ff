"""FP8 rows on a trained backbone: what they cost, and that every path through the model sees the same bytes."""
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from copd_megatron.checkpoint.huggingface import save_quantised
from copd_megatron.checkpoint.w8a8 import rounded_weights
from copd_megatron.checkpoint.weight_stream import scale_name
from copd_megatron.config.loading import apply_overrides, load_recipe
from copd_megatron.config.model import AdapterConfig, ModelConfig
from copd_megatron.model.backbone import Backbone
from copd_megatron.model.fp8 import SCALE, is_fp8
from copd_megatron.model.moe_weights import MoeShard
from copd_megatron.model.translate import check_backbone, layer_pieces, load_backbone_weights
from copd_megatron.parallel.groups import Groups
from copd_megatron.parallel.layout import Layout
from copd_megatron.parallel.placement import Placement
from copd_megatron.simulate.memory import backbone_bytes
from copd_megatron.trainer.build import build_trainer
from copd_megatron.types import UserError
from support.ranks import run_ranks
from support.replay import one_step
from support.tiny_models import tiny_model
from support.toy_run import toy_trainer

RECIPE = Path(__file__).resolve().parents[2] / "examples/quickstart.py"
SMALL = ("rollout.prompts_per_step=4", "rollout.group_size=4", "metrics.progress=off", "metrics.rollouts=false",
         "metrics.tensorboard=false", "evaluation.every=0")
STEP = 3
"""The first OPD step: native and cross batches."""


def config_of(*overrides: str):
    return apply_overrides(load_recipe(RECIPE), [*SMALL, *overrides])


FP8 = "model.fp8=frozen_rowwise"


def replayed(tmp_path_factory, *overrides: str):
    """A step of the backbone with the rollouts that it sampled, and the same step on them in FP8 rows."""
    plain = run_ranks(1, one_step, config_of(*overrides), tmp_path_factory.mktemp("plain"), STEP)[0]
    rounded = run_ranks(1, one_step, config_of(FP8, *overrides), tmp_path_factory.mktemp("fp8"), STEP,
                        plain["recording"])[0]
    return plain, rounded


def cosine(left: dict, right: dict) -> float:
    a, b = (torch.cat([own[name].flatten().double() for name in sorted(own)]) for own in (left, right))
    return float(a @ b / a.norm() / b.norm())


@pytest.mark.parametrize("dtype,own", [("float32", 1e-6), ("bfloat16", 0.002)])
def test_log_probs_and_gradients_stay_near_those_without(tmp_path_factory, dtype, own):
    """The rollouts carry the log-probs of the model in ``dtype``, so the mismatch is what rounding to FP8 did, and in
    bfloat16 what decoding and training, which round differently, differ by themselves."""
    plain, rounded = replayed(tmp_path_factory, f"model.dtype={dtype}")
    for expert in plain["gradients"]:
        assert plain["metrics"][f"{expert}/mismatch_kl"] < own
        assert 0 < rounded["metrics"][f"{expert}/mismatch_kl"] < 0.005
        assert 0.93 < cosine(plain["gradients"][expert], rounded["gradients"][expert]) < 1


def test_decoding_and_training_see_the_same_weights(tmp_path):
    """Tokens sampled in FP8 are scored in FP8: only the order of sums differs, which may move a rounding."""
    result = run_ranks(1, one_step, config_of(FP8), tmp_path, STEP)[0]
    for expert in result["gradients"]:
        assert result["metrics"][f"{expert}/mismatch_kl"] < 1e-4


def exported_bytes(backbone, weights):
    """Name -> bytes and scales that an exported directory has for this rank."""
    at, layout, found = backbone.groups.coords, backbone.groups.layout, {}
    for position, layer in enumerate(backbone.layer_range):
        for name, pieces in layer_pieces(backbone.spec, layer, at.tp, layout.tp, MoeShard.of(layout, at),
                                         "split" if backbone.spec.moe else None).items():
            if scale_name(pieces[0].name) in weights:
                found[f"layers.{position}.{name}"] = (
                    torch.cat([weights[p.name].view(torch.uint8)[p.rows, p.cols] for p in pieces]),
                    torch.cat([weights[scale_name(p.name)][p.rows] for p in pieces]))
    return found


def bytes_of(config, folder, weights):
    """Name -> FP8 bytes and scales of this rank; it holds as many bytes as are planned, those of the export."""
    trainer = build_trainer(config, folder)
    backbone = trainer.runner.backbone
    held = sum(t.nbytes for t in (*backbone.layers.parameters(), *backbone.layers.buffers()))
    assert held == backbone_bytes(backbone.spec, trainer.groups.layout, 0, "float32", "frozen_rowwise")["layers"]
    found = {}
    for name, parameter in backbone.named_parameters():
        if is_fp8(parameter):
            scales = backbone.get_buffer(f"{name.rpartition('.')[0]}.{SCALE}")
            found[name] = parameter.view(torch.uint8).clone(), scales.clone()
    for name, exported in exported_bytes(backbone, weights).items():
        assert all(map(torch.equal, found[name], exported)), name
    trainer.groups.destroy()
    return found


def test_bytes_do_not_depend_on_tensor_parallelism(tmp_path):
    """And are those that an export has, whichever rank looks."""
    backbone = Path(config_of().model.path)
    save_quantised(tmp_path / "w8a8", backbone, rounded_weights(backbone, check_backbone(backbone)))
    weights = load_file(tmp_path / "w8a8/model.safetensors")
    whole = run_ranks(1, bytes_of, config_of(FP8), tmp_path / "one", weights)[0]
    parts = run_ranks(2, bytes_of, config_of(FP8, "parallel.tensor=2"), tmp_path / "two", weights)
    assert sum(name.endswith("weight_scale") for name in weights) == 4 * 7
    assert len(whole) == 4 * 4
    for name, (values, scales) in whole.items():
        (a, a_scales), (b, b_scales) = (part[name] for part in parts)
        if "linear_proj" in name or "linear_fc2" in name:
            assert torch.equal(torch.cat([a, b], 1), values) and torch.equal(a_scales, scales)
            assert torch.equal(b_scales, scales)
        elif "linear_qkv" in name:
            assert torch.equal(torch.cat([a, b]), values) and torch.equal(torch.cat([a_scales, b_scales]), scales)
        else:  # [gate | up] on each rank
            halves = [part.chunk(2) for part in (a, b)]
            assert torch.equal(torch.cat([halves[0][0], halves[1][0], halves[0][1], halves[1][1]]), values)


def moe_bytes(folder, weights, layout):
    """The same of every layer of a MoE backbone under ``layout``; returns how many tensors were compared."""
    groups = Groups.create(layout, Placement.build(("a",), layout.replicas))
    spec = check_backbone(folder)
    model = ModelConfig(path=str(folder), dtype="float32", fp8="frozen_rowwise")
    backbone = Backbone(spec, groups, model, AdapterConfig())
    load_backbone_weights(backbone, folder)
    exported = exported_bytes(backbone, weights)
    for name, (values, scales) in exported.items():
        assert torch.equal(backbone.get_parameter(name).view(torch.uint8), values), name
        assert torch.equal(backbone.get_buffer(f"{name.rpartition('.')[0]}.{SCALE}"), scales), name
    groups.destroy()
    return len(exported)


def test_moe_experts_have_the_exported_bytes_however_they_are_spread(tmp_path):
    """Whole, one half of the MoE experts on each rank, and half of each on each rank."""
    folder = tiny_model("qwen3_moe", head_dim=16, moe_intermediate_size=32, intermediate_size=64)
    save_quantised(tmp_path / "w8a8", folder, rounded_weights(folder, check_backbone(folder)))
    weights = load_file(tmp_path / "w8a8/model.safetensors")
    for ranks, sizes, count in ((1, {}, 3 * 6 * 2), (2, {"ep": 2}, 3 * 3 * 2), (2, {"etp": 2}, 3 * 6 * 2)):
        layout = Layout(tp=ranks, sequence_parallel=ranks > 1, **sizes)
        assert run_ranks(ranks, moe_bytes, folder, weights, layout) == [count + 4 * 2 + 2] * ranks


def test_what_cannot_be_is_refused(tmp_path):
    with pytest.raises(UserError, match="model.fp8: frozen_rowwise with model.dtype=float64"):
        with toy_trainer(config_of(FP8, "model.dtype=float64"), tmp_path):
            pass
