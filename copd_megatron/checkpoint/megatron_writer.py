"""Backbones as Megatron distributed checkpoints (format torch_dist), for people who go on in Megatron-LM.

    DIR/latest_checkpointed_iteration.txt   "release"
    DIR/release/                            the checkpoint; tensors are called as in ``megatron_names``
    DIR/megatron_arguments.txt              options of pretrain_gpt.py for it

Every tensor is stored whole, so a checkpoint loads under any tensor, pipeline and data parallel size; tables are not
padded, which GPTModel's loading allows for. Tensors are read when they are written: memory is that of the largest one.
"""
from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.mapping import ShardedObject
from torch import Tensor
from torch.distributed.checkpoint import FileSystemWriter, SavePlan
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

from copd_megatron.checkpoint.megatron_names import (
    ARGUMENTS,
    FINAL_NORM,
    LAYER,
    MOE_STATEFUL,
    RELEASE,
    STATEFUL,
    TRACKER,
    Slot,
    check_supported,
    megatron_arguments,
    slots,
)
from copd_megatron.checkpoint.weight_stream import DTYPES
from copd_megatron.checkpoint.whole_folder import whole_folder
from copd_megatron.model.safetensor_reader import SafetensorReader
from copd_megatron.model.spec import BackboneSpec
from copd_megatron.model.translate import expected_shapes, stored_as
from copd_megatron.types import UserError

Data = Mapping[MetadataIndex, Callable[[], Tensor | io.BytesIO]]
"""What is written, made when it is written."""


class _Planner(DefaultSavePlanner):
    """Reads a tensor when it is written."""

    def __init__(self, data: Data):
        super().__init__(flatten_state_dict=False)
        self._data = data

    def resolve_data(self, write_item: WriteItem) -> Tensor | io.BytesIO:
        return self._data[write_item.index]()


def to_megatron(backbone: Path, spec: BackboneSpec, folder: Path, dtype: torch.dtype | None = None,
                advance: Callable[[int], object] = lambda count: None) -> None:
    """Write the checkpoint, whole or not at all.

    Args:
        dtype: of all tensors; None keeps that of the backbone, which must then be one.

    Raises:
        UserError: a family that GPTModel does not know, weights of several dtypes, or the disk refuses.
    """
    check_supported(backbone, spec)
    with whole_folder(folder, "the Megatron checkpoint") as partial, SafetensorReader(backbone) as reader:
        storage = stored_as(spec, reader)
        kind = dtype or _only_dtype(reader, expected_shapes(spec, storage))
        state = partial / RELEASE
        state.mkdir()
        data, items = {}, []
        for slot in slots(spec, storage):
            item = _write_item(slot, spec.num_layers, kind)
            items.append(item)
            data[item.index] = lambda slot=slot: _assembled(slot, backbone, kind, advance)
        _write(state, items, data, _objects(spec))
        save_config(CheckpointingConfig("torch_dist"), str(state))
        (partial / ARGUMENTS).write_text("\n".join(megatron_arguments(backbone, spec, kind)) + "\n")
        # Last, as Megatron-LM looks for it first.
        (partial / TRACKER).write_text(RELEASE)


def _only_dtype(reader: SafetensorReader, names: Iterable[str]) -> torch.dtype:
    kinds = {reader.entries[name].dtype for name in names}
    if len(kinds) > 1:
        raise UserError(f"--dtype: {reader.path} mixes {', '.join(sorted(kinds))}; a Megatron checkpoint has one; "
                        "choose it with --dtype")
    return DTYPES[kinds.pop()]


def _write_item(slot: Slot, layers: int, dtype: torch.dtype) -> WriteItem:
    size, offset, whole = slot.shape, (0,) * len(slot.shape), slot.shape
    if slot.layer is not None:
        size, offset, whole = (1, *size), (slot.layer, *offset), (layers, *whole)
    chunk = ChunkStorageMetadata(torch.Size(offset), torch.Size(size))
    return WriteItem(MetadataIndex(slot.key, chunk.offsets), WriteItemType.SHARD, tensor_data=TensorWriteData(
        chunk, TensorProperties(dtype=dtype), torch.Size(whole)))


def _assembled(slot: Slot, backbone: Path, dtype: torch.dtype, advance: Callable[[int], object]) -> Tensor:
    """The values of a slot. The files are opened anew, so that their pages do not stay in memory."""
    with SafetensorReader(backbone) as reader:
        tensor = torch.cat([piece.read(reader) for piece in slot.pieces]).to(dtype).view(slot.shape)
    advance(tensor.nbytes)
    return tensor if slot.layer is None else tensor[None]


def _objects(spec: BackboneSpec) -> dict[MetadataIndex, Callable[[], io.BytesIO]]:
    """What is no tensor: the common state, which dist_checkpointing.load insists on, and empty states of modules."""
    empty = []
    for module in STATEFUL if spec.moe is None else MOE_STATEFUL:
        grid = (spec.num_layers, *((spec.moe.experts,) if ".experts." in module else ()))
        empty += [ShardedObject(f"{LAYER}{module}._extra_state", None, grid, place) for place in np.ndindex(grid)]
    empty += [ShardedObject(key, value, (1,), (0,)) for key, value in ((f"{FINAL_NORM}._extra_state", None),
                                                                       ("common_state", {}))]
    return {MetadataIndex(found.unique_key): lambda data=found.data: _saved([data]) for found in empty}


def _write(folder: Path, tensors: Sequence[WriteItem], data: Data, objects: Data) -> None:
    planner = _Planner({**data, **objects})
    plans, metadata = planner.create_global_plan(
        [SavePlan(list(tensors)), SavePlan([WriteItem(index, WriteItemType.BYTE_IO) for index in objects])])
    # A file for each tensor: torch's writer keeps all tensors of a file in memory.
    writers = FileSystemWriter(folder, single_file_per_rank=False), FileSystemWriter(folder)
    plans = writers[0].prepare_global_plan(plans)
    try:
        results = [writer.write_data(planner.finish_plan(plan), planner).wait() for writer, plan in zip(writers, plans)]
        writers[0].finish(metadata, results)
    except RuntimeError as error:  # torch.save may turn the system's error into one
        raise OSError(str(error)) from error


def _saved(value: object) -> io.BytesIO:
    stream = io.BytesIO()
    torch.save(value, stream)
    return stream
