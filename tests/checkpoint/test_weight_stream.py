"""Files rewritten in blocks: the same bytes where nothing changes, little memory, one error when the disk is full."""
from __future__ import annotations

import errno
import json
import resource
import shutil
import signal
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from copd_kernels.rowwise_fp8.reference import quantise_rows
from copd_megatron.checkpoint import weight_stream
from copd_megatron.checkpoint.adapter import Adapter
from copd_megatron.checkpoint.huggingface import save_merged
from copd_megatron.checkpoint.peak_memory import PeakMemory
from copd_megatron.checkpoint.weight_stream import Matrices, rewrite_file, write_file
from copd_megatron.types import UserError
from support.ranks import run_ranks
from support.tiny_models import tiny_model

TENSORS = {"z": torch.arange(12.0).view(3, 4), "b": torch.tensor([-0.0, 1.5]).bfloat16(),
           "a": torch.randn(5, 7, 3, generator=torch.Generator().manual_seed(0)), "empty": torch.empty(0, 4),
           "scalar": torch.tensor(2.5, dtype=torch.float64)}


@pytest.fixture
def source(tmp_path, monkeypatch) -> Path:
    """A file of odd tensors, and blocks so small that each has several."""
    monkeypatch.setattr(weight_stream, "BLOCK_BYTES", 20)
    save_file(TENSORS, tmp_path / "source.safetensors", metadata={"format": "pt"})
    return tmp_path / "source.safetensors"


def test_without_changes_it_is_the_same_file(source, tmp_path):
    counts = []
    names = rewrite_file(source, tmp_path / "target", lambda name: None, None, counts.append)
    assert (tmp_path / "target").read_bytes() == source.read_bytes()
    assert set(names) == set(TENSORS) and sum(counts) == source.stat().st_size


