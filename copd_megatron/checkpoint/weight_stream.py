"""Safetensors files rewritten in blocks of rows: what is in memory is a block, however large tensors and files are.

Tensors keep their names and their order, and those that nothing changes keep their bytes: a file that is rewritten
without changes is the same file, byte for byte, if it was written by the safetensors library. Weights may be rounded to
FP8 rows on the way (``model.fp8``): then a tensor of scales follows each of them.
"""
from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from copd_megatron.model.fp8 import SCALE, quantised
from copd_megatron.types import UserError

BLOCK_BYTES = 1 << 20
"""Of the source in memory at one time; what is computed from it takes up to twelve times as much."""

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""Names of the types that weights have in a safetensors header."""

NAMES = {dtype: name for name, dtype in DTYPES.items()}
FP8_NAME, SCALE_NAME = "F8_E4M3", "F32"
_ITEM_BYTES = {name: dtype.itemsize for name, dtype in DTYPES.items()} | {FP8_NAME: 1}


@dataclass(frozen=True)
class Matrices:
    """What a tensor that is rounded to FP8 rows becomes. Example: ``Matrices(("mlp.experts.0.down_proj.weight",
    "mlp.experts.1.down_proj.weight"))`` of a stack of two."""

    weights: tuple[str, ...] = ()
    """Names of the matrices [out, in], of equally many rows, that its rows are, one after the other; (): it is one, and
    keeps its name."""
    transposed: bool = False
    """A stack [n, in, out], each of whose entries is as many of the matrices as the next, side by side."""


Edit = Callable[[slice, Tensor], Tensor]
"""(rows, their old values [rows, in]) -> their new values, of any dtype."""


def rewrite_file(source: Path, target: Path, edit: Callable[[str], Edit | None], dtype: torch.dtype | None,
                 advance: Callable[[int], object],
                 rounded: Callable[[str], Matrices | None] = lambda name: None) -> list[str]:
    """Write ``target`` with the tensors of ``source``, a file that ``safetensor_reader`` has checked.

    Args:
        edit: of a tensor's name: how its rows change; None where they do not.
        dtype: of all tensors in the target that are not rounded; None keeps each one's own.
        advance: told how many bytes were written, again and again.
        rounded: of a tensor's name: what it becomes in FP8 rows, each with its scales after it; None: it is kept.

    Returns:
        Names of the target's tensors.

    Raises:
        OSError: the disk refuses. UserError: the source ends before its tensors do.
    """
    header, data = _read_header(source)
    metadata = header.pop("__metadata__", None) or {}
    ordered = sorted(header, key=lambda name: header[name]["data_offsets"])
    becomes = {name: _becomes(name, header[name], dtype, rounded(name)) for name in ordered}
    ranges = _laid_out({new: kind for kinds in becomes.values() for new, kind in kinds.items()})
    # transformers refuses files that do not name their framework.
    new = {"__metadata__": {"format": "pt", **metadata}} | {
        target: ranges[target] for name in header for target in becomes[name]}
    with source.open("rb", buffering=0) as reader, target.open("wb") as writer:
        advance(writer.write(_packed(new)))
        for name in ordered:
            reader.seek(data + header[name]["data_offsets"][0])
            matrices = rounded(name)
            blocks = (_blocks(reader, header[name], edit(name), DTYPES[ranges[name]["dtype"]]) if matrices is None
                      else _rounded_blocks(reader, header[name], edit(name), matrices))
            for block in blocks:
                advance(writer.write(block))
    return list(ranges)


def write_file(target: Path, shapes: dict[str, Sequence[int]], dtype: torch.dtype, tensor: Callable[[str], Tensor],
               advance: Callable[[int], object]) -> None:
    """Write a safetensors file of ``shapes`` in ``dtype``, one tensor after the other as ``tensor`` gives them."""
    kinds = {name: {"dtype": NAMES[dtype], "shape": list(shape)} for name, shape in shapes.items()}
    with target.open("wb") as writer:
        advance(writer.write(_packed({"__metadata__": {"format": "pt"}} | _laid_out(kinds))))
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


def tensor_ranges(file: Path) -> list[tuple[int, int]]:
    """Begin and end of every tensor's bytes."""
    header, _ = _read_header(file)
    return [tuple(entry["data_offsets"]) for name, entry in header.items() if name != "__metadata__"]


