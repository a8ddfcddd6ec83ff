"""PEFT folders: the peft library computes our log-probs from them, and we read back what we and it wrote."""
from __future__ import annotations

import copy
import functools
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from copd_megatron.checkpoint.adapter import Adapter
from copd_megatron.checkpoint.manager import CheckpointManager, RunState
from copd_megatron.checkpoint.peft import CONFIG, WEIGHTS, full_factors, load_peft_adapter, save_peft_adapter
from copd_megatron.config.checkpoint import CheckpointConfig
from copd_megatron.config.model import AdapterConfig
from copd_megatron.model.adapter_bank import AdapterBank
from copd_megatron.model.prompt import PromptEncoder
from copd_megatron.model.translate import TEXT_PREFIX
from copd_megatron.parallel.groups import Groups
from copd_megatron.parallel.layout import Layout
from copd_megatron.parallel.placement import Placement
from copd_megatron.types import Prompt, UserError
from support.pictures import mixed_questions
from support.policies import make_bank, our_logprobs, put_random, transformers_logprobs
from support.ranks import run_ranks
from support.tiny_models import tiny_model

EXPERTS = ("a", "b")
MERGED = {"a": 0.75, "b": 0.5}


@functools.cache
def _encoder(family: str) -> PromptEncoder:
    return PromptEncoder(tiny_model(family))


@functools.cache
def _prompts(family: str) -> list[Prompt]:
    """Text, and for the visual family two images and a video."""
    encoder = _encoder(family)
    return [encoder.encode(item, item.key) for item in mixed_questions()[:3]
            if encoder.spec.is_visual or not item.media]


@functools.cache
def _model(family: str) -> torch.nn.Module:
    auto = AutoModelForImageTextToText if _encoder(family).spec.is_visual else AutoModelForCausalLM
    return auto.from_pretrained(tiny_model(family), dtype=torch.float32).eval()


def _with_adapter(family: str, folder: Path) -> torch.nn.Module:
    return peft.PeftModel.from_pretrained(copy.deepcopy(_model(family)), folder).eval()


def _adapter(scope: str = "sequence", first_layer: int = 0, **changes) -> AdapterConfig:
    return AdapterConfig(rank=3, alpha=6.0, scope=scope, first_layer=first_layer, **changes)


def _bank(groups: Groups, family: str, adapter: AdapterConfig) -> AdapterBank:
    """With two random experts and their rank-concatenated combination."""
    bank = make_bank(groups, _encoder(family).spec, adapter)
    bank.put_combination("merged", MERGED)
    return bank


def _export(bank: AdapterBank, family: str, policy: str, folder: Path) -> Path:
    encoder = _encoder(family)
    header = encoder.invocation_token_ids if bank.config.scope == "completion" else None
    adapter = Adapter(full_factors(bank, policy), bank.scaling_of(policy), header)
    save_peft_adapter(folder, adapter, TEXT_PREFIX[family], encoder.path)
    return folder


# --- exports ------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("family,scope,first_layer", [
    ("qwen3", "sequence", 0), ("qwen3", "sequence", 2), ("qwen3", "completion", 0), ("qwen3", "completion", 2),
    ("qwen3_vl", "sequence", 1), ("qwen3_vl", "completion", 0), ("qwen2_5_vl", "sequence", 0),
    ("qwen2_5_vl", "completion", 1), ("qwen2", "sequence", 1), ("qwen3_moe", "sequence", 0),
    ("qwen3_vl_moe", "completion", 1)])
