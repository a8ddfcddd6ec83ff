"""A policy merged into dense weights: W + scaling B A, as a Hugging Face directory. Scope ``sequence`` only.

Weights stream shard by shard: one file of the backbone is in memory at a time.
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

from copd_megatron.model.adapter_bank import AdapterBank
from copd_megatron.model.safetensor_reader import check_files
from copd_megatron.model.translate import TEXT_PREFIX
from copd_megatron.types import UserError


def save_merged(folder: Path, backbone: Path, factors: Mapping[str, Tensor], scaling: float, bank: AdapterBank) -> None:
    """Write the merged directory, whole or not at all. One rank calls it.

    The delta is computed in float32 (float64 for float64 weights) and rounded once to the dtype of the weight.

    Raises:
        UserError: scope ``completion``, whose adapted span depends on the prompt; or the disk is full.
    """
    if bank.config.scope == "completion":
        raise UserError("adapter.scope: completion never merges into dense weights, because the prompt is not "
                        "adapted; export it as activated LoRA (the PEFT folders of each save), or train with "
                        "adapter.scope=sequence")
    partial = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    used: set[str] = set()
    try:
        for file in sorted({entry.file for entry in check_files(backbone).values()}):
            with safe_open(file, framework="pt") as source:
                tensors = {name: _merged(name, source.get_tensor(name), factors, scaling, bank, used)
                           for name in source.keys()}
                save_file(tensors, partial / file.name, metadata=source.metadata() or {"format": "pt"})
        for file in backbone.iterdir():
            if file.is_file() and file.suffix != ".safetensors":
                shutil.copy2(file, partial / file.name)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise UserError(f"{folder}: the merged model could not be written ({error}); free space or mend the disk; "
                        "nothing was left half-written") from error
    missing = {name.rsplit(".", 1)[0] for name in factors} - used
    if missing:
        shutil.rmtree(partial, ignore_errors=True)
        raise UserError(f"{folder}: {sorted(missing)[0]} has an adapter but no weight in {backbone}; "
                        "check that they belong together")
    (partial / "merge.json").write_text(json.dumps({"backbone": str(backbone), "scaling": scaling,
                                                    "adapted": len(used)}, indent=2) + "\n")
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)


def _merged(name: str, weight: Tensor, factors: Mapping[str, Tensor], scaling: float, bank: AdapterBank,
            used: set[str]) -> Tensor:
    """The weight with its adapter's delta, if it has one."""
    key = name.removeprefix(TEXT_PREFIX[bank.spec.family]).removesuffix(".weight")
    if f"{key}.lora_A" not in factors:
        return weight
    used.add(key)
    wide = torch.promote_types(weight.dtype, torch.float32)
    delta = scaling * (factors[f"{key}.lora_B"].to(wide) @ factors[f"{key}.lora_A"].to(wide))
    return (weight.to(wide) + delta).to(weight.dtype)
