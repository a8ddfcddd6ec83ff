"""Megatron checkpoints: Megatron's own GPTModel loads them and computes transformers' logits; the way back is exact."""
from __future__ import annotations

import resource
import shutil
import signal
import warnings
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import (
    ShardedObject,
    ShardedTensor,
    apply_factories,
    is_main_replica,
)
from megatron.core.dist_checkpointing.strategies.torch import MCoreSavePlanner, mcore_to_pyt_state_dict
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer import TransformerConfig
from safetensors.torch import load_file, save_file
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM

from copd_megatron.checkpoint.megatron_names import check_supported, megatron_arguments, slots
from copd_megatron.checkpoint.megatron_reader import MegatronCheckpoint, from_megatron
from copd_megatron.checkpoint.megatron_writer import to_megatron
from copd_megatron.checkpoint.sharded import Snapshot, write_index, write_part
from copd_megatron.model.hf_config import load_hf_config
from copd_megatron.model.translate import check_backbone
from copd_megatron.parallel.collectives import all_gather_objects
from copd_megatron.parallel.groups import Groups
from copd_megatron.parallel.layout import Layout
from copd_megatron.parallel.placement import Placement
from copd_megatron.types import UserError
from support.fused_experts import fused_copy
from support.ranks import run_ranks
from support.tiny_models import tiny_model

LLAMA3 = {"rope_type": "llama3", "rope_theta": 1000.0, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 8192}
LINEAR = {"rope_type": "linear", "rope_theta": 1000.0, "factor": 2.0}
MODELS = {"qwen3": ("qwen3", {}), "qwen3 tied, one KV head": ("qwen3", {"tie_word_embeddings": True,
                                                                         "num_key_value_heads": 1}),
          "qwen2": ("qwen2", {}),
          "llama": ("llama", {"rope_parameters": LLAMA3, "shard_bytes": 40_000}),
          "llama linear": ("llama", {"rope_parameters": LINEAR}),
          "qwen3_moe": ("qwen3_moe", {"mlp_only_layers": []}),
          "qwen3_moe, weights as they are": ("qwen3_moe", {"mlp_only_layers": [], "norm_topk_prob": False,
                                                            "num_experts_per_tok": 3, "num_key_value_heads": 1})}

LAYOUTS = {"qwen3": [(1, 1), (2, 1)], "qwen3_moe": [(2, 2)]}
"""Tensor and expert parallel sizes of the ranks that load a model's checkpoint; of others one rank."""