def test_the_peft_library_computes_our_logprobs(one_rank, tmp_path, family, scope, first_layer):
    # PEFT 0.21 takes gate_proj, up_proj and down_proj of a Qwen3-MoE for its fused MoE experts, in dense layers too.
    targets = {"targets": ("q_proj", "k_proj", "v_proj", "o_proj")} if family == "qwen3_moe" else {}
    groups, adapter = one_rank(*EXPERTS), _adapter(scope, first_layer, **targets)
    bank, prompts = _bank(groups, family, adapter), _prompts(family)
    factors = {policy: full_factors(bank, policy) for policy in ("a", "merged")}
    ours = our_logprobs(tiny_model(family), groups, adapter, factors, prompts,
                        {policy: bank.scaling_of(policy) for policy in factors})
    for policy, want in ours.items():
        model = _with_adapter(family, _export(bank, family, policy, tmp_path / policy))
        torch.testing.assert_close(transformers_logprobs(model, prompts), want, rtol=0, atol=1e-4)
    assert (transformers_logprobs(_model(family), prompts) - ours["a"]).abs().max() > 0.1
    assert (ours["a"] - ours["merged"]).abs().max() > 0.1


@pytest.mark.parametrize("scope", ["sequence", "completion"])
def test_attention_of_a_moe_backbone(one_rank, tmp_path, scope):
    groups, adapter = one_rank(*EXPERTS), _adapter(scope, targets=("q_proj", "o_proj"))
    bank, prompts = _bank(groups, "qwen3_moe", adapter), _prompts("qwen3_moe")
    ours = our_logprobs(tiny_model("qwen3_moe"), groups, adapter, {"a": full_factors(bank, "a")}, prompts,
                        {"a": bank.scaling_of("a")})["a"]
    model = _with_adapter("qwen3_moe", _export(bank, "qwen3_moe", "a", tmp_path / "a"))
    torch.testing.assert_close(transformers_logprobs(model, prompts), ours, rtol=0, atol=1e-4)


def test_activated_lora_leaves_the_prompt_alone(one_rank, tmp_path):
    """The same factors as plain LoRA compute something else: the equality above is about the adapted span too."""
    bank = _bank(one_rank(*EXPERTS), "qwen3", _adapter("completion"))
    folder = _export(bank, "qwen3", "a", tmp_path / "activated")
    config = json.loads((folder / CONFIG).read_text())
    assert config.pop("alora_invocation_tokens") == list(_encoder("qwen3").header_token_ids)
    plain = shutil.copytree(folder, tmp_path / "plain")
    (plain / CONFIG).write_text(json.dumps(config))
    activated, everywhere = (transformers_logprobs(_with_adapter("qwen3", path), _prompts("qwen3"))
                             for path in (folder, plain))
    assert (activated - everywhere).abs().max() > 0.1


def _export_on_rank(layout: tuple[int, int, int], run_dir: Path, scope: str, kv_heads: int) -> None:
    tp, pp, replicas = layout
    groups = Groups.create(Layout(tp=tp, pp=pp, replicas=replicas), Placement.build(EXPERTS, replicas))
    bank = make_bank(groups, replace(_encoder("qwen3").spec, num_kv_heads=kv_heads), _adapter(scope, 1))
    for expert in set(EXPERTS) - set(groups.hosted):
        put_random(bank, expert, trainable=False)
    bank.put_combination("merged", MERGED)
    manager = CheckpointManager(run_dir, CheckpointConfig(), groups, _encoder("qwen3").path, _encoder("qwen3"))
    for policy in ("b", "merged"):
        manager.export_peft(RunState(bank, {}, "{}"), policy, run_dir / policy)
        before = bank.parameters_of(policy)
        load_peft_adapter(bank, "again", run_dir / policy, _encoder("qwen3").header_token_ids)
        again = bank.parameters_of("again")
        assert bank.scaling_of("again") == bank.scaling_of(policy)
        assert again.keys() == before.keys()
        assert all(torch.equal(again[name], before[name]) and not again[name].requires_grad for name in before)
        assert all(again[name].cut == before[name].cut for name in before)


