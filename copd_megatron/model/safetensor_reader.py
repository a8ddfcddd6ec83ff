"""Reading parts of tensors from a directory of safetensors files, single or sharded by an index.

A safetensors file is 8 bytes of header length, a JSON header {name: dtype, shape, [begin, end]} and the data,
in that order (https://huggingface.co/docs/safetensors). So every missing, truncated or inconsistent file is
found from the headers and file sizes alone, before any weight is read, and a rank maps only the bytes of its
own slices.
"""
from __future__ import annotations

import json
import math
import struct
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import torch
from safetensors import SafetensorError, safe_open

from copd_megatron.model.hf_config import read_json
from copd_megatron.types import UserError

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
_MAX_HEADER_BYTES = 100_000_000
"""The format's own limit; a larger number means that the first 8 bytes are not a safetensors header."""

_OLD_VISION = "visual."

_ITEM_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
"""Weight types that are plain numbers; anything else is a quantised format that needs its own decoder."""


@dataclass(frozen=True)
class TensorEntry:
    """Where one tensor lies. Example: ``TensorEntry(Path(".../model.safetensors"), "lm_head.weight", "BF16",
    (1024, 64), 0, 131072)``."""

    file: Path
    stored_name: str
    """Its name in the file."""
    dtype: str
    shape: tuple[int, ...]
    begin: int
    """First byte, counted from the end of the header."""
    end: int


def check_files(path: str | Path) -> dict[str, TensorEntry]:
    """Every tensor of the checkpoint in directory ``path`` by today's name, after checking all headers and
    file sizes.

    Reads headers only. Raises UserError naming the file (and the tensor, where one is affected) if a file is
    missing, truncated or not safetensors, if the index and the files disagree, or if a weight is not a plain
    float.
    """
    path = Path(path)
    if (path / INDEX_FILE).is_file():
        return _by_todays_names(_check_sharded(path))
    if not (path / SINGLE_FILE).is_file():
        raise UserError(f"model.path: {path} has neither {SINGLE_FILE} nor {INDEX_FILE}; weights must be "
                        "safetensors; finish the download or convert the checkpoint")
    return _by_todays_names(read_header(path / SINGLE_FILE))


def _by_todays_names(entries: dict[str, TensorEntry]) -> dict[str, TensorEntry]:
    """Published Qwen2.5-VL checkpoints have "visual.*" and "model.*" where the model of transformers 5 has
    "model.visual.*" and "model.language_model.*"; transformers renames them on loading, too."""
    if not any(name.startswith(_OLD_VISION) for name in entries):
        return entries
    return {_todays_name(name): entry for name, entry in entries.items()}


def _todays_name(name: str) -> str:
    if name.startswith(_OLD_VISION):
        return f"model.{name}"
    new = not name.startswith("model.") or name.startswith(("model.language_model.", "model.visual."))
    return name if new else f"model.language_model.{name.removeprefix('model.')}"


def _check_sharded(path: Path) -> dict[str, TensorEntry]:
    weight_map = read_json(path / INDEX_FILE).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise _broken(path / INDEX_FILE, "it has no weight_map")
    headers = {}
    for file_name in sorted(set(weight_map.values())):
        if not (path / file_name).is_file():
            tensor = next(name for name, file in weight_map.items() if file == file_name)
            raise _broken(path / file_name, f"the file is missing; tensor {tensor!r} should be in it")
        headers[file_name] = read_header(path / file_name)
    entries = {}
    for name, file_name in weight_map.items():
        if name not in headers[file_name]:
            raise _broken(path / file_name,
                          f"tensor {name!r} is missing, although {INDEX_FILE} places it here")
        entries[name] = headers[file_name][name]
    return entries


def read_header(file: Path) -> dict[str, TensorEntry]:
    """Every tensor of one safetensors file by name, after checking the header against the file's size.

    Raises UserError naming the file if it is truncated, no safetensors or holds anything but plain floats.
    """
    size = file.stat().st_size
    with file.open("rb") as stream:
        prefix = stream.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else _MAX_HEADER_BYTES
        if length >= _MAX_HEADER_BYTES:
            raise _broken(file, "it does not start with a safetensors header")
        if 8 + length > size:
            raise _broken(file, f"truncated: its header alone needs {8 + length} bytes, the file has {size}")
        raw_header = stream.read(length)
    try:
        header = json.loads(raw_header)
        entries = {
            name: TensorEntry(file, name, item["dtype"], tuple(map(int, item["shape"])),
                              *map(int, item["data_offsets"]))
            for name, item in header.items() if name != "__metadata__"
        }
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise _broken(file, f"its header is corrupt ({type(error).__name__})") from error
    data_bytes = size - 8 - length
    for name, entry in entries.items():
        _check_entry(name, entry, data_bytes)
    return entries


def _check_entry(name: str, entry: TensorEntry, data_bytes: int) -> None:
    if entry.dtype not in _ITEM_BYTES:
        raise UserError(f"model.path: {entry.file}: tensor {name!r} is {entry.dtype}; allowed are "
                        f"{', '.join(_ITEM_BYTES)}; use the unquantised checkpoint")
    if entry.begin < 0 or entry.end - entry.begin != math.prod(entry.shape) * _ITEM_BYTES[entry.dtype]:
        raise _broken(entry.file, f"tensor {name!r} of shape {list(entry.shape)} does not fit its byte range")
    if entry.end > data_bytes:
        raise _broken(entry.file, f"truncated: tensor {name!r} ends at data byte {entry.end}, "
                                  f"the file holds {data_bytes}")


def _broken(file: Path, reason: str) -> UserError:
    return UserError(f"model.path: {file}: {reason}; a complete safetensors file is needed; download it "
                     "again")


class SafetensorReader:
    """Slices of the tensors in one checkpoint directory. Files are memory-mapped on first use.

    Use as a context manager: leaving it unmaps the files.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.entries = check_files(path)
        self._handles: dict[Path, safe_open] = {}

    def __enter__(self) -> SafetensorReader:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        self._handles.clear()

    def shape(self, name: str) -> tuple[int, ...]:
        """Full shape of tensor ``name``; UserError naming the directory if there is none."""
        return self._entry(name).shape

    def read(self, name: str, rows: slice = slice(None), cols: slice = slice(None),
             index: int | None = None) -> torch.Tensor:
        """Rows (and, of a matrix, columns) of tensor ``name`` in its stored dtype, on the CPU.

        Args:
            index: of a stack of matrices, read this one.

        Raises UserError naming file and tensor if it is missing, unreadable or not finite.
        """
        entry = self._entry(name)
        try:
            if entry.file not in self._handles:
                self._handles[entry.file] = safe_open(entry.file, framework="pt", device="cpu")
            lazy = self._handles[entry.file].get_slice(entry.stored_name)
            cuts = (rows, cols) if index is None else (index, rows, cols)
            tensor = lazy[cuts[:len(entry.shape)]]
        except (SafetensorError, OSError) as error:
            raise _broken(entry.file, f"tensor {name!r} cannot be read ({error})") from error
        if not bool(torch.isfinite(tensor).all()):
            raise _broken(entry.file, f"tensor {name!r} holds NaN or infinity")
        return tensor

    def _entry(self, name: str) -> TensorEntry:
        if name not in self.entries:
            raise UserError(f"model.path: {self.path}: tensor {name!r} is missing from its safetensors "
                            "files; the family in config.json needs it; check that config and weights "
                            "belong together")
        return self.entries[name]
