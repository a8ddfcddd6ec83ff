"""Run folders: nothing is written over, starts are recorded, runs are read back with their neighbours."""

import sys

import pytest

from copd_megatron.config.loading import load_recipe, to_json
from copd_megatron.config.reference import resolve_object
from copd_megatron.launch.run_folder import check_startable, config_of, existing_run
from copd_megatron.metrics.run_info import write_run_info
from copd_megatron.types import UserError

RECIPE = """
from copd_megatron.config.model import ModelConfig
from copd_megatron.config.run import RunConfig
from copd_megatron.config.tasks import ExpertConfig
from folder_neighbour import Puzzle

def recipe():
    return RunConfig(model=ModelConfig(path="/backbone"), experts={"text": ExpertConfig(task=Puzzle)})
"""


def test_new_and_prepared_folders_are_startable(tmp_path):
    check_startable(tmp_path / "new", resume=False)
    (tmp_path / "config.json").write_text("{}")  # left by a start that failed before its first step
    check_startable(tmp_path, resume=False)


@pytest.mark.parametrize("left", ["metrics.jsonl", "checkpoints", "summary.json"])
def test_a_run_is_only_resumed(tmp_path, left):
    (tmp_path / left).touch()
    check_startable(tmp_path, resume=True)
    with pytest.raises(UserError, match="holds a run already"):
        check_startable(tmp_path, resume=False)


def test_what_is_not_startable(tmp_path):
    with pytest.raises(UserError, match="holds no run"):
        check_startable(tmp_path, resume=True)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="is a file"):
        check_startable(tmp_path / "file", resume=False)


def test_existing_run(tmp_path):
    with pytest.raises(UserError, match="holds no run"):
        existing_run(tmp_path)
    (tmp_path / "summary.json").touch()
    assert existing_run(str(tmp_path)) == tmp_path


def test_run_is_read_back_with_its_recipes_neighbours(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    lab, run_dir = tmp_path / "lab", tmp_path / "run"
    lab.mkdir()
    (lab / "folder_neighbour.py").write_text("class Puzzle:\n    pass\n")
    (lab / "folder_recipe.py").write_text(RECIPE)
    config = load_recipe(lab / "folder_recipe.py")
    write_run_info(run_dir, recipe=str(lab / "folder_recipe.py"), arguments=[], world_size=1, device="cpu")
    (run_dir / "config.json").write_text(to_json(config))

    # As in a new process: neither the folder nor its modules are known.
    sys.path.remove(str(lab))
    for name in ("folder_neighbour", "folder_recipe"):
        del sys.modules[name]
    again = config_of(run_dir)
    assert resolve_object(again.experts["text"].task).__name__ == "Puzzle"
    for name in ("folder_neighbour", "folder_recipe"):
        sys.modules.pop(name, None)