@pytest.mark.parametrize(("scope", "kv_heads"), [("sequence", 2), ("completion", 1)])
def test_exports_of_all_layouts_are_one(tmp_path, scope, kv_heads):
    """Byte for byte; and on each layout, loading an export gives back the shards it was made from."""
    _encoder("qwen3")  # once, before the ranks are forked
    layouts = {"one": (1, 1, 1), "tp": (2, 1, 1)}
    if scope == "sequence":
        layouts |= {"pp": (1, 2, 1), "both": (2, 2, 1), "replicas": (1, 1, 2)}
    for name, layout in layouts.items():
        run_ranks(layout[0] * layout[1] * layout[2], _export_on_rank, layout, tmp_path / name, scope, kv_heads)
        for policy in ("b", "merged"):
            for file in (WEIGHTS, CONFIG):
                assert (tmp_path / name / policy / file).read_bytes() == (tmp_path / "one" / policy / file).read_bytes()


@pytest.mark.parametrize("rank,alpha", [(3, 6.0), (3, 0.3), (7, 1.0), (48, 32.0), (49, 1.0), (96, 0.1)])
def test_the_scaling_survives(one_rank, tmp_path, rank, alpha):
    bank = make_bank(one_rank("a"), _encoder("qwen3").spec, AdapterConfig(rank=rank, alpha=alpha, targets=("q_proj",)))
    folder = _export(bank, "qwen3", "a", tmp_path / "a")
    assert json.loads((folder / CONFIG).read_text())["lora_alpha"] == alpha
    load_peft_adapter(bank, "again", folder)
    assert bank.scaling_of("again") == bank.scaling_of("a")


# --- imports ------------------------------------------------------------------------------------------------------

def test_an_adapter_made_by_the_peft_library(one_rank, tmp_path):
    """Fewer targets, other rank, rank-stabilised scaling: what users bring."""
    made = peft.get_peft_model(copy.deepcopy(_model("qwen3")), peft.LoraConfig(
        r=4, lora_alpha=6, target_modules=["q_proj", "down_proj"], use_rslora=True, lora_dropout=0.1,
        layers_to_transform=[1, 3], init_lora_weights=False, task_type="CAUSAL_LM"))
    made.save_pretrained(tmp_path)
    groups, adapter = one_rank("a"), _adapter()
    bank = make_bank(groups, _encoder("qwen3").spec, adapter)
    load_peft_adapter(bank, "teacher", tmp_path)
    factors = full_factors(bank, "teacher")
    assert {name.rsplit(".", 1)[0] for name in factors} == {
        f"layers.{i}.{m}" for i in (1, 3) for m in ("self_attn.q_proj", "mlp.down_proj")}
    ours = our_logprobs(tiny_model("qwen3"), groups, adapter, {"teacher": factors}, _prompts("qwen3"),
                        {"teacher": bank.scaling_of("teacher")})["teacher"]
    theirs = transformers_logprobs(made.eval(), _prompts("qwen3"))
    torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-4)
    assert (transformers_logprobs(_model("qwen3"), _prompts("qwen3")) - theirs).abs().max() > 0.05


def test_moe_experts_have_no_adapter(one_rank, tmp_path):
    """Of the four layers of this backbone only the third has an MLP of its own."""
    family, adapter = "qwen3_moe", _adapter(targets=("q_proj", "up_proj"))
    bank = _bank(one_rank(*EXPERTS), family, adapter)
    assert bank.names() == ["layers.0.self_attn.q_proj", "layers.1.self_attn.q_proj", "layers.2.self_attn.q_proj",
                            "layers.2.mlp.up_proj", "layers.3.self_attn.q_proj"]
    folder = _export(bank, family, "a", tmp_path / "a")
    load_peft_adapter(bank, "again", folder)
    assert all(torch.equal(p, bank.parameters_of("a")[n]) for n, p in bank.parameters_of("again").items())
    tensors = load_file(folder / WEIGHTS)
    save_file({name.replace("layers.2.mlp", "layers.3.mlp"): t for name, t in tensors.items()}, folder / WEIGHTS)
    with pytest.raises(UserError, match="layers.3.mlp.up_proj.lora_.*belongs to no linear"):
        load_peft_adapter(bank, "other", folder)


