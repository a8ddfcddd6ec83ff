"""The merged directory: transformers computes our log-probs from it; zero adapters change no bit."""
from __future__ import annotations

import functools
import json
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from copd_megatron.checkpoint import huggingface
from copd_megatron.checkpoint.adapter import Adapter
from copd_megatron.checkpoint.huggingface import save_merged
from copd_megatron.checkpoint.manager import CheckpointManager, RunState
from copd_megatron.checkpoint.peft import full_factors
from copd_megatron.config.checkpoint import CheckpointConfig
from copd_megatron.config.model import AdapterConfig
from copd_megatron.model.adapter_bank import AdapterBank
from copd_megatron.model.prompt import PromptEncoder
from copd_megatron.model.translate import TEXT_PREFIX, check_backbone
from copd_megatron.parallel.groups import Groups
from copd_megatron.parallel.layout import Layout
from copd_megatron.parallel.placement import Placement
from copd_megatron.types import UserError
from support.pictures import mixed_questions
from support.policies import CPU, make_bank, our_logprobs, put_random, transformers_logprobs
from support.ranks import RankError, run_ranks
from support.tiny_models import tiny_model

ADAPTER = AdapterConfig(rank=3, alpha=6.0, first_layer=1)


@functools.cache
def _encoder(path: Path) -> PromptEncoder:
    return PromptEncoder(path)


def _manager(run_dir: Path, bank: AdapterBank, path: Path) -> tuple[CheckpointManager, RunState]:
    manager = CheckpointManager(run_dir, CheckpointConfig(), bank.groups, path, _encoder(path))
    return manager, RunState(bank, {}, "{}")


