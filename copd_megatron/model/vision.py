"""The frozen vision tower: transformers' own module, run once for each prompt, its features cached.

Features of a prompt are a pure function of its media and are always computed for one prompt alone, so that a
cached feature equals a recomputed one bit for bit, whatever other prompts share the microbatch.

Shapes: n visual tokens, H hidden size of the backbone, L deepstack levels.
"""
from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoModel
from transformers.initialization import no_init_weights

from copd_megatron.model.hf_config import load_hf_config
from copd_megatron.model.safetensor_reader import SafetensorReader
from copd_megatron.model.spec import BackboneSpec
from copd_megatron.model.translate import VISION_PREFIX
from copd_megatron.types import Prompt, UserError, VisualInputs

CACHE_BYTES = 1 << 30
"""Default budget of the feature cache: 1 GiB holds some 50,000 visual tokens of a 4B backbone in bfloat16."""


def stage_needs_features(spec: BackboneSpec, layers: range) -> bool:
    """Whether a pipeline stage with these (global) layers reads visual features: the first one puts them into
    the embeddings, the ones that hold deepstack layers add them to hidden states."""
    return spec.is_visual and layers.start < max(1, spec.deepstack_layers)


class VisionTower:
    """Vision encoder of a backbone directory, in evaluation mode and without gradients.

    Example: ``VisionTower(path, torch.bfloat16, device).features([prompt])``.
    """

    def __init__(self, path: str | Path, dtype: torch.dtype, device: torch.device,
                 cache_bytes: int = CACHE_BYTES) -> None:
        """Load the tower's weights. UserError names the first missing, misshapen or unreadable tensor.

        Args:
            cache_bytes: features of least recently used prompts are dropped beyond this; 0 keeps none.
        """
        config = load_hf_config(path).vision_config
        with no_init_weights(), device:
            self.module = AutoModel.from_config(config, dtype=dtype, attn_implementation="sdpa")
        self.module.eval().requires_grad_(False)
        _load(self.module, path)
        self.dtype, self.device = dtype, device
        self.merged_patches = config.spatial_merge_size ** 2
        self.cache_bytes, self.cached_bytes = cache_bytes, 0
        self._cache: OrderedDict[str, Tensor] = OrderedDict()

    def features(self, prompts: Sequence[Prompt]) -> tuple[Tensor, list[Tensor]] | None:
        """Merged features [n, H] of all prompts in order, and L deepstack features [n, H]; None without
        media.

        Row i belongs to the i-th visual token when the prompts' ``visual_index`` are read one after the
        other.
        """
        parts = [self._of_prompt(prompt) for prompt in prompts if prompt.visual is not None]
        if not parts:
            return None
        stacked = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
        return stacked[0], list(stacked[1:])

    def _of_prompt(self, prompt: Prompt) -> Tensor:
        """[1 + L, n, H] from the cache or the tower."""
        key = prompt.content_hash
        if key in self._cache:
            self._cache.move_to_end(key)
            return self._cache[key]
        features = self._compute(prompt.visual)
        if features.shape[1] != len(prompt.visual_index):
            raise ValueError(f"{prompt.key}: {features.shape[1]} visual features for "
                             f"{len(prompt.visual_index)} tokens")
        self._keep(key, features)
        return features

    def _keep(self, key: str, features: Tensor) -> None:
        if features.nbytes > self.cache_bytes:
            return
        self._cache[key] = features
        self.cached_bytes += features.nbytes
        while self.cached_bytes > self.cache_bytes:
            _, dropped = self._cache.popitem(last=False)
            self.cached_bytes -= dropped.nbytes

    def _compute(self, visual: VisualInputs) -> Tensor:
        """[1 + L, n, H] with images and videos put back into the order of their tokens."""
        runs = {"image": self._encode(visual.image_patches, visual.image_grids),
                "video": self._encode(visual.video_patches, visual.video_grids)}
        return torch.cat([next(runs[kind]) for kind in visual.order], dim=1)

    @torch.no_grad()
    def _encode(self, patches: np.ndarray | None, grids: np.ndarray | None):
        """Yield [1 + L, tokens, H] for each image (or each video, whole)."""
        if patches is None:
            return
        pixels = torch.from_numpy(patches).to(self.device, self.dtype)
        out = self.module(pixels, grid_thw=torch.from_numpy(grids).to(self.device))
        stacked = torch.stack([out.pooler_output, *out.deepstack_features])
        yield from stacked.split((grids.prod(axis=1) // self.merged_patches).tolist(), dim=1)


@torch.no_grad()
def _load(module: nn.Module, path: str | Path) -> None:
    """Fill the tower in place; every tensor of it must be in the checkpoint with its shape, and none be left
    over."""
    targets = {f"{VISION_PREFIX}{name}": parameter for name, parameter in module.named_parameters()}
    with SafetensorReader(path) as reader:
        unknown = [name for name in reader.entries if name.startswith(VISION_PREFIX) and name not in targets]
        if unknown:
            raise UserError(f"model.path: {reader.entries[unknown[0]].file}: vision tensor {unknown[0]!r} is "
                            "unknown; config.json describes a tower without it; check that they belong "
                            "together")
        for name, parameter in targets.items():
            if reader.shape(name) != tuple(parameter.shape):
                raise UserError(f"model.path: {reader.entries[name].file}: tensor {name!r} has shape "
                                f"{list(reader.shape(name))}, config.json asks for {list(parameter.shape)}; "
                                "weights and config must belong together; copy both anew")
            parameter.copy_(reader.read(name))
