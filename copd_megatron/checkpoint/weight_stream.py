"""Safetensors files rewritten in blocks of rows: what is in memory is a block, however large tensors and files are.

Tensors keep their names and their order, and those that nothing changes keep their bytes: a file that is rewritten
without changes is the same file, byte for byte, if it was written by the safetensors library.
"""
from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from copd_megatron.types import UserError

BLOCK_BYTES = 1 << 20
"""Of the source in memory at one time; what is computed from it takes up to twelve times as much."""

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""Names of the types that weights have in a safetensors header."""

NAMES = {dtype: name for name, dtype in DTYPES.items()}

Edit = Callable[[slice, Tensor], Tensor]
"""(rows, their old values [rows, in]) -> their new values, of any dtype."""


def rewrite_file(source: Path, target: Path, edit: Callable[[str], Edit | None], dtype: torch.dtype | None,
                 advance: Callable[[int], object]) -> list[str]:
    """Write ``target`` with the tensors of ``source``, a file that ``safetensor_reader`` has checked.

    Args:
        edit: of a tensor's name: how its rows change; None where they do not.
        dtype: of all tensors in the target; None keeps each one's own.
        advance: told how many bytes were written, again and again.

    Returns:
        Names of the tensors.

    Raises:
        OSError: the disk refuses. UserError: the source ends before its tensors do.
    """
    header, data = _read_header(source)
    metadata = header.pop("__metadata__", None) or {}
    ordered = sorted(header, key=lambda name: header[name]["data_offsets"])
    ranges = _new_ranges(header, ordered, dtype)
    # transformers refuses files that do not name their framework.
    new = {"__metadata__": {"format": "pt", **metadata}} | {name: ranges[name] for name in header}
    with source.open("rb", buffering=0) as reader, target.open("wb") as writer:
        advance(writer.write(_packed(new)))
        for name in ordered:
            reader.seek(data + header[name]["data_offsets"][0])
            for block in _blocks(reader, header[name], edit(name), DTYPES[ranges[name]["dtype"]]):
                advance(writer.write(block))
    return ordered


def write_file(target: Path, shapes: dict[str, Sequence[int]], dtype: torch.dtype, tensor: Callable[[str], Tensor],
               advance: Callable[[int], object]) -> None:
    """Write a safetensors file of ``shapes`` in ``dtype``, one tensor after the other as ``tensor`` gives them."""
    kinds = {name: {"dtype": NAMES[dtype], "shape": list(shape)} for name, shape in shapes.items()}
    with target.open("wb") as writer:
        advance(writer.write(_packed({"__metadata__": {"format": "pt"}} | _new_ranges(kinds, list(kinds), None))))
        for name in kinds:
            advance(writer.write(as_bytes(tensor(name).to(dtype))))


def as_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a tensor in host memory, without a copy where it is contiguous."""
    return memoryview(tensor.contiguous().flatten().view(torch.uint8).numpy())


def _read_header(file: Path) -> tuple[dict[str, Any], int]:
    """The header as it is, and where the data begin."""
    with file.open("rb") as stream:
        size = struct.unpack("<Q", stream.read(8))[0]
        return json.loads(stream.read(size)), 8 + size


def _packed(header: dict[str, Any]) -> bytes:
    """As the safetensors library writes it: compact, padded to 8 bytes."""
    raw = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    raw += b" " * (-len(raw) % 8)
    return struct.pack("<Q", len(raw)) + raw


def _new_ranges(header: dict[str, Any], ordered: Sequence[str], dtype: torch.dtype | None) -> dict[str, Any]:
    """Name -> entry of the new header, tensors one after the other."""
    ranges, offset = {}, 0
    for name in ordered:
        kind, shape = NAMES[dtype] if dtype else header[name]["dtype"], header[name]["shape"]
        end = offset + math.prod(shape) * DTYPES[kind].itemsize
        ranges[name] = {"dtype": kind, "shape": shape, "data_offsets": [offset, end]}
        offset = end
    return ranges


def _blocks(reader: BinaryIO, entry: dict[str, Any], edit: Edit | None, dtype: torch.dtype) -> Iterator[memoryview]:
    """The bytes of one tensor as they are to be written; ``reader`` stands at its first byte."""
    old, shape = DTYPES[entry["dtype"]], entry["shape"]
    rows, width = (shape[0], math.prod(shape[1:])) if edit else (math.prod(shape), 1)
    step = max(1, BLOCK_BYTES // (max(1, width) * old.itemsize))
    for start in range(0, rows, step):
        count = min(step, rows - start)
        values = _read(reader, count * width, old)
        if edit:
            values = edit(slice(start, start + count), values.view(count, width))
        yield as_bytes(values.to(dtype))


def _read(reader: BinaryIO, count: int, dtype: torch.dtype) -> Tensor:
    values = torch.empty(count, dtype=dtype)
    view, filled = as_bytes(values), 0
    while filled < len(view):
        got = reader.readinto(view[filled:])
        if not got:
            raise UserError(f"{reader.name}: ends before its tensors do; a complete safetensors file is needed; "
                            "download it again")
        filled += got
    return values
