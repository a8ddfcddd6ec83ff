"""A policy merged into dense weights, W + scaling B A, as a Hugging Face directory. Scope ``sequence`` only.

Weights stream file by file: one file of the backbone is in memory at a time.
"""
from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from copd_megatron.checkpoint.whole_folder import whole_folder
from copd_megatron.model.safetensor_reader import check_files
from copd_megatron.types import UserError

WEIGHT_FILES = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx")
"""Endings of files that hold the backbone's weights, which the merged directory must not repeat."""


def save_merged(folder: Path, backbone: Path, factors: Mapping[str, Tensor], scaling: float,
                prefix: str) -> None:
    """Write the merged directory, whole or not at all; every other file is the backbone's. One rank calls it.

    The delta is computed in float32 (float64 for float64 weights) and rounded once to the dtype of the
    weight; a weight whose delta is zero keeps its bits.

    Args:
        factors: full factors by name, see ``peft.full_factors``.
        prefix: what precedes "layers." in the backbone's weight names, see ``translate.TEXT_PREFIX``.

    Raises:
        UserError: the disk refuses, or an adapter has no weight in the backbone.
    """
    unused = {f"{prefix}{name.rsplit('.', 1)[0]}.weight" for name in factors}
    adapted = len(unused)
    with whole_folder(folder, "the merged model") as partial:
        entries = check_files(backbone)
        names = {(entry.file, entry.stored_name): name for name, entry in entries.items()}
        for file in sorted({entry.file for entry in entries.values()}):
            with safe_open(file, framework="pt") as source:
                stored = {name: names.get((file, name), name) for name in source.keys()}
                tensors = {own: _merged(name, source.get_tensor(own), factors, scaling, prefix)
                           for own, name in stored.items()}
                unused -= set(stored.values())
                # transformers refuses files that do not name their framework.
                metadata = {"format": "pt", **(source.metadata() or {})}
                save_file(tensors, partial / file.name, metadata=metadata)
        if unused:
            raise UserError(f"{folder}: {min(unused)} has an adapter but is not in {backbone}; adapters and "
                            "backbone must belong together; give the backbone of the run")
        # Last, so that no unfinished folder has a config.json.
        for file in backbone.iterdir():
            if file.is_file() and file.suffix not in WEIGHT_FILES:
                shutil.copyfile(file, partial / file.name)
        about = {"backbone": str(backbone), "adapted_weights": adapted}
        (partial / "merge.json").write_text(json.dumps(about, indent=2) + "\n")


def _merged(name: str, weight: Tensor, factors: Mapping[str, Tensor], scaling: float, prefix: str) -> Tensor:
    """The weight with its adapter's delta, if it has one."""
    key = name.removeprefix(prefix).removesuffix(".weight")
    if f"{key}.lora_A" not in factors:
        return weight
    wide = torch.promote_types(weight.dtype, torch.float32)
    delta = scaling * (factors[f"{key}.lora_B"].to(wide) @ factors[f"{key}.lora_A"].to(wide))
    # Adding a zero delta would turn -0.0 into 0.0.
    return (weight.to(wide) + delta).to(weight.dtype) if delta.any() else weight
