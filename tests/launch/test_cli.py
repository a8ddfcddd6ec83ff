"""The command line as a user meets it: exit codes, one line per mistake, nothing heavy before its time."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from copd_megatron import __version__
from copd_megatron.launch import cli
from support.fake_run import fake_run

ROOT = Path(__file__).resolve().parents[2]
RECIPE = """
from copd_megatron.config.model import ModelConfig
from copd_megatron.config.run import RunConfig
from copd_megatron.config.tasks import ExpertConfig

def recipe():
    expert = ExpertConfig(task="tasks:Text", task_args={"level": 1})
    return RunConfig(model=ModelConfig(path="backbone"), experts={"text": expert})
"""


@pytest.fixture
def recipe(tmp_path, monkeypatch) -> str:
    file = tmp_path / "cli_recipe.py"
    file.write_text(RECIPE)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.chdir(tmp_path)
    yield str(file)
    sys.modules.pop("cli_recipe", None)


@pytest.fixture(autouse=True)
def own_environment(monkeypatch):
    monkeypatch.setattr(os, "environ", dict(os.environ))


def test_version_and_help_load_nothing_heavy():
    # In a process of its own: this one has torch already. -S hides everything that is installed.
    check = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "from copd_megatron.launch.cli import main\n"
        "for argument in ('--version', '--help'):\n"
        "    try: main([argument])\n"
        "    except SystemExit as end: assert end.code == 0\n"
        "heavy = {'torch', 'numpy', 'pydantic', 'rich', 'megatron', 'transformers'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-S", "-c", check, str(ROOT)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"copd_megatron {__version__}\n")


@pytest.mark.parametrize("command", ["train", "preview", "config", "eval"])
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["absent.py"], "recipe: absent.py does not exist"),
        (["RECIPE", "--set", "lr=1"], "lr: no such key; nearest: optimizer.lr"),
        (
            ["RECIPE", "--set", "seed=1", "rollout.group_size=none"],
            "rollout.group_size: 'none' given; allowed: int >= 2",
        ),
        (["RECIPE", "--set", "seed=1", "--set", "seed"], "--set seed: no key or no '='"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(recipe, capsys, command, arguments, message):
    code = cli.main([command, *(recipe if argument == "RECIPE" else argument for argument in arguments)])
    out, err = capsys.readouterr()
    assert (code, out) == (2, "")
    assert err.startswith(f"copd: {message}")
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    "arguments",
    [[], ["trian"], ["train"], ["preview", "x.py", "-n", "0"], ["eval", "x", "--greedy", "--sampled"]],
)
def test_wrong_usage_is_exit_code_2(arguments, capsys):
    with pytest.raises(SystemExit) as end:
        cli.main(arguments)
    assert end.value.code == 2
    assert "usage: copd" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["report", "compare", "eval"])
def test_commands_on_runs_want_a_run(command, tmp_path, capsys):
    assert cli.main([command, str(tmp_path / "absent")]) == 2
    assert "does not exist; a folder that `copd train` wrote" in capsys.readouterr().err
    assert cli.main([command, str(tmp_path)]) == 2
    assert "holds no run" in capsys.readouterr().err


def test_train_does_not_write_over_a_run(recipe, tmp_path, capsys):
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    (run_dir / "metrics.jsonl").write_text("{}\n")
    assert cli.main(["train", recipe, "--run-dir", str(run_dir)]) == 2
    assert "holds a run already; a new folder, or --resume" in capsys.readouterr().err
    assert cli.main(["train", recipe, "--run-dir", str(tmp_path / "other"), "--resume"]) == 2
    assert "holds no run" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()


def test_errors_of_other_ranks_come_later_and_say_whose_they_are(recipe, monkeypatch, capsys):
    waits = []
    monkeypatch.setattr(cli.time, "sleep", waits.append)
    monkeypatch.setitem(os.environ, "RANK", "3")
    assert cli.main(["config", recipe, "--set", "lr=1"]) == 2
    assert capsys.readouterr().err.startswith("copd (rank 3): lr: no such key")
    assert waits == [cli.OTHER_RANKS_WAIT_S]


def test_interruption_is_130(recipe, capsys):
    Path(recipe).write_text("raise KeyboardInterrupt\n")
    assert cli.main(["config", recipe]) == 130


def test_traceback_on_request(recipe):
    with pytest.raises(Exception, match="lr: no such key"):
        cli.main(["--traceback", "config", recipe, "--set", "lr=1"])


def test_a_bug_is_not_dressed_up_as_a_mistake_of_the_user(recipe, monkeypatch):
    from copd_megatron.launch import commands

    def broken(options):
        raise ValueError("a bug")

    monkeypatch.setattr(commands, "show_config", broken)
    with pytest.raises(ValueError, match="a bug"):
        cli.main(["config", recipe])


def test_config_shows_value_default_type_and_doc(recipe, capsys):
    assert cli.main(["config", recipe, "--set", "optimizer.lr=0.001", "experts.text.task_args.level=3"]) == 0
    out = capsys.readouterr().out
    assert "optimizer.lr = 0.001   (default: 2e-05)\n    float > 0. Learning rate after the warm-up" in out
    assert 'experts.text.task_args = {"level": 3}' in out


def test_config_without_a_recipe_shows_defaults(capsys):
    assert cli.main(["config"]) == 0
    assert "model.path = (required)" in capsys.readouterr().out


def test_report_and_compare_read_runs(tmp_path, capsys):
    one, two = (str(fake_run(tmp_path / name, cycles=1)) for name in ("one", "two"))
    assert cli.main(["report", one]) == 0
    out = capsys.readouterr().out
    assert "merged" in out
    assert out.endswith(f"report: {one}/report.html\n")
    assert Path(one, "report.html").stat().st_size > 1000
    assert cli.main(["compare", one, two, "--html", str(tmp_path / "both.html")]) == 0
    assert "merged" in capsys.readouterr().out
    assert (tmp_path / "both.html").exists()


def test_config_as_json(recipe, capsys, tmp_path):
    assert cli.main(["config", recipe, "--json", "--set", "seed=5"]) == 0
    tree = json.loads(capsys.readouterr().out)
    assert (tree["seed"], tree["model"]["path"]) == (5, str(tmp_path / "backbone"))
    assert cli.main(["config", "--json"]) == 2
    assert "name a recipe" in capsys.readouterr().err
