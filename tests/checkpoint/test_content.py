"""The backbone's hash: every byte of every weight counts, nothing else does, and no weight is read twice."""
from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from copd_megatron.checkpoint import content
from copd_megatron.checkpoint.content import backbone_hash
from copd_megatron.types import UserError
from support.ranks import run_ranks
from support.tiny_models import tiny_model

LAYERS = {"num_hidden_layers": 2}


@pytest.fixture
def copy(tmp_path) -> Path:
    return Path(shutil.copytree(tiny_model("qwen3", **LAYERS), tmp_path / "copy"))


@pytest.fixture
def world(one_rank):
    return one_rank("only").world


def _change_config(folder: Path, **values) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | values))


def test_files_and_their_place_do_not_matter(world, copy):
    first = backbone_hash(tiny_model("qwen3", **LAYERS), world)
    assert len(first) == 64
    _change_config(copy, transformers_version="0.0", _name_or_path="/elsewhere")
    assert backbone_hash(copy, world) == first
    assert backbone_hash(tiny_model("qwen3", **LAYERS, shard_bytes=20_000), world) == first


@pytest.mark.parametrize("at", [0.01, 0.5, 0.999], ids=["near the start", "in the middle", "near the end"])
def test_every_bit_of_the_weights_matters(world, copy, at):
    first, file = backbone_hash(copy, world), copy / "model.safetensors"
    data = bytearray(file.read_bytes())
    header = 8 + int.from_bytes(data[:8], "little")
    data[header + int(at * (len(data) - header))] ^= 1
    file.write_bytes(data)
    assert backbone_hash(copy, world) != first


def test_the_configuration_matters(world, copy):
    first = backbone_hash(copy, world)
    _change_config(copy, rms_norm_eps=1e-6)
    assert backbone_hash(copy, world) != first


def test_ranks_share_the_work_and_agree(world):
    model = tiny_model("qwen3", **LAYERS, shard_bytes=20_000)

    def on_rank():
        import torch.distributed as dist
        return backbone_hash(model, dist.group.WORLD)

    assert run_ranks(3, on_rank) == [backbone_hash(model, world)] * 3


def test_an_unreadable_file_is_one_error_on_all_ranks(copy, monkeypatch):
    def refuse(file, tensors):
        raise OSError("I/O error")

    def on_rank():
        import torch.distributed as dist
        if dist.get_rank() == 0:
            monkeypatch.setattr(content, "_file_sum", refuse)
        with pytest.raises(UserError, match="model.path: .*cannot be read .I/O error"):
            backbone_hash(copy, dist.group.WORLD)

    run_ranks(2, on_rank)


def test_large_files_are_remembered_until_they_change(world, copy, tmp_path, monkeypatch):
    monkeypatch.setattr(content, "CACHED_BYTES", 1000)
    cache, file, reads = tmp_path / "cache/weights.json", copy / "model.safetensors", []
    monkeypatch.setattr(content, "_file_sum", lambda *args, plain=content._file_sum: reads.append(1) or plain(*args))
    first = backbone_hash(copy, world, cache)
    assert backbone_hash(copy, world, cache) == first and len(reads) == 1
    stamp = file.stat().st_mtime_ns
    os.utime(file, ns=(stamp, stamp + 1))
    assert backbone_hash(copy, world, cache) == first and len(reads) == 2
    for broken in ("{", "[]", json.dumps({str(file.resolve()): 3})):
        cache.write_text(broken)
        assert backbone_hash(copy, world, cache) == first
    assert len(reads) == 5
    gone = Path(shutil.copytree(copy, tmp_path / "gone"))
    backbone_hash(gone, world, cache)
    shutil.rmtree(gone)
    os.utime(file)
    backbone_hash(copy, world, cache)
    assert list(json.loads(cache.read_text())) == [str(file.resolve())]


def test_small_files_leave_no_trace(world, copy, tmp_path):
    backbone_hash(copy, world, tmp_path / "weights.json")
    assert not (tmp_path / "weights.json").exists()