OPTIONS = {
    "peft_type": "ADALORA", "use_dora": True, "bias": "lora_only", "fan_in_fan_out": True, "lora_bias": True,
    "rank_pattern": {"q_proj": 8}, "alpha_pattern": {"q_proj": 8}, "modules_to_save": ["lm_head"],
    "trainable_token_indices": [1, 2], "target_parameters": ["w"], "layer_replication": [[0, 2], [1, 3]],
    "init_lora_weights": "pissa_niter_4", "use_qalora": True, "use_bdlora": {"nblocks": 2},
    "arrow_config": {"arrow_top_k": 3}, "corda_config": {"x": 1}, "kasa_config": {"x": 1}, "velora_config": {"x": 1},
    "monteclora_config": {"x": 1}, "lora_ga_config": {"x": 1}, "loftq_config": {"loftq_bits": 4},
    "an_option_of_tomorrow": True,
}


@pytest.fixture
def bank_and_folder(one_rank, tmp_path) -> tuple[AdapterBank, Path]:
    """A bank whose experts adapt q_proj and down_proj from layer 1 on, and one of them exported."""
    adapter = _adapter(first_layer=1, targets=("q_proj", "down_proj"))
    bank = make_bank(one_rank(*EXPERTS), _encoder("qwen3").spec, adapter)
    return bank, _export(bank, "qwen3", "a", tmp_path / "a")


def _edit_config(folder: Path, **changes) -> None:
    config = json.loads((folder / CONFIG).read_text()) | changes
    (folder / CONFIG).write_text(json.dumps({k: v for k, v in config.items() if v != "absent"}))


@pytest.mark.parametrize("option", OPTIONS)
def test_foreign_options_are_refused(bank_and_folder, option):
    bank, folder = bank_and_folder
    _edit_config(folder, **{option: OPTIONS[option]})
    with pytest.raises(UserError, match=rf"adapter .*: {option} .*; allowed is .*; "):
        load_peft_adapter(bank, "teacher", folder)
    assert "teacher" not in bank.slots


def test_every_option_of_the_library_is_off_or_understood(bank_and_folder):
    """Defaults of the installed peft never stand in the way."""
    bank, folder = bank_and_folder
    tensors = load_file(folder / WEIGHTS)
    config = peft.LoraConfig.from_pretrained(folder)
    config.save_pretrained(folder)
    assert len(json.loads((folder / CONFIG).read_text())) > 30
    load_peft_adapter(bank, "teacher", folder)
    assert len(bank.parameters_of("teacher")) == len(tensors)


def _tensors(change: Callable[[dict[str, torch.Tensor], str], None]) -> Callable[[Path], None]:
    """An edit of the tensors, told the name of one of them."""
    def edit(folder: Path) -> None:
        tensors = load_file(folder / WEIGHTS)
        change(tensors, "base_model.model.model.layers.1.mlp.down_proj.lora_A.weight")
        save_file(tensors, folder / WEIGHTS)
    return edit


def _rename(old: str, new: str) -> Callable[[dict[str, torch.Tensor], str], None]:
    """Of both factors of a weight."""
    def change(tensors: dict[str, torch.Tensor], name: str) -> None:
        for key in (name, name.replace("lora_A", "lora_B")):
            tensors[key.replace(old, new)] = tensors.pop(key)
    return change


