"""A policy merged into dense weights, W + scaling B A, as a Hugging Face directory. Scope ``sequence`` only.

Weights stream block by block (see ``weight_stream``); tensors without an adapter keep their bytes.
"""
from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from copd_megatron.checkpoint.adapter import Adapter
from copd_megatron.checkpoint.weight_stream import Edit, rewrite_file
from copd_megatron.checkpoint.whole_folder import whole_folder
from copd_megatron.model.safetensor_reader import INDEX_FILE, check_files, read_header
from copd_megatron.types import UserError

WEIGHT_FILES = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx")
"""Endings of files that hold the backbone's weights, which the merged directory must not repeat."""

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
                advance: Callable[[int], object] = lambda count: None) -> None:
    """Write the merged directory, whole or not at all; every other file is the backbone's. One rank calls it.

    The delta is computed in float32 (float64 for float64 weights) and rounded once to the dtype of the
    weight; rows whose delta is zero keep their bits.

    Args:
        prefix: what precedes "layers." in the backbone's weight names, see ``translate.TEXT_PREFIX``.
        dtype: of all weights of the result; None keeps each one's own.
        about: noted in merge.json beside the backbone; asked for when all weights are written.
        advance: told how many bytes of weights were written.

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

    # Old checkpoints store tensors under other names than the model has today; the result keeps theirs.
    adapted = {(entries[name].file, entries[name].stored_name): module for name, module in modules.items()}

    def edit(file: Path, stored_name: str) -> Edit | None:
        module = adapted.get((file, stored_name))
        return _addition(adapter, module) if module else None

    with whole_folder(folder, "the merged model") as unfinished:
        for file in sorted({entry.file for entry in entries.values()}):
            rewrite_file(file, unfinished / file.name, partial(edit, file), dtype, advance)
        # Last, so that no unfinished folder has a config.json.
        copy_companions(backbone, unfinished, dtype)
        noted = {"backbone": str(backbone), "adapted_weights": len(modules), **about()}
        (unfinished / "merge.json").write_text(json.dumps(noted, indent=2) + "\n")


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


def copy_companions(backbone: Path, folder: Path, dtype: torch.dtype | None) -> None:
    """Copy whatever is no weight: configuration, index, tokenizer, processor, chat template, generation settings."""
    for file in sorted(backbone.iterdir()):
        stale = file.name.endswith(".index.json") and file.name != INDEX_FILE
        if not file.is_file() or file.suffix in WEIGHT_FILES or stale or file.name == ADAPTER_CONFIG:
            continue
        content = json.loads(file.read_text()) if dtype and file.name in ("config.json", INDEX_FILE) else None
        if content is None:
            shutil.copyfile(file, folder / file.name)
            continue
        if file.name == INDEX_FILE:
            content.setdefault("metadata", {})["total_size"] = _bytes_of(folder)
        else:
            _set_dtype(content, dtype)
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
    return sum(entry.end - entry.begin for file in folder.glob("*.safetensors") for entry in read_header(file).values())
