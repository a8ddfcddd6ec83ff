"""Collectives that torch.distributed lacks: ragged exchanges, and small objects; the same on gloo and NCCL.

Payloads travel as bytes, so that every dtype works on both backends (gloo does not know all of them). Nothing
here is differentiable. Every rank of the group must make the call.
"""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup


def all_to_all_ragged(tensors_per_peer: Sequence[torch.Tensor], group: ProcessGroup) -> list[torch.Tensor]:
    """Send ``tensors_per_peer[i]`` to group rank i; returns what each peer sent here, by group rank.

    All tensors, on all ranks, share dtype and all dims but the first; the first dim is free and may be 0.

    Raises:
        ValueError: not one tensor per peer, or they differ in dtype or trailing dims.
    """
    size = dist.get_world_size(group)
    if len(tensors_per_peer) != size:
        raise ValueError(f"{len(tensors_per_peer)} tensors for a group of {size} ranks; give one per rank")
    first = tensors_per_peer[0]
    if any(t.dtype != first.dtype or t.shape[1:] != first.shape[1:] for t in tensors_per_peer):
        raise ValueError("tensors for different peers must share dtype and all dims but the first")
    if size == 1:
        return [first.clone()]
    lengths = torch.tensor([len(t) for t in tensors_per_peer], device=first.device)
    lengths_in = torch.empty_like(lengths)
    dist.all_to_all_single(lengths_in, lengths, group=group)
    rows_in = lengths_in.tolist()
    row_bytes = first.element_size() * first.shape[1:].numel()
    bytes_out = [len(t) * row_bytes for t in tensors_per_peer]
    bytes_in = [rows * row_bytes for rows in rows_in]
    received = torch.empty(sum(bytes_in), dtype=torch.uint8, device=first.device)
    sent = torch.cat([_as_bytes(t) for t in tensors_per_peer])
    dist.all_to_all_single(received, sent, bytes_in, bytes_out, group=group)
    return [_from_bytes(chunk, first, rows) for chunk, rows in zip(received.split(bytes_in), rows_in)]


def all_gather_ragged(tensor: torch.Tensor, group: ProcessGroup) -> list[torch.Tensor]:
    """Every rank's tensor, by group rank. Only the first dim may differ between ranks, and be 0."""
    size = dist.get_world_size(group)
    if size == 1:
        return [tensor.clone()]
    length = torch.tensor([len(tensor)], device=tensor.device)
    lengths = [torch.empty_like(length) for _ in range(size)]
    dist.all_gather(lengths, length, group=group)
    rows = [int(n) for n in lengths]
    row_bytes = tensor.element_size() * tensor.shape[1:].numel()
    padded = torch.zeros(max(rows) * row_bytes, dtype=torch.uint8, device=tensor.device)
    padded[:len(tensor) * row_bytes] = _as_bytes(tensor)
    gathered = [torch.empty_like(padded) for _ in range(size)]
    dist.all_gather(gathered, padded, group=group)
    return [_from_bytes(chunk[:n * row_bytes], tensor, n) for chunk, n in zip(gathered, rows)]


def broadcast_object(obj: Any, src: int, group: ProcessGroup) -> Any:
    """The picklable object that the global rank ``src`` holds; what other ranks pass in is ignored."""
    if dist.get_world_size(group) == 1:
        return obj
    box = [obj if dist.get_rank() == src else None]
    dist.broadcast_object_list(box, src=src, group=group)
    return box[0]


def all_gather_objects(obj: Any, group: ProcessGroup) -> list[Any]:
    """Every rank's picklable object, by group rank."""
    size = dist.get_world_size(group)
    if size == 1:
        return [obj]
    boxes: list[Any] = [None] * size
    dist.all_gather_object(boxes, obj, group=group)
    return boxes


def reduce_scalars(values: Mapping[str, float], group: ProcessGroup, op: Literal["sum", "max", "min"] = "sum"
                   ) -> dict[str, float]:
    """Reduce named numbers over the group in one call, in float64; keys absent on a rank do not count there.

    Keys may differ between ranks; the result has their union, in order of first appearance by group rank.
    """
    merged: dict[str, list[float]] = {}
    for theirs in all_gather_objects(dict(values), group):
        for name, value in theirs.items():
            merged.setdefault(name, []).append(float(value))
    fold = {"sum": sum, "max": max, "min": min}[op]
    return {name: float(fold(numbers)) for name, numbers in merged.items()}


def assert_same_on_all_ranks(tensor: torch.Tensor, group: ProcessGroup, what: str) -> None:
    """Raise AssertionError unless all ranks of the group hold the same bits (debug mode)."""
    theirs = all_gather_ragged(_as_bytes(tensor), group)
    differing = [rank for rank, other in enumerate(theirs) if not torch.equal(other, theirs[0])]
    if differing:
        raise AssertionError(f"{what}: group ranks {differing} hold other bits than group rank 0")


def _as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor's memory as a flat uint8 tensor, without gradient."""
    return tensor.detach().contiguous().flatten().view(torch.uint8)


def _from_bytes(flat: torch.Tensor, like: torch.Tensor, rows: int) -> torch.Tensor:
    """Inverse of `_as_bytes`: [rows, *like.shape[1:]] in the dtype of ``like``, in memory of its own."""
    return flat.clone().view(like.dtype).view(rows, *like.shape[1:])
