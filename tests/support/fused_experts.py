"""MoE experts of a Qwen3-MoE checkpoint in one tensor per linear and layer, as transformers 5 writes them."""
from __future__ import annotations

import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file


def fused_copy(path: Path, folder: Path) -> Path:
    """A copy of the checkpoint in ``path``, whose 6 MoE experts have tensors of their own, at ``folder``."""
    tensors = load_file(path / "model.safetensors")
    fused = {name: tensor for name, tensor in tensors.items() if ".mlp.experts." not in name}
    for layer in {name.partition(".mlp.experts.")[0] for name in tensors.keys() - fused.keys()}:
        gate, up, down = (torch.stack([tensors[f"{layer}.mlp.experts.{e}.{part}_proj.weight"] for e in range(6)])
                          for part in ("gate", "up", "down"))
        fused |= {f"{layer}.mlp.experts.gate_up_proj": torch.cat([gate, up], 1), f"{layer}.mlp.experts.down_proj": down}
    shutil.copytree(path, folder)
    save_file(fused, folder / "model.safetensors", metadata={"format": "pt"})
    return folder
