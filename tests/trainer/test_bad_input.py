"""What a user may get wrong: one line that says what and where, exit code 2, and no run is begun."""
import json
import os
import shutil
import sys

import pytest
import torch
from megatron.core import parallel_state
from PIL import Image

from copd_megatron.launch import cli
from copd_megatron.parallel.groups import shutdown_distributed
from support.ranks import run_ranks
from support.tiny_models import tiny_model

RECIPE = '''
from copd_megatron.config.run import RunConfig

def recipe():
    return RunConfig(model={"path": MODEL, "dtype": "float32"},
                     experts={"text": {"task": "support.toy_tasks:LetterTask", "task_args": {"letter": "a"}}},
                     rollout={"prompts_per_step": 2, "group_size": 2, "max_completion_tokens": 4},
                     schedule={"rl_steps": 1, "opd_steps": 1}, evaluation={"final_prompts": 1})
'''
DATASET = "experts.text.task=copd_megatron.tasks.dataset:DatasetTask"


@pytest.fixture
def train(tmp_path, capsys, monkeypatch):
    """Runs ``copd train`` with overrides; returns its one line of complaint."""
    recipe = tmp_path / "wrong_recipe.py"
    recipe.write_text(RECIPE.replace("MODEL", repr(str(tiny_model("qwen3")))))
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(os, "environ", dict(os.environ))

    def run(*overrides: str) -> str:
        folder = tmp_path / "run"
        capsys.readouterr()
        code = cli.main(["train", str(recipe), "--run-dir", str(folder), "--set", *overrides])
        err = capsys.readouterr().err
        assert code == 2
        assert not folder.exists()
        (line,) = (line for line in err.splitlines() if line.startswith("copd"))
        return line

    yield run
    sys.modules.pop("wrong_recipe", None)
    parallel_state.destroy_model_parallel()
    shutdown_distributed()


@pytest.fixture
def broken_model(tmp_path):
    """A copy of the tiny backbone to break."""
    return shutil.copytree(tiny_model("qwen3"), tmp_path / "model")


def test_missing_weights(train, broken_model):
    (broken_model / "model.safetensors").unlink()
    assert "model.path" in train(f"model.path={broken_model}")


def test_truncated_weights(train, broken_model):
    file = broken_model / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    line = train(f"model.path={broken_model}")
    assert "model.path" in line and "model.safetensors" in line


def test_unknown_family(train, broken_model):
    config = json.loads((broken_model / "config.json").read_text())
    (broken_model / "config.json").write_text(json.dumps({**config, "model_type": "gpt_neox"}))
    line = train(f"model.path={broken_model}")
    assert "gpt_neox" in line and "qwen3_vl" in line


def test_no_backbone_at_all(train, tmp_path):
    assert str(tmp_path / "nowhere") in train(f"model.path={tmp_path / 'nowhere'}")


def test_a_row_without_an_answer(train, tmp_path):
    rows = [{"prompt": f"{i}+1?", "answer": str(i + 1)} for i in range(30)]
    del rows[7]["answer"]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    line = train(DATASET, f'experts.text.task_args={{"path": "{file}"}}')
    assert f"{file} row 8, field 'answer'" in line


def test_an_image_that_does_not_open(train, tmp_path):
    Image.new("RGB", (32, 32)).save(tmp_path / "good.png")
    (tmp_path / "bad.png").write_bytes(b"no picture")
    content = [{"type": "image"}, {"type": "text", "text": "?"}]
    rows = [{"messages": [{"role": "user", "content": content}], "images": ["good.png" if i != 3 else "bad.png"],
             "answer": str(i)} for i in range(30)]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    line = train(DATASET, f'experts.text.task_args={{"path": "{file}"}}', f"model.path={tiny_model('qwen3_vl')}")
    assert f"{file} row 4, field 'images'" in line and "bad.png" in line


def test_pictures_for_a_backbone_that_cannot_see(train):
    line = train('experts.text.task_args={"media": "image"}')
    assert "'a/train/0'" in line and "qwen3" in line


@pytest.mark.parametrize(("overrides", "message"), [
    (['exchange.topology=[["text", "sound"]]'], "exchange.topology: student 'sound'; experts are text"),
    (["exchange.topology=star"], "exchange.topology: 'star'"),
    (["rlvr.kl_coef=1", "rlvr.kl_reference=/nowhere"], "rlvr.kl_reference: /nowhere has no adapter_config.json"),
    (["rollout.max_prompt_tokens=3"], "rollout.max_prompt_tokens: prompt 'a/train/0' has "),
    (['experts.text.task_args={"count": 0}'], "experts.text.task: it has no training question"),
    (["experts.text.task=no_such_module:Task"], "experts.text.task: 'no_such_module:Task' was given; there is no"),
    (['experts.text.rewards={"speed": {"weight": 1.0}}'], "experts.text.rewards: ['speed'] was given"),
    (["adapter.first_layer=4"], "adapter.first_layer: 4; the backbone has 4 layers"),
    (["parallel.backend=nccl"], "parallel.backend: nccl on a machine without a CUDA device"),
    (["optimizer.lrr=1"], "optimizer.lrr: no such key; nearest: optimizer.lr"),
    (["schedule.rl_steps=0", "schedule.opd_steps=0"], "schedule.rl_steps and schedule.opd_steps: both are 0"),
])
def test_one_line_says_what_is_wrong(train, overrides, message):
    if "nccl" in overrides[0]:
        shutdown_distributed()
    assert f"copd: {message}" in train(*overrides)


def _train_on_rank(recipe: str, folder: str, override: str) -> tuple[int, bool]:
    os.environ["RANK"] = str(torch.distributed.get_rank())
    code = cli.main(["train", recipe, "--run-dir", folder, "--set", override])
    return code, os.path.exists(folder)


@pytest.mark.parametrize(("ranks", "override", "message"), [
    (3, "parallel.tensor=2", "parallel.tensor"),
    (3, "parallel.tensor=3", "parallel.tensor: 3")])
def test_a_world_that_does_not_fit(tmp_path, capfd, ranks, override, message):
    recipe = tmp_path / "wrong_recipe.py"
    recipe.write_text(RECIPE.replace("MODEL", repr(str(tiny_model("qwen3")))))
    results = run_ranks(ranks, _train_on_rank, str(recipe), str(tmp_path / "run"), override)
    assert results == [(2, False)] * ranks
    first = [line for line in capfd.readouterr().err.splitlines() if line.startswith("copd: ")]
    assert len(first) == 1 and message in first[0]
