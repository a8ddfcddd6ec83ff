"""A policy merged into dense weights, W + scaling B A, as a Hugging Face directory. Scope ``sequence`` only.

Weights stream block by block (see ``weight_stream``); tensors without an adapter keep their bytes. The linears of the
layers can be written in FP8 rows (``w8a8``), those of a merged policy or those of the backbone as it is.
"""
from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from copd_megatron.checkpoint.adapter import Adapter
from copd_megatron.checkpoint.w8a8 import quantization_config
from copd_megatron.checkpoint.weight_stream import Edit, Matrices, rewrite_file, tensor_ranges
from copd_megatron.checkpoint.whole_folder import whole_folder
from copd_megatron.model.safetensor_reader import INDEX_FILE, check_files
from copd_megatron.types import UserError

WEIGHT_FILES = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx")
"""Endings of files that hold the backbone's weights, which the merged directory must not repeat."""

NOTHING: Mapping[str, Matrices] = MappingProxyType({})

ADAPTER_CONFIG = "adapter_config.json"
"""Of an adapter that lies in the backbone's directory: transformers would lay it over the merged weights."""


def refuse_activated(adapter: Adapter) -> None:
    """Refuse to merge an activated LoRA, with the ways out.

    Raises:
        UserError: scope ``completion``, whose adapted span depends on the prompt.
    """
    if adapter.invocation_token_ids is not None:
        raise UserError("adapter.scope: completion never merges into dense weights, because the prompt is not adapted "
                        "(whatever adapter.first_layer is); allowed is sequence; use the policy as an activated LoRA "
                        "(the PEFT folders of each save, or `convert_checkpoint.py peft`), or train with "
                        "adapter.scope=sequence, with any adapter.first_layer")


def save_merged(folder: Path, backbone: Path, adapter: Adapter, prefix: str, dtype: torch.dtype | None = None,
                about: Callable[[], Mapping[str, Any]] = dict,
                advance: Callable[[int], object] = lambda count: None,
                rounded: Mapping[str, Matrices] = NOTHING) -> None:
    """Write the merged directory, whole or not at all; every other file is the backbone's. One rank calls it.

    The delta is computed in float32 (float64 for float64 weights) and rounded once to the dtype of the
    weight; rows whose delta is zero keep their bits.

    Args:
        prefix: what precedes "layers." in the backbone's weight names, see ``translate.TEXT_PREFIX``.
        dtype: of all weights of the result that are not rounded; None keeps each one's own.
        about: noted in merge.json beside the backbone; asked for when all weights are written.
        advance: told how many bytes of weights were written.
        rounded: weights that the result has in FP8 rows, see ``w8a8.rounded_weights``; what is rounded is W + delta.

    Raises:
        UserError: an activated LoRA, the disk refuses, or an adapter has no weight in the backbone.
    """
    refuse_activated(adapter)
    modules = {f"{prefix}{module}.weight": module for module in adapter.modules()}
    entries = check_files(backbone)
    missing = sorted(modules.keys() - entries.keys())
    if missing:
        raise UserError(f"{folder}: {missing[0]} has an adapter but is not in {backbone}; adapters and backbone must "
                        "belong together; give the backbone of the run")

    def edit(name: str) -> Edit | None:
        return _addition(adapter, modules[name]) if name in modules else None

    with whole_folder(folder, "the merged model") as unfinished:
        _write_weights(unfinished, backbone, edit, dtype, rounded, advance)
        noted = {"backbone": str(backbone), "adapted_weights": len(modules), **about()}
        (unfinished / "merge.json").write_text(json.dumps(noted, indent=2) + "\n")


def save_quantised(folder: Path, backbone: Path, rounded: Mapping[str, Matrices], dtype: torch.dtype | None = None,
                   advance: Callable[[int], object] = lambda count: None) -> None:
    """Write the backbone with some weights in FP8 rows, whole or not at all; arguments as in ``save_merged``.

    Raises:
        UserError: the disk refuses.
    """
    with whole_folder(folder, "the quantised model") as unfinished:
        _write_weights(unfinished, backbone, lambda name: None, dtype, rounded, advance)


def _write_weights(unfinished: Path, backbone: Path, edit: Callable[[str], Edit | None], dtype: torch.dtype | None,
                   rounded: Mapping[str, Matrices], advance: Callable[[int], object]) -> None:
    """The weight files of the backbone, changed, and everything that belongs to them; names are today's."""
    # Old checkpoints store tensors under other names than the model has today; the result keeps theirs.
    today = {(entry.file, entry.stored_name): name for name, entry in check_files(backbone).items()}

    def edit_stored(file: Path, stored: str) -> Edit | None:
        return edit(today.get((file, stored), stored))

    def round_stored(file: Path, stored: str) -> Matrices | None:
        return rounded.get(today.get((file, stored), stored))

    written = {}
    for file in sorted({file for file, _ in today}):
        written[file.name] = rewrite_file(file, unfinished / file.name, partial(edit_stored, file), dtype, advance,
                                          partial(round_stored, file))
    # Last, so that no unfinished folder has a config.json.
    copy_companions(backbone, unfinished, dtype, written if rounded else None)


def _addition(adapter: Adapter, module: str) -> Edit | None:
    """How one weight's rows change; None if the adapter is the zero that experts begin with."""
    a, b = adapter.pair(module)
    if not b.any():
        return None

    def edit(rows: slice, weight: Tensor) -> Tensor:
        wide = torch.promote_types(weight.dtype, torch.float32)
        delta = (b[rows].to(wide) @ a.to(wide)).mul_(adapter.scaling)
        # Adding a zero delta would turn -0.0 into 0.0.
        return delta.add_(weight) if delta.any() else weight

    return edit


def copy_companions(backbone: Path, folder: Path, dtype: torch.dtype | None,
                    quantised: Mapping[str, Sequence[str]] | None = None) -> None:
    """Copy whatever is no weight: configuration, index, tokenizer, processor, chat template, generation settings.

    Args:
        dtype: what config.json is to name; None: what it names.
        quantised: file -> its tensors, if some are FP8 rows: config.json says so, and the index lists them.
    """
    changed = ("config.json", INDEX_FILE) if dtype or quantised else ()
    for file in sorted(backbone.iterdir()):
        stale = file.name.endswith(".index.json") and file.name != INDEX_FILE
        if not file.is_file() or file.suffix in WEIGHT_FILES or stale or file.name == ADAPTER_CONFIG:
            continue
        content = json.loads(file.read_text()) if file.name in changed else None
        if content is None:
            shutil.copyfile(file, folder / file.name)
            continue
        if file.name == INDEX_FILE:
            content.setdefault("metadata", {})["total_size"] = _bytes_of(folder)
            if quantised:
                content["weight_map"] = {name: owner for owner, names in quantised.items() for name in names}
        else:
            if dtype:
                _set_dtype(content, dtype)
            if quantised:
                content["quantization_config"] = quantization_config()
        (folder / file.name).write_text(json.dumps(content, indent=2) + "\n")


def _set_dtype(config: dict[str, Any], dtype: torch.dtype) -> None:
    """Let a config.json, its parts included, name the dtype of the weights."""
    name = str(dtype).removeprefix("torch.")
    for part in (config, *(value for value in config.values() if isinstance(value, dict))):
        for key in {"dtype", "torch_dtype"} & part.keys():
            part[key] = name
    config.setdefault("torch_dtype" if "torch_dtype" in config else "dtype", name)


def _bytes_of(folder: Path) -> int:
    """Bytes of all tensors in the weight files of a folder."""
    return sum(end - begin for file in folder.glob("*.safetensors") for begin, end in tensor_ranges(file))