def gpt_model(path: Path, tp: int = 1, ep: int = 1) -> tuple[GPTModel, Groups]:
    """Megatron's model as its options say: the flags of `megatron_arguments` by hand."""
    spec = check_backbone(path)
    lines = megatron_arguments(path, spec, torch.float32)
    flags = dict((line.removeprefix("--").split(" ", 1) + [True])[:2] for line in lines)
    groups = Groups.create(Layout(tp=tp, ep=ep, sequence_parallel=ep > 1), Placement.build(("a",), 1))
    moe = {"num_moe_experts": int(flags["num-experts"]), "moe_router_topk": int(flags["moe-router-topk"]),
           "moe_ffn_hidden_size": int(flags["moe-ffn-hidden-size"]), "moe_router_dtype": flags["moe-router-dtype"],
           "moe_router_pre_softmax": "moe-router-pre-softmax" in flags, "moe_router_load_balancing_type": "none",
           "moe_token_dispatcher_type": flags["moe-token-dispatcher-type"], "expert_tensor_parallel_size": 1,
           "expert_model_parallel_size": ep} if "num-experts" in flags else {}
    config = TransformerConfig(
        num_layers=int(flags["num-layers"]), hidden_size=int(flags["hidden-size"]),
        ffn_hidden_size=int(flags["ffn-hidden-size"]), num_attention_heads=int(flags["num-attention-heads"]),
        num_query_groups=int(flags["num-query-groups"]), kv_channels=int(flags["kv-channels"]),
        normalization=flags["normalization"], layernorm_epsilon=float(flags["norm-epsilon"]),
        gated_linear_unit=flags["swiglu"], activation_func=F.silu, add_bias_linear=not flags["disable-bias-linear"],
        add_qkv_bias="add-qkv-bias" in flags, qk_layernorm="qk-layernorm" in flags, tensor_model_parallel_size=tp,
        hidden_dropout=0.0, attention_dropout=0.0, gradient_accumulation_fusion=False, bias_dropout_fusion=False,
        bias_activation_fusion=False, masked_softmax_fusion=False, apply_rope_fusion=False, persist_layer_norm=False,
        **moe)
    layer = get_gpt_layer_local_spec(moe.get("num_moe_experts"), qk_layernorm=config.qk_layernorm,
                                     normalization="RMSNorm")
    if moe:  # the local spec names the norm of a linear_fc1 that MoE layers do not have
        del layer.submodules.sharded_state_dict_keys_map["pre_mlp_layernorm."]
    padded = -(-spec.vocab_size // 128) * 128  # as Megatron-LM pads its tables
    model = GPTModel(config, layer, padded, int(flags["max-position-embeddings"]), position_embedding_type="rope",
                     rotary_base=int(flags["rotary-base"]), rope_scaling="use-rope-scaling" in flags,
                     rope_scaling_factor=float(flags.get("rope-scaling-factor", 8.0)),
                     seq_len_interpolation_factor=float(flags["rotary-seq-len-interpolation-factor"])
                     if "rotary-seq-len-interpolation-factor" in flags else None, parallel_output=False,
                     share_embeddings_and_output_weights="untie-embeddings-and-output-weights" not in flags,
                     pg_collection=groups.pg_collection)
    return model.eval(), groups


def load_into(model: GPTModel, folder: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.load_state_dict(dist_checkpointing.load(model.sharded_state_dict(), str(folder)))


@torch.no_grad()
def check_logits(path: Path, folder: Path, tp: int, ep: int = 1) -> None:
    model, groups = gpt_model(path, tp, ep)
    load_into(model, folder / "release")
    token_ids = torch.arange(24)[None] * 7 % 260
    mask = torch.ones(1, 1, 24, 24, dtype=torch.bool).triu(1)
    logits = model(token_ids, torch.arange(24)[None], mask)
    vocab = check_backbone(path).vocab_size
    want = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)(token_ids).logits
    torch.testing.assert_close(logits[..., :vocab], want, rtol=0, atol=2e-5)
    groups.destroy()


@pytest.mark.parametrize("name", MODELS)
def test_megatrons_model_computes_transformers_logits_and_the_way_back_is_exact(tmp_path, name):
    family, changes = MODELS[name]
    path = tiny_model(family, **changes)
    spec = check_backbone(path)
    to_megatron(path, spec, tmp_path / "megatron")
    for tp, ep in LAYOUTS.get(name, [(1, 1)]):
        run_ranks(tp, check_logits, path, tmp_path / "megatron", tp, ep)
    from_megatron(tmp_path / "megatron", path, spec, tmp_path / "back")
    for file in path.iterdir():
        assert (tmp_path / "back" / file.name).read_bytes() == file.read_bytes(), file.name


def _save_with_megatron(path: Path, folder: Path) -> None:
    """What Megatron-LM leaves after training: the shards of GPTModel on 2 ranks, as Megatron's planner writes them.

    (Megatron's ``save`` starts a helper process on every rank first, which takes longer than all the rest.)
    """
    model, groups = gpt_model(path, 2, 2 if check_backbone(path).moe else 1)
    load_into(model, folder / "release")
    state = {key: value for key, value in model.sharded_state_dict().items() if not key.endswith("_extra_state")}
    apply_factories(state)
    shards: dict[str, list] = {}
    for shard in tree_leaves(state, is_leaf=lambda leaf: isinstance(leaf, ShardedTensor)):
        if is_main_replica(shard.replica_id):
            shards.setdefault(shard.key, []).append(shard)
    if groups.is_main:
        nothing = ShardedObject("common_state", {}, (1,), (0,))
        shards[nothing.unique_key] = [nothing]
    planner = MCoreSavePlanner(dedup_replicated_tensors=False, flatten_state_dict=False, flatten_sharded_tensors=False)
    planner.set_up_planner(mcore_to_pyt_state_dict(shards), is_coordinator=groups.is_main)
    target = folder / "iter_0000007"
    target.mkdir(exist_ok=True)
    part = write_part(target, Snapshot(groups.rank, planner, planner.create_local_plan()))
    parts = all_gather_objects(part, groups.world)
    if groups.is_main:
        write_index(target, parts)
    groups.destroy()


@pytest.mark.parametrize("name", ["qwen3", "qwen3_moe"])
def test_what_megatron_saved_on_two_ranks_comes_back(tmp_path, name):
    """Padded tables, fused tensors cut over ranks, MoE experts shared out; the tracker file names the iteration."""
    path = tiny_model(MODELS[name][0], **MODELS[name][1])
    spec = check_backbone(path)
    to_megatron(path, spec, tmp_path / "megatron")
    run_ranks(2, _save_with_megatron, path, tmp_path / "megatron")
    (tmp_path / "megatron/latest_checkpointed_iteration.txt").write_text("7\n")
    from_megatron(tmp_path / "megatron", path, spec, tmp_path / "back")
    assert (tmp_path / "back/model.safetensors").read_bytes() == (path / "model.safetensors").read_bytes()
    from_megatron(tmp_path / "megatron/iter_0000007", path, spec, tmp_path / "half", torch.bfloat16)
    after, before = (load_file(folder / "model.safetensors") for folder in (tmp_path / "half", path))
    assert all(torch.equal(after[name], tensor.bfloat16()) for name, tensor in before.items())
    assert load_hf_config(tmp_path / "half").dtype == torch.bfloat16


def test_names_and_sizes_are_gpt_models(tmp_path):
    """Key by key, global shape by global shape, for tied and untied heads, with MoE layers too."""
    for name in ("qwen3", "qwen3 tied, one KV head", "qwen3_moe"):
        path = tiny_model(MODELS[name][0], **MODELS[name][1])
        spec = check_backbone(path)
        ours = {slot.key: ((spec.num_layers,) if slot.layer is not None else ()) + slot.shape for slot in slots(spec)}
        [theirs] = run_ranks(1, _gpt_names, path)
        tables = [key for key in ours if key.startswith(("embedding", "output"))]
        assert ours.keys() == theirs.keys()
        assert all(ours[key] == theirs[key] for key in ours if key not in tables), "tables are padded there"


def _gpt_names(path: Path) -> dict[str, tuple[int, ...]]:
    model, groups = gpt_model(path)
    found = {}
    for value in model.sharded_state_dict().values():
        for shard in value.build() if hasattr(value, "build") else [value]:
            if hasattr(shard, "global_shape") and not shard.key.endswith("_extra_state"):
                found[shard.key] = tuple(shard.global_shape)
    groups.destroy()
    return found


def test_what_gpt_model_cannot_be_is_refused():
    for family, changes, what in (("qwen3_vl", {}, "a vision tower"), ("qwen3_moe", {}, "dense layers between"),
                                  ("qwen3_moe", {"mlp_only_layers": [], "num_experts_per_tok": 1}, "num_experts_per_"),
                                  ("llama", {"attention_bias": True}, "biases on o_proj"),
                                  ("llama", {}, "rotary scaling .*llama3")):
        with pytest.raises(UserError, match=f"--backbone: family {family} has {what}.*; continue from the H"):
            path = tiny_model(family, **changes)
            check_supported(path, check_backbone(path))


def test_fused_moe_experts_give_the_same_checkpoint_and_come_back_fused(tmp_path):
    plain = tiny_model("qwen3_moe", mlp_only_layers=[])
    fused = fused_copy(plain, tmp_path / "fused")
    spec = check_backbone(fused)
    for path, name in ((plain, "a"), (fused, "b")):
        to_megatron(path, spec, tmp_path / name)
    stored = [{slot.key + str(slot.layer): MegatronCheckpoint(tmp_path / name).read(slot) for slot in slots(spec)}
              for name in "ab"]
    assert all(torch.equal(stored[1][key], tensor) for key, tensor in stored[0].items())
    from_megatron(tmp_path / "a", fused, spec, tmp_path / "back")
    assert (tmp_path / "back/model.safetensors").read_bytes() == (fused / "model.safetensors").read_bytes()


def test_broken_and_unfitting_checkpoints_are_named(tmp_path):
    path = tiny_model("qwen3")
    spec = check_backbone(path)
    to_megatron(path, spec, tmp_path / "megatron")
    other = tiny_model("qwen3", hidden_size=40)
    with pytest.raises(UserError, match="--backbone asks for .* per layer; they must be the same model"):
        from_megatron(tmp_path / "megatron", other, check_backbone(other), tmp_path / "back")
    more = tiny_model("qwen3", num_hidden_layers=5)
    with pytest.raises(UserError, match="they must be the same model"):
        from_megatron(tmp_path / "megatron", more, check_backbone(more), tmp_path / "back")
    with pytest.raises(UserError, match="torch_dist holds .metadata; check the path"):
        from_megatron(tmp_path, path, spec, tmp_path / "back")
    largest = max((tmp_path / "megatron/release").glob("__0_*.distcp"), key=lambda file: file.stat().st_size)
    largest.write_bytes(largest.read_bytes()[:1000])
    with pytest.raises(UserError, match=r"cannot be read \(.*; a complete checkpoint is needed"):
        from_megatron(tmp_path / "megatron", path, spec, tmp_path / "back")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["megatron"]


def _convert_where_files_are_small(path: Path, folder: Path) -> str:
    """The kernel refuses to write more than 10 kB to one file, as a full disk would."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
    with pytest.raises(UserError) as error:
        to_megatron(path, check_backbone(path), folder)
    return str(error.value)


def test_a_disk_that_refuses_leaves_one_error_and_no_folder(tmp_path):
    [message] = run_ranks(1, _convert_where_files_are_small, tiny_model("qwen3"), tmp_path / "megatron")
    assert message.startswith(f"{tmp_path / 'megatron'}: the Megatron checkpoint could not be written (")
    assert "free space" in message and "\n" not in message
    assert list(tmp_path.iterdir()) == []


def test_mixed_types_ask_for_one(tmp_path):
    path = shutil.copytree(tiny_model("qwen3"), tmp_path / "mixed")
    tensors = load_file(path / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"].bfloat16()
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    spec = check_backbone(path)
    with pytest.raises(UserError, match="--dtype: .* mixes BF16, F32; a Megatron checkpoint has one"):
        to_megatron(path, spec, tmp_path / "megatron")
    to_megatron(path, spec, tmp_path / "megatron", torch.bfloat16)
    assert "--bf16" in (tmp_path / "megatron/megatron_arguments.txt").read_text()
