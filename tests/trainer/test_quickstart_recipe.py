"""The quickstart's own recipe: any layout trains the very same experts, by torchrun as by hand."""
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from copd_megatron.config.loading import apply_overrides, load_recipe
from support.ranks import run_ranks
from support.toy_run import run_steps

ROOT = Path(__file__).resolve().parents[2]
SMALLER = {"model.dtype": "float64", "schedule.cycles": 1, "schedule.rl_steps": 1, "schedule.opd_steps": 1,
           "rollout.prompts_per_step": 2, "rollout.group_size": 2, "evaluation.every": 0, "evaluation.final_prompts": 1,
           "metrics.tensorboard": False, "metrics.progress": "off", "metrics.overlap_tokens": 4,
           "checkpoint.export_merged": False}


def overrides(tensor: int = 1, pipeline: int = 1) -> list[str]:
    given = {**SMALLER, "parallel.tensor": tensor, "parallel.pipeline": pipeline}
    return [f"{key}={value}" for key, value in given.items()]


def config(tensor: int = 1, pipeline: int = 1):
    return apply_overrides(load_recipe(ROOT / "examples/quickstart.py"), overrides(tensor, pipeline))


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory):
    result = run_ranks(1, run_steps, config(), tmp_path_factory.mktemp("one_rank"))[0]
    for factors in result["adapters"].values():
        assert all(factor.any() for factor in factors.values())  # lora_B starts at 0
    return result


@pytest.mark.parametrize("tensor, pipeline", [(2, 1), (1, 2)], ids=["TP 2", "PP 2"])
def test_layout_equals_one_rank(one_rank, tensor, pipeline, tmp_path):
    for got in run_ranks(2, run_steps, config(tensor, pipeline), tmp_path, timeout_s=120):
        assert got["tokens"] == one_rank["tokens"]
        torch.testing.assert_close(got["adapters"], one_rank["adapters"], rtol=0, atol=1e-8)


@pytest.mark.gpu
@pytest.mark.parametrize("options", [
    {}, {"model.attention": "flash", "model.dtype": "bfloat16"},
    {"model.fp8": "frozen_rowwise", "model.dtype": "bfloat16"},
    {"model.fp8": "te_blockwise", "model.dtype": "bfloat16", "adapter.scope": "completion"},
    {"model.fp8": "te_current", "model.dtype": "bfloat16", "model.norms": "torch", "optimizer.adam": "torch"}],
    ids=lambda options: ",".join(map(str, options.values())) or "defaults")
def test_a_gpu_trains_every_expert(options, tmp_path):
    """One RLVR and one OPD step, evaluation and checkpoint by the command; all numbers finite, all experts moved."""
    if "te_" in options.get("model.fp8", ""):
        pytest.importorskip("transformer_engine")
    given = {**SMALLER, "model.dtype": "float32", "rollout.prompts_per_step": 8, "rollout.group_size": 8, **options}
    command = [sys.executable, "-m", "copd_megatron", "train", str(ROOT / "examples/quickstart.py"), "--run-dir",
               str(tmp_path), *(part for key, value in given.items() for part in ("--set", f"{key}={value}"))]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels"),
                                                                os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["phase"] for row in rows] == ["rlvr", "opd"]
    assert all(math.isfinite(value) for row in rows for value in row.values() if isinstance(value, float))
    for expert in config().experts:
        folder, = tmp_path.glob(f"checkpoints/*/adapters/{expert}")
        factors = load_file(folder / "adapter_model.safetensors")
        assert any(factor.any() for name, factor in factors.items() if "lora_B" in name)


def test_torchrun_trains_the_same_three_experts_on_two_replicas(one_rank, tmp_path):
    options = [part for override in overrides() for part in ("--set", override)]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m",
               "copd_megatron", "train", str(ROOT / "examples/quickstart.py"), "--run-dir", str(tmp_path), *options]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    for expert, factors in one_rank["adapters"].items():
        folder, = tmp_path.glob(f"checkpoints/*/adapters/{expert}")
        exported = load_file(folder / "adapter_model.safetensors")
        assert len(exported) == len(factors)
        for name, factor in factors.items():
            tensor, = [t for key, t in exported.items() if key.endswith(f"{name}.weight")]
            torch.testing.assert_close(tensor.double(), factor, rtol=1e-6, atol=1e-8)
