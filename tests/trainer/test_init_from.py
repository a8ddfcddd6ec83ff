"""A run whose expert begins as a PEFT adapter."""
from pathlib import Path

import pytest
import torch

from copd_megatron.types import UserError
from support.toy_run import adapters_of, randomise, toy_config, toy_trainer

EXPERTS = ("text", "image")


def _config(init_from: Path | None = None, **sections):
    config = toy_config("qwen3", EXPERTS, rollout={"prompts_per_step": 2, "group_size": 2, "max_completion_tokens": 3},
                        model={"dtype": "float32"}, metrics={"rollouts": False}, **sections)
    config.experts["text"].init_from = str(init_from) if init_from else None
    return config


def test_an_expert_begins_where_another_run_ended(tmp_path):
    """It trains on from there, the others begin as the backbone, and at a resume the save counts."""
    with toy_trainer(_config(), tmp_path / "old") as trainer:
        randomise(trainer)
        ended = adapters_of(trainer)["text"]
        trainer.milestones.checkpoints.export_peft(trainer.milestones.state, "text", tmp_path / "adapter")
    config = _config(tmp_path / "adapter", checkpoint={"export_merged": False})
    with toy_trainer(config, tmp_path / "new") as trainer:
        begun = adapters_of(trainer)
        assert all(torch.equal(begun["text"][name], factor) for name, factor in ended.items())
        assert not any(factor.any() for name, factor in begun["image"].items() if name.endswith("B"))
        trainer.train_step(0, "rlvr")
        trained = adapters_of(trainer)
        assert any(not torch.equal(trained["text"][name], factor) for name, factor in ended.items())
        trainer.milestones.state.step = 1
        trainer.milestones._save()
        trainer.milestones.checkpoints.wait()
    with toy_trainer(config, tmp_path / "new", resume=True) as trainer:
        assert all(torch.equal(adapters_of(trainer)["text"][name], factor) for name, factor in trained["text"].items())


def test_a_folder_that_is_none_is_named_before_weights_are_read(tmp_path):
    with pytest.raises(UserError, match=r"experts.text.init_from: .*no adapter_config.json; allowed is a PEFT adapter"):
        with toy_trainer(_config(tmp_path / "nothing"), tmp_path / "run"):
            pass