def _weights(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


@pytest.mark.parametrize("family,shard_bytes,changes", [
    ("qwen3", None, {}), ("qwen3_vl", None, {}), ("llama", 40_000, {}), ("qwen2", None, {}),
    ("qwen3_vl", 60_000, {"tie_word_embeddings": False}), ("qwen2_5_vl", 60_000, {"num_key_value_heads": 1}),
    ("qwen3_moe", 60_000, {}), ("qwen3_vl_moe", None, {})],
    ids=lambda value: str(value))
def test_transformers_computes_our_logprobs(one_rank, tmp_path, family, shard_bytes, changes):
    """On text and, for the visual family, on images and video; the merge is that of two experts."""
    path = tiny_model(family, shard_bytes=shard_bytes, **changes)
    encoder = _encoder(path)
    prompts = [encoder.encode(item, item.key) for item in mixed_questions()[:3]
               if encoder.spec.is_visual or not item.media]
    groups = one_rank("a", "b")
    bank = make_bank(groups, encoder.spec, ADAPTER)
    bank.put_combination("merged", {"a": 0.75, "b": 0.5})
    manager, state = _manager(tmp_path, bank, path)
    manager.export_merged(state, "merged", tmp_path / "merged")
    auto = AutoModelForImageTextToText if encoder.spec.is_visual else AutoModelForCausalLM
    model, before = (auto.from_pretrained(folder, dtype=torch.float32) for folder in (tmp_path / "merged", path))
    ours = our_logprobs(path, groups, ADAPTER, {"merged": full_factors(bank, "merged")}, prompts, {"merged": 1.0})
    theirs = transformers_logprobs(model, prompts)
    torch.testing.assert_close(theirs, ours["merged"], rtol=0, atol=1e-4)
    assert (transformers_logprobs(before, prompts) - theirs).abs().max() > 0.1
    assert check_backbone(tmp_path / "merged") == encoder.spec, "the result is a backbone again"
    old, new = _weights(path), _weights(tmp_path / "merged")
    changed = {name[name.index("layers."):] for name, weight in old.items() if not torch.equal(new[name], weight)}
    assert changed == {f"{name}.weight" for name in bank.names()}, "moe_experts and the rest stay, under their names"
    again = PromptEncoder(tmp_path / "merged").encode(mixed_questions()[0], "text")
    assert again.content_hash == prompts[0].content_hash
    files = {file.name for file in path.iterdir()}
    assert {file.name for file in (tmp_path / "merged").iterdir()} == files | {"merge.json"}
    assert bool(shard_bytes) == ("model.safetensors.index.json" in files)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_zero_adapters_change_no_bit(one_rank, tmp_path, dtype):
    """Not even the sign of a zero."""
    path = shutil.copytree(tiny_model("qwen3"), tmp_path / "backbone")
    weights = {name: tensor.to(dtype) for name, tensor in _weights(path).items()}
    weights["model.layers.2.mlp.up_proj.weight"][:4] = -0.0
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    bank = make_bank(one_rank("a"), _encoder(path).spec, ADAPTER)
    bank.add_expert("fresh", seed=1)
    manager, state = _manager(tmp_path, bank, path)
    manager.export_merged(state, "fresh", tmp_path / "merged")
    after = _weights(tmp_path / "merged")
    assert after.keys() == weights.keys()
    for name, weight in weights.items():
        assert after[name].dtype == dtype
        assert torch.equal(after[name].view(torch.uint8), weight.view(torch.uint8)), name


@pytest.mark.parametrize(("family", "count"), [("qwen3", 3 * 7), ("qwen3_moe", 3 * 4 + 3)])
def test_only_adapted_weights_change_and_are_rounded_once(one_rank, tmp_path, family, count):
    """Those of layers 1 to 3, of which one has an MLP of its own where there are MoE layers: MoE experts are copied."""
    path = shutil.copytree(tiny_model(family), tmp_path / "backbone")
    weights = {name: tensor.bfloat16() for name, tensor in _weights(path).items()}
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    bank = make_bank(one_rank("a"), _encoder(path).spec, ADAPTER)
    manager, state = _manager(tmp_path, bank, path)
    manager.export_merged(state, "a", tmp_path / "merged")
    after, factors = _weights(tmp_path / "merged"), full_factors(bank, "a")
    adapted = {f"model.{name.rsplit('.', 1)[0]}.weight" for name in factors}
    assert len(adapted) == count
    for name, weight in weights.items():
        if name not in adapted:
            assert torch.equal(after[name], weight)
            continue
        key = name.removeprefix("model.").removesuffix(".weight")
        exact = weight.double() + 2.0 * factors[f"{key}.lora_B"].double() @ factors[f"{key}.lora_A"].double()
        step = 2.0 ** -8 * exact.abs().clamp_min(2.0 ** -100)  # half a unit in the last place of bfloat16
        assert ((after[name].double() - exact).abs() <= 1.001 * step + 1e-6).all()
        assert not torch.equal(after[name], weight)


def test_weights_in_other_formats_stay_behind(one_rank, tmp_path):
    """The directory would otherwise hold the untrained weights beside the merged ones."""
    path = shutil.copytree(tiny_model("qwen3"), tmp_path / "backbone")
    for name in ("pytorch_model.bin", "model.gguf", "consolidated.safetensors"):
        (path / name).write_bytes(b"old weights")
    (path / "LICENSE").write_text("terms")
    bank = make_bank(one_rank("a"), _encoder(path).spec, ADAPTER)
    manager, state = _manager(tmp_path, bank, path)
    manager.export_merged(state, "a", tmp_path / "merged")
    names = {file.name for file in (tmp_path / "merged").iterdir()}
    assert not names & {"pytorch_model.bin", "model.gguf", "consolidated.safetensors"}
    assert {"LICENSE", "config.json", "tokenizer.json", "chat_template.jinja", "model.safetensors"} <= names
    assert json.loads((tmp_path / "merged/merge.json").read_text()) == {"backbone": str(path), "adapted_weights": 21}


def _export_on_rank(layout: tuple[int, int, int], folder: Path) -> None:
    tp, pp, replicas = layout
    groups = Groups.create(Layout(tp=tp, pp=pp, replicas=replicas), Placement.build(("a", "b"), replicas))
    bank = make_bank(groups, _encoder(tiny_model("qwen3")).spec, ADAPTER)
    if "a" not in groups.hosted:
        put_random(bank, "a", trainable=False)
    manager, state = _manager(folder, bank, tiny_model("qwen3"))
    manager.export_merged(state, "a", folder)


def test_all_layouts_write_the_same_bytes(tmp_path):
    _encoder(tiny_model("qwen3"))  # once, before the ranks are forked
    for name, layout in {"one": (1, 1, 1), "tp-pp": (2, 2, 1), "replicas": (1, 1, 2)}.items():
        run_ranks(layout[0] * layout[1] * layout[2], _export_on_rank, layout, tmp_path / name)
        for file in (tmp_path / "one").iterdir():
            assert (tmp_path / name / file.name).read_bytes() == file.read_bytes(), file.name


def test_scope_completion_is_refused_on_all_ranks_with_the_ways_out(tmp_path):
    encoder = _encoder(tiny_model("qwen3"))

    def on_rank():
        groups = Groups.create(Layout(tp=2), Placement.build(("a",), 1))
        bank = make_bank(groups, encoder.spec,
                         ADAPTER.model_copy(update={"scope": "completion"}))
        manager, state = _manager(tmp_path, bank, tiny_model("qwen3"))
        with pytest.raises(UserError) as error:
            manager.export_merged(state, "a", tmp_path / "merged")
        return str(error.value)

    first, second = run_ranks(2, on_rank)
    assert first == second and first.startswith("adapter.scope: completion")
    assert "activated LoRA" in first and "adapter.scope=sequence" in first
    assert not (tmp_path / "merged").exists()


def test_an_adapter_without_a_weight_is_refused(one_rank, tmp_path):
    factors = {f"layers.9.mlp.up_proj.lora_{f}": torch.ones(2, 2, device=CPU) for f in "AB"}
    with pytest.raises(UserError, match="model.layers.9.mlp.up_proj.weight has an adapter but is not in"):
        save_merged(tmp_path / "merged", tiny_model("qwen3"), Adapter(factors, 1.0), TEXT_PREFIX["qwen3"])
    assert list(tmp_path.iterdir()) == []


def test_a_killed_export_leaves_nothing_that_loads(tmp_path, monkeypatch):
    """Killed at the second of several weight files: only a temporary folder, and that one has no config.json."""
    path = tiny_model("qwen3", shard_bytes=40_000)
    encoder, rewrite, written = _encoder(path), huggingface.rewrite_file, []

    def rewrite_then_die(source, target, *rest):
        rewrite(source, target, *rest)
        written.append(target)
        if len(written) == 2:
            os.kill(os.getpid(), signal.SIGKILL)

    def on_rank():
        groups = Groups.create(Layout(), Placement.build(("a",), 1))
        manager, state = _manager(tmp_path, make_bank(groups, encoder.spec, ADAPTER), path)
        manager.export_merged(state, "a", tmp_path / "merged")

    monkeypatch.setattr(huggingface, "rewrite_file", rewrite_then_die)
    with pytest.raises(RankError, match="died with exit code -9"):
        run_ranks(1, on_rank)
    assert [p.name for p in tmp_path.iterdir()] == ["merged.tmp"]
    assert len(list((tmp_path / "merged.tmp").glob("*.safetensors"))) == 2
    assert not (tmp_path / "merged.tmp/config.json").exists()