def _packed(header: dict[str, Any]) -> bytes:
    """As the safetensors library writes it: compact, padded to 8 bytes."""
    raw = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    raw += b" " * (-len(raw) % 8)
    return struct.pack("<Q", len(raw)) + raw


def _becomes(name: str, entry: dict[str, Any], dtype: torch.dtype | None, rounded: Matrices | None) -> dict[str, Any]:
    """Names, types and shapes of what one tensor of the source becomes."""
    shape = entry["shape"]
    if rounded is None:
        return {name: {"dtype": NAMES[dtype] if dtype else entry["dtype"], "shape": shape}}
    names, width = rounded.weights or (name,), shape[-2] if rounded.transposed else shape[-1]
    rows = math.prod(shape) // width // len(names)
    return {target: kind for weight in names for target, kind in (
        (weight, {"dtype": FP8_NAME, "shape": [rows, width]}),
        (scale_name(weight), {"dtype": SCALE_NAME, "shape": [rows, 1]}))}


def scale_name(weight: str) -> str:
    """What the scales of a weight's FP8 rows are called: "...q_proj.weight" -> "...q_proj.weight_scale"."""
    return weight[:weight.rfind(".") + 1] + SCALE


def _laid_out(kinds: dict[str, Any]) -> dict[str, Any]:
    """The entries of a new header, tensors one after the other."""
    ranges, offset = {}, 0
    for name, kind in kinds.items():
        end = offset + math.prod(kind["shape"]) * _ITEM_BYTES[kind["dtype"]]
        ranges[name] = {**kind, "data_offsets": [offset, end]}
        offset = end
    return ranges


def _blocks(reader: BinaryIO, entry: dict[str, Any], edit: Edit | None, dtype: torch.dtype) -> Iterator[memoryview]:
    """The bytes of one tensor as they are to be written; ``reader`` stands at its first byte."""
    shape = entry["shape"]
    rows, width = (shape[0], math.prod(shape[1:])) if edit else (math.prod(shape), 1)
    for values in _row_blocks(reader, entry, edit, rows, width):
        yield as_bytes(values.to(dtype))


def _row_blocks(reader: BinaryIO, entry: dict[str, Any], edit: Edit | None, rows: int,
                width: int) -> Iterator[Tensor]:
    """The next rows, [n, width] at a time; with ``edit`` after the change."""
    kind = DTYPES[entry["dtype"]]
    step = max(1, BLOCK_BYTES // (max(1, width) * kind.itemsize))
    for start in range(0, rows, step):
        count = min(step, rows - start)
        values = _read(reader, count * width, kind).view(count, width)
        yield edit(slice(start, start + count), values) if edit else values


def _rounded_blocks(reader: BinaryIO, entry: dict[str, Any], edit: Edit | None,
                    matrices: Matrices) -> Iterator[memoryview]:
    """The same in FP8: the rows of each matrix, then their scales. What is changed is one matrix."""
    shape, count = entry["shape"], len(matrices.weights) or 1
    width = shape[-2] if matrices.transposed else shape[-1]
    rows = math.prod(shape) // width // count
    turned: list[Tensor] = []
    for _ in range(count):
        if matrices.transposed and not turned:
            stored = _read(reader, math.prod(shape[1:]), DTYPES[entry["dtype"]]).view(*shape[1:])
            turned = list(stored.T.split(rows))
        blocks = [turned.pop(0)] if matrices.transposed else _row_blocks(reader, entry, edit, rows, width)
        scales = []
        for values in blocks:
            rounded, scale = quantised(values, slice(None))
            scales.append(scale)
            yield as_bytes(rounded)
        yield as_bytes(torch.cat(scales))


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
