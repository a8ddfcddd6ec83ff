"""A folder is whole or absent, whatever interrupts its writing."""
from __future__ import annotations

import multiprocessing
import os
import resource
import signal

import pytest
import torch
from safetensors.torch import save_file

from copd_megatron.checkpoint.whole_folder import remove, whole_folder
from copd_megatron.types import UserError


def _content(folder):
    return {str(p.relative_to(folder)): p.read_text() for p in folder.rglob("*") if p.is_file()}


def test_a_finished_folder_appears_at_once_and_replaces_the_old_one(tmp_path):
    final = tmp_path / "run/merged"
    for text in ("old", "new"):
        with whole_folder(final, "the model") as partial:
            (partial / "sub").mkdir()
            (partial / "sub/file").write_text(text)
            assert not final.exists() or _content(final) == {"sub/file": "old"}
        assert _content(final) == {"sub/file": text}
    assert list(final.parent.iterdir()) == [final]


@pytest.mark.parametrize("interruption", [KeyboardInterrupt, ValueError, OSError(28, "No space left on device")])
@pytest.mark.parametrize("before", ["nothing", "an old one"])
def test_an_interruption_leaves_what_was_there(tmp_path, interruption, before):
    final = tmp_path / "merged"
    if before == "an old one":
        final.mkdir()
        (final / "file").write_text("old")
    expected = UserError if isinstance(interruption, OSError) else interruption
    with pytest.raises(expected) as error, whole_folder(final, "the model") as partial:
        (partial / "file").write_text("half")
        raise interruption
    if expected is UserError:
        assert str(error.value).startswith(f"{final}: the model could not be written ([Errno 28] No space left")
    assert [p.name for p in tmp_path.iterdir()] == (["merged"] if before == "an old one" else [])
    assert before == "nothing" or _content(final) == {"file": "old"}


@pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")
def test_a_killed_process_leaves_only_a_temporary_name(tmp_path):
    final = tmp_path / "merged"

    def write_and_die():
        with whole_folder(final, "the model") as partial:
            (partial / "half").write_text("half")
            os.kill(os.getpid(), signal.SIGKILL)

    child = multiprocessing.get_context("fork").Process(target=write_and_die)
    child.start()
    child.join()
    assert child.exitcode == -signal.SIGKILL
    assert [p.name for p in tmp_path.iterdir()] == ["merged.tmp"]
    with whole_folder(final, "the model") as partial:
        (partial / "file").write_text("whole")
    assert [p.name for p in tmp_path.iterdir()] == ["merged"]
    assert _content(final) == {"file": "whole"}


def test_a_refusing_disk_under_safetensors(tmp_path):
    """safetensors wraps the system's error in its own; the file is larger than the kernel allows."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
    try:
        with pytest.raises(UserError, match="the model could not be written .*free space or mend the disk"), \
                whole_folder(tmp_path / "merged", "the model") as partial:
            save_file({"weight": torch.zeros(1000)}, partial / "model.safetensors")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    assert list(tmp_path.iterdir()) == []


def test_removal_goes_through_a_temporary_name(tmp_path, monkeypatch):
    """Killed in the middle of a removal, half a folder would otherwise look like a whole one."""
    folder = tmp_path / "step_000001"
    folder.mkdir()
    (folder / "file").write_text("text")
    monkeypatch.setattr("shutil.rmtree", lambda path, **_: None)
    remove(folder)
    assert [p.name for p in tmp_path.iterdir()] == ["step_000001.old.tmp"]
