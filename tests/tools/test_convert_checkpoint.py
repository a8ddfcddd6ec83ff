"""The conversion tool as a user runs it: every subcommand on real files, and one clear line for every mistake."""
from __future__ import annotations

import importlib.util
import json
import re
import shutil
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from copd_megatron.checkpoint import weight_stream
from copd_megatron.checkpoint.adapter import Adapter
from copd_megatron.checkpoint.peft import full_factors, save_peft_adapter
from copd_megatron.config.loading import to_json
from copd_megatron.config.model import AdapterConfig
from copd_megatron.model.prompt import PromptEncoder
from copd_megatron.model.translate import TEXT_PREFIX
from copd_megatron.parallel.groups import Groups
from copd_megatron.parallel.layout import Layout
from copd_megatron.parallel.placement import Placement
from support.policies import make_bank
from support.ranks import run_ranks
from support.saves import manager_of, saved, state_of
from support.tiny_models import tiny_model
from support.toy_run import toy_config

TOOL = Path(__file__).resolve().parents[2] / "tools/convert_checkpoint.py"
EXPERTS = ("text", "image")
ADAPTER = AdapterConfig(rank=3, alpha=6.0, first_layer=1)
WEIGHTS = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def tool():
    spec = importlib.util.spec_from_file_location("convert_checkpoint", TOOL)
    module = sys.modules["convert_checkpoint"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    del sys.modules["convert_checkpoint"]


def _save_run(run_dir: Path, scope: str) -> None:
    """Saves of steps 2 and 4 of a run of two experts, and its merged policy; step 2 was the best."""
    for step in (2, 4):
        groups = Groups.create(Layout(), Placement.build(EXPERTS, 1))
        encoder = PromptEncoder(tiny_model("qwen3"))
        adapter = ADAPTER.model_copy(update={"scope": scope})
        state = state_of(groups, encoder, True, adapter, step)
        with torch.no_grad():
            for parameter in state.bank.parameters():
                parameter.mul_(step / 4)
        state.best_step, state.config_json = 2, to_json(toy_config(
            "qwen3", EXPERTS, adapter=adapter.model_dump(), merge={"rule": "task_arithmetic", "scale": 0.75}))
        state.bank.put_combination("merged", dict.fromkeys(EXPERTS, 0.75))
        saved(manager_of(run_dir, groups, encoder), state, (*EXPERTS, "merged"))
        groups.destroy()


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[str, Path]:
    """A run of each adapter scope."""
    tiny_model("qwen3")
    folder = tmp_path_factory.mktemp("runs")
    for scope in ("sequence", "completion"):
        run_ranks(1, _save_run, folder / scope, scope)
    return {scope: folder / scope for scope in ("sequence", "completion")}


@pytest.fixture(scope="module")
def adapters(tmp_path_factory) -> tuple[Path, Path]:
    """Two PEFT folders of a vision-language backbone, of different ranks and targets."""
    folder, groups = tmp_path_factory.mktemp("adapters"), Groups.create(Layout(), Placement.build(("a",), 1))
    spec = PromptEncoder(tiny_model("qwen3_vl")).spec
    for name, section in {"maths": {}, "code": {"rank": 2, "targets": ("v_proj", "up_proj"), "first_layer": 0}}.items():
        bank = make_bank(groups, spec, ADAPTER.model_copy(update=section))
        save_peft_adapter(folder / name, Adapter(full_factors(bank, "a"), 1.5), TEXT_PREFIX["qwen3_vl"],
                          tiny_model("qwen3_vl"))
    groups.destroy()
    return folder / "maths", folder / "code"


def _call(tool, *arguments: object) -> int:
    return tool.main([str(argument) for argument in arguments])


def _factors(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / WEIGHTS)


def test_a_merged_run_is_the_runs_merged_policy(tool, runs, tmp_path, capsys):
    """By the run's own rule, from its newest save; transformers on the dense weights, PEFT on the adapter, and our
    backbone agree."""
    assert _call(tool, "merge", "--run", runs["sequence"], "--out", tmp_path / "merged", "--profile") == 0
    out = capsys.readouterr()
    assert "0.75 x text, 0.75 x image" in out.out and "x the largest shard" in out.out
    assert "merge: 100 % of" in out.err
    about = json.loads((tmp_path / "merged/merge.json").read_text())
    assert about["weights"] == {"text": 0.75, "image": 0.75} and about["adapted_weights"] == 21
    assert _call(tool, "verify", tmp_path / "merged", f"{runs['sequence']}:merged", "--text", "2+3=", "--text", "abc",
                 "--answer", "5 is it") == 0
    table = capsys.readouterr().out
    assert table.count("transformers") == table.count("copd_megatron") == 2 and "100.0 %" in table
    assert _call(tool, "verify", tmp_path / "merged", tiny_model("qwen3"), "--answer", "5") == 1
    assert "ABOVE 0.0001" in capsys.readouterr().out


def test_the_best_save_and_other_rules(tool, runs, tmp_path, capsys):
    run, base = runs["sequence"], load_file(tiny_model("qwen3") / "model.safetensors")
    name = "model.layers.2.mlp.up_proj.weight"

    def delta(*arguments: str) -> torch.Tensor:
        assert _call(tool, "merge", "--run", run, *arguments, "--out", tmp_path / "out", "--overwrite") == 0
        return load_file(tmp_path / "out/model.safetensors")[name] - base[name]

    text, image = (delta("--rule", "concat", "--experts", expert) for expert in EXPERTS)
    for arguments, want in (("--rule", "uniform"), (text + image) / 2), (
            ("--rule", "weighted", "--weights", "text=0.2", "image=-1"), 0.2 * text - image), (
            ("--rule", "task_arithmetic", "--scale", "0.1"), 0.1 * (text + image)), (
            ("--rule", "concat"), text + image), (
            ("--step", "best"), 0.75 * (text + image) / 4), (("--step", "4"), 0.75 * (text + image)), (
            ("--rule", "svd", "--rank", "6"), (text + image) / 2):
        torch.testing.assert_close(delta(*arguments), want, rtol=0, atol=2e-6)
    capsys.readouterr()
    cut = delta("--rule", "svd", "--rank", "2")
    printed = capsys.readouterr().out
    about = json.loads((tmp_path / "out/merge.json").read_text())
    assert f"relative error |delta - cut| / |delta| {about['relative_error']:.4g}" in printed and about["rank"] == 2
    want = float((cut - (text + image) / 2).norm() / ((text + image) / 2).norm())
    assert 0 < want <= about["worst_relative_error"] + 1e-5


def test_adapters_of_a_backbone_that_sees(tool, adapters, tmp_path, capsys):
    """Two PEFT folders of other ranks and targets, weighted: dense and as one adapter, the same on text and image."""
    backbone = tiny_model("qwen3_vl", shard_bytes=60_000)
    source = ("--backbone", backbone, "--adapters", *adapters, "--rule", "weighted", "--weights", "maths=0.7",
              "code=-0.4")
    for command in ("merge", "peft"):
        assert _call(tool, command, *source, "--out", tmp_path / command) == 0
    Image.fromarray(np.arange(48 * 48 * 3, dtype=np.uint8).reshape(48, 48, 3)).save(tmp_path / "picture.png")
    capsys.readouterr()
    assert _call(tool, "verify", tmp_path / "merge", f"{backbone}+{tmp_path / 'peft'}", "--image",
                 tmp_path / "picture.png", "--answer", "two red") == 0
    assert _call(tool, "merge", *source, "--dtype", "bfloat16", "--out", tmp_path / "half") == 0
    exact, half = ({name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}
                   for folder in (tmp_path / "merge", tmp_path / "half"))
    assert all(torch.equal(half[name], tensor.bfloat16()) for name, tensor in exact.items())
    config = json.loads((tmp_path / "half/config.json").read_text())
    assert config["dtype"] == "bfloat16"
    assert not [part for part in config.values() if isinstance(part, dict) and part.get("dtype") == "float32"]
    index = json.loads((tmp_path / "half/model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in half.values())
    assert {f.name for f in backbone.iterdir()} | {"merge.json"} == {f.name for f in (tmp_path / "half").iterdir()}


def test_fp8_rows_of_a_backbone_and_of_a_merge(tool, runs, tmp_path, capsys):
    """Zero adapters merge into the quantised backbone; sizes that FP8 cannot take are one line."""
    backbone = tiny_model("qwen3", head_dim=16)
    assert _call(tool, "quantize", "--backbone", backbone, "--out", tmp_path / "fp8", "--profile") == 0
    out = capsys.readouterr()
    assert "28 tensors in FP8 rows" in out.out and "quantize: 100 % of" in out.err
    factors = {"layers.1.mlp.up_proj.lora_A": torch.ones(2, 32), "layers.1.mlp.up_proj.lora_B": torch.zeros(48, 2)}
    save_peft_adapter(tmp_path / "zero", Adapter(factors, 1.5), TEXT_PREFIX["qwen3"], backbone)
    assert _call(tool, "merge", "--backbone", backbone, "--adapters", tmp_path / "zero", "--quantize", "fp8_rowwise",
                 "--out", tmp_path / "merged") == 0
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "merged" / name).read_bytes() == (tmp_path / "fp8" / name).read_bytes()
    capsys.readouterr()
    assert _call(tool, "quantize", "--run", runs["sequence"], "--out", tmp_path / "no") == 2
    assert "k_proj.weight is [24, 32]; FP8 products need multiples of 16" in capsys.readouterr().err


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_zero_adapters_leave_every_byte(tool, runs, tmp_path, dtype):
    backbone = shutil.copytree(tiny_model("qwen3"), tmp_path / "backbone")
    weights = {name: tensor.to(dtype) for name, tensor in load_file(backbone / "model.safetensors").items()}
    weights["model.layers.2.mlp.up_proj.weight"][:4] = -0.0
    save_file(weights, backbone / "model.safetensors", metadata={"format": "pt"})
    assert _call(tool, "peft", "--run", runs["sequence"], "--policy", "text", "--out", tmp_path / "zero") == 0
    zero = {name: tensor * 0 if "lora_B" in name else tensor for name, tensor in _factors(tmp_path / "zero").items()}
    save_file(zero, tmp_path / "zero" / WEIGHTS, metadata={"format": "pt"})
    assert _call(tool, "merge", "--backbone", backbone, "--adapters", tmp_path / "zero", "--out", tmp_path / "out") == 0
    for file in backbone.iterdir():
        assert (tmp_path / "out" / file.name).read_bytes() == file.read_bytes(), file.name


def test_scope_completion_stays_an_activated_lora(tool, runs, tmp_path, capsys):
    run = runs["completion"]
    assert _call(tool, "merge", "--run", run, "--out", tmp_path / "merged") == 2
    error = capsys.readouterr().err
    assert "completion never merges into dense weights" in error and error.count("\n") == 1
    assert "`convert_checkpoint.py peft`" in error and "with any adapter.first_layer" in error
    assert not (tmp_path / "merged").exists()
    for policy in ("image", "merged"):
        assert _call(tool, "peft", "--run", run, "--policy", policy, "--out", tmp_path / policy) == 0
        config = json.loads((tmp_path / policy / "adapter_config.json").read_text())
        assert config["alora_invocation_tokens"] == list(PromptEncoder(tiny_model("qwen3")).header_token_ids)
    capsys.readouterr()
    assert _call(tool, "verify", f"{tiny_model('qwen3')}+{tmp_path / 'merged'}", f"{run}:merged", "--answer", "5") == 0
    assert _call(tool, "verify", f"{run}:image", f"{run}:merged", "--answer", "5") == 1


def test_an_export_is_the_expert_and_its_import_the_export(tool, runs, tmp_path, capsys):
    run = runs["sequence"]
    newest = run / "checkpoints/step_000004/adapters"
    for policy in ("text", "merged"):
        assert _call(tool, "peft", "--run", run, "--policy", policy, "--out", tmp_path / policy) == 0
        assert _call(tool, "import", "--backbone", tiny_model("qwen3"), "--adapter", tmp_path / policy, "--out",
                     tmp_path / f"{policy}_expert") == 0
        for folder in (tmp_path / policy, tmp_path / f"{policy}_expert"):
            assert (folder / WEIGHTS).read_bytes() == (newest / policy / WEIGHTS).read_bytes()
    printed = capsys.readouterr().out
    assert "adapter.rank=3 " in printed and "adapter.alpha=6 " in printed and "adapter.first_layer=1 " in printed
    assert f"experts.NAME.init_from={tmp_path / 'text_expert'}" in printed
    assert _call(tool, "peft", "--run", run, "--rank", "2", "--out", tmp_path / "cut") == 0
    assert next(t.shape[0] for name, t in _factors(tmp_path / "cut").items() if "lora_A" in name) == 2
    assert "rank 2: relative error" in capsys.readouterr().out


def test_to_megatron_and_back(tool, tmp_path, capsys):
    backbone = tiny_model("qwen3")
    assert _call(tool, "megatron", "--backbone", backbone, "--out", tmp_path / "megatron") == 0
    assert "megatron_arguments.txt" in capsys.readouterr().out
    assert _call(tool, "megatron", "--backbone", backbone, "--checkpoint", tmp_path / "megatron", "--out",
                 tmp_path / "back", "--profile") == 0
    assert (tmp_path / "back/model.safetensors").read_bytes() == (backbone / "model.safetensors").read_bytes()
    assert _call(tool, "megatron", "--backbone", tiny_model("qwen3_vl"), "--out", tmp_path / "no") == 2


MISTAKES = {
    "no backbone": (["merge", "--adapters", "x", "--out", "{}/out"], "--backbone: missing"),
    "nothing to quantise": (["quantize", "--out", "{}/out"], "--backbone: missing"),
    "no run": (["merge", "--run", "{}/nothing", "--out", "{}/out"], "--run: .* holds no complete save"),
    "no step": (["peft", "--run", "RUN", "--step", "3", "--out", "{}/out"], "--step: .* no complete save of step 3"),
    "no policy": (["peft", "--run", "RUN", "--policy", "chess", "--out", "{}/out"], "allowed are text, image, merged"),
    "no expert": (["merge", "--run", "RUN", "--experts", "chess", "--out", "{}/out"], "allowed are text, image"),
    "no weights": (["merge", "--run", "RUN", "--rule", "weighted", "--out", "{}/out"], "one weight for each of"),
    "no rank": (["merge", "--run", "RUN", "--rule", "svd", "--out", "{}/out"], "--rank: missing"),
    "a number that is none": (["merge", "--run", "RUN", "--rule", "task_arithmetic", "--scale", "nan", "--out",
                               "{}/out"], "scale"),
    "there already": (["merge", "--run", "RUN", "--out", "RUN"], "--out: .* exists; a new folder, or --overwrite"),
    "onto itself": (["import", "--backbone", "BACKBONE", "--adapter", "RUN/checkpoints/step_000004/adapters/text",
                     "--out", "BACKBONE", "--overwrite"], "--out: .* is what is read"),
    "another backbone": (["merge", "--run", "RUN", "--backbone", "OTHER", "--out", "{}/out"],
                         "--backbone: .* is not the backbone of .*; give its directory"),
    "adapters of another backbone": (["merge", "--backbone", "OTHER", "--adapters",
                                      "RUN/checkpoints/step_000004/adapters/text", "--out", "{}/out"],
                                     "adapter .*the backbone and r=3 need"),
    "no adapter": (["merge", "--backbone", "BACKBONE", "--adapters", "{}/no", "--out", "{}/out"], "cannot be read"),
    "no directory": (["megatron", "--backbone", "{}/no", "--out", "{}/out"], "backbone: .*config.json does not exist"),
    "no side": (["verify", "{}/no"], "backbone: .* does not exist"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_one_line(tool, runs, tmp_path, capsys, mistake):
    arguments, message = MISTAKES[mistake]
    places = {"RUN": runs["sequence"], "BACKBONE": tiny_model("qwen3"), "OTHER": tiny_model("qwen3", hidden_size=40)}
    for name, path in places.items():
        arguments = [argument.replace(name, str(path)) for argument in arguments]
    assert _call(tool, *(argument.replace("{}", str(tmp_path)) for argument in arguments)) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("convert_checkpoint: ")
    assert re.search(message, error), error
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_conversion_leaves_nothing(tool, runs, tmp_path, monkeypatch, capsys):
    """Ctrl-C in the middle of a file."""
    calls, real = [], weight_stream.as_bytes

    def interrupted(tensor):
        calls.append(tensor)
        if len(calls) == 30:
            signal.raise_signal(signal.SIGINT)
        return real(tensor)

    monkeypatch.setattr(weight_stream, "as_bytes", interrupted)
    # A shell's background job starts with SIGINT ignored.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        assert _call(tool, "merge", "--run", runs["sequence"], "--out", tmp_path / "merged") == 130
    finally:
        signal.signal(signal.SIGINT, before)
    assert "interrupted; nothing was left half-written" in capsys.readouterr().err
    assert len(calls) == 30 and list(tmp_path.iterdir()) == []