def test_rows_change_and_types_too(source, tmp_path):
    seen = []

    def edit(name):
        def add(rows: slice, values: torch.Tensor) -> torch.Tensor:
            seen.append((rows.start, len(values)))
            return values.double() + torch.arange(rows.start, rows.stop)[:, None]
        return add if name == "z" else None

    rewrite_file(source, tmp_path / "target.safetensors", edit, torch.float16, lambda count: None)
    assert seen == [(0, 1), (1, 1), (2, 1)], "a block is at least a row"
    after = load_file(tmp_path / "target.safetensors")
    for name, tensor in TENSORS.items():
        want = tensor + torch.arange(3)[:, None] if name == "z" else tensor
        assert torch.equal(after[name], want.half()), name
    assert torch.signbit(after["b"][0])
    with safe_open(tmp_path / "target.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_matrices_become_fp8_rows(source, tmp_path):
    """Rows are rounded after they changed, scales follow their weight, and other tensors may change type."""
    counts = []
    names = rewrite_file(source, tmp_path / "target.safetensors",
                         lambda name: (lambda rows, values: values * 3) if name == "z" else None, torch.bfloat16,
                         counts.append, rounded=lambda name: Matrices() if name == "z" else None)
    after, (rows, scales) = load_file(tmp_path / "target.safetensors"), quantise_rows(TENSORS["z"] * 3)
    assert set(names) == after.keys() == {*TENSORS, "weight_scale"}
    assert names.index("weight_scale") == 1 + names.index("z")
    assert torch.equal(after["z"].view(torch.uint8), rows.view(torch.uint8))
    assert torch.equal(after["weight_scale"], scales)
    assert torch.equal(after["a"], TENSORS["a"].bfloat16())
    assert sum(counts) == (tmp_path / "target.safetensors").stat().st_size


def test_a_file_written_tensor_by_tensor(tmp_path):
    shapes = {name: tuple(tensor.shape) for name, tensor in TENSORS.items()}
    write_file(tmp_path / "new.safetensors", shapes, torch.float32, TENSORS.__getitem__, lambda count: None)
    after = load_file(tmp_path / "new.safetensors")
    assert all(torch.equal(after[name], tensor.float()) for name, tensor in TENSORS.items())


def test_a_source_that_shrinks_meanwhile_is_named(source, tmp_path):
    def cut(name):
        with source.open("r+b") as file:
            file.truncate(source.stat().st_size - 4)

    with pytest.raises(UserError, match="source.safetensors: ends before its tensors do; .*download it again"):
        rewrite_file(source, tmp_path / "target", cut, None, lambda count: None)


def _big_backbone(folder: Path) -> Path:
    """Two shards of 24 MB, of one large and some small tensors, with a Qwen3's names."""
    shutil.copytree(tiny_model("qwen3"), folder)
    (folder / "model.safetensors").unlink()
    names = {}
    for shard, layer in enumerate((0, 1)):
        big = torch.full((3072, 2048), 0.5 + layer).bfloat16()
        save_file({f"model.layers.{layer}.mlp.up_proj.weight": big,
                   **{f"model.layers.{layer}.norm{i}.weight": torch.ones(300_000).bfloat16() for i in range(20)}},
                  folder / f"model-{shard}.safetensors", metadata={"format": "pt"})
        with safe_open(folder / f"model-{shard}.safetensors", framework="pt") as file:
            names |= dict.fromkeys(file.keys(), f"model-{shard}.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))
    return folder


def test_merging_takes_a_fraction_of_a_shard(tmp_path):
    """The promise is less than twice the largest shard; measured by the kernel, the copies in flight included."""
    backbone = _big_backbone(tmp_path / "big")
    factors = {f"layers.{layer}.mlp.up_proj.lora_{f}": torch.full(shape, 0.25) for layer in (0, 1)
               for f, shape in {"A": (4, 2048), "B": (3072, 4)}.items()}
    largest = max(file.stat().st_size for file in backbone.glob("*.safetensors"))
    for most in (2.0, 1.25):  # the first one loads the code of the matrix product, too
        with PeakMemory() as memory:
            save_merged(tmp_path / "merged", backbone, Adapter(factors, 1.0), "model.")
        assert 0 < memory.peak_bytes < most * largest, f"{memory.peak_bytes / largest:.2f} shards"
    for shard, layer in enumerate((0, 1)):
        after = load_file(tmp_path / f"merged/model-{shard}.safetensors")
        assert after[f"model.layers.{layer}.mlp.up_proj.weight"].unique().tolist() == [0.75 + layer]


def _merge_where_files_are_small(folder: Path) -> str:
    """The kernel refuses to write more than 30 kB to one file, as a full disk would."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000))
    with pytest.raises(UserError) as error:
        save_merged(folder, tiny_model("qwen3"), Adapter({}, 1.0), "model.")
    return str(error.value)


def test_a_disk_that_refuses_leaves_one_error_and_no_folder(tmp_path):
    tiny_model("qwen3")  # before the rank is forked
    [message] = run_ranks(1, _merge_where_files_are_small, tmp_path / "merged")
    assert message.startswith(f"{tmp_path / 'merged'}: the merged model could not be written ([Errno {errno.EFBIG}]")
    assert "free space" in message and "\n" not in message
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_says_so(tmp_path, monkeypatch):
    """ENOSPC from the write itself, in the middle of the second file."""
    calls, real = [], weight_stream.as_bytes

    def full(tensor):
        calls.append(tensor)
        if len(calls) == 40:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(tensor)

    monkeypatch.setattr(weight_stream, "as_bytes", full)
    with pytest.raises(UserError, match="could not be written .*No space left on device.*; free space"):
        save_merged(tmp_path / "merged", tiny_model("qwen3", shard_bytes=40_000), Adapter({}, 1.0), "model.")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("cut", [100, 30_000])
def test_a_truncated_source_is_refused_before_anything_is_written(tmp_path, cut):
    path = shutil.copytree(tiny_model("qwen3"), tmp_path / "backbone")
    raw = (path / "model.safetensors").read_bytes()
    (path / "model.safetensors").write_bytes(raw[:cut])
    with pytest.raises(UserError, match="model.safetensors: truncated.*download it again"):
        save_merged(tmp_path / "merged", path, Adapter({}, 1.0), "model.")
    assert [file.name for file in tmp_path.iterdir()] == ["backbone"]
