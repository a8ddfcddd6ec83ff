"""Megatron distributed checkpoints (format torch_dist) as Hugging Face directories: the inverse of ``megatron_writer``.

Reads what Megatron-LM saved on any number of ranks: each region is put together from the parts that hold it.
"""
from __future__ import annotations

import pickle
from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader, LoadPlan, LoadPlanner
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import ReadItem
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from copd_megatron.checkpoint.huggingface import copy_companions
from copd_megatron.checkpoint.megatron_names import LAYER, RELEASE, TRACKER, Slot, check_supported, piece_rows, slots
from copd_megatron.checkpoint.weight_stream import DTYPES, write_file
from copd_megatron.checkpoint.whole_folder import whole_folder
from copd_megatron.model.moe_weights import Storage
from copd_megatron.model.safetensor_reader import SafetensorReader, TensorEntry, check_files
from copd_megatron.model.spec import BackboneSpec
from copd_megatron.model.translate import HEAD_NAME, TEXT_PREFIX, expected_shapes, stored_as
from copd_megatron.types import UserError

REMEMBERED = 3
"""Slots in memory: q, k, v and gate, up of a layer come from one each, with others between them."""


class _Target(LoadPlanner):
    """Receives parts of one tensor."""

    def __init__(self, tensor: Tensor):
        self.tensor = tensor

    def set_up_planner(self, state_dict, metadata=None, is_coordinator=False) -> None:
        """Nothing to set up."""

    def create_local_plan(self) -> LoadPlan:
        """Made by the caller."""
        raise NotImplementedError

    create_global_plan = finish_plan = load_bytes = create_local_plan

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        """The place of a part."""
        place = self.tensor
        for dim, (start, length) in enumerate(zip(read_item.dest_offsets, read_item.lengths)):
            place = place.narrow(dim, start, length)
        return place

    def commit_tensor(self, read_item: ReadItem, tensor: Tensor) -> None:
        """It was written in place."""


class MegatronCheckpoint:
    """Tensors of a Megatron distributed checkpoint, by slot, however its ranks cut them.

    Layers may be one tensor of all layers, or tensors of their own (``decoder.layers.3...``).
    """

    def __init__(self, folder: Path):
        self.folder = _iteration_folder(folder)
        self._reader = FileSystemReader(self.folder)
        try:
            self.metadata: Metadata = self._reader.read_metadata()
        except (OSError, pickle.UnpicklingError, EOFError) as error:
            raise UserError(f"--checkpoint: {self.folder} cannot be read ({error}); a Megatron checkpoint of format "
                            "torch_dist holds .metadata; check the path") from error
        self._reader.set_up_storage_reader(self.metadata, True)
        self._recent: OrderedDict[Slot, Tensor] = OrderedDict()

    def dtype(self, spec: BackboneSpec) -> torch.dtype:
        """Of the model's tensors.

        Raises:
            UserError: they have several.
        """
        kinds = {self._find(slot)[1].properties.dtype for slot in slots(spec)}
        if len(kinds) > 1:
            raise UserError(f"--dtype: {self.folder} mixes {', '.join(sorted(map(str, kinds)))}; the directory gets "
                            "one; choose it with --dtype")
        return kinds.pop()

    def read(self, slot: Slot) -> Tensor:
        """The values of a slot, [rows] or [rows, cols], without padding of a vocabulary. The last few are remembered.

        Raises:
            UserError: the tensor is missing, smaller than the backbone's or not all there.
        """
        if slot not in self._recent:
            self._recent[slot] = self._load(slot)
            while len(self._recent) > REMEMBERED:
                self._recent.popitem(last=False)
        self._recent.move_to_end(slot)
        return self._recent[slot]

    def _find(self, slot: Slot) -> tuple[str, TensorStorageMetadata, tuple[int, ...]]:
        """Key, description and leading offset of a slot."""
        alone = slot.key if slot.layer is None else f"{LAYER}{slot.layer}.{slot.key.removeprefix(LAYER)}"
        stacked = () if slot.layer is None else (slot.layer,)
        for key, lead in ((slot.key, stacked), (alone, ())):
            found = self.metadata.state_dict_metadata.get(key)
            if isinstance(found, TensorStorageMetadata):
                self._check_size(key, tuple(found.size), lead, slot)
                return key, found, lead
        raise UserError(f"--checkpoint: {self.folder} has no tensor {slot.key!r}; it must hold the model that "
                        "--backbone describes; check both paths")

    def _check_size(self, key: str, size: tuple[int, ...], lead: tuple[int, ...], slot: Slot) -> None:
        own = size[len(lead):]
        padded = slot.layer is None and len(own) == 2 and own[0] >= slot.shape[0] and own[1] == slot.shape[1]
        if not (padded or own == slot.shape) or (lead and lead[0] >= size[0]):
            raise UserError(f"--checkpoint: {self.folder}: {key} is {list(size)}, --backbone asks for "
                            f"{list(slot.shape)} per layer; they must be the same model; check both paths")

    def _load(self, slot: Slot) -> Tensor:
        key, found, lead = self._find(slot)
        offset = torch.Size((*lead, *(0 for _ in slot.shape)))
        target = torch.empty((*(1 for _ in lead), *slot.shape), dtype=found.properties.dtype)
        items = create_read_items_for_chunk_list(key, found, [ChunkStorageMetadata(offset, target.shape)])
        if sum(item.lengths.numel() for item in items) != target.numel():
            raise UserError(f"--checkpoint: {self.folder}: parts of {key} are missing; a complete checkpoint is "
                            "needed; save it anew")
        try:
            self._reader.read_data(LoadPlan(items), _Target(target)).wait()
        except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
            raise UserError(f"--checkpoint: {self.folder}: {key} cannot be read ({str(error).splitlines()[0]}); a "
                            "complete checkpoint is needed; copy it anew") from error
        return target.view(slot.rows)


