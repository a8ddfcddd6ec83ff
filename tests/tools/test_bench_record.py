"""What benchmarks share: files that cannot be written are refused before anything runs, and how a tool ends."""
import argparse
import importlib
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch

from copd_megatron.config.model import AdapterConfig, ModelConfig
from copd_megatron.types import UserError

TOOLS = Path(__file__).resolve().parents[2] / "tools"
NAMES = {"bench_update": [], "bench_scoring": [], "bench_fp8": [], "bench_losses": [], "bench_rollout": [],
         "bench_exchange": [], "bench_vs_trl": ["-"], "profile_step": ["-"], "expert_scaling": []}
"""Tools, and what they cannot do without."""


@pytest.fixture(scope="module")
def tools():
    before = set(sys.modules)
    sys.path.insert(0, str(TOOLS))
    try:
        yield importlib.import_module
    finally:
        sys.path.remove(str(TOOLS))
        for name in set(sys.modules) - before:
            if (TOOLS / f"{name}.py").exists():
                del sys.modules[name]


@pytest.mark.parametrize("name", NAMES)
def test_every_tool_refuses_what_it_could_not_write_in_the_end(tools, name, tmp_path, capsys):
    tool, needed = tools(name), NAMES[name]
    new = tmp_path / "new/folder/rows.json"
    assert tool.parse([*needed, "--json", str(new)]).json == new
    assert new.parent.is_dir() and not list(new.parent.iterdir())
    (tmp_path / "file").touch()
    for bad, message in ((tmp_path, "is a folder; a file to write"),
                         (tmp_path / "file/rows.json", "a file in a folder that can be written")):
        with pytest.raises(SystemExit) as stop:
            tool.parse([*needed, "--json", str(bad)])
        error = capsys.readouterr().err.splitlines()[-1]
        assert stop.value.code == 2 and f"--json: {bad}" in error and message in error


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_a_folder_that_is_read_only_is_refused(tools, tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(argparse.ArgumentTypeError, match="Permission denied"):
        tools("bench_record").writable(str(tmp_path / "rows.json"))


@pytest.mark.parametrize("error", [MemoryError(), torch.OutOfMemoryError("CUDA out of memory. Tried"),
                                   RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried")])
def test_memory_that_runs_out_is_one_line(tools, error, capsys):
    def work():
        raise error

    with pytest.raises(SystemExit) as stop:
        tools("bench_record").end(work)
    line, = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and line.startswith("error: memory is out: ") and line.endswith("; smaller sizes")


def test_other_errors_keep_their_traceback(tools):
    def work():
        raise RuntimeError("shapes differ")

    with pytest.raises(RuntimeError, match="shapes differ"):
        tools("bench_record").end(work)


def test_weights_that_do_not_fit_are_refused_before_they_are_made(tools, one_rank):
    backbone = tools("bench_backbone")
    parser = argparse.ArgumentParser()
    backbone.add_shape_options(parser)
    options = parser.parse_args(["--hidden", "1048576", "--layers", "64"])
    with pytest.raises(UserError, match=r"--layers, --hidden, --ffn, --vocab: the weights take \d+.\d GB, .* smaller"):
        backbone.random_backbone(backbone.spec_of(options), AdapterConfig(), one_rank(), ModelConfig(path="-"), ["a"])


def test_an_interrupted_tool_ends_its_other_process_and_says_one_line(tmp_path):
    script = tmp_path / "tool.py"
    script.write_text(textwrap.dedent(f"""
        import os, sys, time
        sys.path[:0] = [{str(TOOLS)!r}, {str(TOOLS.parent)!r}]
        from bench_record import end
        from own_process import in_a_process
        import pathlib

        def work(file):
            pathlib.Path(file).write_text(str(os.getpid()))
            time.sleep(600)

        if __name__ == "__main__":
            end(lambda: in_a_process(work, {str(tmp_path / "pid")!r}))
        """))
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job starts with it ignored
    try:
        tool = subprocess.Popen([sys.executable, script], stderr=subprocess.PIPE, text=True, start_new_session=True)
    finally:
        signal.signal(signal.SIGINT, before)
    try:
        deadline = time.monotonic() + 200
        while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():
            assert tool.poll() is None and time.monotonic() < deadline
            time.sleep(0.1)
        os.killpg(tool.pid, signal.SIGINT)  # as a terminal does: to every process of the group
        _, err = tool.communicate(timeout=60)
    finally:
        if tool.poll() is None:
            os.killpg(tool.pid, signal.SIGKILL)
    assert tool.returncode == 130
    assert err.strip() == "interrupted; what --json saves row by row is there"
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)
