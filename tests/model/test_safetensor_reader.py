"""Reading slices from single and sharded checkpoints; every broken file is one error that names it."""
from __future__ import annotations

import json
import shutil
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from copd_megatron.model.safetensor_reader import INDEX_FILE, SafetensorReader, check_files
from copd_megatron.types import UserError
from support.tiny_models import tiny_model

MATRIX = "model.layers.1.mlp.up_proj.weight"
SHARD_BYTES = 40_000


@pytest.fixture
def single(tmp_path) -> Path:
    return Path(shutil.copytree(tiny_model("qwen3"), tmp_path / "single"))


@pytest.fixture
def sharded(tmp_path) -> Path:
    return Path(shutil.copytree(tiny_model("qwen3", shard_bytes=SHARD_BYTES), tmp_path / "sharded"))


def _refused(path: Path, *named: str) -> None:
    with pytest.raises(UserError, match=r"^model\.path: ") as caught:
        check_files(path)
    message = str(caught.value)
    assert all(name in message for name in named), message
    assert "\n" not in message


def _shard_of(path: Path, tensor: str) -> Path:
    return path / json.loads((path / INDEX_FILE).read_text())["weight_map"][tensor]


def test_slices_equal_slices_of_the_whole(single):
    whole = load_file(single / "model.safetensors")
    with SafetensorReader(single) as reader:
        assert reader.entries.keys() == whole.keys()
        for name, tensor in whole.items():
            assert reader.shape(name) == tuple(tensor.shape)
            assert torch.equal(reader.read(name), tensor)
        assert torch.equal(reader.read(MATRIX, slice(3, 11)), whole[MATRIX][3:11])
        assert torch.equal(reader.read(MATRIX, cols=slice(5, 9)), whole[MATRIX][:, 5:9])
        assert torch.equal(reader.read(MATRIX, slice(2, 3), slice(0, 1)), whole[MATRIX][2:3, :1])
        assert torch.equal(reader.read("model.norm.weight", slice(4, 6)), whole["model.norm.weight"][4:6])
        assert reader.read(MATRIX, slice(7, 7)).shape == (0, 32)


def test_published_names_of_qwen2_5_vl_are_todays(tmp_path):
    """Stored as published ("visual.*", "model.layers.*"), or by the names of the model in transformers 5."""
    old = tiny_model("qwen2_5_vl")
    stored = load_file(old / "model.safetensors")
    assert "visual.patch_embed.proj.weight" in stored and "model.layers.0.self_attn.q_proj.bias" in stored
    with SafetensorReader(old) as one:
        names = {entry.stored_name: name for name, entry in one.entries.items()}
        assert names.keys() == stored.keys()
        save_file({names[name]: tensor for name, tensor in stored.items()}, tmp_path / "model.safetensors")
        with SafetensorReader(tmp_path) as other:
            assert other.entries.keys() == one.entries.keys()
            assert {"lm_head.weight", "model.visual.patch_embed.proj.weight",
                    "model.language_model.layers.0.self_attn.q_proj.bias"} <= other.entries.keys()
            for name in one.entries:
                assert torch.equal(one.read(name), other.read(name))


def test_sharded_equals_single(single, sharded):
    assert len(list(sharded.glob("*.safetensors"))) > 2
    with SafetensorReader(single) as one, SafetensorReader(sharded) as many:
        assert one.entries.keys() == many.entries.keys()
        assert all(torch.equal(one.read(name), many.read(name)) for name in one.entries)


@pytest.mark.parametrize("keep", [0, 5, 8, 200, -1])
def test_truncated_file(single, keep):
    file = single / "model.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[:keep])
    _refused(single, "model.safetensors", "truncated" if keep in (8, 200, -1) else "header")


def test_truncation_names_the_tensor(sharded):
    file = _shard_of(sharded, MATRIX)
    length = struct.unpack("<Q", file.read_bytes()[:8])[0]
    header = json.loads(file.read_bytes()[8 : 8 + length])
    header.pop("__metadata__", None)
    last = max(header, key=lambda name: header[name]["data_offsets"])
    file.write_bytes(file.read_bytes()[:-2])
    _refused(sharded, file.name, last, "truncated")


@pytest.mark.parametrize("header", [b"not json", b"[1, 2]", b"\xff\xfe", b'{"a": 1}',
                                    b'{"a": {"dtype": "F32"}}',
                                    b'{"a": {"dtype": "F32", "shape": ["x"], "data_offsets": [0, 4]}}'])
def test_corrupt_header(single, header):
    (single / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)
    _refused(single, "model.safetensors", "header is corrupt")


def test_byte_range_that_does_not_fit_its_shape(single):
    header = json.dumps({"a": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 12]}}).encode()
    (single / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(12))
    _refused(single, "'a'", "byte range")


def test_missing_files(single, sharded):
    (single / "model.safetensors").unlink()
    _refused(single, "neither model.safetensors nor")
    file = _shard_of(sharded, MATRIX)
    file.unlink()
    _refused(sharded, file.name, "missing", "tensor '")


def test_index_that_names_a_tensor_the_file_lacks(sharded):
    file = _shard_of(sharded, MATRIX)
    tensors = load_file(file)
    del tensors[MATRIX]
    save_file(tensors, file)
    _refused(sharded, file.name, MATRIX)


@pytest.mark.parametrize("index", ["{", "{}", '{"weight_map": {}}'])
def test_broken_index(sharded, index):
    (sharded / INDEX_FILE).write_text(index)
    _refused(sharded, INDEX_FILE)


def test_quantised_weights_are_refused(single):
    file = single / "model.safetensors"
    save_file(load_file(file) | {"a": torch.zeros(4).to(torch.float8_e4m3fn)}, file)
    _refused(single, "'a'", "F8_E4M3")


def test_missing_tensor_and_values_that_are_not_finite(single):
    file = single / "model.safetensors"
    tensors = load_file(file)
    tensors[MATRIX][3, 4] = float("nan")
    save_file(tensors, file)
    with SafetensorReader(single) as reader:
        with pytest.raises(UserError, match=f"{MATRIX}.*NaN"):
            reader.read(MATRIX)
        reader.read(MATRIX, slice(4, 8))
        with pytest.raises(UserError, match="lm_tail.*is missing"):
            reader.read("lm_tail")
