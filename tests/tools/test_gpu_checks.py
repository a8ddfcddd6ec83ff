"""Every command of tools/gpu_checks.sh has options that its tool knows, on a machine without a GPU."""
from __future__ import annotations

import importlib
import os
import shlex
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def commands(tmp_path_factory) -> list[list[str]]:
    """The arguments of every call of Python, by a Python that only writes them down."""
    folder = tmp_path_factory.mktemp("gpu_checks")
    python, told = folder / "python", folder / "told"
    python.write_text(f'#!/usr/bin/env bash\nprintf "%q " "$@" >> {told}\necho >> {told}\n')
    python.chmod(0o755)
    done = subprocess.run(["bash", str(ROOT / "tools/gpu_checks.sh")], capture_output=True, text=True, timeout=60,
                          env={**os.environ, "PYTHON": str(python), "OUT": str(folder / "out")})
    assert done.returncode == 0, done.stdout + done.stderr
    assert [line.split()[2] for line in done.stdout.splitlines()[-10:-1]] == ["passed"] * 9
    return [shlex.split(line) for line in told.read_text().splitlines()]


def test_tools_know_their_options(commands, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    given = [(name, rest) for script, *rest in commands
             if (name := Path(script).stem) and Path(script).parts[0] == "tools"]
    assert {name for name, _ in given} == {"bench_scoring", "bench_update", "bench_fp8", "bench_rollout",
                                           "smollm2_study", "profile_step", "bench_losses"}
    for name, arguments in given:
        if name == "smollm2_study":
            monkeypatch.setattr("sys.argv", [name, *arguments])
            options = importlib.import_module("quickstart_study").options_of("", "out")
        else:
            options = importlib.import_module(name).parse(arguments)
        assert options.json.parent.is_dir() and options.json.suffix == ".json"


def test_the_rest_is_there(commands):
    others = [given for given in commands if Path(given[0]).parts[0] != "tools"]
    assert [given for given in others if given[:2] == ["-m", "pytest"]] == [["-m", "pytest", "-q", "-m", "gpu"]]
    assert ["-m", "copd_megatron", "doctor"] in others
    kernels = [given[0] for given in others if given[0].startswith("kernels/")]
    assert len(kernels) == 7 and all((ROOT / script).is_file() for script in kernels)