BROKEN = {
    "no folder": (shutil.rmtree, "cannot be read"),
    "no weights": (lambda f: (f / WEIGHTS).unlink(), "cannot be read"),
    "config is no JSON": (lambda f: (f / CONFIG).write_text("{"), "cannot be read"),
    "config is a list": (lambda f: (f / CONFIG).write_text("[]"), "lacks r or lora_alpha"),
    "truncated weights": (lambda f: (f / WEIGHTS).write_bytes((f / WEIGHTS).read_bytes()[:-8]), "cannot be read"),
    "no rank": (lambda f: _edit_config(f, r="absent"), "lacks r or lora_alpha"),
    "rank 0": (lambda f: _edit_config(f, r=0), "lacks r or lora_alpha"),
    "other rank": (lambda f: _edit_config(f, r=4), r"the backbone and r=4 need \[4, 48\]"),
    "nothing in it": (lambda f: save_file({}, f / WEIGHTS), "is empty"),
    "activated": (lambda f: _edit_config(f, alora_invocation_tokens=[1, 2]), "an activated LoRA under .*sequence"),
    "other shape": (_tensors(lambda t, n: t.update({n: t[n][:, 1:].contiguous()})), r"is \[3, 47\]"),
    "NaN": (_tensors(lambda t, n: t[n].fill_(float("nan"))), "NaN"),
    "integers": (_tensors(lambda t, n: t.update({n: t[n].int()})), "integers"),
    "B missing": (_tensors(lambda t, n: t.pop(n.replace("_A", "_B"))), "but not layers.1.mlp.down_proj.lora_B"),
    "layer too deep": (_tensors(_rename("layers.1", "layers.4")), "belongs to no linear"),
    "layer too low": (_tensors(_rename("layers.1", "layers.0")), "layers from adapter.first_layer=1 on"),
    "other target": (_tensors(_rename("mlp.down_proj", "self_attn.o_proj")), "o_proj, which .*targets leaves out"),
    "other module": (_tensors(_rename("mlp.down_proj", "self_attn.down_proj")), "belongs to no linear"),
    "other family": (_tensors(_rename("model.model", "model.model.language_model")), "belongs to no linear"),
    "an embedding": (_tensors(_rename("layers.1.mlp.down_proj", "embed_tokens")), "belongs to no linear"),
}


@pytest.mark.parametrize("damage", BROKEN)
def test_broken_or_unfitting_folders_are_refused(bank_and_folder, damage):
    bank, folder = bank_and_folder
    edit, message = BROKEN[damage]
    edit(folder)
    with pytest.raises(UserError, match=f"adapter .*: .*{message}.*; "):
        load_peft_adapter(bank, "teacher", folder)
    assert "teacher" not in bank.slots


def test_a_moe_layer_has_no_mlp_of_its_own_to_adapt(one_rank, tmp_path):
    """In the other layers it may be; a name that nothing reads is refused, not dropped."""
    bank = make_bank(one_rank("a"), _encoder("qwen3_moe").spec, _adapter())
    folder = _export(bank, "qwen3_moe", "a", tmp_path / "a")
    load_peft_adapter(bank, "again", folder)
    assert bank.parameters_of("again").keys() == bank.parameters_of("a").keys()
    assert "layers.2.mlp.up_proj.lora_A" in bank.parameters_of("a")
    tensors = load_file(folder / WEIGHTS)
    for factor in "AB":
        name = f"base_model.model.model.layers.2.mlp.up_proj.lora_{factor}.weight"
        tensors[name.replace("layers.2", "layers.1")] = tensors[name].clone()
    save_file(tensors, folder / WEIGHTS)
    with pytest.raises(UserError, match="'layers.1.mlp.up_proj.lora_.' belongs to no linear of the backbone"):
        load_peft_adapter(bank, "other", folder)


def test_scope_completion_wants_its_own_header(one_rank, tmp_path):
    bank = make_bank(one_rank("a"), _encoder("qwen3").spec, _adapter("completion"))
    folder, header = _export(bank, "qwen3", "a", tmp_path / "a"), _encoder("qwen3").header_token_ids
    load_peft_adapter(bank, "teacher", folder, header)
    with pytest.raises(UserError, match="alora_invocation_tokens .*; use an adapter for this template"):
        load_peft_adapter(bank, "other", folder, header[1:])
    _edit_config(folder, alora_invocation_tokens="absent")
    with pytest.raises(UserError, match="a plain LoRA under adapter.scope=completion"):
        load_peft_adapter(bank, "other", folder, header)
