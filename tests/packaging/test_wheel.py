"""The wheel: built offline, complete, and enough for ``copd --version`` in an empty environment."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from copd_megatron import __version__

ROOT = Path(__file__).resolve().parents[2]
BUILD_FILES = (
    "setup.py",
    "pyproject.toml",
    "MANIFEST.in",
    "README.md",
    "LICENSE",
    "CHANGELOG.md",
    "constraints.txt",
)
IGNORED = shutil.ignore_patterns("__pycache__", "*.egg-info")


def run(*command: object, cwd: Path) -> str:
    # PYTHONPATH would make the checkout importable and hide what the wheel lacks.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [str(part) for part in command], cwd=cwd, env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built from a copy: what an earlier build left in the checkout would get into the wheel."""
    source = tmp_path_factory.mktemp("source")
    for name in BUILD_FILES:
        shutil.copy(ROOT / name, source)
    for name in ("copd_megatron", "kernels"):
        shutil.copytree(ROOT / name, source / name, ignore=IGNORED)
    run(
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "--no-index",
        "-w",
        "wheels",
        ".",
        cwd=source,
    )
    [built] = (source / "wheels").glob("*.whl")
    return built


def test_contents_are_the_two_packages_and_nothing_else(wheel):
    names, source = set(zipfile.ZipFile(wheel).namelist()), wheel.parents[1]
    expected = {path.relative_to(source).as_posix() for path in (source / "copd_megatron").rglob("*.py")}
    expected |= {
        path.relative_to(source / "kernels").as_posix()
        for path in (source / "kernels/copd_kernels").rglob("*.py")
    }
    # A folder without __init__.py would be left out.
    assert {name for name in names if name.endswith(".py")} == expected
    assert {name.split("/")[0] for name in names} == {
        "copd_megatron",
        "copd_kernels",
        f"copd_megatron-{__version__}.dist-info",
    }
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_metadata_says_what_is_needed(wheel):
    archive = zipfile.ZipFile(wheel)
    text = archive.read(f"copd_megatron-{__version__}.dist-info/METADATA").decode()
    assert "Requires-Python: ~=3.12" in text
    assert "License-Expression: Apache-2.0" in text
    for extra in ("te", "vllm", "resiliency", "wandb", "test"):
        assert f"Provides-Extra: {extra}\n" in text
    for line in text.splitlines():
        assert not line.startswith("Requires-Dist") or "://" not in line, line


def test_empty_environment_runs_the_command_and_imports_the_kernels(wheel, tmp_path):
    venv = tmp_path / "venv"
    run(sys.executable, "-m", "venv", "--without-pip", venv, cwd=tmp_path)
    run(
        sys.executable,
        "-m",
        "pip",
        "--python",
        venv / "bin/python",
        "install",
        "--quiet",
        "--no-deps",
        "--no-index",
        wheel,
        cwd=tmp_path,
    )
    assert run(venv / "bin/copd", "--version", cwd=tmp_path) == f"copd_megatron {__version__}\n"
    assert (
        run(venv / "bin/python", "-m", "copd_megatron", "--version", cwd=tmp_path)
        == f"copd_megatron {__version__}\n"
    )
    where = run(
        venv / "bin/python", "-c", "import copd_kernels; print(copd_kernels.__path__[0])", cwd=tmp_path
    )
    assert Path(where.strip()).is_relative_to(venv.resolve())


def test_constraints_allow_what_setup_asks_for(wheel):
    from packaging.requirements import Requirement

    pins = dict(
        line.split("==")
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if not line.startswith("#")
    )
    pins = {name.lower(): version for name, version in pins.items()}
    metadata = zipfile.ZipFile(wheel).read(f"copd_megatron-{__version__}.dist-info/METADATA").decode()
    for line in metadata.splitlines():
        if line.startswith("Requires-Dist: "):
            requirement = Requirement(line.removeprefix("Requires-Dist: "))
            if requirement.marker is None or requirement.marker.evaluate({"extra": "test"}):
                assert requirement.specifier.contains(pins[requirement.name.lower()]), line