def _iteration_folder(folder: Path) -> Path:
    """The folder that the tracker file names, or ``folder`` itself."""
    tracker = folder / TRACKER
    if not tracker.is_file():
        return folder
    name = tracker.read_text().strip()
    return folder / (name if name == RELEASE else f"iter_{int(name):07d}")


def from_megatron(checkpoint: Path, backbone: Path, spec: BackboneSpec, folder: Path,
                  dtype: torch.dtype | None = None, advance: Callable[[int], object] = lambda count: None) -> None:
    """Write a Hugging Face directory with the weights of a Megatron checkpoint, whole or not at all.

    Args:
        backbone: the directory that it was converted from, or any of the same model: gives the names of weight files,
            which tensors are in which, and every other file. Its weights are not read.
        dtype: of the weights; None keeps the checkpoint's.

    Raises:
        UserError: a tensor is missing, misshapen or broken, or the disk refuses.
    """
    check_supported(backbone, spec)
    source = MegatronCheckpoint(checkpoint)
    kind = dtype or source.dtype(spec)
    by_file: dict[Path, dict[str, TensorEntry]] = {}
    for name, entry in sorted(check_files(backbone).items(), key=lambda item: item[1].begin):
        by_file.setdefault(entry.file, {})[name] = entry
    kept = {DTYPES[entry.dtype] for entries in by_file.values() for entry in entries.values()} == {kind}
    with whole_folder(folder, "the Hugging Face directory") as partial, SafetensorReader(backbone) as old:
        places = _places(spec, stored_as(spec, old))
        for file, entries in sorted(by_file.items()):
            def tensor(name: str, entries=entries) -> Tensor:
                # What is no weight, such as the frequencies that old checkpoints carry, stays as it was.
                return _gathered(source, places[name], entries[name].shape) if name in places else old.read(name)

            shapes = {name: entry.shape for name, entry in entries.items()}
            write_file(partial / file.name, shapes, kind, tensor, advance)
        copy_companions(backbone, partial, None if kept else kind)


Place = tuple[tuple[slice | int, ...], Slot, slice]
"""A part of a Hugging Face tensor (rows, or a matrix of a stack and rows), the slot and its rows that hold it."""


def _places(spec: BackboneSpec, storage: Storage | None) -> dict[str, list[Place]]:
    """Hugging Face name -> its places; inverse of ``slots``."""
    shapes, places = expected_shapes(spec, storage), {}
    for slot in slots(spec, storage):
        row = 0
        for piece in slot.pieces:
            rows = piece_rows(piece, shapes)
            own = (*(() if piece.index is None else (piece.index,)), slice(rows.start, rows.stop))
            places.setdefault(piece.name, []).append((own, slot, slice(row, row + len(rows))))
            row += len(rows)
    if spec.tied_head:
        places[HEAD_NAME] = places[f"{TEXT_PREFIX[spec.family]}embed_tokens.weight"]
    return places


def _gathered(source: MegatronCheckpoint, parts: Sequence[Place], shape: Sequence[int]) -> Tensor:
    if len(parts) == 1:
        [(_, slot, rows)] = parts
        return source.read(slot)[rows].view(*shape)
    tensor = None
    for own, slot, rows in parts:
        values = source.read(slot)[rows]
        tensor = torch.empty(*shape, dtype=values.dtype) if tensor is None else tensor
        tensor[own] = values
    return tensor
